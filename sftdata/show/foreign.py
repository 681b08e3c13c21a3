"""Rows of token ids that another tool prepared, as a set, so that they are looked at as one.

    plan_inputs -> detect -> read_chunk -> convert_rows -> check_tokens -> PackedRows: audit, inspect, stats

Nothing is written. The rows are held in memory, 8 bytes a token. A row that `prepare` would reject for what
it holds is rejected here too, under the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np

from sftdata.acting import format_options
from sftdata.batches import IGNORE_INDEX, PackedRows
from sftdata.config import PrepareConfig
from sftdata.errors import UsageError, without_secrets
from sftdata.formats.detect import Detection, detect
from sftdata.formats.tokenrows import BESIDE_IDS, BORDERS, PROMPT, STARTS, TRAINED
from sftdata.inputs import plan_inputs
from sftdata.output import counted
from sftdata.plan import choose_tokenizer
from sftdata.set.local import path_of
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo
from sftdata.set.rows import MappedShard
from sftdata.set.shards import ShardInfo, shard_name
from sftdata.show.layout import ForeignRows
from sftdata.show.view import ShownSet, open_shown
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.inputs import is_saved_dataset, set_in
from sftdata.sources.planning import short_names
from sftdata.sources.source import close_sources, read_chunk


@dataclass(frozen=True, slots=True)
class Rows:
    """How token rows of another tool are read.

    Attributes:
        tokenizer: folder or Hub id of the one that made the ids, with its chat template.
        split: of a dataset.
        columns: canonical column = column in the data.
    """

    tokenizer: str
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class ForeignSet(ShownSet):
    """Rows that another tool prepared, as a set; its folder is the path that was named.

    Attributes:
        marks: what was found in ids and masks.
        rejects: rows that cannot be used.
        evidence: what the rows were taken for, a sentence each.
    """

    def __init__(self, path: Path, manifest: Manifest, read: ForeignRows, evidence: Sequence[str]) -> None:
        super().__init__(path, manifest, lawful=True)
        self._mapped = {index: MappedShard([batch]) for index, batch in enumerate(read.batches)}
        self._read = read
        eos = manifest.tokenizer.eos_id
        vocabulary = read.judge.vocabulary
        stops = vocabulary.stop_ids if eos is None else vocabulary.stop_ids | {eos}
        self.vocabulary = replace(vocabulary, stop_ids=stops)
        self.marks, self.rejects, self.ends_left_out = read.marks, tuple(read.rejects), read.ends_left_out
        self.evidence = tuple(evidence)

    @property
    def of_another_tokenizer(self) -> bool:
        """Whether most documents are not of this tokenizer, so that it says nothing about them."""
        return 2 * len(self.marks.get("other-tokenizer", ())) > self._read.judged

    @property
    def tokenizer_folder(self) -> Path:
        """Where the files of the tokenizer are."""
        return self._read.tokenizer.folder

    def origin(self, example_id: int) -> tuple[str, int]:
        """Return the source and the 1-based row that a document comes from."""
        return self._source(example_id).name, self._read.records[example_id]

    def place(self, example_id: int) -> str:
        """Return the same in words, with the number of the document where the row holds several."""
        number = self._read.numbers[example_id]
        return super().place(example_id) + (f", document {number}" if number else "")

    def found_at(self, code: str, example_id: int) -> str:
        """Return the same with the text around, where the finding is about a token."""
        around = self._read.around(code, example_id) if code in self.marks else ""
        return f"{self.place(example_id)}, {around}" if around else self.place(example_id)


def choose_rows(tokenizer: str | None, split: str | None, columns: Mapping[str, str]) -> Rows | None:
    """Return how token rows are read; None, for a finished set, where no tokenizer is named.

    Raises:
        UsageError: a setting acts on such rows alone, and no tokenizer is named.
    """
    if tokenizer is not None:
        return Rows(tokenizer, split, columns)
    if split is not None or columns:
        flag = "--split" if split is not None else "--map"
        raise UsageError(f"{flag} acts on token rows of another tool.", "name their tokenizer: -t TOKENIZER.")
    return None


def open_either(path: str | PathLike[str], rows: Rows | None = None) -> ShownSet:
    """Open a finished set, or read token rows that another tool prepared.

    Raises:
        UsageError: there is neither, rows hold no token ids, or a tokenizer is named where the set has one.
    """
    path = path_of(path)
    made = set_in(Path(path)) == "a finished set"
    if rows is not None and not made:
        return open_foreign(str(path), rows)
    if rows is not None:
        raise UsageError(f"{path}: a finished set, which has a tokenizer of its own.", "leave -t out.")
    if not made and (Path(path).is_file() or is_saved_dataset(Path(path))):
        fix = f"sftdata preview {path} -t TOKENIZER, or, if they are token ids, -t TOKENIZER here."
        raise UsageError(f"{path}: rows, and not a finished set.", fix)
    return open_shown(path)


def open_against(path: str | PathLike[str], rows: Rows | None) -> ShownSet:
    """Open what a set is compared with: a finished set, or token rows read as those of the first."""
    return open_either(path, None if set_in(Path(path_of(path))) == "a finished set" else rows)


def open_foreign(path: str, rows: Rows) -> ForeignSet:
    """Read token rows that another tool prepared.

    Raises:
        UsageError: the rows hold no token ids, nothing can be read, or there is no such tokenizer.
    """
    given = {"inputs": [path], "tokenizer": rows.tokenizer, "split": rows.split, "map": rows.columns}
    config = PrepareConfig.model_validate(given | {"output": "(none)"})
    resolved, notes = choose_tokenizer(config)
    sources, left_out = plan_inputs(config)
    detection = _detect(config, sources)
    names = short_names([without_secrets(source.source.path) for source in sources])
    read, documents = ForeignRows(resolved, format_options(config, chat=False, packed=True)), [0]
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        for chunk in source.placed(number, source.base_id, name).chunks:
            read.add(*read_chunk(chunk, source.max_line_bytes))
        documents.append(len(read.records))
    close_sources()
    if not len(read.records):
        first = read.rejects[0]
        raise UsageError(f"{path}: no row can be used; {first.place}: {first.reason.rstrip('.')}.", first.fix)
    masked = any(name in detection.columns for name in (*TRAINED, PROMPT) if name != "loss_mask")
    everything = read.judge_all() and (masked or read.turns > 0)
    infos = tuple(
        SourceInfo(
            name=name, bytes=source.raw_bytes, xxh3=source.xxh3_128, rows=stop - first, first_id=first,
            unit=source.source.unit,
        )
        for name, source, (first, stop) in zip(names, sources, pairwise(documents), strict=True)
    )  # fmt: skip
    manifest = _describe(read, infos, tuple(notes), everything)
    return ForeignSet(Path(path), manifest, read, [*left_out, *_evidence(detection, read)])


def _detect(config: PrepareConfig, sources: Sequence[SourcePlan]) -> Detection:
    try:
        return detect(sources, format="tokens", columns=config.map)
    except UsageError as error:
        known = f"name rows with input_ids, and beside them {', '.join(BESIDE_IDS)}."
        raise UsageError(error.message, known if "--format" in error.fix else error.fix) from None


def _describe(
    read: ForeignRows, sources: tuple[SourceInfo, ...], notes: tuple[str, ...], everything: bool
) -> Manifest:
    """Return a manifest of what was read; what was cut before, nobody counted."""
    tokenizer, ledger, turns = read.tokenizer, read.ledger, read.turns
    firsts = {source.name: source.first_id for source in sources if source.rows}
    for batch in read.batches:
        ledger.count_packed(batch, None, firsts)
        ledger.count_lengths(batch.seq_lengths[batch.example_ids >= 0].astype(np.int64))
    ledger.rows_kept = sum(len(batch) for batch in read.batches)
    ledger.rows_in = ledger.rows_kept + sum(ledger.rows_rejected.values())
    ledger.tokens_in = ledger.tokens
    ledger.tokens_cut = {"before": 0}
    ledger.counters |= {"turns": turns} if turns else {}
    shards = tuple(_info(index, batch) for index, batch in enumerate(read.batches))
    padding = ledger.tokens_trained - sum(shard.tokens_trained for shard in shards)  # that is trained
    ledger.tokens_trained -= padding
    ledger.tokens_context += padding
    lengths = np.sort(np.concatenate([np.diff(batch.row_offsets) for batch in read.batches]))
    longest = int(lengths[-1]) if len(lengths) > 1 and lengths[-1] == lengths[-2] else None
    return Manifest(
        settings={"max_length": longest, "train_on": "all" if everything else "auto"},
        tokenizer=TokenizerInfo(
            name=tokenizer.name, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id, pad_id=tokenizer.filler_id, bos_id=tokenizer.bos_id,
        ),
        sources=sources,
        ledger=ledger,
        shards=shards,
        notes=notes,
    )  # fmt: skip


def _info(index: int, batch: PackedRows) -> ShardInfo:
    real = np.repeat(batch.example_ids >= 0, batch.seq_lengths)
    return ShardInfo(
        name=shard_name(index), bytes=0, xxh3="0" * 32, sha256="0" * 64, rows=len(batch),
        documents=int((batch.example_ids >= 0).sum()), tokens=int(real.sum()),
        tokens_trained=int(((batch.labels != IGNORE_INDEX) & real).sum()),
    )  # fmt: skip


def _evidence(detection: Detection, read: ForeignRows) -> Iterator[str]:
    """Yield what the rows were taken for."""
    columns, ledger = detection.columns, read.ledger
    masks = [name for name in ("labels", *TRAINED, PROMPT) if name in columns]
    borders = [name for name in BORDERS if name in columns]
    yield detection.evidence[0]
    said = f"trained by {' and '.join(masks)}" if masks else "no labels and no mask: all is trained"
    if STARTS in columns:
        said += f", one token later, as beside {STARTS}"
    packed = f"documents and padding by {' and '.join(borders)}" if borders else "one document a row"
    share = ledger.tokens_trained / max(ledger.tokens, 1)
    yield f"{said}; {packed}; {share:.1%} of {counted(ledger.tokens, 'token')} trained."
    yield from (
        f"{name.removeprefix('column_unused:')} is not read."
        for name in ledger.counters
        if name.startswith("column_unused:")
    )
    if not read.judged:
        yield "No document is long enough to tell whether this tokenizer made the ids."
    elif read.reencoded < len(read.records):
        yield f"The tokenizer was tried on {read.reencoded:,} of {counted(len(read.records), 'document')}."
    if not read.turns:
        yield "No turn of the tokenizer's chat template is in the ids: prompts cannot be told from answers."
