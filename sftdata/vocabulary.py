"""What a tokenizer folder tells without a tokenizer library: the bytes of each id, and where tokens lie.

A tokenizer's own `decode` joins, strips and replaces; here one id is one stretch of bytes, so that text can
be laid over ids. Where every token stands for a fixed number of bytes (`TokenLayout`), positions in a text
cost one cumulative sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from sftdata.errors import ANEW, RESTORE, IntegrityError, UsageError

METASPACE = "\u2581"  # SentencePiece writes a space as this
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_TAG = re.compile(r"</?\w+>|\s*")
LayoutKind = Literal["bytes", "spaces", "none"]
File = TypeVar("File")
Part = dict[str, Any]
"""A normalizer, pre-tokenizer or decoder of tokenizer.json, by its `type`."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    normalizer: Part | None = None
    pre_tokenizer: Part | None = None
    decoder: Part | None = None


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What decides where tokens lie.

    Attributes:
        kind: "bytes" (byte-level alphabet), "spaces" (SentencePiece, one metaspace per space), or "none"
            where lengths are no help.
        prefix: where a dummy prefix is added: nowhere ("none"), before the "first" byte of a text, or
            "always", after an added token too.
        prefix_doubles: the dummy prefix comes before a real space too (normalizer Prepend).
        prefix_words: words are split off at whitespace first, so that each gets its own prefix (T5).
        normal_form: Unicode normal form the text is brought into, or "".
        looks_ahead: words are found by a pattern, so that what follows can change the tokens before it.
    """

    kind: LayoutKind
    prefix: Literal["none", "first", "always"]
    prefix_doubles: bool
    prefix_words: bool
    normal_form: str
    looks_ahead: bool


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself, the other bytes are shifted to U+0100 and up.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {
        chr(256 + index): byte for index, byte in enumerate(shifted)
    }


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one tokenizer.

    Attributes:
        pieces: as tokenizer.json spells them, by id.
        added: texts of the added tokens, by id.
        special: ids of the added tokens that count as special.
        named: the tokenizer's named special tokens (`bos_token`, `eos_token`, ...).
        stop_ids: ids that end generation: EOS and those of generation_config.json.
        chat_template: the default template, if any.
        decoder: parts of the tokenizer's decoder, which say how pieces spell text.
        layout: where its tokens lie in a text.
    """

    pieces: dict[int, str]
    added: dict[int, str]
    special: frozenset[int]
    named: dict[str, str]
    stop_ids: frozenset[int]
    chat_template: str | None
    decoder: tuple[Part, ...]
    layout: TokenLayout

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_alphabet() if any(part["type"] == "ByteLevel" for part in self.decoder) else {}

    @property
    def enders(self) -> frozenset[int]:
        """Ids of added tokens that may end a turn: all but tags such as `</tool_call>`, which are text."""
        return frozenset(
            index for index, text in self.added.items() if index in self.special or not _TAG.fullmatch(text)
        )

    def bytes_of(self, token_id: int) -> bytes:
        """Return what one id adds to the text, in bytes; an id without a token is spelled `<id 7>`."""
        if token_id in self.added:
            return self.added[token_id].encode()
        piece = self.pieces.get(token_id)
        if piece is None:
            return f"<id {token_id}>".encode()
        if self._alphabet:
            with suppress(KeyError):  # a piece that is no byte-level text
                return bytes(map(self._alphabet.__getitem__, piece))
        for part in self.decoder:
            if part["type"] == "ByteFallback" and _BYTE_PIECE.fullmatch(piece):
                return bytes([int(piece[3:5], 16)])
            piece = _decoded(piece, part)
        return piece.encode()

    def lengths(self) -> list[int]:
        """Return the source bytes of every id, where the layout tells; unused ids stand for none."""
        source = replace(self, decoder=_SOURCE[self.layout.kind])
        known = self.pieces.keys() | self.added.keys()
        return [
            len(source.bytes_of(index)) if index in known else 0
            for index in range(max(known, default=-1) + 1)
        ]

    def text_of(self, token_ids: Iterable[int]) -> str:
        r"""Return the text of some ids; bytes that are no utf-8 are spelled `\xe2`."""
        return b"".join(map(self.bytes_of, token_ids)).decode(errors="backslashreplace")

    def is_blank(self, token_id: int) -> bool:
        """Return whether an id adds nothing but whitespace."""
        last = self.pieces.get(token_id, "")[-1:]
        if (
            last.isascii() and last.isalnum() and token_id not in self.added
        ):  # most are words: no need to spell them
            return False
        return not self.text_of([token_id]).strip()

    def is_visible_token(self, token_id: int) -> bool:
        """Return whether an id is an added token to be shown as one; runs of added whitespace are text."""
        return bool(self.added.get(token_id, "").strip())


# How the pieces of each kind of layout spell the text that they were cut from.
_SOURCE: dict[LayoutKind, tuple[Part, ...]] = {
    "bytes": ({"type": "ByteLevel"},),
    "spaces": ({"type": "ByteFallback"}, {"type": "Metaspace", "replacement": METASPACE}),
    "none": ({"type": "ByteFallback"}, {"type": "Metaspace", "replacement": METASPACE}),
}


