"""Look at a sample of every source before the run, and refuse settings that have no effect on any row.

A look holds how the rows are read, what they become, and hints on what may be unintended. No setting is
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftdata.batches import Completion, Conversation, Row, RowBatch, Tally, Text, Tokens
from sftdata.choosing import refuse_idle
from sftdata.config import OF_PICTURES, PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError, did_you_mean
from sftdata.formats.calls import WITH_PROCESSOR
from sftdata.formats.convert import convert_rows
from sftdata.formats.detect import Detection, detect
from sftdata.formats.fields import ALPACA, FormatOptions, load_prompt_template
from sftdata.formats.formatter import formatter_sha256, load_formatter
from sftdata.formats.instructions import find_turn_markers, from_messages, is_messages
from sftdata.formats.table import FORMATS
from sftdata.masks.markers import check_markers
from sftdata.output import counted
from sftdata.pictures.loaded import PictureFolder
from sftdata.pictures.rows import COLUMNS, MARKER, Evidence, marks_pictures
from sftdata.render.template import variables_of
from sftdata.set.images import PROCESSOR
from sftdata.set.local import local_folder
from sftdata.set.manifest import read_manifest
from sftdata.settings import flag_of
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.jsonrows import from_json
from sftdata.wording import shell_quote

INSTRUCTIONS = ("alpaca", "dolly", "question-answer", "query-response")
JOINED_RAW = "prompts and completions are joined as raw text, no chat template"
ROWS = 256  # of a sample that are converted
SHOWN = 3  # sources that a refusal names
LONGEST_PACKED = 1 << 24  # tokens; such a row alone is 128 MB

# ------------------------------------------------------------------------------------------- looks


@dataclass(frozen=True, slots=True)
class Look:
    """What a sample of one source shows.

    Attributes:
        path: of the source.
        format: name in FORMATS.
        kinds: of the converted rows, under these settings; empty if no row of the sample is valid.
        completes: some row has a prompt, as text or messages, and its completion.
        asks: rows are instructions, questions or prompts as text, whose kind is a setting.
        roles: of all sampled messages, as spelled in the data; only collected if roles are mapped.
        whole: the sample is the whole source.
        pictured: some row holds a picture.
        by_path: some row names one by its path.
        entry: of the registry that the source is of; empty for none.
    """

    path: str
    format: str
    kinds: frozenset[type]
    completes: bool
    asks: bool
    roles: frozenset[str]
    whole: bool
    pictured: bool = False
    by_path: bool = False
    entry: str = ""

    def holds(self, *kinds: type) -> bool:
        """Return whether a row becomes one of these kinds."""
        return not self.kinds.isdisjoint(kinds)


def _look(
    config: PrepareConfig,
    source: SourcePlan,
    detection: Detection,
    rows: list[Row],
    pictures: Evidence | None,
) -> Look:
    column, prompts = detection.columns.get("prompt"), []
    if detection.format == "prompt-completion" and column is not None:
        prompts = [row.get(column) for row in detection.rows]
    return Look(
        path=source.source.path,
        format=detection.format,
        kinds=frozenset(map(type, rows)),
        completes=any(
            isinstance(row, Completion) or (isinstance(row, Conversation) and row.prompt_messages)
            for row in rows
        ),
        asks=detection.format in INSTRUCTIONS
        or any(not is_messages(from_messages(prompt)) for prompt in prompts),
        roles=frozenset(_roles(detection)) if config.map_role else frozenset(),
        whole=source.samples.sizes.sum() == source.chunks.sizes.sum(),
        pictured=pictures is not None,
        by_path=pictures is not None and "path" in pictures.sources,
        entry=source.entry,
    )


def _roles(detection: Detection) -> Iterator[str]:
    for row in detection.rows:
        for value in map(from_json, map(row.get, detection.columns.values())):
            if is_messages(value):
                yield from (
                    str(message.get("role", message.get("from")))
                    for message in value
                    if isinstance(message, dict)
                )


def format_options(
    config: PrepareConfig, *, chat: bool, pictures: PictureFolder | None = None, parts_only: bool = False,
    packed: bool = False,
) -> FormatOptions:  # fmt: skip
    """Return how rows are read; `chat` if a chat template is in use, `pictures` if a processor is."""
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
        pictures=pictures,
        parts_only=parts_only,
        packed=packed,
    )


def look_at(
    config: PrepareConfig,
    source: SourcePlan,
    tokenizer: ResolvedTokenizer,
    pictures: PictureFolder | None = None,
) -> tuple[str, Look | None, list[str]]:
    """Return the row format of one source, a look at its rows, and notes; the sources may differ.

    There is no look at the input of a formatter, nor at a source without rows.

    Args:
        pictures: where they are; None where no processor is at hand.

    Raises:
        UsageError: the format is not clear, or needs a chat template or a processor that is not there.
    """
    path = source.source.path
    if config.formatter is not None or not source.records:
        return config.format or "text", None, []
    detection = detect([source], format=config.format, columns=config.map)
    hints = _refuse_unseen(path, detection, processor=pictures is not None)
    sample = list(detection.rows[:: -(-len(detection.rows) // ROWS)])
    index = np.arange(len(sample), dtype=np.int64)
    options = format_options(config, chat=tokenizer.chat_template is not None, pictures=pictures)
    batch = RowBatch(sample, index, index, index)
    rows = convert_rows(batch, detection.format, options, Tally(batch)).rows
    look = _look(config, source, detection, rows, None if pictures is None else detection.pictures)
    if look.holds(Conversation) and tokenizer.chat_template is None:
        raise UsageError(
            f"{path} holds conversations, and tokenizer {tokenizer.name} has no chat template.",
            "--chat-template chatml (or another built-in name, a template file, or a tokenizer to clone it"
            " from).",
        )
    columns = ", ".join(
        column if column == name else f"{column or 'the line'} as {name}"
        for name, column in detection.columns.items()
    )
    share = f"{detection.matched} of {counted(detection.sampled, 'sampled row')}"
    note = f"{path}: {detection.format} ({columns}), {share}."
    if detection.pictures is not None:
        hints += [f"{path}: {line}." for line in detection.pictures.lines]
    return detection.format, look, [note, *hints, *_hints(config, look, rows, tokenizer)]


def _refuse_unseen(path: str, detection: Detection, processor: bool) -> list[str]:
    """Refuse rows whose pictures the model would not see; return a note where they are the fewer.

    These are rows that mark pictures and have none; and rows with pictures, without a processor at hand.
    """
    if processor:
        number = 0 if detection.pictures else sum(map(marks_pictures, detection.rows))
        found, then = f"have {MARKER} in a question, and no picture", "it is text there"
        fix = "give the pictures in a column images, or name theirs: --map images=COLUMN."
    else:
        number = detection.pictures.pictured if detection.pictures else 0
        found, then = "hold pictures, and no processor is named", "such rows are rejected"
        fix = f"prepare a set with {WITH_PROCESSOR}"
    what = f"{path}: {number} of {detection.matched} sampled rows {found}"
    if 2 * number > detection.matched:
        raise UsageError(f"{what}.", fix)
    return [f"{what}: {then}."] if number else []


def _hints(config: PrepareConfig, look: Look, rows: list[Row], tokenizer: ResolvedTokenizer) -> list[str]:
    """Return notes on text that may be trained unintentionally."""
    if config.response_template is not None or config.train_on != "auto":
        return []
    markers = find_turn_markers([row.text for row in rows if isinstance(row, Text)])
    if markers is not None:
        instruction, response = map(shell_quote, markers)
        flags = f"--response-template {response} --instruction-template {instruction}"
        return [
            f"{look.path}: all of the text is trained, its questions too; to train the answers alone: {flags}"
        ]
    prompts = [row.prompt for row in rows if isinstance(row, Completion)]
    if not prompts or config.kind != "auto" or look.format != "prompt-completion":
        return []
    control = [token.content for token in tokenizer.added_tokens if token.special]
    rendered = any(token in prompt for prompt in prompts for token in control) or find_turn_markers(prompts)
    if tokenizer.chat_template is None or rendered:
        return []
    return [
        f"{look.path}: {JOINED_RAW};"
        " --kind conversation renders them with it, --kind completion says that raw text is meant."
    ]


# ------------------------------------------------------------------------- settings without effect


def refuse_conflicts(config: PrepareConfig) -> None:
    """Refuse settings that contradict each other for any rows, and a formatter that cannot be loaded.

    Raises:
        UsageError: naming both settings, or the formatter.
    """
    _refuse_markers(config)
    if config.loss_weights and (config.train_on == "all" or config.response_template is not None):
        raise UsageError(
            "--loss-weights weighs turns; no turns are trained by --train-on all or --response-template.",
            "leave one out.",
        )
    if config.formatter is not None:
        _check_formatter(config, config.formatter)
    _refuse_lengths(config)
    refuse_idle(config)
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


def _refuse_lengths(config: PrepareConfig) -> None:
    if config.overlong != "truncate" and config.packing == "wrapped":
        raise UsageError(
            f"--overlong {config.overlong} beside --packing wrapped: one cut stream has room for rows of any"
            " length.",
            "leave --overlong out.",
        )
    if config.packing != "none" and (config.max_length or 0) > LONGEST_PACKED:
        raise UsageError(
            f"--max-length {config.max_length}: each packed row would be as long; at most {LONGEST_PACKED}"
            " tokens are packed.",
            "--packing none keeps each example as it is.",
        )


def _refuse_markers(config: PrepareConfig) -> None:
    if config.response_template is None:
        if config.mask_mode != "default":
            problem = f"--mask-mode {config.mask_mode} masks by response template, and none is given."
            raise UsageError(problem, "--response-template '...'")
        if config.instruction_template is not None:
            raise UsageError(
                "--instruction-template without --response-template: nothing would be trained.", "give both."
            )
        return
    check_markers(config.response_template, config.instruction_template)
    if config.train_on != "auto":
        problem = f"--train-on {config.train_on} beside --response-template: both say what is trained."
        raise UsageError(problem, "leave --train-on out.")


class _Rule(NamedTuple):
    """The rows on which a setting has an effect.

    Attributes:
        acts: whether it has one on the rows of this source.
        on: these rows, in words.
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
    **dict.fromkeys(OF_PICTURES, _Rule(lambda _, look: look.pictured, "rows with pictures")),
    **dict.fromkeys(
        ("images", "embed_images"),
        _Rule(lambda _, look: look.by_path, "pictures that rows name by their paths"),
    ),
}
_TRAIN_ON: dict[str, _Rule] = {
    "assistant": _CHATS,
    "last-assistant": _CHATS,
    "completion": _Rule(lambda _, look: look.completes, "prompts with a completion"),
    "all": _TEXTS,
}


