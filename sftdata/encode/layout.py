"""How a tokenizer's ids lie on the bytes of the text, read from its tokenizer.json.

Where every token stands for a fixed number of bytes, positions cost one cumulative sum and no offsets are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sftdata.batches import Int64

MARKER = "\u2581"  # SentencePiece writes a space as this
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides where tokens lie.

    Attributes:
        kind: "bytes" (byte-level alphabet), "spaces" (SentencePiece, one marker per space) or "none": lengths tell nothing.
        prefix: where a space is invented before the text: nowhere, at its "first" byte, "always" after an added token too.
        prefix_doubles: the invented space comes before a real one too (normalizer Prepend).
        prefix_words: words are split off at whitespace first, so that each gets its own prefix (T5).
        normal_form: Unicode normal form the text is brought into, or "".
        looks_ahead: words are found by a pattern, so that what follows can change the tokens before it.
    """

    kind: Literal["bytes", "spaces", "none"]
    prefix: Literal["none", "first", "always"]
    prefix_doubles: bool
    prefix_words: bool
    normal_form: str
    looks_ahead: bool


def read_layout(spec: dict[str, Any]) -> Layout:
    """Read the layout from a parsed tokenizer.json."""
    normalizers = list(_flat(spec.get("normalizer"), "normalizers"))
    splitters = list(_flat(spec.get("pre_tokenizer"), "pretokenizers"))
    forms = [part["type"] for part in normalizers if part["type"] in UNICODE_FORMS]
    names = [part["type"] for part in splitters]
    return Layout(
        kind=_kind(spec["model"], normalizers, splitters),
        prefix=_prefix(normalizers, splitters),
        prefix_doubles=any(part["type"] == "Prepend" for part in normalizers),
        prefix_words="WhitespaceSplit" in names,
        normal_form=forms[0] if len(forms) == 1 else "",
        looks_ahead=any(name not in ("Metaspace", "WhitespaceSplit") for name in names),
    )


def byte_lengths(spec: dict[str, Any], layout: Layout) -> Int64:
    """Return the number of source bytes each token id stands for (int64[V]); unused ids stand for none."""
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    pieces = dict(_vocab(spec["model"]))
    lengths = np.zeros(max([*pieces.values(), *added.values()], default=-1) + 1, np.int64)
    for piece, index in pieces.items():
        lengths[index] = len(piece) if layout.kind == "bytes" else _spaces_length(piece)
    for content, index in added.items():
        lengths[index] = len(content.encode())
    return lengths


def _spaces_length(piece: str) -> int:
    return 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(MARKER, " ").encode())


def _vocab(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((piece, index) for index, (piece, _) in enumerate(vocab))


def _flat(component: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if component is None:
        return
    if component["type"] == "Sequence":
        for part in component[key]:
            yield from _flat(part, key)
    else:
        yield component


def _kind(
    model: dict[str, Any], normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]
) -> Literal["bytes", "spaces", "none"]:
    if (
        model["type"] not in ("BPE", "Unigram")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return "none"
    if any(part["type"] == "ByteLevel" for part in splitters):
        return (
            "bytes"
            if all(part["type"] in UNICODE_FORMS for part in normalizers) and len(normalizers) <= 1
            else "none"
        )
    marked = any(_writes_marker(part) for part in [*normalizers, *splitters])
    plain = all(_writes_marker(part) or part["type"] == "Prepend" for part in normalizers) and all(
        map(_keeps_text, splitters)
    )
    return "spaces" if marked and plain else "none"


def _writes_marker(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == MARKER)
    return bool(part["type"] == "Metaspace" and part["replacement"] == MARKER)


def _keeps_text(part: dict[str, Any]) -> bool:
    return _writes_marker(part) or (part["type"] == "Split" and part["behavior"] != "Removed")


def _prefix(
    normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]
) -> Literal["none", "first", "always"]:
    schemes = [part["prepend_scheme"] for part in splitters if part["type"] == "Metaspace"]
    spaced = any(part["type"] == "ByteLevel" and part["add_prefix_space"] for part in splitters)
    if spaced or "always" in schemes or any(part["type"] == "Prepend" for part in normalizers):
        return "always"
    return "first" if "first" in schemes else "none"