def _decoded(piece: str, part: Part) -> str:
    if part["type"] == "Replace" and "String" in part["pattern"]:
        return piece.replace(part["pattern"]["String"], part["content"])
    if part["type"] == "Metaspace":
        return piece.replace(part["replacement"], " ")
    if part["type"] == "WordPiece":
        return piece.removeprefix(part["prefix"]) if piece.startswith(part["prefix"]) else f" {piece}"
    return piece


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read a tokenizer folder.

    Raises:
        UsageError: there is none.
        IntegrityError: a file in it is damaged.
    """
    file = _read(folder / "tokenizer.json", _TokenizerFile)
    if file is None:
        raise UsageError(f"{folder}: no tokenizer.json, so ids cannot be turned into text.", ANEW)
    vocab = file.model.vocab
    pieces = (
        {index: piece for piece, index in vocab.items()}
        if isinstance(vocab, dict)
        else dict(enumerate(p for p, _ in vocab))
    )
    config = _read(folder / "tokenizer_config.json", dict[str, Any]) or {}
    return Vocabulary(
        pieces=pieces,
        added={token.id: token.content for token in file.added_tokens},
        special=frozenset(token.id for token in file.added_tokens if token.special),
        named={
            name: _content(value)
            for name, value in config.items()
            if name.endswith("_token") and _content(value)
        },
        stop_ids=_stop_ids(folder, config, {token.content: token.id for token in file.added_tokens}),
        chat_template=_chat_template(folder, config),
        decoder=tuple(_flat(file.decoder)),
        layout=_layout(file),
    )


def read_added_tokens(folder: Path) -> dict[int, str]:
    """Return the added tokens of a tokenizer folder by id; none without a tokenizer.json.

    Raises:
        IntegrityError: it is damaged.
    """
    file = _read(folder / "tokenizer.json", _TokenizerFile)
    return {} if file is None else {token.id: token.content for token in file.added_tokens}


def generation_stops(folder: Path) -> list[int]:
    """Return the ids that generation_config.json stops at, empty without such a file."""
    found = (_read(folder / "generation_config.json", dict[str, Any]) or {}).get("eos_token_id")
    return found if isinstance(found, list) else [found] if isinstance(found, int) else []


def _stop_ids(folder: Path, config: dict[str, object], added: dict[str, int]) -> frozenset[int]:
    eos = _content(config.get("eos_token"))
    return frozenset([*([added[eos]] if eos in added else []), *generation_stops(folder)])


def _content(token: object) -> str:
    """Return the text of a token of tokenizer_config.json, which is a string or an object that holds one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _chat_template(folder: Path, config: dict[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _flat(part: Part | None) -> list[Part]:
    """Return the parts of a component, those of sequences one by one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    children = next(part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part)
    return [leaf for child in children for leaf in _flat(child)]


def _read(path: Path, kind: type[File]) -> File | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: damaged: {error}.", RESTORE) from None


def _layout(file: _TokenizerFile) -> TokenLayout:
    normalizers, splitters = _flat(file.normalizer), _flat(file.pre_tokenizer)
    forms = [part["type"] for part in normalizers if part["type"] in UNICODE_FORMS]
    names = [part["type"] for part in splitters]
    return TokenLayout(
        kind=_kind(file.model, normalizers, splitters),
        prefix=_prefix(normalizers, splitters),
        prefix_doubles=any(part["type"] == "Prepend" for part in normalizers),
        prefix_words="WhitespaceSplit" in names,
        normal_form=forms[0] if len(forms) == 1 else "",
        looks_ahead=any(name not in ("Metaspace", "WhitespaceSplit") for name in names),
    )


def _kind(model: _Model, normalizers: list[Part], splitters: list[Part]) -> LayoutKind:
    if model.type not in ("BPE", "Unigram") or model.continuing_subword_prefix or model.end_of_word_suffix:
        return "none"
    if any(part["type"] == "ByteLevel" for part in splitters):
        return (
            "bytes"
            if all(part["type"] in UNICODE_FORMS for part in normalizers) and len(normalizers) <= 1
            else "none"
        )
    marked = any(_writes_metaspace(part) for part in [*normalizers, *splitters])
    plain = all(_writes_metaspace(part) or part["type"] == "Prepend" for part in normalizers) and all(
        map(_keeps_text, splitters)
    )
    return "spaces" if marked and plain else "none"


def _writes_metaspace(part: Part) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == METASPACE)
    return bool(part["type"] == "Metaspace" and part["replacement"] == METASPACE)


def _keeps_text(part: Part) -> bool:
    return _writes_metaspace(part) or (part["type"] == "Split" and part["behavior"] != "Removed")


def _prefix(normalizers: list[Part], splitters: list[Part]) -> Literal["none", "first", "always"]:
    schemes = [part["prepend_scheme"] for part in splitters if part["type"] == "Metaspace"]
    spaced = any(part["type"] == "ByteLevel" and part["add_prefix_space"] for part in splitters)
    if spaced or "always" in schemes or any(part["type"] == "Prepend" for part in normalizers):
        return "always"
    return "first" if "first" in schemes else "none"