def refuse_without_effect(
    config: PrepareConfig, looks: Sequence[Look], tokenizer: ResolvedTokenizer
) -> list[str]:
    """Refuse settings that act on none of the rows; return notes where a sample is not enough to decide.

    Args:
        looks: at every source that has rows; none with a formatter.

    Raises:
        UsageError: naming the setting, the rows that it acts on, and those that there are.
    """
    if not looks or not all(look.kinds for look in looks):
        return []
    _refuse_unmarked_ids(config, looks)
    rules = {name: rule for name, rule in _RULES.items() if getattr(config, name) != _default(name)}
    if config.train_on != "auto":
        rules["train_on"] = _TRAIN_ON[config.train_on]
    general = {name: _general(config, looks, name) for name in rules}
    idle = [
        name for name, rule in rules.items() if not any(rule.acts(config, look) for look in general[name])
    ]
    liked, notes = _pictures_of_like(config), list[str]()
    if {*idle} & liked.keys():
        notes.append(
            f"--like {config.like}: a set with pictures; here there are none, and its processor rests."
        )
    for name in idle:
        if name not in liked or getattr(config, name) != liked[name]:
            raise _inert(config, name, rules[name], general[name])
    _refuse_unread_arguments(config, tokenizer)
    return notes + _own_notes(config, looks) + _missing_roles(config, _general(config, looks, "map_role"))


