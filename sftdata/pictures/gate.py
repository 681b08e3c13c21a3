"""The gate: a family's rule is held against the family's own processor before a row is prepared with it.

Rules follow the code of transformers, which may change; no row is ever prepared on a guess. The comparison
runs once for each processor, tokenizer and version of transformers, in a child process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sftdata.batches import TokenBatch
from sftdata.errors import RowError, UsageError
from sftdata.output import cache_folder
from sftdata.pictures.families import PictureProcessor
from sftdata.pictures.layouts import Size
from sftdata.pictures.reference import Answer, ReferenceRequest
from sftdata.pictures.stretch import stretch

FORMAT = 1
SIZES = (
    (1, 1), (1, 3), (3, 1), (3, 3), (7, 29), (27, 28), (28, 28), (29, 57), (40, 6), (56, 56), (64, 448),
    (100, 37), (111, 222), (224, 224), (226, 225), (240, 427), (250, 1000), (333, 500), (336, 336),
    (337, 673), (364, 365), (384, 384), (427, 640), (448, 448), (449, 447), (480, 640), (512, 91), (600, 800),
    (640, 427), (673, 337), (720, 1280), (777, 1025), (1000, 250), (1080, 608), (1280, 720), (1333, 800),
)  # fmt: skip
"""Height and width of pictures that hit the edges of every rule; none is costly to resize."""
TEXT = "A:\n {} \n\n b"


def require_parity(processor: PictureProcessor, tokenizer: Path, sizes: Sequence[Size] = ()) -> None:
    """Refuse a processor whose tokens the rule does not reproduce, id by id.

    Args:
        tokenizer: a folder that holds tokenizer.json.
        sizes: more heights and widths to compare, as those of a data set.

    Raises:
        UsageError: the ids differ, or cannot be compared here.
    """
    wanted = [*SIZES, *sizes]
    entry = cache_folder("pictures") / f"{_key(processor, tokenizer, wanted)}.json"
    if not entry.is_file():
        difference = find_difference(processor, tokenizer, wanted)
        if difference:
            fix = "use the version of transformers that this release was tested with."
            what = f"Pictures of {processor.family} are laid out otherwise by transformers: {difference}."
            raise UsageError(what, fix)
        _remember(entry)


def find_difference(processor: PictureProcessor, tokenizer: Path, sizes: Sequence[Size]) -> str | None:
    """Return the first size for which ids differ, in words; None where all are equal.

    Raises:
        UsageError: the family's own processor cannot run here.
    """
    if processor.backend == "torchvision" and importlib.util.find_spec("torchvision") is None:
        what = f"The image processor of {processor.family} needs torchvision, which is not installed"
        raise UsageError(f"{what}; so its tokens cannot be compared.", "install torchvision beside torch.")
    text = TEXT.format(processor.marker)
    request = ReferenceRequest(
        family=processor.family,
        processor=processor.processor_class,
        backend=processor.backend,
        image_settings=processor.image_settings,
        processor_settings=processor.processor_settings,
        tokenizer=str(tokenizer),
        text=text,
        sizes=[list(size) for size in sizes],
    )
    engine = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for (height, width), theirs in zip(sizes, _ask(request), strict=True):
        ours = lay_out(processor, engine, text, height, width)
        if isinstance(theirs, str) != isinstance(ours, str) or (isinstance(theirs, list) and ours != theirs):
            return f"{width}x{height} pixels: {_said(theirs)} there, {_said(ours)} here"
    return None


def lay_out(processor: PictureProcessor, engine: Tokenizer, text: str, height: int, width: int) -> Answer:
    """Return the ids of a text whose marker is a picture of this size, or why there are none."""
    try:
        layout = processor.layout(height, width)
    except RowError as error:
        return error.fault.reason
    ids = np.array(engine.encode(text.replace(processor.marker, layout.text)).ids, np.int32)
    one = TokenBatch(ids, np.zeros(len(ids), np.bool_), np.array([0, len(ids)]), np.zeros(1, np.int64))
    image_id = engine.token_to_id(processor.image_token)
    if image_id is None:
        what = f"The tokenizer has no token {processor.image_token!r} for the pictures of {processor.family}."
        raise UsageError(what, "use the tokenizer of the model.")
    answer: list[int] = stretch(one, image_id, np.array(layout.runs, np.int64)).input_ids.tolist()
    return answer


def _said(answer: Answer) -> str:
    return f"refused ({answer})" if isinstance(answer, str) else f"{len(answer)} ids"


def _ask(request: ReferenceRequest) -> list[Answer]:
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, "-m", "sftdata.pictures.reference"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1][:300]
        what = f"The processor of {request['family']} does not run here ({last}); its tokens stay unproven."
        raise UsageError(what, "check that transformers loads it.")
    answers: list[Answer] = json.loads(child.stdout)
    return answers


def _key(processor: PictureProcessor, tokenizer: Path, sizes: Sequence[Size]) -> str:
    versions = [importlib.metadata.version(package) for package in ("transformers", "tokenizers", "pillow")]
    digest = hashlib.sha256(json.dumps([FORMAT, versions, processor.sha256, list(sizes)]).encode())
    for path in sorted(tokenizer.glob("*.json")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _remember(entry: Path) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text("{}\n", encoding="utf-8")
    except OSError as error:
        what = f"Cache folder {entry.parent} cannot be written ({error.strerror})."
        raise UsageError(what, "set SFTDATA_CACHE.") from None
