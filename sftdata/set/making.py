"""The files of a set while it is made, in a folder or in an object store.

Each slice is committed by its record, which follows its files: a slice without one is not done. A slice is a
pure function of the plan, so making it again writes the same bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec

from sftdata.batches import Reject
from sftdata.errors import IntegrityError, SftError
from sftdata.output import cache_folder
from sftdata.set.ledger import LISTS, REJECTS_NAME, Ledger, decode_rejects, write_parts
from sftdata.set.manifest import MANIFEST_NAME, Manifest, encode_manifest, seal
from sftdata.set.shards import ShardInfo
from sftdata.set.slices import SLICES_NAME, SliceRecord, encode_slice
from sftdata.set.store import SetFile, Sink, explained
from sftdata.set.stores import Folder, Store, put_bytes

PLAN, SLICES, TOKENIZER = "plan.json", "slices", "tokenizer"
_LENT = f"{SLICES}/{TOKENIZER}"
_RECORD = re.compile(rf"{SLICES}/\d+\.json")

CARD_NAME = "README.md"
CARD = b"""\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.arrow
---

A set of tokenized, masked and packed rows for supervised fine-tuning, made by `sftdata COMMAND`.
`manifest.json` says what it was made from; `sftdata verify` checks every byte of it against that.

`load_dataset` reads its rows: `input_ids` and `labels` (-100 where not trained), `seq_lengths` of the
documents in a row, and `example_ids`, the input rows they come from. `tokenizer/` holds the tokenizer, chat
template included. `rest-*.arrow` hold the tokens that were cut or dropped, and `index-*.arrow` say where each
document is.
"""
INDEX_CARD = (
    CARD.partition(b"\n\n")[0]
    + b"""

A view by index: rows for supervised fine-tuning that lie in other sets, the `bases` of `manifest.json`.
`sftdata` and `sfttrain` read it like any set. It has no `shard-*.arrow`, so `load_dataset` and other trainers
cannot read it: the same `sftdata view` with `--write` makes a set that stands alone.
"""
)


def _licences(manifest: Manifest) -> bytes:
    """Return what a card says of the licences of the sources."""
    listed = [f"- `{source.name}`: {source.licence}\n" for source in manifest.sources if source.licence]
    return "".join(["\nLicences of the sources:\n\n", *listed]).encode() if listed else b""


class ShardResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished task gave.

    Attributes:
        index: its number in the plan.
        shards: its shards, none when it kept no row.
        files: what stands beside them, index and rest.
        ledger: what became of its rows and tokens.
        rejects: rows it rejected, also counted in the ledger.
        lists: bytes of its part of each list, by name; filled in when it is committed.
        reused: it was made for a set that this one replaces.
        sample, sample_xxh3: some of its texts, and `digest_ids` of what a fast engine made of them; empty for
            the reference engine.
    """

    index: int
    shards: tuple[ShardInfo, ...]
    files: tuple[SetFile, ...]
    ledger: Ledger
    rejects: int = 0
    lists: dict[str, int] = {}
    reused: bool = False
    sample: tuple[str, ...] = ()
    sample_xxh3: str = ""


