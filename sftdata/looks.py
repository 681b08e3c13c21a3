"""Look at a sample of every source before the work: its row format, what its rows become, and what a user may not have meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sftdata.batches import Completion, Conversation, Row, RowBatch, Tally, Text
from sftdata.config import PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError
from sftdata.formats.convert import convert_rows
from sftdata.formats.detect import Detection, detect
from sftdata.formats.fields import ALPACA, FormatOptions, load_prompt_template
from sftdata.formats.formatter import formatter_sha256
from sftdata.formats.instructions import find_turn_markers, from_messages, is_messages
from sftdata.masks.markers import shell_quote
from sftdata.sources.jsonrows import from_json
from sftdata.sources.source import Chunk, SourcePlan

INSTRUCTIONS = ("alpaca", "dolly", "question-answer", "query-response")
JOINED_RAW = "prompts and completions are joined as raw text, no chat template"
ROWS = 256  # of a sample that are converted


@dataclass(frozen=True, slots=True)
class Look:
    """What a sample of one source shows.

    Attributes:
        path: of the source.
        format: name in FORMATS.
        kinds: what its rows become, as the settings have it; empty where none of the sample can be read.
        completes: a row has a prompt of its own, as text or messages, and what completes it.
        asks: rows are instructions, questions or prompts as text, which may become another kind.
        roles: of all sampled messages, as the data spells them; only looked for where roles are mapped.
        whole: the sample is all there is.
    """

    path: str
    format: str
    kinds: frozenset[type]
    completes: bool
    asks: bool
    roles: frozenset[str]
    whole: bool

    def holds(self, *kinds: type) -> bool:
        """Say whether a row becomes one of these kinds."""
        return not self.kinds.isdisjoint(kinds)


def _look(config: PrepareConfig, source: SourcePlan, found: Detection, rows: list[Row]) -> Look:
    names = found.columns
    prompts = [row.get(names["prompt"]) for row in found.rows] if found.format == "prompt-completion" else []
    return Look(
        path=source.source.path,
        format=found.format,
        kinds=frozenset(map(type, rows)),
        completes=any(
            isinstance(row, Completion) or (isinstance(row, Conversation) and row.prompt_messages)
            for row in rows
        ),
        asks=found.format in INSTRUCTIONS
        or any(not is_messages(from_messages(prompt)) for prompt in prompts),
        roles=frozenset(_roles(found)) if config.map_role else frozenset(),
        whole=_size(source.samples) == _size(source.chunks),
    )


def _roles(found: Detection) -> Iterator[str]:
    for row in found.rows:
        for value in map(from_json, map(row.get, found.columns.values())):
            if is_messages(value):
                yield from (
                    str(message.get("role", message.get("from")))
                    for message in value
                    if isinstance(message, dict)
                )


def _size(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks)


def format_options(config: PrepareConfig, *, chat: bool) -> FormatOptions:
    """Say how rows are read; `chat` when a chat template is in use."""
    return FormatOptions(
        columns=config.map,
        roles=config.map_role,
        kind=config.kind,
        chat=chat,
        template=load_prompt_template(config.prompt_template) if config.prompt_template else ALPACA,
        need_assistant=config.train_on != "all",
        formatter=config.formatter,
        formatter_sha256=formatter_sha256(config.formatter) if config.formatter else None,
        loss_weights=config.loss_weights,
        labels_judge=config.format is None,
    )


def look_at(
    config: PrepareConfig, source: SourcePlan, tokenizer: ResolvedTokenizer
) -> tuple[str, Look | None, list[str]]:
    """Return the row format of one source, a look at its rows, and what to say of them; several inputs may differ.

    There is no look where a formatter says what each row is, or where there are no rows.

    Raises:
        UsageError: the format is not clear, or needs a chat template that the tokenizer lacks.
    """
    path = source.source.path
    if config.formatter is not None or not source.records:
        return config.format or "text", None, []
    found = detect([source], format=config.format, columns=config.map)
    chosen = list(found.rows[:: -(-len(found.rows) // ROWS)])
    index = np.arange(len(chosen), dtype=np.int64)
    options = format_options(config, chat=tokenizer.chat_template is not None)
    batch = RowBatch(chosen, index, index, index)
    rows = convert_rows(batch, found.format, options, Tally(batch)).rows
    look = _look(config, source, found, rows)
    if look.holds(Conversation) and tokenizer.chat_template is None:
        raise UsageError(
            f"{path} holds conversations, and tokenizer {tokenizer.name} has no chat template.",
            "--chat-template chatml (or another built-in name, a template file, or a tokenizer to clone it from).",
        )
    read = ", ".join(
        own if own == name else f"{own or 'the line'} as {name}" for name, own in found.columns.items()
    )
    said = f"{path}: {found.format} ({read}), {found.matched} of {found.sampled} sampled rows."
    return found.format, look, [said, *_hints(config, look, rows, tokenizer)]


def _hints(config: PrepareConfig, look: Look, rows: list[Row], tokenizer: ResolvedTokenizer) -> list[str]:
    """Say where text is trained otherwise than its author may have meant."""
    if config.response_template is not None or config.train_on != "auto":
        return []
    markers = find_turn_markers([row.text for row in rows if isinstance(row, Text)])
    if markers is not None:
        asked, answered = map(shell_quote, markers)
        flags = f"--response-template {answered} --instruction-template {asked}"
        return [
            f"{look.path}: all of the text is trained, its questions too; to train the answers alone: {flags}"
        ]
    prompts = [row for row in rows if isinstance(row, Completion)]
    control = [token.content for token in tokenizer.added_tokens if token.special]
    if (
        not prompts
        or tokenizer.chat_template is None
        or config.kind != "auto"
        or look.format != "prompt-completion"
    ):
        return []
    if any(token in row.prompt for row in prompts for token in control) or find_turn_markers(
        [row.prompt for row in prompts]
    ):
        return []
    return [
        f"{look.path}: {JOINED_RAW};"
        " --kind conversation renders them with it, --kind completion says that raw text is meant."
    ]
