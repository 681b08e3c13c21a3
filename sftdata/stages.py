"""The loaded stages of a job: what a worker process builds once and every task goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from sftdata.encode.engine import Encoder, Engine, choose_engine, digest_ids, load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.plan import Job
from sftdata.render.guards import describe_tokens
from sftdata.render.template import ChatTemplate

SAMPLE_TEXTS = 16
SAMPLE_CHARS = (
    1 << 11
)  # of each text; the window moves from the beginning of the first to the end of the last


@dataclass(frozen=True)
class Stages:
    """Renderer and encoder of one job."""

    job: Job

    @cached_property
    def renderer(self) -> Renderer:
        """What turns canonical rows into texts."""
        config, tokenizer = self.job.config, self.job.tokenizer
        finder = None
        if tokenizer.chat_template is not None:
            template = ChatTemplate(
                tokenizer.chat_template, tokenizer.special_tokens, config.date, config.template_kwargs
            )
            finder = SpanFinder(
                template, tokenizer.stop_tokens, *tokenizer.by_mark, config.trust_control_tokens
            )
        return Renderer(finder, self.job.mask, config.eos_token or "")

    @cached_property
    def names(self) -> list[str]:
        """Names of the sources, in the order of their numbers."""
        return list(self.job.sources)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into ids."""
        return _encoder(self.job.tokenizer, self.job.engine)

    def token_notes(self) -> list[str]:
        """Say which added tokens stay text when a message spells them; nothing without a chat template."""
        finder = self.renderer.finder
        added = [token.content for token in self.job.tokenizer.added_tokens]
        return [] if finder is None else describe_tokens(finder.guarded, added)

    def sample(self, texts: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Return windows of some of these texts, and a digest of a fast engine's ids for them.

        The parent process compares them with the reference tokenizer, which then need not be loaded here.
        """
        if not texts or self.encoder.engine == "tokenizers":
            return (), ""
        chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLE_TEXTS).astype(np.int64)).tolist()
        windows = np.linspace(0, 1, len(chosen)).tolist()
        sample = tuple(_window(texts[index], where) for index, where in zip(chosen, windows, strict=True))
        return sample, digest_ids(self.encoder, sample)


def _window(text: str, where: float) -> str:
    """Return `SAMPLE_CHARS` characters of a text; `where` is 0 for the first, 1 for the last of them."""
    start = int(where * max(len(text) - SAMPLE_CHARS, 0))
    return text[start : start + SAMPLE_CHARS]


_loaded: Stages | None = None


def load_stages(job: Job) -> Stages:
    """Return the stages of a job, built once in each process."""
    global _loaded
    if _loaded is None or _loaded.job != job:
        _loaded = Stages(job)
    return _loaded


def load_shared(job: Job) -> None:
    """Load the stages that every task of a job needs."""
    stages = load_stages(job)
    _ = stages.renderer, stages.encoder.strips_right
    if job.tokenizer.layout.kind != "none":
        _ = stages.encoder.byte_lengths


def load_engine(chosen: tuple[ResolvedTokenizer, Literal["auto", "gigatoken", "tokenizers"]]) -> None:
    """Load the engine that a plan with this tokenizer and setting will most likely choose, ahead of it."""
    tokenizer, requested = chosen
    _encoder(tokenizer, choose_engine(tokenizer, requested)[0])


_encoders: dict[Engine, Encoder] = {}


def _encoder(tokenizer: ResolvedTokenizer, engine: Engine) -> Encoder:
    """Return an encoder, loaded once; of each engine the last is kept."""
    if engine not in _encoders or _encoders[engine].resolved != tokenizer:
        _encoders[engine] = load_encoder(tokenizer, engine)
    return _encoders[engine]