def _own_notes(config: PrepareConfig, looks: Sequence[Look]) -> list[str]:
    """Refuse what sources of the registry say themselves and what acts on none of their rows."""
    notes = list[str]()
    for entry in dict.fromkeys(look.entry for look in looks if look.entry):
        own, reading = _own(config, entry), config.reading(entry)
        theirs = [look for look in looks if look.entry == entry]
        for name in sorted(own & _RULES.keys()):
            if not any(_RULES[name].acts(reading, look) for look in theirs):
                raise _inert(reading, name, _RULES[name], theirs)
        notes += _missing_roles(reading, theirs) if "map_role" in own else []
    return notes


def _own(config: PrepareConfig, entry: str) -> set[str]:
    """Return what a source of the registry sets for its rows itself."""
    found = config.entry(entry)
    said = {} if found is None else found.own()
    return {name for name, value in said.items() if value != _default(name)}


def _general(config: PrepareConfig, looks: Sequence[Look], name: str) -> list[Look]:
    """Return the looks at sources that a setting of the run reaches."""
    return [look for look in looks if name not in _own(config, look.entry)]


def _inert(config: PrepareConfig, name: str, rule: _Rule, looks: Sequence[Look]) -> UsageError:
    found = _kinds(looks) or "each source of the registry says its own"
    what = f"{_option(config, name)} acts on {rule.on}, and there are none: {found}."
    return UsageError(what, "leave it out.")


