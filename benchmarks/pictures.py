"""Rows with pictures, beside the families' own processors: headers read, and rows brought to ids and labels, in CPU seconds.

python benchmarks/pictures.py [--families qwen2.5-vl,llava-next] [--rows 60]

Both sides see the same files and messages in one run. Ours reads each file, hashes it, takes its header, renders the template,
encodes and marks what is trained; theirs decodes the same file and calls the processor, as a trainer does in every epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from sftdata.batches import Tally  # noqa: E402
from sftdata.encode.engine import load_encoder  # noqa: E402
from sftdata.encode.tokenizer import resolve_tokenizer  # noqa: E402
from sftdata.masks import Mask  # noqa: E402
from sftdata.masks.texts import Renderer, render_rows  # noqa: E402
from sftdata.masks.tokens import encode_batch  # noqa: E402
from sftdata.masks.turns import SpanFinder  # noqa: E402
from sftdata.pictures.families import read_processor  # noqa: E402
from sftdata.pictures.headers import read_header  # noqa: E402
from sftdata.pictures.loaded import Picture  # noqa: E402
from sftdata.pictures.rows import PicturedConversation  # noqa: E402
from sftdata.render.template import ChatTemplate  # noqa: E402
from tests.oracles.pictures import Own  # noqa: E402
from tests.processors import write_processor  # noqa: E402
from tests.unit.test_pictures_masks import TEMPLATES  # noqa: E402

WORDS = [
    "Answer",
    "one",
    "two",
    "three",
    "hello",
    "world",
    "of",
    "course",
    "Good",
    "day",
    "tell",
    "me",
    "about",
    "prompt",
    "weather",
    "rain",
    "Oslo",
    "in",
    "is",
    "it",
    "You",
    "Yes",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default="qwen2.5-vl,gemma3,llava-next,idefics3")
    parser.add_argument(
        "--rows", type=int, default=60, help="one picture of 0.2 to 0.3 megapixels and nine messages each"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        files = write_pictures(Path(place), arguments.rows)
        header = rate(lambda: [read_header(path.read_bytes()) for path in files], len(files), rounds=5)
        print(f"header of a file that is read: {header:,.0f}/s")
        for name in arguments.families.split(","):
            compare(name, Path(place) / name, files, header)


def write_pictures(folder: Path, number: int) -> list[Path]:
    draw = random.Random(7)
    found = []
    for index in range(number):
        width, height = draw.randint(480, 640), draw.randint(400, 480)
        noise = Image.frombytes("RGB", (40, 30), draw.randbytes(3600)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        found.append(folder / f"{index}.jpg")
        noise.save(found[-1], quality=92)
    return found


def rate(work: Callable[[], object], items: int, rounds: int = 1) -> float:
    """Return items a CPU second, the best of some rounds."""
    best = 0.0
    for _ in range(rounds):
        begun = time.process_time()
        work()
        best = max(best, items / (time.process_time() - begun))
    return best


def messages(index: int) -> list[dict[str, Any]]:
    draw = random.Random(index)
    made = []
    for number in range(9):
        said: dict[str, Any] = {"type": "text", "text": " ".join(draw.choices(WORDS, k=draw.randint(10, 60)))}
        content = [{"type": "image"}, said] if number == 0 else [said]
        made.append({"role": "assistant" if number % 2 else "user", "content": content})
    return made


def compare(name: str, folder: Path, files: list[Path], header: float) -> None:
    processor = read_processor(write_processor(folder, name))
    resolved = resolve_tokenizer(str(folder))
    encoder = load_encoder(resolved, "gigatoken")
    finder = SpanFinder(
        ChatTemplate(TEMPLATES[name], resolved.special_tokens), resolved.stop_tokens, *resolved.by_mark
    )
    renderer = Renderer(finder, Mask(), processor=processor)
    own = Own(name, folder)
    talks = [messages(index) for index in range(len(files))]

    def ours() -> list[int]:
        rows = []
        for path, talk in zip(files, talks, strict=True):
            data = path.read_bytes()
            hashlib.sha256(data).digest()
            size = read_header(data)
            rows.append(
                PicturedConversation(talk, [None] * len(talk), pictures=(Picture(size.height, size.width),))
            )
        rendered = render_rows(rows, np.arange(len(rows)), renderer, Tally())
        assert rendered.conversations is not None
        batch = encode_batch(rendered.conversations, encoder, Tally(), images=rendered.images)
        return batch.lengths.tolist()  # type: ignore[no-any-return]

    def theirs() -> list[int]:
        lengths = []
        for path, talk in zip(files, talks, strict=True):
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))).convert("RGB")
            text = own.processor.tokenizer.apply_chat_template(
                talk, chat_template=TEMPLATES[name], tokenize=False
            )
            lengths.append(len(own.ids(text, [image], quick=False) or ()))
        return lengths

    assert ours() == theirs()
    images = [Image.open(path).convert("RGB") for path in files]
    pixels = rate(lambda: [own.images([image]) for image in images], len(images))
    mine, other = rate(ours, len(files), rounds=3), rate(theirs, len(files))
    print(
        f"{name}: {mine:,.0f} rows/s, the processor {other:,.1f} ({mine / other:.0f} times);"
        f" image processor {pixels:,.1f} pictures/s, a header {header / pixels:,.0f} times as fast"
    )


if __name__ == "__main__":
    main()