class Making:
    """Slices, and what they add up to.

    Attributes:
        store: where the files are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._written: dict[str, SetFile] = {}

    def recorded(self) -> set[int]:
        """Return the numbers of the tasks that have a record."""
        return {int(Path(name).stem) for name in self.store.sizes(SLICES) if _RECORD.fullmatch(name)}

    def finished(
        self, numbers: Iterable[int] | None = None, *, overwrite: bool = False
    ) -> dict[int, ShardResult]:
        """Return the tasks that are done, by number: by their records and the sizes of files alone.

        Args:
            numbers: of the tasks that are asked for; None for all.
            overwrite: a task whose record is damaged is not done.

        Raises:
            IntegrityError: a record is damaged.
        """
        sizes, done = self.store.sizes(), {}
        names = sorted(filter(_RECORD.fullmatch, sizes))
        if numbers is not None:
            asked = {_record_name(number) for number in numbers}
            names = [name for name in names if name in asked]
        for name, record in zip(names, self.store.get(names), strict=True):
            with suppress(IntegrityError) if overwrite else nullcontext():
                result = self._read_result(name, record)
                if names_of(result).items() <= sizes.items():
                    done[result.index] = result
        return done

    def _read_result(self, name: str, record: bytes) -> ShardResult:
        try:
            return msgspec.convert(msgspec.json.decode(record), ShardResult, str_keys=True)
        except msgspec.MsgspecError as error:
            raise IntegrityError(
                f"{self.store}/{name}: damaged: {error}.", "start anew with --overwrite."
            ) from None

    def commit(self, result: ShardResult, lists: Mapping[str, bytes]) -> ShardResult:
        """Record a finished task, its shards already in place; `lists` are its lines of each of `LISTS`."""
        result = self.keep(result, lists)
        record = msgspec.json.encode(msgspec.to_builtins(result, str_keys=True), order="sorted")
        put_bytes(self.store, _record_name(result.index), record)
        return result

    def keep(self, result: ShardResult, lists: Mapping[str, bytes]) -> ShardResult:
        """Put the lists of a task aside, where it has any lines."""
        if any(lists.values()):
            self.store.put(lists_name(result.index), partial(write_parts, [lists[name] for name in LISTS]))
        return msgspec.structs.replace(result, lists={name: len(lists[name]) for name in LISTS})

    def rejects_of(self, result: ShardResult) -> Iterator[Reject]:
        """Yield the rows that a task rejected."""
        for lines in self._lists([result])[REJECTS_NAME]:
            yield from decode_rejects(lines.splitlines())

    def _lists(self, results: Sequence[ShardResult]) -> dict[str, list[bytes]]:
        """Return the lines of tasks, in order, by the list they belong to."""
        some = [result for result in results if _lines(result)]
        lists: dict[str, list[bytes]] = {name: [] for name in LISTS}
        for result, lines in zip(some, self.store.get([lists_name(one.index) for one in some]), strict=True):
            ends = accumulate((result.lists[name] for name in LISTS), initial=0)
            for name, (first, last) in zip(LISTS, pairwise(ends), strict=True):
                lists[name].append(lines[first:last])
        return lists

    def write_lists(self, slices: Sequence[SliceRecord], results: Sequence[ShardResult]) -> None:
        """Write the records of the slices, and join the tasks' parts of the lists of rows, in order."""
        self._write(SLICES_NAME, partial(write_parts, map(encode_slice, slices)))
        for name, parts in self._lists(results).items():
            self._write(name, partial(write_parts, parts))

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return next(self.store.get([name]))

    def complete(self, manifest: Manifest, tokenizer: Path, others: Mapping[str, Path] = {}) -> Manifest:
        """Add the tokenizer's files and the card to the slices and lists, and the manifest last.

        Args:
            manifest: whose files are those of the slices.
            tokenizer, others: its folder, and more files to copy by their names in the set.

        Raises:
            SftError: the tokenizer was changed or is gone.
        """
        with explained(tokenizer):
            names = {f"{TOKENIZER}/{path.relative_to(tokenizer)}": path for path in tokenizer.rglob("*")}
            copied = [self._copy(*item) for item in sorted((names | {**others}).items()) if item[1].is_file()]
        if manifest.tokenizer.sha256 not in (file.sha256 for file in copied):
            raise SftError(
                f"{tokenizer}: emptied or changed while the set was made.", "run the same command again."
            )
        card = INDEX_CARD if manifest.by_index else CARD
        card = card.replace(b"COMMAND", b"view" if manifest.bases else b"prepare")
        self._write(CARD_NAME, partial(write_parts, [card + _licences(manifest)]))
        listed = (self._written[name] for name in (*LISTS, SLICES_NAME, CARD_NAME))
        sealed = seal(msgspec.structs.replace(manifest, files=(*manifest.files, *listed, *copied)))
        put_bytes(self.store, MANIFEST_NAME, encode_manifest(sealed))
        return sealed

    def lend(self, tokenizer: Path) -> Path:
        """Copy a tokenizer, with what is known of it, to where workers on any machine find it by `borrow`."""
        for path in filter(Path.is_file, sorted(tokenizer.parent.rglob("*"))):
            with open(path, "rb") as original:
                name = f"{_LENT}/{path.relative_to(tokenizer.parent)}"
                self.store.put(name, partial(shutil.copyfileobj, original))
        return self.store.path / _LENT / tokenizer.name if isinstance(self.store, Folder) else tokenizer

    def borrow(self, tokenizer: Path) -> Path:
        """Return where this machine has a tokenizer that was lent; one in an object store is fetched."""
        if tokenizer.is_dir() or isinstance(self.store, Folder):
            return tokenizer
        here = cache_folder("tokenizers") / tokenizer.parent.name
        if not here.is_dir():
            here.parent.mkdir(parents=True, exist_ok=True)
            fetched = Folder(Path(tempfile.mkdtemp(dir=here.parent)))
            names = [*self.store.sizes(_LENT)]
            for name, data in zip(names, self.store.get(names), strict=True):
                put_bytes(fetched, name, data)
            with suppress(OSError):  # another process was faster
                os.rename(fetched / _LENT, here)
            shutil.rmtree(fetched.path)
        return here / tokenizer.name

    def _write(self, name: str, writer: Callable[[Sink], object]) -> SetFile:
        file = SetFile(name=name, **msgspec.structs.asdict(self.store.put(name, writer)))
        self._written[name] = file
        return file

    def _copy(self, name: str, path: Path) -> SetFile:
        with open(path, "rb") as original:
            return self._write(name, partial(shutil.copyfileobj, original))


def _record_name(index: int) -> str:
    return f"{SLICES}/{index:05d}.json"


def lists_name(index: int) -> str:
    """Return where the lines of a task for the lists are kept, end to end, until the lists are joined."""
    return f"{SLICES}/{index:05d}.lists"


def _lines(result: ShardResult) -> int:
    return sum(result.lists.values())


def names_of(result: ShardResult) -> dict[str, int]:
    """Return the bytes of each file of a task, by name."""
    sizes = {file.name: file.bytes for file in (*result.shards, *result.files)}
    return sizes | ({lists_name(result.index): lines} if (lines := _lines(result)) else {})
