"""The reference tokenizer with byte positions, one text at a time: slow, exact, and able to treat control tokens as data.

Used for the rows that cumulative lengths cannot place, for texts cut at the edge of a trained span, and for data that spells
a control token. The last two are encoded in sections: the template's own added tokens are found first, as the tokenizer itself
does, and the stretches between them go through a copy of the tokenizer that has no added tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sftdata.batches import Int32, Int64
from sftdata.encode.tokenizer import AddedToken, ResolvedTokenizer
from sftdata.vocabulary import MARKER

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Stands for each visible character of literal text while added tokens are looked for: no token contains it.
MASK = "\ue000"
# Unicode's White_Space, which is what added tokens strip; str.isspace also counts the separators 0x1c to 0x1f.
WHITESPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Tokens of one text: int32[T] ids, and the half-open byte range of each (int64[T] starts and ends, both ascending)."""

    ids: Int32
    starts: Int64
    ends: Int64

    def shifted(self, by: int) -> Located:
        """Move all positions."""
        return Located(self.ids, self.starts + by, self.ends + by)


def join(parts: list[Located]) -> Located:
    """Put tokens one after another; positions stay."""
    nothing = np.zeros(0, np.int64)
    return Located(
        np.concatenate([nothing.astype(np.int32), *(part.ids for part in parts)]),
        np.concatenate([nothing, *(part.starts for part in parts)]),
        np.concatenate([nothing, *(part.ends for part in parts)]),
    )


class ExactEncoder:
    """Encode with positions. An added token's range is its own text, without whitespace it swallows (`reach` includes it)."""

    def __init__(self, resolved: ResolvedTokenizer) -> None:
        self._path = resolved.folder / "tokenizer.json"
        self._layout = resolved.layout
        self._added: dict[int, AddedToken] = {token.id: token for token in resolved.added_tokens}

    def encode(
        self, raw: bytes, literal: list[tuple[int, int]], *, at_start: bool = True, reach: bool = False
    ) -> Located:
        """Encode one utf-8 text.

        Args:
            raw: the text, or the rest of one that was cut.
            literal: byte ranges whose text must not be matched as added tokens.
            at_start: False for the rest of a cut text: no space is invented before it.
            reach: let added tokens range over the whitespace they swallow.
        """
        text = raw.decode()
        lengths = _byte_positions(text)
        if not literal and (at_start or self._layout.prefix == "none"):
            located = self._one(self._joint, text, reach)
        else:
            chars = [tuple(np.searchsorted(lengths, edge).tolist()) for edge in literal]
            located = self._sections(text, chars, at_start, reach)
        return Located(located.ids, lengths[located.starts], lengths[located.ends])

    def _sections(self, text: str, literal: list[tuple[int, int]], at_start: bool, reach: bool) -> Located:
        masked = _masked(text, literal)
        found = self._one(self._joint, masked, reach=True)
        parts, position = [], 0
        for index in np.flatnonzero(np.isin(found.ids, list(self._added))).tolist():
            start, stop = int(found.starts[index]), int(found.ends[index])
            token = self._added[int(found.ids[index])]
            if not token.normalized and token.content not in masked[start:stop]:
                continue  # the model's own: what it writes for text that it does not know
            parts.append(self._stretch(text[position:start], position, at_start, reach))
            parts.append(self._added_token(int(found.ids[index]), text, start, stop, reach))
            position = stop
        parts.append(self._stretch(text[position:], position, at_start, reach))
        return join(parts)

    def _added_token(self, token_id: int, text: str, start: int, stop: int, reach: bool) -> Located:
        token = Located(np.array([token_id], np.int32), np.array([start]), np.array([stop]))
        if not reach:
            self._strip(token.ids, text, token.starts, token.ends)
        return token

    def _stretch(self, text: str, position: int, at_start: bool, reach: bool) -> Located:
        if position == 0 and not at_start:
            return self._continued(text, reach)
        invents = position == 0 or self._layout.prefix == "always"
        return self._one(self._plain if invents else self._plain_inside, text, reach).shifted(position)

    def _continued(self, text: str, reach: bool) -> Located:
        """Encode text that goes on where other text ended: its first word has no invented space."""
        space = re.search(r"\s", text) if self._layout.prefix_words else None
        if space is None:
            return self._one(self._plain_inside, text, reach)
        cut = space.start()
        return join(
            [
                self._one(self._plain_inside, text[:cut], reach),
                self._one(self._plain, text[cut:], reach).shifted(cut),
            ]
        )

    def _one(self, tokenizer: Tokenizer, text: str, reach: bool) -> Located:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        starts, ends = places[:, 0].copy(), places[:, 1].copy()
        if self._layout.prefix != "none":
            _empty_invented(encoding, text, starts, ends)
        if self._layout.normal_form or self._layout.kind == "none":
            _close_gaps(text, starts, ends)
        if not reach:
            self._strip(ids, text, starts, ends)
        return Located(ids, np.maximum.accumulate(starts), np.maximum.accumulate(ends))

    def _strip(self, ids: Int32, text: str, starts: Int64, ends: Int64) -> None:
        for index in np.flatnonzero(np.isin(ids, self._stripping)):
            token = text[starts[index] : ends[index]]
            starts[index] += len(token) - len(token.lstrip(WHITESPACE))
            ends[index] -= len(token) - len(token.rstrip(WHITESPACE))

    @cached_property
    def _stripping(self) -> list[int]:
        return [token.id for token in self._added.values() if token.lstrip or token.rstrip]

    # ---------------------------------------------------------------------------- forms of the tokenizer

    @cached_property
    def _joint(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._path))
        tokenizer.post_processor = None  # it would trim the offsets of whitespace; ids are the same without
        return tokenizer

    @cached_property
    def _plain(self) -> Tokenizer:
        return self._form(_without_added(json.loads(self._path.read_bytes())))

    @cached_property
    def _plain_inside(self) -> Tokenizer:
        if self._layout.prefix == "none":
            return self._plain
        return self._form(_without_prefix(_without_added(json.loads(self._path.read_bytes()))))

    def _form(self, spec: dict[str, Any]) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(spec))


