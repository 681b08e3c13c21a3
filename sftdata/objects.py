"""Python objects in the place of names: rows become files in the cache, which go when the call ends.

A dataset that lies on disk as it is gets links to its own files. All other rows are written once, tables as
Arrow and dicts as JSON lines, and read as any file is: nothing behind this module knows of objects.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from sftdata.errors import SftError, UsageError
from sftdata.output import SPOOLED, cache_folder, claim_folder
from sftdata.sources.inputs import several_splits, wrong_split
from sftdata.wording import worded

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa
    from datasets import Dataset

    from sftdata.run import Preview

ROWS = SPOOLED  # name of the input in notes and in the manifest
_BATCH_ROWS = 1000
_SPLIT = re.compile(r"\s*([^\s\[+]+)")
_WITHOUT_EFFECT = {"replace_schema_metadata"}  # of what `datasets` did to a table after it mapped the file
_BYTES_OF_A_PICTURE = {"image", "images", "image_url", "url", "source", "data", "bytes", "base64"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_BESIDE_A_TOKENIZER = ("generation_config.json", "config.json")  # hold stop tokens


@runtime_checkable
class Table(Protocol):
    """What pyarrow, polars, pandas, DuckDB and others share: a table that Arrow can stream."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Return a capsule with the stream."""


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    def save_pretrained(self, save_directory: str, /) -> Any:
        """Write its files into a folder."""


Inputs: TypeAlias = str | Path | Iterable[str | Path | Mapping[str, Any]] | Table
AnyTokenizer: TypeAlias = str | Path | Tokenizer