def _pictures_of_like(config: PrepareConfig) -> dict[str, object]:
    """Return the settings on pictures that are those of the set that `--like` names, and were not given."""
    folder = None if config.like is None else local_folder(config.like)
    if folder is None or not (manifest := read_manifest(folder)).pictured:
        return {}
    return {"processor": folder / PROCESSOR, **manifest.settings["vision"]}


def _default(name: str) -> object:
    return PrepareConfig.model_fields[name].get_default(call_default_factory=True)


def _option(config: PrepareConfig, name: str) -> str:
    """Return a setting as an option of the command line."""
    value = getattr(config, name)
    flag = flag_of(name).removesuffix("=VALUE")
    if isinstance(value, dict):
        return " ".join(f"{flag} {shell_quote(f'{key}={item}')}" for key, item in value.items())
    return flag if isinstance(value, bool | tuple) else f"{flag} {shell_quote(value)}"


def _kinds(looks: Sequence[Look]) -> str:
    names = {
        Conversation: "conversations",
        Completion: "prompts with a completion",
        Text: "running text",
        Tokens: "ids",
    }
    held = [" and ".join(names[kind] for kind in names if look.holds(kind)) for look in looks]
    lines = [f"{look.path} holds {kinds} ({look.format})" for look, kinds in zip(looks, held, strict=True)]
    return "; ".join([*lines[:SHOWN], *(["..."] if len(looks) > SHOWN else [])])


def _unread_columns(config: PrepareConfig, look: Look) -> list[str]:
    known = {name for column in FORMATS[look.format].columns for name in column.spellings}
    return [name for name in config.map if name not in known and not (look.pictured and name in COLUMNS)]


def _refuse_unmarked_ids(config: PrepareConfig, looks: Sequence[Look]) -> None:
    """Refuse ids beside a marker given as text, which is only searched for in texts."""
    by_text = isinstance(config.response_template, str) and config.mask_mode == "default"
    paths = [look.path for look in looks if look.holds(Tokens)]
    if by_text and paths:
        raise UsageError(
            f"--response-template {config.response_template!r} is text, and {paths[0]} holds ids.",
            "give the template as token ids, as --response-template '[1, 2]'.",
        )


def _refuse_unread_arguments(config: PrepareConfig, tokenizer: ResolvedTokenizer) -> None:
    if tokenizer.chat_template is None or not (config.template_kwargs or config.date != _default("date")):
        return
    known = variables_of(tokenizer.chat_template)
    if unread := sorted(set(config.template_kwargs) - known):
        problem = f"--set template_kwargs.{unread[0]}: the chat template reads no such argument."
        fix = did_you_mean(unread[0], known, "leave it out, or choose another --chat-template.")
        raise UsageError(problem, fix)
    if config.date != _default("date") and "strftime_now" not in known:
        raise UsageError(f"--date {config.date}: the chat template writes no date.", "leave it out.")


def _missing_roles(config: PrepareConfig, looks: Sequence[Look]) -> list[str]:
    """Refuse a mapped role that no message has; return a note instead if only a sample was seen."""
    roles = {role for look in looks for role in look.roles}
    whole = all(look.whole for look in looks)
    notes = []
    for role in config.map_role.keys() - roles:
        messages = "no message has" if whole else "no sampled message has"
        problem = f"--map-role {role}={config.map_role[role]}: {messages} the role {role!r}"
        if whole:
            fix = did_you_mean(role, roles, "leave it out.")
            raise UsageError(f"{problem}; there are {', '.join(sorted(roles))}.", fix)
        notes.append(f"{problem}.")
    return sorted(notes)
