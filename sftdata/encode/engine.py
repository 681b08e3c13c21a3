"""Texts to ids: gigatoken where it is proven equal, the `tokenizers` package as the reference and fallback.

An engine turns texts into ids and nothing else: no BOS or EOS, no truncation, added tokens matched. The
reference with byte positions (`ExactEncoder`) takes one text at a time: slow, exact, and able to treat
control tokens as data. It serves the rows that cumulative lengths cannot place, texts cut at the edge of a
trained span, and data that spells a control token. The last two are encoded in sections: the template's own
added tokens are found first, as the tokenizer itself does, and the stretches between them go through a copy
of the tokenizer that has no added tokens.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from xxhash import xxh3_128

from sftdata.batches import Bool, Int32, Int64, offsets_of
from sftdata.encode.tokenizer import AddedToken, ResolvedTokenizer
from sftdata.errors import UsageError
from sftdata.vocabulary import METASPACE

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


Engine = Literal["gigatoken", "tokenizers"]
Encode = Callable[[Sequence[str]], tuple[Int32, Int64]]


class Encoder:
    """Encode texts of one tokenizer; one per worker process.

    Attributes:
        resolved: the tokenizer.
        engine: which engine serves `encode`.
        encode: texts to (int32[T] ids, int64[N + 1] offsets).
        added: added tokens by id: their text in utf-8, and whether they absorb whitespace before
            and after them.
    """

    def __init__(self, resolved: ResolvedTokenizer, engine: Engine, encode: Encode) -> None:
        self.resolved = resolved
        self.engine = engine
        self.encode = encode
        self.added = {
            token.id: (token.content.encode(), token.lstrip, token.rstrip) for token in resolved.added_tokens
        }

    @cached_property
    def exact(self) -> ExactEncoder:
        """The reference with positions, for rows that need care; loaded when the first such row comes."""
        self.resolved.require_files()
        return ExactEncoder(self.resolved)

    @cached_property
    def byte_lengths(self) -> Int64:
        """int64[V], source bytes per token id; meaningful unless `resolved.layout.kind` is "none"."""
        lengths: Int64 = np.load(self.resolved.lengths_file)
        return lengths

    @cached_property
    def is_added(self) -> Bool:
        """bool[V], tokens that are matched before anything else."""
        return self._flags(token.id for token in self.resolved.added_tokens)

    @cached_property
    def strips_right(self) -> Bool:
        """bool[V], added tokens that absorb the whitespace after them."""
        return self._flags(token.id for token in self.resolved.added_tokens if token.rstrip)

    @cached_property
    def strips_left(self) -> Bool:
        """bool[V], added tokens that absorb the whitespace before them."""
        return self._flags(token.id for token in self.resolved.added_tokens if token.lstrip)

    def _flags(self, ids: Iterable[int]) -> Bool:
        flags = np.zeros(self.resolved.vocab_size, np.bool_)
        flags[list(ids)] = True
        return flags


def load_encoder(resolved: ResolvedTokenizer, engine: Engine) -> Encoder:
    """Load one engine for a tokenizer.

    Raises:
        UsageError: gigatoken does not know this kind of tokenizer.
        SftError: its files are gone.
    """
    resolved.require_files()
    return Encoder(
        resolved, engine, _load_gigatoken(resolved) if engine == "gigatoken" else _load_tokenizers(resolved)
    )


def _load_tokenizers(resolved: ResolvedTokenizer) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(resolved.folder / "tokenizer.json"))

    def encode(texts: Sequence[str]) -> tuple[Int32, Int64]:
        rows = [
            encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        offsets = offsets_of([len(ids) for ids in rows])
        return np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1]), offsets

    return encode


def _load_gigatoken(resolved: ResolvedTokenizer) -> Encode:
    import gigatoken

    try:
        # from_json, not the folder: by folder it may choose by the names in tokenizer_config.json.
        backend = gigatoken.Tokenizer.from_json((resolved.folder / "tokenizer.json").read_bytes()).backend
    except Exception as error:  # its refusals share no class
        reason = " ".join(str(error).split())[:200]
        what = f"gigatoken cannot read tokenizer {resolved.name!r} ({reason})."
        raise UsageError(what, "--engine auto") from None

    def encode(texts: Sequence[str]) -> tuple[Int32, Int64]:
        # One call per text: its batch call imports awkward (0.5 s to start) and is hardly faster.
        rows = [backend.encode(text) for text in texts]
        ids = np.concatenate(rows) if rows else np.zeros(0, np.uint32)
        return ids.view(np.int32), offsets_of([len(row) for row in rows])

    return encode


def choose_engine(
    resolved: ResolvedTokenizer,
    requested: Literal["auto", "gigatoken", "tokenizers"],
    *,
    worth_it: bool = True,
) -> tuple[Engine, str]:
    """Choose the engine of a run, and say why: gigatoken only if it equals the reference on hard texts.

    Each shard task compares the two again on a sample of its own texts. The verdict on the hard texts is kept
    beside the resolved tokenizer, for this version of gigatoken and tokenizers.

    Args:
        worth_it: False for an input so small that loading a second engine costs more than it saves.

    Raises:
        UsageError: gigatoken was asked for by name and cannot serve.
    """
    if requested == "tokenizers" or (requested == "auto" and not worth_it):
        return "tokenizers", "asked for" if requested == "tokenizers" else "the input is small"
    refusal = _verdict(resolved)
    if not refusal:
        return "gigatoken", "equal to tokenizers on the hard texts; a sample of each slice is checked too"
    if requested == "gigatoken":
        raise UsageError(f"Tokenizer {resolved.name!r}: {refusal}.", "--engine auto")
    return "tokenizers", refusal


def _verdict(resolved: ResolvedTokenizer) -> str:
    """Return why gigatoken cannot serve a tokenizer, "" where it can; computed once per version of both."""
    versions = "-".join(version(name) for name in ("gigatoken", "tokenizers"))
    path = resolved.folder.parent / f"gate-{versions}.json"
    try:
        kept: str = msgspec.json.decode(path.read_bytes(), type=str)
        return kept
    except (OSError, msgspec.MsgspecError):
        refusal = _judge(resolved)
    # Several runs may judge at once; each rename is whole, and all say the same.
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(msgspec.json.encode(refusal))
    os.replace(draft, path)
    return refusal


def _judge(resolved: ResolvedTokenizer) -> str:
    try:
        encoder = load_encoder(resolved, "gigatoken")
    except UsageError as error:
        return error.message.rstrip(".")
    equal = check_engine(encoder, load_encoder(resolved, "tokenizers"), hard_texts(resolved))
    return "" if equal else "gigatoken gives other ids on hard texts"


def hard_texts(resolved: ResolvedTokenizer) -> list[str]:
    """Return the fixed hard texts, and each added token of this tokenizer inside running text."""
    added = [
        f"a {token.content} b{token.content}\n  {token.content}{token.content}x"
        for token in resolved.added_tokens
    ]
    return [*HARD_TEXTS, *added]


def check_engine(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> bool:
    """Return whether two encoders give the same ids on these texts."""
    return digest_ids(encoder, texts) == digest_ids(reference, texts)


def digest_ids(encoder: Encoder, texts: Sequence[str]) -> str:
    """Return an xxh3-128 of the ids of these texts and their offsets: equal for two encoders that agree."""
    ids, offsets = encoder.encode(texts)
    digest = xxh3_128(ids.tobytes())
    digest.update(offsets.tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------- the reference, with byte positions

# Replaces each visible character of literal text while added tokens are looked for: no token contains it.
MASK = "\ue000"
# Unicode's White_Space, which added tokens strip; str.isspace also counts the separators 0x1c to 0x1f.
_EN_TO_HAIR = "".join(map(chr, range(0x2000, 0x200B)))
WHITESPACE = f"\t\n\x0b\x0c\r \x85\xa0\u1680{_EN_TO_HAIR}\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Tokens of one text: int32[T] ids, and int64[T] starts and ends of their byte ranges, both ascending."""

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
    """Encode with positions.

    The range of an added token is its own text, without the whitespace it absorbs unless `reach` is set.
    """

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
            at_start: False for the rest of a cut text: it gets no dummy prefix.
            reach: let added tokens range over the whitespace they absorb.
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
                continue  # the unknown token, which the model gives text outside its vocabulary
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
        prefixed = position == 0 or self._layout.prefix == "always"
        return self._one(self._plain if prefixed else self._plain_inside, text, reach).shifted(position)

    def _continued(self, text: str, reach: bool) -> Located:
        """Encode text that continues other text: its first word has no dummy prefix."""
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
            _empty_dummy_prefix(encoding, text, starts, ends)
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
    """Hide literal text, but not its whitespace: neighbours that absorb whitespace must still see it."""
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


