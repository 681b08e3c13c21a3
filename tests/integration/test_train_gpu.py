"""What only a GPU can show: `pytest -m gpu`, each test in a process of its own (tests/forked.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import sfttrain
from sftdata.set.opened import open_set
from sfttrain.attention import FLATTENED, register_attention, unsupported_reason
from sfttrain.compiling import compile_layers
from sfttrain.data import Collator
from sfttrain.kernels import apply_liger
from sfttrain.loss import fuse_loss
from sfttrain.proofs import Document, Surroundings, _row, prove
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_mixed_set, make_set

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------ the default path


@pytest.mark.gpu(seconds=90)
@pytest.mark.feature("attention")
def test_the_default_trains_on_varlen_in_no_more_memory_than_its_steps_need(
    shards: Path, tmp_path: Path
) -> None:
    packed = make_mixed_set(tmp_path / "set", "instructions", rows=24, max_length=4096, vocabulary=32_000)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=6, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=32_000, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    peaks: list[int] = []

    class Peaks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            peaks.append(torch.cuda.max_memory_allocated())

    trainer = sfttrain.train(
        packed, model=tmp_path / "model", output=tmp_path / "out", callbacks=[Peaks()], **QUICK | {"learning_rate": 1e-5},
        activation_checkpointing=True,
    )  # fmt: skip
    assert trainer.model.config._attn_implementation.startswith(("varlen", "flash_attention"))
    assert trainer.data_collator.flatten
    assert trainer.fused
    assert peaks[0] <= peaks[-1] * 1.01  # nothing before the first step needs more than a later one
    assert _losses(trainer)[0] == pytest.approx(
        _first_loss_alone(packed, tmp_path / "model", trainer), rel=1e-2
    )


def _first_loss_alone(packed: Path, folder: Path, trainer: Any) -> float:
    """Mean loss over the trained tokens of the first global batch, every document alone in float32."""
    opened, total, count = open_set(packed), 0.0, 0
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).cuda()
    for row in trainer.order.rows(0)[:4].tolist():
        for document in opened[row].documents():
            ids, labels = (
                torch.from_numpy(part.astype(np.int64)).cuda()
                for part in (document.input_ids, document.labels)
            )
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            total += float(cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100))
            count += int((labels[1:] != -100).sum())
    return total / count


# Gemma 2 has a cap on attention logits; LFM2's convolutions leak without a kernel that knows documents.
PROOFS = [
    ("qwen2", "varlen", True), ("qwen2", "flex_attention", True), ("qwen2", "sdpa", True), ("mistral", "varlen", True),
    ("qwen3_moe", "varlen", True), ("gemma2", "eager", True), ("phi3", "varlen", True), ("lfm2", "sdpa", False),
]  # fmt: skip


@pytest.mark.gpu(seconds=100)
@pytest.mark.feature("attention")
@pytest.mark.parametrize(("family", "attention", "isolated"), PROOFS)
def test_the_proof_in_bfloat16_says_what_holds(family: str, attention: str, isolated: bool) -> None:
    more = {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4}
    config = AutoConfig.for_model(family, **more if family == "lfm2" else {})
    register_attention()
    proof = prove(config, attention, Surroundings("cuda", torch.bfloat16, rows=2, reach=None))
    assert proof.isolated == isolated, proof


# Attention, and what the layers run: each choice that `auto` may come to.
WAYS = [
    *((name, "plain") for name in (*sorted(FLATTENED), "flex_attention", "sdpa", "sdpa:efficient")),
    *(("varlen", way) for way in ("liger", "compiled", "compiled, attention kept")),
    ("sdpa", "compiled"),
]


@pytest.mark.gpu(seconds=150)
@pytest.mark.feature("attention")
@pytest.mark.parametrize(("attention", "way"), WAYS)
def test_in_bfloat16_a_packed_document_has_the_loss_it_has_alone(attention: str, way: str) -> None:
    register_attention()
    given = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=4, vocab_size=999, initializer_range=0.1, **given
    )
    reason = unsupported_reason(attention, config, "cuda", torch.bfloat16)
    if reason:
        pytest.skip(f"{attention}: {reason}")
    torch.manual_seed(0)
    documents = [torch.randint(3, 999, (length,)) for length in (900, 300, 700, 148)]

    def losses(packed: bool, dtype: torch.dtype, used: str, how: str) -> Tensor:
        """Mean loss of each document."""
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=used).cuda().train()
        model.config.use_cache = False
        fuse_loss(model)
        if how == "liger":
            apply_liger(model, {})
        if how.startswith("compiled"):
            model.activation_checkpointing_enable({"use_reentrant": False})
            compile_layers(model, keep="kept" in how)
        found = []
        for row in [documents] if packed else [[one] for one in documents]:
            batch = Collator(used in FLATTENED)([_row([Document(ids) for ids in row])])
            held = {name: part.cuda() if isinstance(part, Tensor) else part for name, part in batch.items()}
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
                found.append(model(**held, skip_logits=True).token_losses.detach())
        return torch.stack(
            [part.mean() for part in torch.cat(found).split([len(one) - 1 for one in documents])]
        )

    alone = losses(False, torch.bfloat16, attention, way)
    exact = losses(False, torch.float32, "sdpa", "plain")
    noise = (losses(False, torch.bfloat16, "sdpa", "plain") - exact).abs().max()
    assert exact.std() > 5 * noise  # a document with the loss of another would be seen
    assert (losses(True, torch.bfloat16, attention, way) - alone).abs().max() <= noise
    assert (alone - exact).abs().max() <= 3 * noise


@pytest.mark.gpu(seconds=120)
@pytest.mark.feature("memory")
@pytest.mark.parametrize("keep", [False, True])
def test_a_compiled_checkpoint_computes_attention_once_where_it_keeps_it(keep: bool) -> None:
    register_attention()
    given = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen2", num_hidden_layers=3, vocab_size=999, **given)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="varlen").cuda().train()
    model.config.use_cache = False
    fuse_loss(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    compile_layers(model, keep=keep)
    batch = Collator(True)([_row([Document(torch.randint(3, 999, (length,))) for length in (900, 124)])])
    held = {name: part.cuda() if isinstance(part, Tensor) else part for name, part in batch.items()}

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = model(**held, skip_logits=True).loss
        loss.backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    calls = sum(event.count for event in seen.key_averages() if event.key == "aten::_flash_attention_forward")
    assert calls == (3 if keep else 6)


# -------------------------------------------------------------------------------------- the trainer's table


@pytest.mark.gpu
@pytest.mark.feature("Unsloth")
def test_an_unsloth_model_trains_on_shards(shards: Path, model: Path, tmp_path: Path) -> None:
    unsloth = pytest.importorskip("unsloth")
    given, _ = unsloth.FastLanguageModel.from_pretrained(str(model), max_seq_length=64, load_in_4bit=False)
    given = unsloth.FastLanguageModel.get_peft_model(given, r=4)
    losses = _losses(
        sfttrain.train(shards, model=given, output=tmp_path / "out", **{**QUICK, "max_steps": 20})
    )
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.feature("memory")
def test_offloaded_activations_change_no_weight(shards: Path, model: Path, tmp_path: Path) -> None:
    kept = train_in_process(shards, model, tmp_path / "kept", {**QUICK, "activation_checkpointing": True})
    offload = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    moved = train_in_process(shards, model, tmp_path / "moved", {**QUICK, **offload})
    for one, other in zip(kept.model.parameters(), moved.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.gpu(seconds=100)
@pytest.mark.feature("attention")
@pytest.mark.parametrize("attention", ["varlen", "flex_attention", "sdpa", "sdpa:flash", "sdpa:efficient"])
def test_each_attention_of_the_gpu_trains_with_the_same_loss(
    shards: Path, model: Path, tmp_path: Path, attention: str
) -> None:
    packing = "unpack" if attention == "sdpa:flash" else "auto"  # it takes no mask, so its rows are documents
    eager = train_in_process(shards, model, tmp_path / "eager", QUICK, attention="eager", packing=packing)
    found = train_in_process(shards, model, tmp_path / attention, QUICK, attention=attention)
    assert _losses(found) == pytest.approx(_losses(eager), rel=2e-2)


@pytest.mark.gpu
@pytest.mark.feature("export: GPTQ")
def test_a_gptq_model_answers_nearly_as_the_original(shards: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from sfttrain.export import quantize

    quantize(model, shards, tmp_path / "gptq", 8, 32, print)
    ids = torch.arange(3, 40)[None].cuda()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model).cuda()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", device_map="cuda")(
            input_ids=ids
        ).logits
    assert (wanted - found).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.feature("Liger")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_liger_gives_the_loss_that_is_given_without_it(
    shards: Path, model: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    more = {"lora": {"r": 4}} if kind == "lora" else {}
    ours = train_in_process(shards, model, tmp_path / "ours", QUICK, **more)
    liger = train_in_process(shards, model, tmp_path / "liger", QUICK, kernels="liger", **more)
    assert _losses(liger) == pytest.approx(_losses(ours), rel=2e-2)


# ------------------------------------------------------------------------------- compiled layers and kernels


@pytest.mark.gpu(seconds=150)
@pytest.mark.feature("compiled layers")
@pytest.mark.parametrize("checkpoints", [True, False])
def test_compiled_layers_train_as_plain_ones_and_compile_before_the_first_step(
    shards: Path, model: Path, tmp_path: Path, checkpoints: bool
) -> None:
    from torch._dynamo.utils import counters

    given = {**QUICK, "activation_checkpointing": checkpoints}
    plain = train_in_process(shards, model, tmp_path / "plain", given, kernels="none", compile="none")
    found = train_in_process(shards, model, tmp_path / "layers", given, kernels="none", compile="layers")
    assert _losses(found) == pytest.approx(_losses(plain), rel=1e-2)
    assert counters["stats"]["unique_graphs"] == 2  # the layer, and the loss
    assert not counters["graph_break"]


@pytest.mark.gpu(seconds=120)
@pytest.mark.feature("Liger")
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_liger_s_kernels_are_proven_on_the_families_they_are_for(family: str) -> None:
    pytest.importorskip("liger_kernel")
    from sfttrain.kernels import prove_kernels

    config = AutoConfig.for_model(
        family, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    assert prove_kernels(config, Surroundings("cuda", torch.bfloat16), False, {}) < 3
