"""What each token id stands for, read from the tokenizer folder of a set: its bytes, without a tokenizer library.

A tokenizer's own `decode` joins, strips and replaces; here one id is one stretch of bytes, so that text can be laid over ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from sftdata.errors import IntegrityError, UsageError

_TAG = re.compile(r"</?\w+>|\s*")


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    decoder: dict[str, Any] | None = None


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: printable Latin-1 itself, the rest shifted."""
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
    """

    pieces: dict[int, str]
    added: dict[int, str]
    special: frozenset[int]
    named: dict[str, str]
    stop_ids: frozenset[int]
    chat_template: str | None
    decoder: tuple[dict[str, Any], ...]

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
        if self._alphabet and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        for part in self.decoder:
            if part["type"] == "ByteFallback" and len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            piece = _decoded(piece, part)
        return piece.encode()

    def text_of(self, token_ids: Iterable[int]) -> str:
        r"""Return the text of some ids; bytes that are no utf-8 are spelled `\xe2`."""
        return b"".join(map(self.bytes_of, token_ids)).decode(errors="backslashreplace")

    def is_blank(self, token_id: int) -> bool:
        """Say whether an id adds nothing but whitespace."""
        last = self.pieces.get(token_id, "")[-1:]
        if (
            last.isascii() and last.isalnum() and token_id not in self.added
        ):  # most are words: no need to spell them
            return False
        return not self.text_of([token_id]).strip()

    def is_visible_token(self, token_id: int) -> bool:
        """Say whether an id is an added token that should be seen as one; runs of added whitespace are text."""
        return bool(self.added.get(token_id, "").strip())


def _decoded(piece: str, part: dict[str, Any]) -> str:
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
        raise UsageError(
            f"{folder}: no tokenizer.json, so ids cannot be turned into text.", "prepare the set again."
        )
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
    )


def generation_stops(folder: Path) -> list[int]:
    """Return the ids that generation_config.json stops at, empty without such a file."""
    found = (_read(folder / "generation_config.json", dict[str, Any]) or {}).get("eos_token_id")
    return found if isinstance(found, list) else [found] if isinstance(found, int) else []


def _stop_ids(folder: Path, config: dict[str, Any], added: dict[str, int]) -> frozenset[int]:
    eos = _content(config.get("eos_token"))
    return frozenset([*([added[eos]] if eos in added else []), *generation_stops(folder)])


def _content(token: Any) -> str:
    """Return the text of a token as tokenizer_config.json spells it: a string, or an object that holds one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return (
        [part for child in decoder["decoders"] for part in _flat(child)]
        if decoder["type"] == "Sequence"
        else [decoder]
    )


def _read(path: Path, kind: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path}: damaged: {error}.", "restore the file or prepare the set again."
        ) from None
