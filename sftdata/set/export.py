"""Write a finished set as other trainers take tokenized rows, without a token or a label gained or lost.

    datasets         folder for datasets.load_from_disk: axolotl, LLaMA-Factory's tokenized_path, TRL;
                     of a set with pictures with these as Image features, in `images`
    token-rows       Parquet, input_ids and loss_mask: SkyRL, Akka
    verl, nemo-rl    the same, and rows.py, which gives these rows to verl's trainer or NeMo-RL's
    tinker           JSON lines: input_tokens, target_tokens and weights of a Datum: NeMo Automodel, too
    megatron-bridge  packed Parquet: rows as they are packed here, padding left out

All but the last hold a document a row, since their readers pack, or do not pack, themselves; a stretch of a
document without a trained token, which some of them refuse, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import msgspec
import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, PackedRows, offsets_of, positions_of
from sftdata.errors import IntegrityError, UsageError
from sftdata.output import behind_links
from sftdata.set.build import refuse_inside_a_set
from sftdata.set.images import StoredPictures, picture_bytes, pictures_folder
from sftdata.set.ledger import REJECTS_NAME
from sftdata.set.local import path_of
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.store import Sink, explained, held_alone, sync_folder, write_atomic
from sftdata.set.verify import damaged_bases, damaged_files
from sftdata.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

Target = Literal["datasets", "token-rows", "verl", "nemo-rl", "tinker", "megatron-bridge"]
EXPORT_NAME = "sftdata-export.json"
FILE_TOKENS = 1 << 23  # of a file
_ROW_GROUP = {"token-rows": 10_000, "megatron-bridge": 500}  # its reader keeps one group in memory
_SUFFIX = ".partial.export"  # of its own: DIR.partial may be a set that is not finished


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What an export holds; sftdata-export.json beside it.

    Attributes:
        to: the format.
        digest: of the set.
        tokenizer: name of its tokenizer, and sha256 of the tokenizer's files.
        rows, tokens, tokens_trained: as written; padding is not.
        left_out: stretches of documents without a trained token.
        unmarked: trained tokens that the reader will not train, since it takes no loss after an EOS.
        files: names.
    """

    to: Target
    digest: str
    tokenizer: tuple[str, str]
    rows: int
    tokens: int
    tokens_trained: int
    left_out: int
    unmarked: int
    files: tuple[str, ...]
    software: str = __version__

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        plain: dict[str, object] = msgspec.json.decode(msgspec.json.encode(self))
        return plain


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Rows of one file.

    Attributes:
        input_ids, labels: int32[T].
        weights: float32[T], or None.
        offsets: int64[N + 1], of the rows.
        starts: int64[D], first token of each document within its row.
        documents: int64[N], how many each row has.
        pictures: of the rows; None without.
    """

    input_ids: Int32
    labels: Int32
    weights: np.ndarray[tuple[int], np.dtype[np.float32]] | None
    offsets: Int64
    starts: Int64
    documents: Int64
    pictures: _Pictures | None = None


class _Pictures(NamedTuple):
    """Pictures of rows: sidecar, numbers there, int64[N + 1], where those of each row begin, their folder."""

    stored: StoredPictures | None
    numbers: Int32
    offsets: Int64
    folder: Path


def export(folder: str | PathLike[str], output: str | Path, to: Target) -> Exported:
    """Write a set, or a view, as another trainer reads it.

    Args:
        folder: a finished set.
        output: folder to be made.
        to: the format.

    Raises:
        UsageError: the format is unknown or cannot carry what the set holds, or the output exists.
        SftError: there is no set, it is damaged, or the output cannot be written.
    """
    if to not in get_args(Target):
        raise UsageError(f"--to {to}: no such format.", f"choose one of {', '.join(get_args(Target))}.")
    folder = path_of(folder)
    opened, output = open_set(folder), behind_links(Path(output))
    if opened.manifest.pictured and to != "datasets":
        what = f"{folder}: a set with pictures, which the rows of {to} have no place for: they are ids alone."
        raise UsageError(what, "--to datasets")
    if opened.manifest.weighted and to != "tinker":
        fix = "--to tinker, or prepare it without --loss-weights."
        if opened.manifest.pictured:  # which tinker has no place for
            fix = "prepare it without --loss-weights."
        raise UsageError(f"{folder}: its tokens have weights, which {to} cannot carry.", fix)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: exists and is not empty.", "choose another -o.")
    refuse_inside_a_set(output)
    _refuse_damaged(opened)
    partial = output.with_name(output.name + _SUFFIX)
    with held_alone(partial, "writing this export"):
        with explained(partial):
            for path in partial.iterdir():  # of one that was broken off
                path.unlink()
        exported = _write(opened, partial, to)
        with explained(output):
            if output.exists():
                output.rmdir()
            os.replace(partial, output)
            sync_folder(output.parent)
    return exported


def _refuse_damaged(opened: ShardSet) -> None:
    """Hold every file that rows are read from against its manifest: no other trainer could tell.

    Raises:
        IntegrityError: one is missing, or its bytes differ.
    """
    checked = damaged_files(opened.folder, opened.manifest)
    own = (problem for info, problem in checked if info.name != REJECTS_NAME)  # may be under repair
    beneath = (problem for _, problem in damaged_bases(opened.folder, opened.manifest))
    for problem in filter(None, chain(own, beneath)):
        raise IntegrityError(problem)


def _write(opened: ShardSet, folder: Path, to: Target) -> Exported:
    """Write the files, and what describes them."""
    rows = tokens = trained = left_out = unmarked = firsts = 0
    files: list[str] = []
    for batches in _gathered(opened):
        parts = []
        for batch, stored in batches:
            batch, lost = _without_firsts(batch)
            firsts += lost
            part, untrained = _packed(batch) if to == "megatron-bridge" else _documents(batch)
            if (vision := opened.manifest.vision) is not None:
                part = replace(
                    part, pictures=_pictures(batch, stored, pictures_folder(opened.folder, vision))
                )
            parts.append(part)
            rows, tokens, left_out = (
                rows + len(part.offsets) - 1, tokens + len(part.labels), left_out + untrained
            )  # fmt: skip
            trained += int((part.labels != IGNORE_INDEX).sum())
            if to == "megatron-bridge":
                unmarked += _after_eos(part, opened.manifest.tokenizer.eos_id)
        name = _NAMES[to].format(len(files))
        _FILES[to](folder / name, parts)
        files.append(name)
    if trained + firsts != opened.manifest.ledger.tokens_trained:
        raise IntegrityError(
            f"{opened.folder}: {trained + firsts:,} trained tokens read; its manifest says"
            f" {opened.manifest.ledger.tokens_trained:,}.",
            "run `sftdata verify`.",
        )
    tokenizer = opened.manifest.tokenizer
    exported = Exported(
        to=to, digest=opened.manifest.digest, tokenizer=(tokenizer.name, tokenizer.sha256), rows=rows,
        tokens=tokens, tokens_trained=trained, left_out=left_out, unmarked=unmarked, files=tuple(files),
    )  # fmt: skip
    if to in _READERS:
        reader = Path(__file__).with_name(_READERS[to]).read_bytes()
        write_atomic(folder / "rows.py", lambda sink: sink.write(reader))
    if to == "datasets":
        _describe_dataset(folder, exported, opened.manifest.pictured)
    _write_json(folder / EXPORT_NAME, exported)
    return exported


def _gathered(opened: ShardSet) -> Iterator[list[tuple[PackedRows, StoredPictures | None]]]:
    """Yield the record batches of each file, with the pictures of their shards."""
    batches, tokens, row = list[tuple[PackedRows, StoredPictures | None]](), 0, 0
    for batch in opened.batches():
        batches.append((batch, opened.stored_pictures(row)))
        tokens, row = tokens + len(batch.labels), row + len(batch)
        if tokens >= FILE_TOKENS:
            yield batches
            batches, tokens = [], 0
    if batches:
        yield batches


# -------------------------------------------------------------------------------------------- rows


def _without_firsts(batch: PackedRows) -> tuple[PackedRows, int]:
    """Take away the labels of documents' first tokens, which format version 1 has, and count them."""
    firsts = offsets_of(batch.seq_lengths)[:-1][batch.seq_lengths > 0]
    firsts = firsts[batch.labels[firsts] != IGNORE_INDEX]
    if not len(firsts):
        return batch, 0
    labels = batch.labels.copy()
    labels[firsts] = IGNORE_INDEX
    return replace(batch, labels=labels), len(firsts)


