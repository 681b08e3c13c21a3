"""Rows of token ids that another tool prepared, laid out as packed rows and judged, a chunk at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, PackedRows, Reject, RowBatch, Tally, offsets_of
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import RowError
from sftdata.formats.convert import convert_rows
from sftdata.formats.fields import FormatOptions
from sftdata.formats.tokenrows import TokenRow
from sftdata.masks.tokens import check_tokens
from sftdata.output import one_line
from sftdata.set.ledger import Ledger
from sftdata.show.headers import load_tokenizer
from sftdata.show.supervision import make_judge
from sftdata.vocabulary import read_vocabulary

REENCODED = 1 << 18  # tokens that are encoded again to see whether the tokenizer is theirs
SAME = 0.93  # share of neighbours that come back where it is; of other tokenizers, 0.92 at most on average
FEWEST = 24  # pairs of neighbours in a document that is judged so
AROUND = 24  # characters shown before a place, and behind it
FULL, INSIDE = 0.9, 0.25  # shares of rows that are full, and begin inside a turn, where a stream was cut


class ForeignRows:
    """What was read of rows that another tool prepared.

    Args:
        tokenizer: that should have made the ids.
        options: how rows are read.

    Attributes:
        batches: the rows that can be used.
        records: 1-based row of each document in its source.
        numbers: 1-based number of each document in its row; 0 where it is alone.
        marks: by code of a finding, the documents that it is about, each with a batch and a token in it.
        rejects: the other rows.
        ledger: counts of both.
        turns: answers under a header of the chat template.
        ends_left_out: stop tokens behind an answer that are not trained.
        reencoded: documents of which the tokenizer was tried.
        judged: those of them that are long enough to tell.
    """

    def __init__(self, tokenizer: ResolvedTokenizer, options: FormatOptions) -> None:
        self.tokenizer, self._options = tokenizer, options
        self._encoder = load_tokenizer(tokenizer.folder)
        vocabulary = read_vocabulary(tokenizer.folder)
        self.judge = make_judge(vocabulary, self._encoder, tokenizer.bos_id, tokenizer.eos_id)
        self.batches: list[PackedRows] = []
        self.records: list[int] = []
        self.numbers: list[int] = []
        self.marks: dict[str, dict[int, tuple[int, int]]] = {}
        self.rejects: list[Reject] = []
        self.ledger = Ledger()
        self.turns = self.ends_left_out = self.reencoded = self.judged = 0

    def add(self, batch: RowBatch, unreadable: Sequence[Reject]) -> None:
        """Take the rows of a chunk."""
        tally = Tally(batch, unreadable)
        converted = convert_rows(batch, "tokens", self._options, tally)
        rows, records = [], []
        for index, item in zip(converted.row.tolist(), converted.rows, strict=True):
            assert isinstance(item, TokenRow)
            try:
                rows.append((*check_tokens(item, self.tokenizer), item))
                records.append(batch.record_of(index))
            except RowError as error:
                tally.reject(index, error.fault)
        self.rejects += tally.rejects
        self.ledger.count_tally(tally, "")
        if rows:
            self._judge(self._lay_out(rows, records))

    def _lay_out(self, rows: Sequence[tuple[Int32, Bool, TokenRow]], records: Sequence[int]) -> PackedRows:
        """Cut rows into documents and padding, also where no column says that a document begins."""
        ids = np.concatenate([row[0] for row in rows])
        trained = np.concatenate([row[1] for row in rows])
        offsets = offsets_of([len(row[0]) for row in rows])
        starts, real = list[int](), list[bool]()
        for (row_ids, row_trained, row), first in zip(rows, offsets.tolist(), strict=False):
            begin, stop = self._kept(row_ids, row_trained, row)
            own = [begin, *(start for start in row.starts if begin < start < stop)]
            borders = [0] * (begin > 0) + own + [stop] * (stop < len(row_ids))
            starts += [first + border for border in borders]
            real += [border in own for border in borders]
        edges, is_real = np.append(starts, len(ids)), np.array(real)
        inner = self.judge.joined(ids, edges)
        inner = inner[is_real[np.searchsorted(edges, inner, side="right") - 1]]
        begins = np.union1d(edges[:-1], inner)
        is_real = is_real[np.searchsorted(edges, begins, side="right") - 1]
        documents = np.full(len(begins), -1)
        documents[is_real] = len(self.records) + np.arange(is_real.sum())
        row_of = np.searchsorted(offsets, begins, side="right") - 1
        self._number(row_of[is_real], records)
        made = PackedRows(
            input_ids=ids,
            labels=np.where(trained, ids, np.int32(IGNORE_INDEX)),
            row_offsets=offsets,
            seq_lengths=np.diff(np.append(begins, len(ids))).astype(np.int32),
            example_ids=documents,
            segment_offsets=np.searchsorted(begins, offsets),
        )
        self.batches.append(made)
        _, first = np.unique(np.searchsorted(offsets, inner, "right"), return_index=True)
        self._mark("packed-unmarked", inner[first])
        return made

    def _kept(self, ids: Int32, trained: Bool, row: TokenRow) -> tuple[int, int]:
        """Return where the documents of a row begin and end; pad tokens around them are padding.

        A row of nothing else is a document of one token, so that it is looked at like any other.
        """
        start, stop = row.kept.start, row.kept.stop
        pad = self.tokenizer.filler_id
        ends = pad in self.judge.headers.ends
        other = np.flatnonzero(ids[start:stop] != pad)
        if not len(other):
            return start, start + 1
        last = start + int(other[-1]) + 1
        ended = self.judge.ends_in_stop(ids[start:last])
        if last < stop and not ended and (ends or (trained[last] and not trained[last + 1 : stop].any())):
            last += 1  # it is the end of the text
        return (start if ends or pad == self.tokenizer.bos_id else start + int(other[0])), last

    def _number(self, rows: Int64, records: Sequence[int]) -> None:
        """Note the places of documents, in the rows int64[D]."""
        counts = np.bincount(rows, minlength=len(records))
        within = np.arange(len(rows)) - offsets_of(counts)[:-1][rows] + 1
        self.records += np.array(records)[rows].tolist()
        self.numbers += np.where(counts[rows] > 1, within, 0).tolist()

    def _mark(self, code: str, places: Int64) -> None:
        """Note the documents of the last batch at these places; padding counts to the document before it."""
        batch = self.batches[-1]
        edges = offsets_of(batch.seq_lengths)
        at = np.searchsorted(edges, places, side="right") - 1
        at += np.isin(at, batch.segment_offsets) & (batch.example_ids[at] < 0)  # before the first: to that
        before = np.append(np.maximum.accumulate(batch.example_ids), -1)
        documents = before[at]
        found = self.marks.setdefault(code, {}) if len(places) else {}
        for document, place in zip(documents.tolist(), places.tolist(), strict=True):
            if document >= 0:
                found.setdefault(document, (len(self.batches) - 1, place))

    def _judge(self, rows: PackedRows) -> None:
        for code, places in self.judge.find(rows).items():
            self._mark(code, places)
        turns = self.judge.headers.turns(rows.input_ids, offsets_of(rows.seq_lengths))
        self.turns += int(turns.answer.sum())
        self.ends_left_out += len(self.judge.ends_left_out(rows))

    def judge_all(self) -> bool:
        """Judge what only all rows together show; return whether every token of every document is trained."""
        self._judge_cuts()
        self._judge_tokenizer()
        return not any(map(_leaves_out, self.batches))

    def _judge_cuts(self) -> None:
        """Mark rows that begin in the middle of a turn where all rows are full: texts were cut to rows."""
        lengths = np.concatenate([np.diff(batch.row_offsets) for batch in self.batches])
        inside = [self.judge.begins_inside(batch) for batch in self.batches]
        full = lengths == lengths.max()
        if full.sum() < 3 or full.mean() < FULL or np.concatenate(inside).mean() < INSIDE:
            return
        marked = self.marks.setdefault("packed-unmarked", {})
        for index, batch in enumerate(self.batches):
            for row in np.flatnonzero(inside[index]).tolist():
                document = int(batch.example_ids[batch.segment_offsets[row]])
                if document >= 0:
                    marked.setdefault(document, (index, int(batch.row_offsets[row])))

    def _judge_tokenizer(self) -> None:
        """Mark documents whose ids are others when their text is encoded again."""
        step = -(-sum(len(batch.labels) for batch in self.batches) // REENCODED)
        for number, batch in enumerate(self.batches):
            edges, chosen = offsets_of(batch.seq_lengths).tolist(), batch.example_ids % step == 0
            for segment in np.flatnonzero(chosen & (batch.example_ids >= 0)).tolist():
                tokens = slice(edges[segment], edges[segment + 1])
                same, pairs = self._encoded_again(
                    batch.input_ids[tokens], batch.labels[tokens] != IGNORE_INDEX
                )
                self.reencoded += 1
                self.judged += pairs >= FEWEST
                if pairs >= FEWEST and same < SAME * pairs:
                    marked = self.marks.setdefault("other-tokenizer", {})
                    marked[int(batch.example_ids[segment])] = number, tokens.start

    def _encoded_again(self, ids: Int32, trained: Bool) -> tuple[int, int]:
        """Return how many pairs of neighbours come back, and of how many.

        Texts are cut at control tokens and where training begins or ends. The first token behind a cut does
        not count, and where a tokenizer writes a prefix, the first word.
        """
        control = np.isin(ids, sorted(self.judge.vocabulary.added))
        cut = control | np.append(False, control[:-1]) | (np.diff(trained, prepend=trained[:1]) != 0)
        edges = [0, *np.flatnonzero(cut).tolist(), len(ids)]
        stretches = [ids[start:stop].tolist() for start, stop in pairwise(edges) if stop - start > 2]
        texts = list(map(self.judge.vocabulary.text_of, stretches))
        again = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        own = [Counter(pairwise(self._behind_prefix(stretch))) for stretch in stretches]
        same = sum((one & Counter(pairwise(two.ids))).total() for one, two in zip(own, again, strict=True))
        return same, sum(one.total() for one in own)

    def _behind_prefix(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the ids from the second on, or from the second word on."""
        vocabulary = self.judge.vocabulary
        words = (at for at in range(1, len(ids)) if vocabulary.bytes_of(ids[at])[:1].isspace())
        return ids[next(words, len(ids)) :] if vocabulary.layout.prefix != "none" else ids[1:]

    def around(self, code: str, document: int) -> str:
        """Return the token at the place of a finding, in the text around it."""
        number, place = self.marks[code][document]
        batch = self.batches[number]
        row = int(np.searchsorted(batch.row_offsets, place, side="right")) - 1
        first, stop = batch.row_offsets[row : row + 2].tolist()
        text = self.judge.vocabulary.text_of
        before = text(batch.input_ids[max(first, place - AROUND) : place].tolist())[-AROUND:]
        here = text([int(batch.input_ids[place])])
        behind = text(batch.input_ids[place + 1 : min(stop, place + AROUND)].tolist())[:AROUND]
        return f"token {place - first}: {one_line(f'{before}⟦{here}⟧{behind}')}"


def _leaves_out(batch: PackedRows) -> bool:
    """Whether some token is not trained, padding and the first of each document aside."""
    edges = offsets_of(batch.seq_lengths)
    off = (batch.labels == IGNORE_INDEX) & np.repeat(batch.example_ids >= 0, batch.seq_lengths)
    off[edges[:-1][batch.seq_lengths > 0]] = False
    return bool(off.any())
