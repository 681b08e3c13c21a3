"""Tokenizers for tests, real ones and those made here, resolved once per machine and state of the resolving code."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from sftdata import vocabulary
from sftdata.encode import autotokenizer, tokenizer
from sftdata.encode.engine import Encoder, load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer, resolve_tokenizer
from tests.made_tokenizers import MADE

TOKENIZERS = (
    "gpt-neox-20b", "gpt2", "llama-3.2-instruct", "minicpm3-4b", "minimind", "mistral-7b-instruct", "phi-3-mini",
    "qwen2.5-instruct", "qwen3", "t5-small", "torchtitan-test",
)  # fmt: skip
EVERY = (*TOKENIZERS, *MADE)  # the real ones and those made here
NO_GIGATOKEN = ("t5-small", "torchtitan-test", "made-unigram")

_code = b"".join(Path(str(module.__file__)).read_bytes() for module in (autotokenizer, vocabulary, tokenizer))
CACHE = Path(tempfile.gettempdir()) / f"sftdata-tests-{os.getuid()}-{hashlib.sha256(_code).hexdigest()[:12]}"


@lru_cache(maxsize=32)
def resolved(data: Path, name: str) -> ResolvedTokenizer:
    """Resolve a tokenizer of `shared_data` or `made_data`."""
    before = os.environ.get("SFTDATA_CACHE")
    os.environ["SFTDATA_CACHE"] = str(CACHE)
    try:
        return resolve_tokenizer(str(data / "tokenizers" / name))
    finally:
        os.environ.pop("SFTDATA_CACHE")
        if before is not None:
            os.environ["SFTDATA_CACHE"] = before


@lru_cache(maxsize=4)
def encoder(data: Path, name: str, engine: str = "auto") -> Encoder:
    """Load the fast engine where it serves, else the oracle."""
    chosen = ("tokenizers" if name in NO_GIGATOKEN else "gigatoken") if engine == "auto" else engine
    return load_encoder(resolved(data, name), chosen)  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def reference(data: Path, name: str) -> Tokenizer:
    """The resolved tokenizer as the `tokenizers` package reads it."""
    return Tokenizer.from_file(str(resolved(data, name).folder / "tokenizer.json"))
