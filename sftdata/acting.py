"""Look at a sample of every source before the work, and refuse the settings that cannot act on any of its rows.

A look says how the rows are read, what they become, and what a user may not have meant. Nothing asked for is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftdata.batches import Completion, Conversation, Row, RowBatch, Tally, Text, Tokens
from sftdata.config import PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError, did_you_mean
from sftdata.formats.convert import convert_rows
from sftdata.formats.detect import Detection, detect
from sftdata.formats.fields import ALPACA, FormatOptions, load_prompt_template
from sftdata.formats.formatter import formatter_sha256, load_formatter
from sftdata.formats.instructions import find_turn_markers, from_messages, is_messages
from sftdata.formats.registry import FORMATS
from sftdata.masks.markers import check_markers, shell_quote
from sftdata.render.template import variables_of
from sftdata.settings import flag_of
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


SHOWN = 3  # sources that a refusal names
LONGEST_PACKED = 1 << 24  # tokens; such a row alone is 128 MB


def refuse_useless(config: PrepareConfig) -> None:
    """Refuse settings that contradict each other, or name code that cannot be run, whatever the rows are.

    Raises:
        UsageError: naming both.
    """
    _refuse_markers(config)
    if config.loss_weights and (config.train_on == "all" or config.response_template is not None):
        raise UsageError(
            "--loss-weights weighs turns; --train-on all and --response-template train no turns.",
            "leave one out.",
        )
    if config.formatter is not None:
        _check_formatter(config, config.formatter)
    _refuse_useless_lengths(config)
    if config.revision is not None and Path(config.tokenizer).exists():
        raise UsageError(
            f"--revision {config.revision}: {config.tokenizer} is a local tokenizer.", "leave --revision out."
        )


def _check_formatter(config: PrepareConfig, formatter: str) -> None:
    if config.format is not None or config.map:
        flag = "--format" if config.format is not None else "--map"
        raise UsageError(
            f"{flag} beside --formatter: the function says what each row is.", f"leave {flag} out."
        )
    load_formatter(formatter, formatter_sha256(formatter))


def _refuse_useless_lengths(config: PrepareConfig) -> None:
    if config.overlong != "truncate" and config.packing == "wrapped":
        found = f"--overlong {config.overlong} beside --packing wrapped: one cut stream has room for rows of any length."
        raise UsageError(found, "leave --overlong out.")
    if config.packing != "none" and (config.max_length or 0) > LONGEST_PACKED:
        found = f"--max-length {config.max_length}: each packed row would be as long; at most {LONGEST_PACKED} tokens are packed."
        raise UsageError(found, "--packing none keeps each example as it is.")


def _refuse_markers(config: PrepareConfig) -> None:
    if config.response_template is None:
        if config.mask_mode != "default":
            found = f"--mask-mode {config.mask_mode} masks by response template, and none is given."
            raise UsageError(found, "--response-template '...'")
        if config.instruction_template is not None:
            raise UsageError(
                "--instruction-template without --response-template trains nothing.", "give both."
            )
        return
    check_markers(config.response_template, config.instruction_template)
    if config.train_on != "auto":
        found = f"--train-on {config.train_on} beside --response-template: both say what is trained."
        raise UsageError(found, "leave --train-on out.")


class _Rule(NamedTuple):
    """Where a setting acts.

    Attributes:
        acts: whether it does on rows such as these.
        on: those rows, in words.
    """

    acts: Callable[[PrepareConfig, Look], bool]
    on: str


def _holds(*kinds: type) -> Callable[[PrepareConfig, Look], bool]:
    return lambda _, look: look.holds(*kinds)


_CHATS = _Rule(_holds(Conversation), "conversations")
_TEXTS = _Rule(_holds(Conversation, Completion, Text), "rows that are tokenized here")
_RULES: dict[str, _Rule] = {
    "map": _Rule(lambda config, look: not _unread_columns(config, look), "columns that the format has"),
    "map_role": _CHATS,
    "kind": _Rule(lambda _, look: look.asks, "instructions, questions and prompts with an answer, as text"),
    "prompt_template": _Rule(
        lambda _, look: look.format in INSTRUCTIONS and look.holds(Completion, Text),
        "instructions and questions that do not become conversations (--kind completion)",
    ),
    "template_kwargs": _CHATS,
    "date": _CHATS,
    "loss_weights": _Rule(_CHATS.acts, "conversations, whose messages may have weights"),
    "boundary": _TEXTS,
    "eos_token": _TEXTS,
    "trust_control_tokens": _Rule(_CHATS.acts, "conversations; raw text is always taken as rendered"),
}
_TRAIN_ON: dict[str, _Rule] = {
    "assistant": _CHATS,
    "last-assistant": _CHATS,
    "completion": _Rule(lambda _, look: look.completes, "prompts with a completion"),
    "all": _TEXTS,
}


def refuse_idle(config: PrepareConfig, looks: Sequence[Look], tokenizer: ResolvedTokenizer) -> list[str]:
    """Refuse settings that can act on none of the rows; return what to say of those of which a sample cannot tell.

    Args:
        looks: at every source that has rows; none where a formatter says what each row is.

    Raises:
        UsageError: naming the setting, what it acts on, and what the rows are.
    """
    if not looks or not all(look.kinds for look in looks):
        return []
    _refuse_unmarked_ids(config, looks)
    rules = {name: rule for name, rule in _RULES.items() if getattr(config, name) != _default(name)}
    if config.train_on != "auto":
        rules["train_on"] = _TRAIN_ON[config.train_on]
    for name, rule in rules.items():
        if not any(rule.acts(config, look) for look in looks):
            raise UsageError(
                f"{_shown(config, name)} acts on {rule.on}, and there are none: {_kinds(looks)}.",
                "leave it out.",
            )
    _refuse_unread_arguments(config, tokenizer)
    return _roles_not_met(config, looks)


def _default(name: str) -> object:
    return PrepareConfig.model_fields[name].get_default(call_default_factory=True)


def _shown(config: PrepareConfig, name: str) -> str:
    value = getattr(config, name)
    flag = flag_of(name).removesuffix("=VALUE")
    if isinstance(value, dict):
        return f"{flag} {' '.join(f'{key}={item}' for key, item in value.items())}"
    return flag if isinstance(value, bool | tuple) else f"{flag} {value!r}"


def _kinds(looks: Sequence[Look]) -> str:
    names = {
        Conversation: "conversations",
        Completion: "prompts with a completion",
        Text: "running text",
        Tokens: "ids",
    }
    held = [" and ".join(names[kind] for kind in names if look.holds(kind)) for look in looks]
    said = [
        f"{look.path} holds {kinds} ({look.format})" for look, kinds in zip(looks[:SHOWN], held, strict=False)
    ]
    return "; ".join([*said, *(["..."] if len(looks) > SHOWN else [])])


def _unread_columns(config: PrepareConfig, look: Look) -> list[str]:
    known = {name for column in FORMATS[look.format].columns for name in column.spellings}
    return [name for name in config.map if name not in known]


def _by_text(config: PrepareConfig) -> bool:
    return isinstance(config.response_template, str) and config.mask_mode == "default"


def _refuse_unmarked_ids(config: PrepareConfig, looks: Sequence[Look]) -> None:
    """Markers given as text are looked for in texts: ids beside them would be trained without any."""
    found = [look.path for look in looks if look.holds(Tokens)]
    if _by_text(config) and found:
        raise UsageError(
            f"--response-template {config.response_template!r} is text, and {found[0]} holds ids.",
            "give the template as token ids, as --response-template '[1, 2]'.",
        )


def _refuse_unread_arguments(config: PrepareConfig, tokenizer: ResolvedTokenizer) -> None:
    if tokenizer.chat_template is None or not (config.template_kwargs or config.date != _default("date")):
        return
    known = variables_of(tokenizer.chat_template)
    if unread := sorted(set(config.template_kwargs) - known):
        what = f"--set template_kwargs.{unread[0]}: the chat template reads no such argument."
        fix = did_you_mean(unread[0], known, "leave it out, or choose another --chat-template.")
        raise UsageError(what, fix)
    if config.date != _default("date") and "strftime_now" not in known:
        raise UsageError(f"--date {config.date}: the chat template writes no date.", "leave it out.")


def _roles_not_met(config: PrepareConfig, looks: Sequence[Look]) -> list[str]:
    """Refuse a mapped role that no message has; where only a sample was seen, say so instead."""
    met = {role for look in looks for role in look.roles}
    notes = []
    for role in config.map_role.keys() - met:
        what = f"--map-role {role}={config.map_role[role]}: no {'' if _whole(looks) else 'sampled '}message has the role {role!r}"
        if _whole(looks):
            fix = did_you_mean(role, met, "leave it out.")
            raise UsageError(f"{what}; there are {', '.join(sorted(met))}.", fix)
        notes.append(f"{what}.")
    return sorted(notes)


def _whole(looks: Sequence[Look]) -> bool:
    return all(look.whole for look in looks)
