"""Rows tokenized elsewhere: ids, with labels, and with the masks that tools put beside them."""

from __future__ import annotations

from typing import Any

from sftdata.batches import IGNORE_INDEX, Tokens
from sftdata.errors import RowError
from sftdata.formats.fields import Fields, FormatOptions
from sftdata.sources.jsonrows import kind_of

# Masks of what is trained, 1 for each such token; one of the prompt says the opposite.
TRAINED = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "response_mask")
PROMPT = "prompt_mask"
BESIDE_IDS = ("labels", *TRAINED, PROMPT, "attention_mask", "position_ids", "seq_lengths")
# What tokenizers add that says nothing about training.
_HARMLESS = frozenset({"token_type_ids", "mm_token_type_ids", "special_tokens_mask"})
_ONE_EACH = "write one document a row; packing is done here."


def fits_tokens(fields: Fields) -> bool:
    """Say whether a row holds a flat list of ids."""
    ids = fields.get("input_ids")
    return isinstance(ids, list) and set(map(type, ids)) == {int}


def convert_tokens(fields: Fields, options: FormatOptions) -> Tokens:
    """Return the ids without their padding; a token is trained where its label and every mask say so.

    Raises:
        RowError: a column that is no list of integers of the same length, several documents in one row, or a list of numbers, one
            for each id, that nothing reads.
    """
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
    kept = slice(None) if fields.get("attention_mask") is None else _unpadded(fields)
    _refuse_packed(fields, kept)
    return Tokens(ids[kept], labels[kept])


def _bits(fields: Fields, column: str) -> list[int]:
    values = _integers(fields, column)
    if strange := sorted(set(values) - {0, 1}):
        what = f"{fields.names[column]} holds {strange[0]}; expected 0 or 1."
        raise RowError("bad-tokens", what, "write 1 or 0 for each id.")
    return values


def _unpadded(fields: Fields) -> slice:
    """Return where the attention mask is not 0."""
    mask, name = _integers(fields, "attention_mask"), fields.names["attention_mask"]
    documents = {value for value in mask if value}
    if len(documents) > 1:
        raise RowError("packed-row", f"{name} numbers {len(documents)} documents in one row.", _ONE_EACH)
    kept = [index for index, value in enumerate(mask) if value]
    if not kept:
        raise RowError("bad-tokens", f"{name} is 0 everywhere.", "remove the row.")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise RowError("bad-tokens", f"{name} is 0 in the middle of the row.", "take the padding out.")
    return slice(kept[0], kept[-1] + 1)


def _refuse_packed(fields: Fields, kept: slice) -> None:
    """Refuse several documents in one row: their borders would be lost."""
    if fields.get("position_ids") is not None:
        positions = _integers(fields, "position_ids")[kept]
        for index in range(1, len(positions)):
            if positions[index] <= positions[index - 1]:
                what = f"{fields.names['position_ids']} start anew at token {index}: the row holds several documents."
                raise RowError("packed-row", what, _ONE_EACH)
    lengths = fields.get("seq_lengths")
    if isinstance(lengths, list) and len(lengths) > 1:
        what = f"{fields.names['seq_lengths']} counts {len(lengths)} documents in one row."
        raise RowError("packed-row", what, _ONE_EACH)


def _refuse_unread(fields: Fields, size: int) -> None:
    """Refuse a list of numbers, one for each id, that nothing reads: it may say what is trained."""
    if len(fields.row) == len(fields.names):
        return
    for name, value in fields.row.items():
        if name in fields.names.values() or name.lower() in _HARMLESS:
            continue
        if isinstance(value, list) and len(value) == size and _says_something(value):
            what = (
                f"{name} has a number for each id, and nothing reads it; known are {', '.join(BESIDE_IDS)}."
            )
            raise RowError(
                "unread-mask",
                what,
                "give it one of these names, as with --map loss_mask=COLUMN, or take it out.",
            )


def _says_something(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int, float, bool} and len(set(values)) > 1


def _integers(fields: Fields, column: str) -> list[int]:
    values, name = fields.get(column), fields.names[column]
    if not isinstance(values, list) or set(map(type, values)) - {int, bool}:
        raise RowError(
            "bad-tokens",
            f"{name} is {kind_of(values)}, not a list of integers.",
            "write it as a list of integers.",
        )
    if len(values) != len(fields.get("input_ids")):
        what = f"{name} has {len(values)} entries, input_ids has {len(fields.get('input_ids'))}."
        raise RowError("bad-tokens", what, "make them equally long.")
    return values