@contextmanager
def named(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield settings of plain values: names for `inputs` and `tokenizer`, whose files last as long.

    Raises:
        UsageError: an object that holds no rows, a row that is no JSON data, or several splits.
    """
    inputs = _listed(given["inputs"])
    settings = dict(given) | {"tokenizer": tokenizer_folder(given["tokenizer"]), "inputs": inputs}
    if isinstance(settings.get("workers"), Executor):
        settings["workers"] = None
    if not _holds_rows(inputs):
        yield settings
        return
    with _spool() as folder:
        split = given.get("split")
        for name, rows in _by_split(inputs, split if isinstance(split, str) else None).items():
            _write(rows, folder, name)
        try:
            yield settings | {"inputs": str(folder)}
        except SftError as error:
            error.message, error.fix = shown(error.message), shown(error.fix)
            raise


def shown(text: str) -> str:
    """Return a text with the name of a file of rows alone, without the folders that will be gone."""
    return re.sub(rf"{re.escape(str(cache_folder(ROWS)))}/[^/]+/({ROWS}(?![\w/.])|{ROWS}/)", _last, text)


def shown_preview(preview: Preview) -> Preview:
    """Return a preview with such names, in the words of the caller."""
    return replace(
        preview,
        examples=[replace(example, file=shown(example.file)) for example in preview.examples],
        rejects=[worded(shown(reason)) for reason in preview.rejects],
        notes=tuple(worded(shown(note)) for note in preview.notes),
    )


def _last(found: re.Match[str]) -> str:
    return "" if found[1].endswith("/") else ROWS


def tokenizer_folder(tokenizer: object) -> object:
    """Return the name of a tokenizer, or the folder, by its content, where an object is saved for good.

    Raises:
        UsageError: the cache cannot be written.
    """
    if isinstance(tokenizer, (str, Path)) or not isinstance(tokenizer, Tokenizer):
        return tokenizer  # what is neither is refused as a setting
    name = getattr(tokenizer, "name_or_path", "")
    with _cache("tokenizers-given") as cache, tempfile.TemporaryDirectory(dir=cache, prefix=".") as draft:
        folder = Path(draft) / (Path(name).name or "tokenizer")
        tokenizer.save_pretrained(str(folder))
        _forget_last_call(folder / "tokenizer.json")
        for path in filter(None, (_beside(name, file) for file in _BESIDE_A_TOKENIZER)):
            shutil.copyfile(path, folder / path.name)
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
        kept = cache / digest.hexdigest()[:32]
        with suppress(OSError):  # it is there already
            Path(draft).rename(kept)
        return str(kept / folder.name)


def _forget_last_call(path: Path) -> None:
    """Drop padding and truncation, which a tokenizer keeps from the last call and saves."""
    if path.is_file():
        spec = msgspec.json.decode(path.read_bytes())
        path.write_bytes(msgspec.json.encode(spec | {"padding": None, "truncation": None}))


def _beside(name: str, file: str) -> Path | None:
    """Return a file of the folder or Hub repository that a tokenizer was loaded from, if it is here."""
    if (path := Path(name) / file).is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # no id, as the name of a folder that is gone
        return None
    return Path(found) if isinstance(found, str) else None


# ------------------------------------------------------------------------------------------------ rows


def _listed(inputs: Any) -> Any:
    """Return paths that come one by one, as those of `Path.glob`, as a list; other inputs as they are."""
    if not isinstance(inputs, Iterator) or isinstance(inputs, io.IOBase):
        return inputs
    first = list(islice(inputs, 1))
    return [*first, *inputs] if first and isinstance(first[0], (str, Path)) else chain(first, inputs)


def _holds_rows(inputs: object) -> bool:
    if isinstance(inputs, (str, bytes, Path)):
        return False
    if isinstance(inputs, (list, tuple)):
        return bool(inputs) and not any(isinstance(name, (str, Path)) for name in inputs)
    if isinstance(inputs, Mapping):
        return _is_one(inputs, "DatasetDict", "IterableDatasetDict")
    return isinstance(inputs, (Iterable, Table))


def _loaded(package: str) -> ModuleType | None:
    """Return a package that this process uses: without it, none of its objects is here."""
    return sys.modules.get(package)


def _is_one(rows: object, *classes: str, package: str = "datasets") -> bool:
    module = _loaded(package)
    return module is not None and isinstance(rows, tuple(getattr(module, name) for name in classes))


def _by_split(inputs: Any, split: str | None) -> dict[str, Any]:
    """Return rows by the name that their file gets: of several splits, those that `split` is about."""
    if not isinstance(inputs, Mapping):
        return {ROWS: inputs}
    what = type(inputs).__name__
    if split is None and len(inputs) > 1:
        raise several_splits(what, inputs)
    wanted = list(inputs) if split is None else _names_in(split)
    if unknown := [name for name in wanted if name not in inputs]:
        raise wrong_split(what, split or "", inputs, f"no split {unknown[0]!r}")
    return {f"{name}-00000-of-00001": inputs[name] for name in wanted}  # as files on the Hub are named


def _names_in(split: str) -> list[str]:
    return [found[1] for part in split.split("+") if (found := _SPLIT.match(part))]


def _write(rows: Any, folder: Path, name: str) -> None:
    """Make the file of some rows, or links to the files where they lie."""
    import pyarrow as pa

    try:
        if _is_one(rows, "Dataset"):
            _write_dataset(rows, folder, name)
        elif _is_one(rows, "DataFrame", package="pandas"):
            _write_arrow(pa.Table.from_pandas(rows, preserve_index=False).to_reader(), folder, name)
        elif isinstance(rows, Table):
            _write_arrow(pa.RecordBatchReader.from_stream(rows), folder, name)
        else:
            _write_lines(rows, folder / f"{name}.jsonl")
    except pa.ArrowException as error:
        raise UsageError(
            f"inputs: the {type(rows).__name__} has no Arrow form ({' '.join(str(error).split())}).",
            "give each column values of one type.",
        ) from None
    except OSError as error:
        if error.errno not in _FULL:  # of whatever the rows are read from
            raise
        raise _unwritten(cache_folder(ROWS), error) from None


def _write_dataset(dataset: Dataset, folder: Path, name: str) -> None:
    files = _whole_files(dataset)
    for number, path in enumerate(files):
        (folder / (f"{name}.arrow" if len(files) == 1 else f"{name}-{number:05d}.arrow")).symlink_to(path)
    if files:
        return
    import pyarrow as pa

    batches = (
        batch
        for table in dataset.with_format("arrow").iter(_BATCH_ROWS)
        for batch in table.to_batches()
    )  # fmt: skip
    _write_arrow(pa.RecordBatchReader.from_batches(dataset.features.arrow_schema, batches), folder, name)


def _whole_files(dataset: Dataset) -> list[str]:
    """Return the files whose rows are those of the dataset, all and in this order; none where it is not so.

    `datasets` notes for each mapped file what was done to its table since: cut, renamed, cast and the like.
    """
    if getattr(dataset, "_indices", None) is not None:  # chosen, filtered or shuffled
        return []
    paths = []
    for row in getattr(dataset.data, "blocks", [[dataset.data]]):
        table = row[0]
        done = {replay[0] for replay in getattr(table, "replays", [("in memory",)])}
        if len(row) > 1 or not done <= _WITHOUT_EFFECT:
            return []
        paths.append(str(table.path))
    return paths


def _write_arrow(reader: pa.RecordBatchReader, folder: Path, name: str) -> None:
    import pyarrow as pa

    with (
        pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
        pa.ipc.new_stream(file, reader.schema) as out,
    ):
        for batch in reader:
            out.write_batch(batch)


def _write_lines(rows: Iterable[object], path: Path) -> None:
    encode = msgspec.json.Encoder(enc_hook=_plain).encode
    with path.open("wb") as file:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise UsageError(
                    f"inputs: row {number} is a {type(row).__name__}; expected a dict.",
                    'give rows as {"messages": [...]} or {"text": ...}, or one dataset or table.',
                )
            if name := _name_of_bytes(row):
                raise UsageError(
                    f"inputs: row {number} holds bytes under {name!r}; expected text.",
                    f"decode them, as .decode() does, or leave {name!r} out.",
                )
            try:
                file.write(encode(dict(row)) + b"\n")
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"inputs: row {number} is no JSON data ({error}).",
                    "make it of dicts, lists, texts and numbers; a picture is its path or its bytes.",
                ) from None


def _name_of_bytes(value: object, name: str = "") -> str | None:
    """Return the name under which bytes lie that are no picture's: JSON would write them as base64."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return None if name in _BYTES_OF_A_PICTURE else name
    if isinstance(value, Mapping):
        parts = ((part, str(key)) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((part, name) for part in value)
    else:
        return None
    return next((found for part, key in parts if (found := _name_of_bytes(part, key))), None)


def _plain(value: Any) -> object:
    """Turn an array, or a number of NumPy, into JSON data."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


# ------------------------------------------------------------------------------------------------ places


@contextmanager
def _cache(name: str) -> Iterator[Path]:
    folder = cache_folder(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if error.errno not in _FULL | _CLOSED:
            raise
        raise _unwritten(folder, error) from None


def _unwritten(folder: Path, error: OSError) -> UsageError:
    reason = os.strerror(error.errno or 0)
    return UsageError(f"Cache folder {folder} cannot be written ({reason}).", "set SFTDATA_CACHE.")


@contextmanager
def _spool() -> Iterator[Path]:
    """Yield a folder for rows, gone afterwards; those that killed processes of this machine left go first."""
    with _cache(ROWS) as cache:
        folder, claim = claim_folder(cache, f"{socket.gethostname()}~")
    try:
        (folder / ROWS).mkdir()
        yield folder / ROWS
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(claim)
