"""Two engines behind one gate: gigatoken where it is proven equal, the `tokenizers` package as oracle and fallback.

An engine turns texts into ids and nothing else: no BOS or EOS, no truncation, added tokens matched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from typing import Literal

import msgspec
import numpy as np
from xxhash import xxh3_128

from sftdata.batches import Bool, Int32, Int64
from sftdata.encode.exact import ExactEncoder
from sftdata.encode.hard_texts import HARD_TEXTS
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError
from sftdata.ragged import offsets_of

Engine = Literal["gigatoken", "tokenizers"]
Encode = Callable[[Sequence[str]], tuple[Int32, Int64]]


class Encoder:
    """Encode texts of one tokenizer; one per worker process.

    Attributes:
        resolved: the tokenizer.
        engine: which engine serves `encode`.
        encode: texts to (int32[T] ids, int64[N + 1] offsets).
        added: added tokens by id: their text in utf-8, and whether they swallow whitespace to the left and right.
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
        self.resolved.check_standing()
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
        """bool[V], added tokens that swallow the whitespace after them."""
        return self._flags(token.id for token in self.resolved.added_tokens if token.rstrip)

    @cached_property
    def strips_left(self) -> Bool:
        """bool[V], added tokens that swallow the whitespace before them."""
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
    resolved.check_standing()
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
        raise UsageError(
            f"gigatoken cannot read tokenizer {resolved.name!r} ({reason}).", "--engine auto"
        ) from None

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
    """Choose the engine of a run and say why: gigatoken only where it equals the reference on hard texts.

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
    """Return why gigatoken cannot serve a tokenizer, "" where it can; computed once for each version of both."""
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


def check_engine(encoder: Encoder, oracle: Encoder, texts: Sequence[str]) -> bool:
    """Tell whether two encoders give the same ids on these texts."""
    return digest_ids(encoder, texts) == digest_ids(oracle, texts)


def digest_ids(encoder: Encoder, texts: Sequence[str]) -> str:
    """Return an xxh3-128 of the ids of these texts and of where each begins: equal for two encoders that agree."""
    ids, offsets = encoder.encode(texts)
    digest = xxh3_128(ids.tobytes())
    digest.update(offsets.tobytes())
    return digest.hexdigest()


def char_offsets(
    resolved: ResolvedTokenizer, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return ids and the (start, stop) characters of each token, as the oracle gives them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(resolved.folder / "tokenizer.json"))
    return [
        (encoding.ids, encoding.offsets)
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
