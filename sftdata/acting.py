"""Which settings act on which rows: one that cannot act is an error before anything is made. Nothing asked for is ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sftdata.batches import Completion, Conversation, Text, Tokens
from sftdata.config import PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import UsageError, did_you_mean
from sftdata.formats.formatter import formatter_sha256, load_formatter
from sftdata.formats.registry import FORMATS
from sftdata.looks import INSTRUCTIONS, Look
from sftdata.masks.markers import check_markers
from sftdata.render.template import variables_of
from sftdata.settings import flag_of

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