def _masked(text: str, literal: list[tuple[int, int]]) -> str:
    """Hide literal text, but not its whitespace: neighbours that strip whitespace must still see it."""
    chars = list(text)
    for start, stop in literal:
        chars[start:stop] = [char if char in WHITESPACE else MASK for char in chars[start:stop]]
    return "".join(chars)


def _byte_positions(text: str) -> Int64:
    """int64[C + 1]: where each character starts in utf-8, and the end."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    positions = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=positions[1:])
    return positions


def _empty_invented(encoding: Encoding, text: str, starts: Int64, ends: Int64) -> None:
    """Give a space that the tokenizer invented no text: its offsets claim the character that follows."""
    for index, piece in enumerate(encoding.tokens):
        if piece in (MARKER, "\u0120") and text[starts[index] : ends[index]] not in (" ", MARKER, "\u0120"):
            ends[index] = starts[index]


def _close_gaps(text: str, starts: Int64, ends: Int64) -> None:
    """Let a token reach over the combining marks that were merged into it: its offsets leave them out."""
    following = np.append(starts[1:], len(text))
    for index in np.flatnonzero(following > ends):
        if text[ends[index] : following[index]].strip(WHITESPACE):
            ends[index] = following[index]


def _without_added(spec: dict[str, Any]) -> dict[str, Any]:
    """Drop the added tokens, and rename them where the model's own vocabulary holds them, so that none can be born from text."""
    model = spec["model"]
    contents = {token["content"] for token in spec["added_tokens"]}
    if isinstance(model["vocab"], dict):
        contents.discard(model.get("unk_token"))
        model["vocab"] = {_hidden(piece, contents): index for piece, index in model["vocab"].items()}
        model["merges"] = [
            pair for pair in model.get("merges", []) if not contents.intersection(_merge_parts(pair))
        ]
    else:
        model["vocab"] = [[_hidden(piece, contents), score] for piece, score in model["vocab"]]
    return spec | {"added_tokens": [], "post_processor": None}


def _hidden(piece: str, contents: set[str]) -> str:
    return f"{MASK}{piece}{MASK}" if piece in contents else piece


def _merge_parts(pair: list[str] | str) -> tuple[str, str, str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right, left + right


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """Drop everything that invents a space before a text."""
    return spec | {"normalizer": _quiet(spec["normalizer"]), "pre_tokenizer": _quiet(spec["pre_tokenizer"])}


def _quiet(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part = part | {key: [kept for child in part[key] if (kept := _quiet(child)) is not None]}
    if part["type"] == "Metaspace":
        part = part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part.get("add_prefix_space") else part
