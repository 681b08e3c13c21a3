"""Rows that ranks hold together: what each gets of a batch, and what is refused because slices cannot train it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sftdata.batches import IGNORE_INDEX
from sftdata.errors import UsageError
from sfttrain import sequence
from sfttrain.attention import register_attention
from sfttrain.config import read_settings
from sfttrain.data import Collator, Row, filler
from sfttrain.loss import items_of
from sfttrain.proofs import Surroundings
from sfttrain.sequence import Sliced, difference_of_slices, refuse_unshared, share_rows
from sfttrain.training import plan_run
from tests.train_runs import tiny_llama
from tests.train_sets import make_set

CPU = Surroundings("cpu", torch.float32, 2, 64)
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
PLAIN = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def _row(lengths: list[int], seed: int) -> Row:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    ids = rng.integers(3, 99, total).astype(np.int32)
    labels = np.where(rng.random(total) < 0.5, ids, IGNORE_INDEX).astype(np.int32)
    places = np.stack(
        [np.zeros(len(lengths)), np.full(len(lengths), seed), np.arange(len(lengths)), np.ones(len(lengths))],
        1,
    )
    source, weights = rng.integers(0, 3, total), rng.random(total).astype(np.float32)
    return Row(ids, labels, np.array(lengths, np.int32), source, weights, places.astype(np.int64))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_slices_hold_every_token_once_and_every_pair_that_is_trained(parts: int) -> None:
    rows = [_row([5, 2, 7], 1), filler(), _row([3, 8], 2)]
    rows[1] = rows[1]._replace(source=np.zeros(2, np.int64))
    whole: Any = Collator(True)(rows)
    slices: list[Any] = [Sliced(Collator(True), part, parts)(rows) for part in range(parts)]
    tokens = whole["input_ids"].shape[1]
    for name in ("input_ids", "position_ids", "seq_idx"):
        together = torch.cat([part[name] for part in slices], 1)
        assert together.shape[1] % parts == 0
        assert torch.equal(together[:, :tokens], whole[name])
    for name in ("labels", "loss_weights", "source"):
        shifted = torch.cat([part[name][:, 1:] for part in slices], 1)
        assert torch.equal(shifted[:, : tokens - 1], whole[name][:, 1:])
        assert len({part[name].shape[1] - part["input_ids"].shape[1] for part in slices}) == 1
    assert sum(items_of(part["labels"], None) for part in slices) == items_of(whole["labels"], None)
    weights = sum(items_of(part["labels"], part["loss_weights"]) for part in slices)
    assert weights == pytest.approx(float(items_of(whole["labels"], whole["loss_weights"])))
    for part in slices:
        assert (
            part["cu_seq_lens_q"][: len(whole["cu_seq_lens_q"])].tolist() == whole["cu_seq_lens_q"].tolist()
        )
        assert part["cu_seq_lens_q"][-1] == parts * part["input_ids"].shape[1]
        assert part["documents"].trained.tolist() == whole["documents"].trained.tolist()


def test_a_batch_of_fillers_alone_still_has_a_token_for_each() -> None:
    for part in range(4):
        batch: Any = Sliced(Collator(True), part, 4)([filler(), filler()])
        assert batch["input_ids"].shape == (1, 1)
        assert batch["labels"].tolist() == [[IGNORE_INDEX] * 2]


def _shared(config: Any, **settings: object) -> Any:
    register_attention()
    given = read_settings(None, [], {"output": "out", "model": "m", "sequence_parallel": 2, **settings})
    return share_rows(given, config, CPU, lambda _: None)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("LlamaConfig", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "3 heads are no multiple of 2"),
        ("LlamaConfig", {"attention_dropout": 0.1}, "attention on slices of a row has no dropout"),
        ("GPT2Config", {}, "attention on slices of a row has no dropout"),
        ("MixtralConfig", {"output_router_logits": True, "num_local_experts": 4},
         "its loss has terms that are means over whole rows"),
        ("LlamaConfig", {"rope_parameters": LONGROPE, "max_position_embeddings": 32},
         "its rotary factors follow the length of each document"),
        ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
         "its rotary factors follow the length of each document"),
    ],
)  # fmt: skip
def test_a_model_that_slices_cannot_train_is_refused(
    name: str, fields: dict[str, Any], reason: str, no_cache: None
) -> None:
    import transformers

    with pytest.raises(UsageError, match=reason):
        _shared(getattr(transformers, name)(**(PLAIN | fields if name != "GPT2Config" else fields)))


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTTRAIN_CACHE", "")


def test_our_loss_is_needed(no_cache: None) -> None:
    from transformers import LlamaConfig

    with pytest.raises(UsageError, match="it needs our loss"):
        _shared(LlamaConfig(**PLAIN), loss="plain")


def test_layers_whose_tokens_meet_outside_of_attention_are_found() -> None:
    """The proof is no formality: one layer that looks a token back is enough, and plain layers are exact."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(**PLAIN)
    assert difference_of_slices(config, True, CPU) < 1e-5
    own = LlamaMLP.forward

    def looks_back(self: Any, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = own(self, states + 0.1 * states.roll(1, 1))
        return mixed

    LlamaMLP.forward = looks_back
    try:
        assert difference_of_slices(config, True, CPU) > 1e-2
    finally:
        LlamaMLP.forward = own


def test_convolutions_are_refused(no_cache: None) -> None:
    from transformers import Lfm2Config

    config = Lfm2Config(**PLAIN, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    with pytest.raises(UsageError, match="^sequence_parallel=2: "):
        _shared(config)


def _args(**more: Any) -> Any:
    defaults = {
        "world_size": 2,
        "parallelism_config": None,
        "neftune_noise_alpha": None,
        "average_tokens_across_devices": True,
    }
    return SimpleNamespace(**(defaults | more))


@pytest.mark.parametrize(
    ("settings", "args", "objects", "found"),
    [
        ({}, {"world_size": 3}, {}, "sequence_parallel=2: the number of processes is 3, no multiple of 2"),
        ({"attention": "sdpa"}, {}, {}, 'attention="sdpa" takes no sliced rows'),
        ({}, {}, {"compute_metrics": len}, "compute_metrics wants the logits of whole rows"),
        ({}, {}, {"compute_loss_func": len}, "compute_loss_func wants the logits of whole rows"),
        ({}, {"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha scales its noise"),
        ({}, {"average_tokens_across_devices": False}, {}, "would weigh the slices of a row differently"),
        ({"sequence_parallel": 1}, {"parallelism_config": SimpleNamespace(cp_size=2, sp_size=1, tp_size=1)}, {},
         "cp_size=2: accelerate drops the mask of attention"),
        ({"sequence_parallel": 1}, {"parallelism_config": SimpleNamespace(cp_size=1, sp_size=2, tp_size=1)}, {},
         "sp_size=2: DeepSpeed takes the loss from full logits"),
        ({"sequence_parallel": 1}, {"parallelism_config": SimpleNamespace(cp_size=1, sp_size=1, tp_size=2)}, {},
         "tp_size=2: the ranks of a group would get different rows"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused(
    settings: dict[str, Any], args: dict[str, Any], objects: dict[str, Any], found: str
) -> None:
    given = read_settings(None, [], {"output": "out", "model": "m", "sequence_parallel": 2, **settings})
    with pytest.raises(UsageError, match=found):
        refuse_unshared(given, _args(**args), objects)


def test_a_launcher_that_takes_rows_apart_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = read_settings(None, [], {"output": "out", "model": "m"})
    refuse_unshared(given, _args(), {})
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(
        UsageError, match=r"cp_size=2.*leave it out of the launch, and set sequence_parallel=2\."
    ):
        refuse_unshared(given, _args(), {})


def test_a_plan_of_one_process_is_refused_as_its_run_would_be(tmp_path: Path) -> None:
    make_set(tmp_path / "set", rows=4)
    given = {
        "sets": (tmp_path / "set",),
        "model": str(tiny_llama(tmp_path / "model")),
        "output": tmp_path / "out",
    }
    with pytest.raises(
        UsageError, match="the number of processes is 1, no multiple of 2.*torchrun --nproc-per-node 2"
    ):
        plan_run(read_settings(None, [], {**given, "sequence_parallel": 2}))


def test_accelerates_context_parallel_lets_documents_read_each_other() -> None:
    """Why it is refused: its hooks take the mask away. Should this fail one day, look at it again."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**PLAIN, attn_implementation="sdpa")).eval()
    ids = torch.randint(3, 99, (1, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    changed = ids.clone()
    changed[:, :10] = torch.randint(3, 99, (1, 10))

    def moved() -> float:
        with torch.no_grad():
            one, other = (
                model(input_ids=part, position_ids=positions, use_cache=False).logits[:, 10:]
                for part in (ids, changed)
            )
        return float((one - other).abs().max())

    assert moved() == 0
    _attach_context_parallel_hooks(model)
    assert moved() > 1e-3


def test_more_ranks_than_heads_of_keys_repeat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four ranks gets the key heads that its query heads belong to; the ranks take their turns here."""
    query = torch.arange(8.0).view(1, 8, 1, 1)
    key = torch.arange(2.0).view(1, 2, 1, 1)

    def dealt(states: torch.Tensor, group: Any, give: int, take: int) -> torch.Tensor:
        return states.chunk(4, give)[group.rank()] if states.shape[give] > 2 else states

    def inner(
        module: Any, query: torch.Tensor, key: torch.Tensor, *_: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        belongs = query // 4  # eight heads of queries, two of keys
        assert key.repeat_interleave(query.shape[1] // key.shape[1], 1).tolist() == belongs.tolist()
        assert options["s_aux"].tolist() == query.flatten().tolist()
        return query, None

    monkeypatch.setattr(sequence, "exchange", dealt)
    for rank in range(4):
        group: Any = SimpleNamespace(size=lambda: 4, rank=lambda rank=rank: rank)
        sequence.attend(inner, group, torch.nn.Module(), query, key, key, None, s_aux=torch.arange(8.0))
