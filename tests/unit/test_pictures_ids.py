"""Real files of every format and turn: ids from their headers are those that the family's processor makes from their pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from sftdata.batches import Int32, TokenBatch
from sftdata.pictures.families import PictureProcessor, read_processor
from sftdata.pictures.headers import read_header
from sftdata.pictures.stretch import count_image_tokens, stretch
from tests.made_pictures import good_pictures
from tests.oracles.pictures import CLASSES, Own
from tests.processors import write_processor

PICTURES = list(good_pictures().values())
# What stands around and between markers: white space that tokenizers join, nothing at all, text that looks like a marker.
AROUND = ("", "\n", " \n\n  ", "Hi ", "\t\t", "<imag>", "one two\n\n\n")


def loaded(data: bytes) -> Image.Image:
    """As `transformers.image_utils.load_image` does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def ours(processor: PictureProcessor, engine: Tokenizer, text: str, files: list[bytes]) -> list[int]:
    layouts = [processor.layout(header.height, header.width) for header in map(read_header, files)]
    pieces = text.split(processor.marker)
    compact = pieces[0] + "".join(
        layout.text + piece for layout, piece in zip(layouts, pieces[1:], strict=True)
    )
    ids = np.array(engine.encode(compact).ids, np.int32)
    batch = TokenBatch(ids, np.ones(len(ids), np.bool_), np.array([0, len(ids)]), np.array([0]))
    image_id = engine.token_to_id(processor.image_token)
    runs = np.array([run for layout in layouts for run in layout.runs])
    assert count_image_tokens(batch, image_id).tolist() == [len(runs)]
    return stretch(batch, image_id, runs).input_ids.tolist()


@pytest.mark.parametrize("name", CLASSES)
def test_more_than_sixty_files_have_the_ids_of_the_family_s_processor(name: str, tmp_path: Path) -> None:
    """Several pictures in one text, and one or two with every pixel made as users make them."""
    processor, own = read_processor(write_processor(tmp_path, name)), Own(name, tmp_path)
    engine = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(PICTURES) >= 60
    seen = 0
    for number, start in enumerate(range(0, len(PICTURES), 3)):
        files = PICTURES[start : start + 3]
        between = [AROUND[(number + place) % len(AROUND)] for place in range(len(files) + 1)]
        text = processor.marker.join(between)
        theirs = own.ids(text, [loaded(data) for data in files], quick=number != 4)
        assert theirs == ours(processor, engine, text, files), number
        seen += len(files)
    assert seen == len(PICTURES)


# ---------------------------------------------------------------------------------------------------- stretching


def slowly(
    batch: TokenBatch, image_id: int, runs: list[int]
) -> list[tuple[list[int], list[bool], list[float]]]:
    """Token by token."""
    waiting, found = iter(runs), []
    for start, stop in zip(batch.offsets, batch.offsets[1:], strict=False):
        ids, trained, weights = [], [], []
        for place in range(start, stop):
            is_image = batch.input_ids[place] == image_id
            for _ in range(next(waiting) if is_image else 1):
                ids.append(int(batch.input_ids[place]))
                trained.append(bool(batch.trained[place]) and not is_image)
                weights.append(0.0 if is_image else float(batch.weights()[place]))
        found.append((ids, trained, weights))
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_stretching_is_token_by_token_and_trains_no_picture(weighted: bool) -> None:
    draw = np.random.default_rng(5)
    lengths = draw.integers(0, 9, 60)
    offsets = np.append(0, np.cumsum(lengths))
    ids: Int32 = draw.integers(0, 5, offsets[-1]).astype(np.int32)
    trained = draw.random(len(ids)) < 0.6
    weights = (draw.random(len(ids)).astype(np.float32) + 0.5) * trained if weighted else None
    batch = TokenBatch(ids, trained, offsets, np.arange(60), weights)
    runs = draw.integers(0, 7, int((ids == 3).sum()))
    made = stretch(batch, 3, runs)
    assert count_image_tokens(batch, 3).tolist() == [
        int((part == 3).sum()) for part in np.split(ids, offsets[1:-1])
    ]
    for number, (want_ids, want_trained, want_weights) in enumerate(slowly(batch, 3, runs.tolist())):
        part = made.pick(np.array([number]))
        assert part.input_ids.tolist() == want_ids
        assert part.trained.tolist() == want_trained
        assert part.weights().tolist() == pytest.approx(want_weights)
    assert not made.trained[made.input_ids == 3].any()


def test_a_run_too_many_is_an_error() -> None:
    batch = TokenBatch(np.array([3], np.int32), np.ones(1, np.bool_), np.array([0, 1]), np.array([0]))
    with pytest.raises(ValueError, match="1 image tokens, 2 runs"):
        stretch(batch, 3, np.array([1, 2]))