def _empty_dummy_prefix(encoding: Encoding, text: str, starts: Int64, ends: Int64) -> None:
    """Give the dummy prefix an empty range: the tokenizer's offsets claim the character after it."""
    for index, piece in enumerate(encoding.tokens):
        if piece in (METASPACE, "\u0120") and text[starts[index] : ends[index]] not in (
            " ",
            METASPACE,
            "\u0120",
        ):
            ends[index] = starts[index]


def _close_gaps(text: str, starts: Int64, ends: Int64) -> None:
    """Extend a token over the combining marks that were merged into it: its offsets leave them out."""
    following = np.append(starts[1:], len(text))
    for index in np.flatnonzero(following > ends):
        if text[ends[index] : following[index]].strip(WHITESPACE):
            ends[index] = following[index]


def _without_added(spec: dict[str, Any]) -> dict[str, Any]:
    """Drop the added tokens, and hide them in the model's own vocabulary, so that no text can become one."""
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
    """Drop everything that adds a dummy prefix to a text."""
    return spec | {key: _unprefixed(spec[key]) for key in ("normalizer", "pre_tokenizer")}


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part = part | {key: [kept for child in part[key] if (kept := _unprefixed(child)) is not None]}
    if part["type"] == "Metaspace":
        part = part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part.get("add_prefix_space") else part