def _documents(batch: PackedRows) -> tuple[_Part, int]:
    """Return each document as a row of its own, and how many had no trained token."""
    keep = _kept(batch)
    lengths = batch.seq_lengths[keep].astype(np.int64)
    part = _taken(
        batch, keep, offsets_of(lengths), np.zeros(len(lengths), np.int64), np.ones(len(lengths), np.int64)
    )
    return part, int(((batch.example_ids >= 0) & ~keep).sum())


def _kept(batch: PackedRows) -> Bool:
    """bool[S]: documents with a trained token."""
    starts = offsets_of(batch.seq_lengths.astype(np.int64))
    counted = offsets_of((batch.labels != IGNORE_INDEX).astype(np.int64))
    return (batch.example_ids >= 0) & (counted[starts[1:]] > counted[starts[:-1]])


def _pictures(batch: PackedRows, stored: StoredPictures | None, folder: Path) -> _Pictures:
    """Return the pictures of documents that are rows of their own."""
    assert batch.images is not None
    assert batch.image_counts is not None
    keep, edges = _kept(batch), offsets_of(batch.image_counts)
    counts = batch.image_counts[keep].astype(np.int64)
    return _Pictures(stored, batch.images[positions_of(edges[:-1][keep], counts)], offsets_of(counts), folder)


