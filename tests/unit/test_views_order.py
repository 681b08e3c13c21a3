"""Steps of equal work: what documents cost, which rows are dealt to whom, and that they stay shuffled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.errors import IntegrityError, UsageError
from sftdata.pack import plan_packs
from sftdata.set.steps import NO_ROW, Cost, Steps, balance_of, row_costs
from sftdata.views.balance import deal_rows
from sftdata.views.cost import read_cost
from sftdata.views.order import read_steps
from sftdata.views.recipe import ViewConfig

PLAIN = Cost(token=1, square=0)


# ------------------------------------------------------------------------------------------------ cost


def _pairs(length: int, window: int | None) -> int:
    """Count twice the pairs of tokens in which one sees the other: by hand, halves of the diagonal."""
    seen = 0
    for token in range(length):
        first = 0 if window is None else max(0, token - window + 1)
        seen += 2 * (token - first + 1) - 1 if first == 0 else 2 * (token - first + 1)
    return seen


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 50])
def test_attention_costs_the_pairs_that_see_each_other(length: int) -> None:
    assert Cost(token=1, square=3).of(np.array([length]))[0] == length + 3 * _pairs(length, None)
    near = Cost(token=1, square=0, windowed=5, window=8).of(np.array([length]))[0]
    assert near == pytest.approx(length + 5 * _pairs(length, 8), rel=0.15)  # halves of the diagonal apart
    assert Cost(token=1, square=0, windowed=5, window=64).of(np.array([length]))[0] == length + 5 * length**2


def test_a_row_costs_its_documents_and_its_padding() -> None:
    lengths, offsets = np.array([4, 6, 10, 3]), np.array([0, 2, 4])
    assert row_costs(Cost(token=2, square=1), lengths, offsets).tolist() == [20 + 16 + 36, 26 + 100 + 9]


def _config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
}
WEIGHTS = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 100  # of a layer


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, Cost(token=6 * WEIGHTS, square=3 * 128)),
        ({"head_dim": 32}, Cost(token=6 * (WEIGHTS + 64 * 128 * 2 + 64 * 64 * 2 - 64 * 64 * 2 - 64 * 32 * 2), square=3 * 256)),
        ({"sliding_window": 16}, Cost(token=6 * WEIGHTS, square=0, windowed=3 * 128, window=16)),
        ({"sliding_window": 16, "use_sliding_window": False}, Cost(token=6 * WEIGHTS, square=3 * 128)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
         Cost(token=6 * WEIGHTS, square=2 * 128, windowed=128, window=16)),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "linear_attention"]},
         Cost(token=6 * WEIGHTS, square=128, windowed=128, window=9)),
        ({"num_experts_per_tok": 2, "moe_intermediate_size": 50, "shared_expert_intermediate_size": 20},
         Cost(token=6 * (WEIGHTS + 3 * 64 * 20), square=3 * 128)),
    ],
    ids=["dense", "wide heads", "window", "window off", "upper layers", "three kinds", "experts"],
)  # fmt: skip
def test_a_config_gives_the_weights_that_a_token_meets(
    tmp_path: Path, more: dict[str, Any], expected: Cost
) -> None:
    assert read_cost(_config(tmp_path, **DENSE, **more))[0] == expected
    assert read_cost(tmp_path)[0] == expected
    assert read_cost(_config(tmp_path, text_config={**DENSE, **more}, hidden_size=1))[0] == expected


def test_the_weights_of_a_dense_config_are_those_of_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(__file__).parents[2] / "examples" / "tiny-model"
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    weights = sum(part.numel() for name, part in model.named_parameters() if "proj" in name)
    assert read_cost(folder)[0].token == 2 * weights


TOWERS = {
    "Qwen2_5_VLConfig": 4, "Qwen3VLConfig": 4, "LlavaConfig": 1, "Idefics3Config": 4, "InternVLConfig": 4, "Mistral3Config": 4,
}  # fmt: skip


def test_the_tower_of_qwen2_vl_has_a_width_of_its_own(tmp_path: Path) -> None:
    tower = {"depth": 2, "embed_dim": 8, "hidden_size": 64, "mlp_ratio": 4, "spatial_merge_size": 2}
    cost, _ = read_cost(_config(tmp_path, **DENSE, vision_config=tower))
    weights = 2 * (4 * 8 * 8 + 2 * 8 * 32)
    assert cost.picture == Cost(token=4 * 2 * weights // 3, square=4 * 4 * 4 * 8 * 2 // 3)


@pytest.mark.parametrize("name", TOWERS)
def test_the_weights_of_a_vision_tower_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, name)()
    with torch.device("meta"):
        tower = transformers.AutoModel.from_config(config.vision_config)
    weights = sum(
        weight.numel()
        for key, weight in tower.named_parameters()
        if weight.ndim == 2 and ("layer" in key or "block" in key) and "merger" not in key
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"text_config": DENSE}))
    cost, said = read_cost(tmp_path)
    assert cost.picture is not None
    attention = cost.picture.token * 3 / TOWERS[name] / 2 - weights  # within tiles or windows
    assert -3 <= attention <= 0.2 * weights
    assert cost.picture.square == 0 or attention <= 0.05 * weights
    assert "a token of a picture costs" in said


@pytest.mark.parametrize(
    ("text", "found"), [("[1]", "no config"), ("{", "cannot be read"), ("{}", "has no num_hidden_layers")]
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=found):
        read_cost(tmp_path)


def test_without_a_model_what_is_assumed_is_said() -> None:
    assert "as --model names none; full attention over 49,152 tokens" in read_cost(None)[1]
    assert read_steps(ViewConfig(sets=("a",), output=Path("b"))) is None


# ----------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("count", [1, 5, 8, 24, 29])
def test_every_row_is_dealt_once_and_the_last_step_evenly(count: int) -> None:
    dealt = Steps(ranks=4, rows=2, cost=PLAIN).deal(count)
    assert dealt.shape == (-(-count // 8), 4, 2)
    assert dealt[dealt != NO_ROW].tolist() == list(range(count))
    assert np.ptp((dealt[-1] != NO_ROW).sum(axis=1)) <= 1


def lengths_of(mix: str, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """Draw documents: chats, with reasoning, and with traces of agents."""
    drawn = [rng.lognormal(5.6, 1.0, 60_000), rng.lognormal(8.6, 0.8, 12_000), rng.lognormal(9.9, 0.9, 4_000)]
    kinds = {"chats 4K": 1, "reasoning 32K": 2, "agents 128K": 3}[mix]
    length = {1: 4096, 2: 32768, 3: 131072}[kinds]
    lengths = np.concatenate([drawn[0], *([np.concatenate(drawn[1:kinds])] * 3 if kinds > 1 else [])])
    return length, np.clip(lengths, 16, length).astype(np.int64)


def _worst_share(costs: np.ndarray, ranks: int, rows: int) -> list[float]:
    """Measure every whole step the slow way."""
    found = []
    for first in range(0, len(costs) - ranks * rows + 1, ranks * rows):
        work = [sum(costs[first + rank * rows + place] for place in range(rows)) for rank in range(ranks)]
        found.append(max(work) / (sum(work) / ranks))
    return found


@pytest.mark.parametrize("mix", ["chats 4K", "reasoning 32K", "agents 128K"])
@pytest.mark.parametrize(("ranks", "rows"), [(8, 1), (8, 4), (64, 1), (64, 4)])
def test_the_busiest_rank_has_one_percent_more_than_the_mean_at_most(mix: str, ranks: int, rows: int) -> None:
    length, lengths = lengths_of(mix, np.random.default_rng(2))
    packs = plan_packs(lengths, length)
    cost, _ = read_cost(None)
    spans = packs.stop - packs.start
    costs = row_costs(cost, spans, packs.offsets) + cost.of(
        length - np.add.reduceat(spans, packs.offsets[:-1])
    )
    steps = Steps(ranks=ranks, rows=rows, cost=cost)
    order = deal_rows(costs, steps, seed=1)
    assert np.array_equal(np.sort(order), np.arange(len(costs)))
    assert not np.array_equal(order, deal_rows(costs, steps, seed=2))
    found, measured = _worst_share(costs[order], ranks, rows), balance_of(steps, costs[order])
    assert np.mean(found) == pytest.approx(measured.mean)
    assert max(found) == pytest.approx(measured.worst)
    assert measured.mean <= 1.01 < measured.shuffled
    # Cost does not drift over training: each quarter of the steps has the mean of all, as far as chance allows.
    means = costs[order][: len(found) * ranks * rows].reshape(len(found), -1).mean(axis=1)
    for quarter in np.array_split(means, 4):
        assert abs(quarter.mean() - means.mean()) <= 4 * means.std() / np.sqrt(len(quarter))
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 4 / np.sqrt(len(means))


def test_steps_that_a_random_draw_makes_even_keep_what_was_drawn() -> None:
    """With rows of all kinds for each rank, documents of a step are those of a random one: no short or long steps."""
    costs = np.random.default_rng(3).lognormal(0, 0.3, 64_000)
    steps = Steps(ranks=8, rows=8, cost=PLAIN)
    means = costs[deal_rows(costs, steps, 0)].reshape(-1, 64).mean(axis=1)
    assert means.std() == pytest.approx(costs.std() / 8, rel=0.1)


def test_a_last_step_gives_fewer_rows_to_those_with_the_costliest() -> None:
    costs = np.array([9.0, 1, 1, 1, 1])
    order = deal_rows(costs, Steps(ranks=4, rows=2, cost=PLAIN), seed=0)
    assert 0 not in order[:2]  # the first rank has two rows, the others one
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]


def test_stored_steps_that_are_none_are_damage(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from sftdata.set.steps import stored_steps

    for view in ({"steps": {"ranks": 0}}, {"steps": 3}):
        with pytest.raises(IntegrityError, match=r"view\.steps of the manifest"):
            stored_steps(SimpleNamespace(settings={"view": view}))  # type: ignore[arg-type]
    assert stored_steps(SimpleNamespace(settings={})) is None  # type: ignore[arg-type]