# Texts on which tokenizer engines have differed, or could: the fixed part of the parity gate.
HARD_TEXTS = (
    # whitespace, line ends, control characters
    "", " ", "  ", "\n", "\t", "\r\n", "\x00", " leading", "trailing ", "trailing\n\n",
    "\x1c\x85\xa0\u2003\u3000x",
    "a  b   c    d\t\te", "line\r\nline\rline\n\n\n  indented\n\t\ttabs",
    "def f(x):\n        return x**2  # 8 spaces\n" + " " * 40 + "end",
    # words and numbers
    "I'm you'RE they'll WE'VE 'tis 's 'S \u2019s don't",
    "0 1 12 123 1234 12345 3.14159 1,000,000 \u0663\u0664 \u00bd \u2167 x2y",
    "https://example.org/a_b?c=d&e=%20f#g camelCaseWord snake_case_word SCREAMING x86_64 \\frac{a}{b}"
    " {\"k\": [1, 2]}",
    # combining marks, composed and decomposed; scripts; emoji
    "e\u0301 \u00e9 a\u0300\u0316 \u1112\u1161\u11ab \u0958 \ufb01 \u212b \u0344",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587\u6df7\u5408text\ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea"
    " \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0e44\u0e17\u0e22 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u1f08\u03c1\u03c7\u03ae",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd"
    " \u2764\ufe0f \U0001f600" * 3,
    "\u2581under \u2581\u2581 \ufeffbom \u200b\u200d\u00ad \ue000 \ufffd \U0010ffff \u0378",
    # long runs
    "a" * 3000, "ab" * 700, " " * 700, "\n" * 500, "=" * 300 + "-" * 299, "!?.,;:" * 60, "\u4e2d" * 400,
    "\u0301" * 60, "9" * 301,
    # control tokens of the common families, whole and torn
    "<0x41><unk><s></s>[INST] x [/INST]", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>", "<|im_end",
    "|>im_end|>",
    "<|begin_of_text|><|eot_id|> <|end|> \n<|user|>\n  x<|endoftext|>",
)  # fmt: skip