def _packed(batch: PackedRows) -> tuple[_Part, int]:
    """Return rows as they are packed, without padding."""
    keep = batch.example_ids >= 0
    row = np.repeat(np.arange(len(batch)), np.diff(batch.segment_offsets))[keep]
    lengths = batch.seq_lengths[keep].astype(np.int64)
    documents = np.bincount(row, minlength=len(batch))
    offsets = offsets_of(np.bincount(row, weights=lengths, minlength=len(batch)).astype(np.int64))
    starts = offsets_of(lengths)[:-1] - offsets[row]
    return _taken(batch, keep, offsets, starts, documents), 0


def _taken(batch: PackedRows, keep: Bool, offsets: Int64, starts: Int64, documents: Int64) -> _Part:
    """Return the tokens of some segments."""
    tokens = np.repeat(keep, batch.seq_lengths)
    weights = None if batch.loss_weights is None else batch.loss_weights[tokens]
    return _Part(batch.input_ids[tokens], batch.labels[tokens], weights, offsets, starts, documents)


def _next_marks(part: _Part) -> Bool:
    """Say of each token whether the one after it, in the same document, is trained."""
    marks = np.append(part.labels[1:] != IGNORE_INDEX, False)
    firsts = np.repeat(part.offsets[:-1], part.documents) + part.starts
    marks[firsts[firsts > 0] - 1] = False  # what follows there is another document
    return marks


def _after_eos(part: _Part, eos: int | None) -> int:
    """Count trained tokens that come after an EOS: Megatron-Bridge's collator takes no loss from there."""
    return 0 if eos is None else int((_next_marks(part) & (part.input_ids == eos)).sum())


# ------------------------------------------------------------------------------------------- files


def _list(values: np.ndarray[tuple[int], np.dtype[np.generic]], offsets: Int64) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _write_dataset(path: Path, parts: list[_Part]) -> None:
    import pyarrow as pa

    def batch_of(part: _Part) -> pa.RecordBatch:
        columns = {
            "input_ids": _list(part.input_ids, part.offsets),
            "attention_mask": _list(np.ones(len(part.labels), np.int8), part.offsets),
            "labels": _list(part.labels, part.offsets),
        }
        if part.pictures is not None:
            columns["images"] = _image_features(part.pictures)
        return pa.record_batch(columns)

    def write(sink: Sink) -> None:
        batches = map(batch_of, parts)  # pictures of one at a time
        first = next(batches)
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), first.schema) as stream:
            for batch in chain([first], batches):
                stream.write_batch(batch)

    write_atomic(path, write)


