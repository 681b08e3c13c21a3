"""Pictures on their way to the model: positions, masks, the proof, and what a worker refuses. Each silent trap is a test."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftdata.errors import DataError, IntegrityError, UsageError
from sftdata.pictures.families import read_processor
from sfttrain import proofs
from sfttrain.attention import register_attention
from sfttrain.data import Collator, Row
from sfttrain.pictures import RowPicture, grid_positions, refuse_other_model
from sfttrain.proofs import Surroundings, prove
from sfttrain.tiny import tiny_model
from sfttrain.tiny_pictures import made_pictures
from tests.made_pictures import make, saved, turned
from tests.vision_models import SMALL, inputs_of_folder, small_config, write_small_processor

IMAGE = 7
ALL = [
    pytest.param(name, marks=[] if name in ("llava", "qwen2.5-vl", "gemma3") else pytest.mark.slow)
    for name in SMALL
]
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
BOTH_WAYS = ("gemma3", "gemma4")  # which kernels without masks cannot show
FLAT = [
    pytest.param(name, marks=[] if name == "qwen2.5-vl" else pytest.mark.slow)
    for name in SMALL
    if name not in BOTH_WAYS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processors")
    for name in SMALL:
        write_small_processor(folder / name, name)
    register_attention()
    return folder


def picture(
    data: bytes, tokens: int, size: tuple[int, int], path: str = "", folder: Path = Path()
) -> RowPicture:
    given = b"" if path else data
    return RowPicture("set: row 5", path, folder, given, hashlib.sha256(data).digest(), *size, tokens)


def of(folder: Path, name: str, height: int, width: int, seed: int = 0) -> RowPicture:
    tokens = sum(read_processor(folder / name).layout(height, width).runs)
    return picture(saved(make(height, width, seed=seed), "PNG"), tokens, (height, width))


# ----------------------------------------------------------------------------------------------- packed = alone


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof compute in float64, and what its models cast to float32 on their way."""
    softmax = torch.nn.functional.softmax

    def double_softmax(scores: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(scores, dim, dtype=torch.float64 if dtype == torch.float32 else dtype)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", double_softmax)
    monkeypatch.setattr(proofs, "tiny_model", lambda *given: tiny_model(*given).double())


@pytest.mark.feature("pictures")
@pytest.mark.parametrize("name", ALL)
def test_what_is_left_between_packed_and_alone_is_rounding(folders: Path, float64: None, name: str) -> None:
    """A leak is as large in float64 as in float32; what rounding makes is gone."""
    config = small_config(name, folders / name)
    inputs = inputs_of_folder(folders / name, config.image_token_id)
    proof = prove(config, "sdpa", Surroundings("cpu", torch.float32, pictures=inputs))
    assert max(proof.difference, proof.padded, proof.leak) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_wide_heads_of_gemma_4_are_proven_as_well(folders: Path, attention: str) -> None:
    """It learns in its norms what others divide scores by: without, a softmax of wide heads magnifies rounding 40 times."""
    config = small_config("gemma4", folders / "gemma4", head_dim=256, global_head_dim=512)
    inputs = inputs_of_folder(folders / "gemma4", config.image_token_id)
    proof = prove(config, attention, Surroundings("cpu", torch.float32, pictures=inputs))
    assert max(proof.difference, proof.padded) < 1e-5


@pytest.mark.feature("pictures")
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", QWEN)
def test_models_of_pictures_pack_sets_of_text_too(folders: Path, name: str, attention: str) -> None:
    config = small_config(name, folders / name)
    proof = prove(config, attention, Surroundings("cpu", torch.float32))
    assert proof.isolated
    assert proof.difference < 1e-5


@pytest.mark.feature("pictures")
@pytest.mark.parametrize("name", FLAT)
def test_pictures_lie_in_a_flattened_row_as_in_a_padded_one(folders: Path, name: str) -> None:
    """What varlen and flash attention take: a stand-in computes what their kernels do."""
    config = small_config(name, folders / name)
    inputs = inputs_of_folder(folders / name, config.image_token_id)
    proof = prove(config, "varlen", Surroundings("cpu", torch.float32, pictures=inputs))
    assert proof.isolated
    assert proof.difference < 1e-5


@pytest.mark.feature("pictures")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_documents_with_pictures_are_the_same_packed_and_alone(
    folders: Path, name: str, attention: str
) -> None:
    """A document of text alone is among them. The model alone finds its positions and its masks by itself."""
    config = small_config(name, folders / name)
    inputs = inputs_of_folder(folders / name, config.image_token_id)
    proof = prove(config, attention, Surroundings("cpu", torch.float32, pictures=inputs))
    assert proof.difference < 1e-5
    assert proof.padded < 1e-5
    assert proof.leak < 1e-6
    assert proof.fuses
    assert proof.causal


def test_pixels_reach_the_text_behind_them(folders: Path) -> None:
    """With the time of a picture in the place of the ordinary positions, the text behind does not see it at all."""
    from sfttrain.tiny import smallest_that_runs
    from sfttrain.tiny_pictures import shrink_tower

    config = small_config("qwen2.5-vl", folders / "qwen2.5-vl")
    given = inputs_of_folder(folders / "qwen2.5-vl", config.image_token_id)
    inputs = shrink_tower(config.to_dict(), given, 96)
    model: Any = tiny_model(smallest_that_runs(config, False, None, given), "sdpa", False, True)
    logits = []
    for seed in (1, 2):
        (one,) = made_pictures(inputs, 1, seed)
        ids = np.array([5, *[inputs.image_id] * one.tokens, 6, 8], np.int32)
        row = Row(
            ids, ids, np.array([len(ids)], np.int32), pictures=[one], picture_counts=np.array([1], np.int32)
        )
        batch = Collator(False, pictures=inputs)([row, row])
        batch.pop("labels")
        with torch.no_grad():
            logits.append(model(**batch).logits[0, -1])
    assert float((logits[0] - logits[1]).abs().max()) > 0.1


@pytest.mark.parametrize("name", QWEN)
def test_grid_positions_are_those_of_the_model_in_every_document(folders: Path, name: str) -> None:
    from transformers import AutoModelForImageTextToText

    config = small_config(name, folders / name)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config).model
    chance = np.random.default_rng(3)
    for _ in range(20):
        lengths, kinds, grids, theirs = [], [], [], []
        for _ in range(chance.integers(1, 5)):
            own = [tuple(chance.integers(1, 7, 2).tolist()) for _ in range(chance.integers(0, 4))]
            parts = [np.zeros(chance.integers(1, 6), bool)]
            for rows, columns in own:
                parts += [np.ones(rows * columns, bool), np.zeros(chance.integers(1, 6), bool)]
            image = np.concatenate(parts)
            types = torch.from_numpy(image).int()[None]
            thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in own]).view(-1, 3)
            found, _ = model.get_rope_index(torch.zeros_like(types).long(), types, thw)
            theirs.append(np.concatenate([np.arange(len(image))[None], found[:, 0].numpy()]))
            lengths.append(len(image))
            kinds.append(image)
            grids += own
        ours = grid_positions(np.concatenate(kinds), np.array(lengths), grids)
        assert ours.tolist() == np.concatenate(theirs, 1).tolist()


