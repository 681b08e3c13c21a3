"""The loaded stages of a job: what a worker process builds once and every slice goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from sftdata.batches import Tally, TokenBatch
from sftdata.config import PrepareConfig
from sftdata.encode.engine import Encoder, Engine, choose_engine, digest_ids, load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import Fault
from sftdata.plan import Job
from sftdata.render.guards import describe_tokens
from sftdata.render.markers import find_id_spans
from sftdata.render.rows import Renderer
from sftdata.render.spans import SpanFinder
from sftdata.render.template import ChatTemplate
from sftdata.render.trl_masks import trl_0_7_10_mask

SAMPLE_TEXTS = 16
SAMPLE_CHARS = (
    1 << 11
)  # of each text; the window moves from the beginning of the first to the end of the last


@dataclass(frozen=True)
class Stages:
    """Renderer, encoder and marker masks of one job."""

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
        by_text = isinstance(config.response_template, str) and config.mask_mode == "default"
        return Renderer(
            finder=finder,
            train_on=config.train_on,
            response=str(config.response_template) if by_text else None,
            instruction=config.instruction_template
            if by_text and isinstance(config.instruction_template, str)
            else None,
            end_token=config.eos_token or "",
            overrules=_overrules(config),
        )

    @cached_property
    def names(self) -> list[str]:
        """Names of the sources, in the order of their numbers."""
        return list(self.job.sources)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into ids."""
        return _encoder(self.job.tokenizer, self.job.engine)

    def token_notes(self) -> list[str]:
        """Say which added tokens stay text when a message spells them, and which count; nothing without a chat template."""
        finder = self.renderer.finder
        added = [token.content for token in self.job.tokenizer.added_tokens]
        return [] if finder is None else describe_tokens(finder.guarded, added)

    def sample(self, texts: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Return windows of some of these texts, and a digest of the ids that the engine gives them; none for the oracle itself.

        Whoever waits for the slice holds them against the oracle, which then need not be loaded here.
        """
        if not texts or self.encoder.engine == "tokenizers":
            return (), ""
        chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLE_TEXTS).astype(np.int64)).tolist()
        windows = np.linspace(0, 1, len(chosen)).tolist()
        sample = tuple(_window(texts[index], where) for index, where in zip(chosen, windows, strict=True))
        return sample, digest_ids(self.encoder, sample)

    def mask(self, tokens: TokenBatch, tally: Tally) -> tuple[TokenBatch, list[tuple[int, Fault]]]:
        """Mask by response template where it is given as ids, or in the way of trl 0.7.10; else leave tokens as they are.

        Args:
            tally: where rows are counted of which the old collator would have warned.

        Returns:
            tokens, and faults (index into the RowBatch, why).
        """
        config = self.job.config
        if config.response_template is None or self.renderer.response is not None:
            return tokens, []
        response, instruction = self._ids(config.response_template), self._ids(config.instruction_template)
        if config.mask_mode == "trl-0.7.10":
            pad = self.job.pad_id
            masked = trl_0_7_10_mask(tokens.input_ids, tokens.offsets, response, instruction or None, pad)
            tally.count_rows("rows_without_response_marker", tokens.row[masked.response_warned])
            tally.count_rows("rows_without_instruction_marker", tokens.row[masked.instruction_warned])
            tally.count_rows("rows_masked_without_warning", tokens.row[masked.silently_masked])
            return TokenBatch(tokens.input_ids, masked.trained, tokens.offsets, tokens.row), []
        found = find_id_spans(tokens.input_ids, tokens.offsets, response, instruction or None)
        tokens = TokenBatch(tokens.input_ids, found.trained, tokens.offsets, tokens.row)
        tally.count_rows("rows_with_repeated_markers", tokens.row[found.repeated])
        faults = [(int(tokens.row[index]), fault) for index, fault in sorted(found.faults.items())]
        keep = np.ones(len(tokens), np.bool_)
        keep[list(found.faults)] = False
        return tokens.select(keep), faults

    def _ids(self, template: str | Sequence[int] | None) -> list[int]:
        if template is None:
            return []
        if isinstance(template, str):
            ids: list[int] = self.encoder.encode([template])[0].tolist()
            return ids
        return list(template)


def _overrules(config: PrepareConfig) -> str:
    """Return the flag, without its dashes, that decides what is trained whatever messages say of themselves; "" for none."""
    if config.response_template is not None:
        return "response-template"
    return "train-on all" if config.train_on == "all" else ""


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
    """Load the stages that every slice of a job needs."""
    stages = load_stages(job)
    _ = stages.renderer, stages.encoder.strips_right
    if job.tokenizer.layout.kind != "none":
        _ = stages.encoder.byte_lengths


def load_engine(chosen: tuple[ResolvedTokenizer, Literal["auto", "gigatoken", "tokenizers"]]) -> None:
    """Load the engine that a run with this tokenizer and setting will most likely choose, for `load_shared` to find."""
    tokenizer, requested = chosen
    _encoder(tokenizer, choose_engine(tokenizer, requested)[0])


_encoders: dict[Engine, Encoder] = {}


def _encoder(tokenizer: ResolvedTokenizer, engine: Engine) -> Encoder:
    """Return an encoder, loaded once; of each engine the last is kept."""
    if engine not in _encoders or _encoders[engine].resolved != tokenizer:
        _encoders[engine] = load_encoder(tokenizer, engine)
    return _encoders[engine]