def _image_features(pictures: _Pictures) -> pa.ListArray:
    """Return pictures as datasets keeps Image features: the bytes of the file, and its name."""
    import pyarrow as pa

    stored, numbers, offsets, folder = pictures
    data, names = list[bytes](), list[str]()
    for number in numbers.tolist():
        assert stored is not None
        data.append(picture_bytes(stored, number, folder))
        names.append(PurePosixPath(stored.path[number]).name)
    files = [pa.array(data, pa.binary()), pa.array(names, pa.utf8())]
    images = pa.StructArray.from_arrays(files, ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), images)


def _describe_dataset(folder: Path, exported: Exported, pictured: bool) -> None:
    """Write the two files by which datasets knows a folder."""
    types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
    items: dict[str, dict[str, str]] = {
        name: {"dtype": dtype, "_type": "Value"} for name, dtype in types.items()
    }
    items |= {"images": {"_type": "Image"}} if pictured else {}
    features = {name: {"feature": item, "_type": "Sequence"} for name, item in items.items()}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in exported.files],
        "_fingerprint": exported.digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write_json(folder / "dataset_info.json", info)
    _write_json(folder / "state.json", state)


def _write_parquet(
    path: Path, parts: list[_Part], columns: Callable[[_Part], dict[str, pa.Array]], group: int
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_batches([pa.record_batch(columns(part)) for part in parts])
    write_atomic(
        path,
        lambda sink: parquet.write_table(
            table, pa.PythonFile(sink, mode="w"), row_group_size=group, compression="zstd"
        ),
    )


def _write_token_rows(path: Path, parts: list[_Part]) -> None:
    def columns(part: _Part) -> dict[str, pa.Array]:
        marks = (part.labels != IGNORE_INDEX).astype(np.int8)
        return {
            "input_ids": _list(part.input_ids, part.offsets),
            "loss_mask": _list(marks, part.offsets),
        }

    _write_parquet(path, parts, columns, _ROW_GROUP["token-rows"])


def _write_megatron(path: Path, parts: list[_Part]) -> None:
    """Write the mask where the reader wants it: on the token before the one that is trained."""

    def columns(part: _Part) -> dict[str, pa.Array]:
        return {
            "input_ids": _list(part.input_ids, part.offsets),
            "loss_mask": _list(_next_marks(part).astype(np.int8), part.offsets),
            "seq_start_id": _list(part.starts.astype(np.int32), offsets_of(part.documents)),
        }

    _write_parquet(path, parts, columns, _ROW_GROUP["megatron-bridge"])


def _write_datums(path: Path, parts: list[_Part]) -> None:
    def lines() -> Iterator[bytes]:
        for part in parts:
            for start, stop in zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True):
                yield msgspec.json.encode(_datum(part, start, stop)) + b"\n"

    def write(sink: Sink) -> None:
        for line in lines():
            sink.write(line)

    write_atomic(path, write)


def _datum(part: _Part, start: int, stop: int) -> dict[str, object]:
    """Return what a Datum is made of: position i predicts token i + 1 of the document."""
    marks = part.labels[start + 1 : stop] != IGNORE_INDEX
    weights = marks.astype(np.float32) if part.weights is None else part.weights[start + 1 : stop]
    return {
        "input_tokens": part.input_ids[start : stop - 1].tolist(),
        "target_tokens": part.input_ids[start + 1 : stop].tolist(),
        "weights": weights.tolist(),
    }


def _write_json(path: Path, content: object) -> None:
    text = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    write_atomic(path, lambda sink: sink.write(text))


_READERS: dict[Target, str] = {"verl": "rows_for_verl.txt", "nemo-rl": "rows_for_nemo_rl.txt"}
_NAMES: dict[Target, str] = {
    "datasets": "data-{:05d}.arrow",
    "token-rows": "rows-{:05d}.parquet",
    "verl": "rows-{:05d}.parquet",
    "nemo-rl": "rows-{:05d}.parquet",
    "tinker": "datums-{:05d}.jsonl",
    "megatron-bridge": "rows-{:05d}.idx.parquet",
}
_FILES: dict[Target, Callable[[Path, list[_Part]], None]] = {
    "datasets": _write_dataset,
    "token-rows": _write_token_rows,
    "verl": _write_token_rows,
    "nemo-rl": _write_token_rows,
    "tinker": _write_datums,
    "megatron-bridge": _write_megatron,
}