def test_a_batch_holds_its_pictures_in_the_order_of_their_tokens(folders: Path) -> None:
    """Over documents, rows, and parts of rows; text-only batches hold none."""
    name = "qwen2.5-vl"
    inputs = inputs_of_folder(folders / name, IMAGE)
    some = [of(folders, name, 56, 56, 1), of(folders, name, 28, 84, 2), of(folders, name, 84, 28, 3)]
    ids = np.concatenate(
        [[1, 2], [3] + [IMAGE] * some[0].tokens, [IMAGE] * (some[1].tokens + some[2].tokens) + [4]]
    )
    lengths = np.array([2, 1 + some[0].tokens, len(ids) - 3 - some[0].tokens], np.int32)
    row = Row(
        ids.astype(np.int32),
        ids.astype(np.int32),
        lengths,
        pictures=some,
        picture_counts=np.array([0, 1, 2], np.int32),
    )
    batch = Collator(False, pictures=inputs)([row, row.part(2, 3), row.part(0, 1)])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 6], [1, 6, 2], [1, 2, 6], [1, 6, 2]]
    assert batch["position_ids"].shape == (4, 3, len(ids))
    assert len(batch["pixel_values"]) == 16 + 4 * 12
    flat = Collator(True, pictures=inputs)([row, row.part(2, 3)])
    assert flat["position_ids"].shape == (4, 1, len(ids) + int(lengths[2]))
    assert flat["position_ids"][:, 0, : len(ids)].tolist() == batch["position_ids"][:, 0].tolist()
    alone = Collator(False, pictures=inputs)([row.part(0, 1)])
    assert "pixel_values" not in alone
    assert alone["position_ids"].tolist() == [[[0, 1]]] * 4


