"""Rows of token ids, with what stands beside them: labels, masks, padding, and where documents begin.

`prepare` takes one document a row; the audit of rows that other tools prepared takes them as they are, packed
or not (`FormatOptions.packed`). Both refuse rows for the same reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from sftdata.batches import IGNORE_INDEX, Tokens
from sftdata.errors import RowError
from sftdata.formats.fields import Fields, FormatOptions
from sftdata.output import counted
from sftdata.sources.jsonrows import kind_of

# Masks of what is trained, 1 for each such token; one of the prompt says the opposite.
TRAINED = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "response_mask")
PROMPT = "prompt_mask"
STARTS = "seq_start_id"
"""Of a row packed for Megatron-Bridge, whose masks lie on the token before the one that is trained."""
BORDERS = ("seq_lengths", STARTS, "position_ids", "attention_mask")
BESIDE_IDS = ("labels", *TRAINED, PROMPT, "attention_mask", "position_ids", "seq_lengths", STARTS)
# What tokenizers add that says nothing about training.
_HARMLESS = frozenset({"token_type_ids", "mm_token_type_ids", "special_tokens_mask"})
_ONE_EACH = "write one document a row; packing is done here."
_SAID = {
    "seq_lengths": "{name} counts {count} documents in one row.",
    STARTS: "{name} says where {count} documents begin, and masks lie one token early beside it.",
    "position_ids": "{name} start anew at token {second}: the row holds several documents.",
    "attention_mask": "{name} numbers {count} documents in one row.",
}


class TokenRow(Tokens, frozen=True):
    """A row of ids as it came, with its padding.

    Attributes:
        kept: the tokens that the attention mask does not call padding.
        starts: first token of each document, counted in the row; the first is that of `kept`.
    """

    kept: slice
    starts: list[int]


def fits_tokens(fields: Fields) -> bool:
    """Say whether a row holds a flat list of ids."""
    ids = fields.get("input_ids")
    return isinstance(ids, list) and set(map(type, ids)) == {int}


def convert_tokens(fields: Fields, options: FormatOptions) -> Tokens:
    """Return the ids without their padding; a token is trained where its label and every mask say so.

    With `options.packed` return all of the row, a `TokenRow`.

    Raises:
        RowError: a column that is no list of integers of the same length, columns that do not agree on where
            documents begin, several documents in the row, or a list of numbers, one for each id, that nothing
            reads.
    """
    ids, labels = _ids_and_labels(fields)
    if options.packed:
        return _as_it_is(fields, ids, labels)
    kept = _unpadded(fields, len(ids))
    for column, starts in _borders(fields, kept, len(ids)):
        if len(starts) > 1 or column == STARTS:
            second = starts[min(1, len(starts) - 1)]
            said = _SAID[column].format(name=fields.names[column], count=len(starts), second=second)
            raise RowError("packed-row", said, _ONE_EACH)
    return Tokens(ids[kept], labels[kept])


def _as_it_is(fields: Fields, ids: list[int], labels: list[int]) -> TokenRow:
    kept = _unpadded(fields, len(ids))
    found = dict(_borders(fields, kept, len(ids)))
    known = {column: starts for column, starts in found.items() if len(starts) > 1} or found
    for (one, here), (other, there) in pairwise(known.items()):
        if here != there:
            named = f"{fields.names[one]} and {fields.names[other]} differ on where documents begin"
            raise _wrong_borders(f"{named}: tokens {_few(here)} and tokens {_few(there)}.")
    starts = next(iter(known.values()), [kept.start])
    if STARTS in found:
        labels = _one_later(ids, labels, starts)
    return TokenRow(ids, labels, kept, starts)


def _ids_and_labels(fields: Fields) -> tuple[list[int], list[int]]:
    ids = _integers(fields, "input_ids")
    if not ids or min(ids) < 0:
        raise RowError("bad-tokens", "input_ids is empty or holds negative ids.", "remove the row.")
    _refuse_unread(fields, len(ids))
    labels = list(ids if fields.get("labels") is None else _integers(fields, "labels"))
    for mask in (*TRAINED, PROMPT):
        if fields.get(mask) is not None:
            trains = mask != PROMPT
            labels = [
                label if kept == trains else IGNORE_INDEX
                for label, kept in zip(labels, _bits(fields, mask), strict=True)
            ]
    return ids, labels


def _bits(fields: Fields, column: str) -> list[int]:
    values = _integers(fields, column)
    if strange := sorted(set(values) - {0, 1}):
        what = f"{fields.names[column]} holds {strange[0]}; expected 0 or 1."
        raise RowError("bad-tokens", what, "write 1 or 0 for each id.")
    return values


def _one_later(ids: list[int], labels: list[int], starts: list[int]) -> list[int]:
    """Move marks from the token before to the one that is trained; none goes over to the next document."""
    firsts = {*starts}
    return [
        ids[at] if at and at not in firsts and labels[at - 1] != IGNORE_INDEX else IGNORE_INDEX
        for at in range(len(ids))
    ]


def _unpadded(fields: Fields, size: int) -> slice:
    """Return where the attention mask is not 0."""
    if fields.get("attention_mask") is None:
        return slice(0, size)
    mask, name = _integers(fields, "attention_mask"), fields.names["attention_mask"]
    kept = [index for index, value in enumerate(mask) if value]
    if not kept:
        raise RowError("bad-tokens", f"{name} is 0 everywhere.", "remove the row.")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise RowError("bad-tokens", f"{name} is 0 in the middle of the row.", "take the padding out.")
    return slice(kept[0], kept[-1] + 1)


# ----------------------------------------------------------------------------------- where documents begin


def _borders(fields: Fields, kept: slice, size: int) -> Iterator[tuple[str, list[int]]]:
    """Yield each column that says where documents begin, with the first token of each."""
    if fields.get("attention_mask") is not None:
        mask = _integers(fields, "attention_mask")[kept]
        yield "attention_mask", _changes(kept.start, [a != b for a, b in pairwise(mask)])
    if fields.get("position_ids") is not None:
        positions = _integers(fields, "position_ids")[kept]
        yield "position_ids", _changes(kept.start, [after <= before for before, after in pairwise(positions)])
    if fields.get("seq_lengths") is not None:
        yield "seq_lengths", _from_lengths(fields, kept, size)
    if fields.get(STARTS) is not None:
        yield STARTS, _from_starts(fields, size)


def _changes(first: int, begins: Sequence[bool]) -> list[int]:
    return [first, *(first + index for index, here in enumerate(begins, 1) if here)]


def _from_lengths(fields: Fields, kept: slice, size: int) -> list[int]:
    lengths, name = _numbers(fields, "seq_lengths"), fields.names["seq_lengths"]
    if not lengths or min(lengths) < 1:
        raise _wrong_borders(f"{name} is empty, or counts a document of no token.")
    if sum(lengths) not in (size, kept.stop - kept.start):
        raise _wrong_borders(f"{name} sum to {sum(lengths)}, and the row has {counted(size, 'token')}.")
    first = 0 if sum(lengths) == size else kept.start
    starts = [first + start for start in accumulate(lengths[:-1], initial=0)]
    return [kept.start, *(start for start in starts if kept.start < start < kept.stop)]


def _from_starts(fields: Fields, size: int) -> list[int]:
    starts, name = _numbers(fields, STARTS), fields.names[STARTS]
    if starts[:1] != [0] or starts[-1] >= size or any(b <= a for a, b in pairwise(starts)):
        raise _wrong_borders(f"{name} is {_few(starts)}; expected 0 and more, ascending, below {size}.")
    return starts


def _wrong_borders(what: str) -> RowError:
    return RowError("borders-wrong", what, "pack the documents again, or leave the row out.")


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


# ------------------------------------------------------------------------------------------ lists of numbers


def _refuse_unread(fields: Fields, size: int) -> None:
    """Refuse a list of numbers, one for each id, that nothing reads: it may say what is trained."""
    if len(fields.row) == len(fields.names):
        return
    for name, value in fields.row.items():
        if name in fields.names.values() or name.lower() in _HARMLESS:
            continue
        if isinstance(value, list) and len(value) == size and _varies(value):
            known = ", ".join(BESIDE_IDS)
            what = f"{name} has a number for each id, and nothing reads it; known are {known}."
            fix = "give it one of these names, as with --map loss_mask=COLUMN, or take it out."
            raise RowError("unread-mask", what, fix)


def _varies(values: list[object]) -> bool:
    """Return whether a list holds numbers that differ, as a mask does."""
    return set(map(type, values)) <= {int, float, bool} and len(set(values)) > 1


def _integers(fields: Fields, column: str) -> list[int]:
    """Return a list of integers, one for each id."""
    values, name = _numbers(fields, column), fields.names[column]
    ids = fields.get("input_ids")
    size = len(ids) if isinstance(ids, list) else 0
    if len(values) != size:
        what = f"{name} has {len(values)} entries, input_ids has {size}."
        raise RowError("bad-tokens", what, "make them equally long.")
    return values


def _numbers(fields: Fields, column: str) -> list[int]:
    values = fields.get(column)
    if not isinstance(values, list) or set(map(type, values)) - {int, bool}:
        what = f"{fields.names[column]} is {kind_of(values)}, not a list of integers."
        raise RowError("bad-tokens", what, "write it as a list of integers.")
    return values