# ------------------------------------------------------------------------------------------- what a worker refuses


def test_a_worker_holds_every_picture_against_its_set(folders: Path, tmp_path: Path) -> None:
    inputs, data = inputs_of_folder(folders / "qwen2.5-vl", IMAGE), saved(make(56, 84), "PNG")
    (tmp_path / "a.png").write_bytes(data)

    def load(one: RowPicture) -> None:
        ids = torch.tensor([[1, *[IMAGE] * one.tokens]])
        inputs.of_batch([one], ids, np.array([ids.shape[1]]))

    good = picture(data, 6, (56, 84), "a.png", tmp_path)
    load(good)
    with pytest.raises(
        IntegrityError, match=r"set: row 5, picture a.png: decodes to 84x56 pixels; the set says 56x84"
    ):
        load(good._replace(height=84, width=56))
    with pytest.raises(
        IntegrityError, match=r"a.png: the image processor makes 6 tokens of it; the set has 7. Fix: prepare"
    ):
        load(good._replace(tokens=7))
    (tmp_path / "a.png").write_bytes(saved(make(56, 84, seed=9), "PNG"))
    with pytest.raises(IntegrityError, match=r"set: row 5, picture a.png: another picture by now"):
        load(good)
    (tmp_path / "a.png").unlink()
    with pytest.raises(IntegrityError, match=r"a.png: not there, below .*Fix: restore the file"):
        load(good)
    cut = saved(make(56, 84), "JPEG")[:-60]
    with pytest.raises(DataError, match=r"set: row 5, picture \w+: its pixels cannot be decoded"):
        load(picture(cut, 6, (56, 84)))


def test_a_picture_is_turned_before_its_pixels_are_made(folders: Path) -> None:
    inputs = inputs_of_folder(folders / "qwen2.5-vl", IMAGE)
    data = saved(make(56, 112), "JPEG", exif=turned(6))
    ids = torch.tensor([[1, *[IMAGE] * 8]])
    found = inputs.of_batch([picture(data, 8, (112, 56))], ids, np.array([9]))
    assert found["image_grid_thw"].tolist() == [[1, 8, 4]]


def test_another_model_than_the_pictures_are_made_for_is_refused(folders: Path) -> None:
    config = small_config("qwen2.5-vl", folders / "qwen2.5-vl")
    inputs = inputs_of_folder(folders / "qwen2.5-vl", config.image_token_id)
    refuse_other_model(inputs, config)
    with pytest.raises(UsageError, match="pictures have token 3 in the set, and token"):
        refuse_other_model(replace(inputs, image_id=3), config)
    with pytest.raises(
        UsageError, match=r"the model is a llava; the pictures were prepared for qwen2.5-vl.*qwen2_5_vl"
    ):
        refuse_other_model(inputs, small_config("llava", folders / "llava"))


@pytest.mark.parametrize("name", ["llava", "llava-next", "idefics3", "smolvlm", "internvl", "gemma3"])
def test_a_model_of_the_family_that_sees_squares_of_another_side_is_refused(name: str, folders: Path) -> None:
    config = small_config(name, folders / name)
    inputs = inputs_of_folder(folders / name, config.image_token_id)
    refuse_other_model(inputs, config)
    config.vision_config.image_size = 42
    with pytest.raises(
        UsageError, match=r"cut to \d+ pixels a side in the set, and the model sees 42"
    ) as caught:
        refuse_other_model(inputs, config)
    assert caught.value.fix == "prepare the set with the processor of the model."
