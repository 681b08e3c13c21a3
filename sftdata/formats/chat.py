"""Chat messages of every spelling -> messages as chat templates take them: contents, roles, switches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from sftdata.batches import Conversation
from sftdata.errors import RowError, nearest
from sftdata.formats.calls import Message, read_calls, read_parts, read_tools, without_stray_nulls
from sftdata.formats.fields import Fields, FormatOptions
from sftdata.sources.jsonrows import from_json, kind_of
from sftdata.wording import shell_quote

Switch = bool | float | None
"""What a message says about its own training: on, off, a weight, or nothing."""
Switched = tuple[Message, Switch]


REASONING = ("reasoning_content", "thinking", "reasoning")


def read_conversation(
    turns: list[Switched], fields: Fields, options: FormatOptions, prompt_messages: int = 0
) -> Conversation:
    """Join turns with the row's own system text, tools and template arguments.

    Raises:
        RowError: no message, no assistant message, two system texts, tools or arguments that cannot be read.
    """
    if not turns:
        raise RowError("no-messages", "the conversation is empty.", "remove the row.")
    messages, trained = [message for message, _ in turns], [switch for _, switch in turns]
    if options.need_assistant and "assistant" not in [message["role"] for message in messages]:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        what = f"no assistant message to train on; found only {roles}."
        fix = "add the answer, name its role with --map-role ROLE=assistant, or --train-on all."
        raise RowError("no-assistant", what, fix)
    counted = tuple(fields.counted)
    if len(fields.names) == 1 and "tools" not in messages[0]:  # the row has messages and nothing beside them
        return Conversation(messages, trained, prompt_messages=prompt_messages, counted=counted)
    system = fields.optional_text("system")
    if system:
        if messages[0]["role"] not in ("system", "developer"):
            messages, trained = [{"role": "system", "content": system}, *messages], [None, *trained]
            prompt_messages += prompt_messages > 0
        elif messages[0].get("content") != system:
            what = "the system column and the first message differ."
            raise RowError("two-system-texts", what, "keep one of them.")
    messages, tools, arguments = _read_tools_anywhere(messages, fields)
    if tools:
        messages = without_stray_nulls(messages, tools, fields.counted)
    return Conversation(messages, trained, tools, arguments, prompt_messages, tuple(fields.counted))


def _read_tools_anywhere(
    messages: list[Message], fields: Fields
) -> tuple[list[Message], list[Message] | None, Message]:
    """Read tools from their column, from the template arguments or from the system message.

    Returns:
        messages and template arguments without them, tools between.

    Raises:
        RowError: tools in two places that differ.
    """
    arguments = _read_arguments(fields)
    places = {"the tools column": fields.get("tools")}
    if "tools" in arguments:
        places["chat_template_kwargs"] = arguments["tools"]
        arguments = {key: value for key, value in arguments.items() if key != "tools"}
    if "tools" in messages[0] and messages[0]["role"] in ("system", "developer"):
        places["the system message"] = messages[0]["tools"]
        messages = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
    found = {place: tools for place, value in places.items() if (tools := read_tools(value))}
    if any(tools != next(iter(found.values())) for tools in found.values()):
        raise RowError("said-twice", f"{' and '.join(found)} hold different tools.", "keep one of them.")
    return messages, next(iter(found.values()), None), arguments


def read_messages(value: object, column: str, options: FormatOptions, counted: list[str]) -> list[Switched]:
    """Read messages with `role` and `content`, or `from` and `value`.

    Args:
        counted: where it is noted what had to be put right.

    Raises:
        RowError: names the message and what is wrong with it.
    """
    value = from_json(value)
    if not isinstance(value, list):
        what = f"{column} is {kind_of(value)}; expected an array of messages."
        raise RowError("no-messages", what, "write one per turn.")
    mapped = bool(options.roles)
    turns: list[Switched] = []
    for index, message in enumerate(value):
        # Nearly all messages are plain: there is nothing to rewrite, and no place to name.
        if not mapped and _is_plain(message):
            turns.append((message, None))
            continue
        where = f"{column}[{index}]"
        if not isinstance(message, dict):
            what = f"{where} is {kind_of(message)}; expected an object with role and content."
            raise RowError("not-a-message", what, "write each message as an object.")
        spelling = spelled_role(message)
        role = find_role(spelling, options.roles)
        if role is None:
            raise unknown_roles(value, column, options.roles)
        if "from" in message and message.get("role") is not None:
            _check_spellings(message, where, options)
        name = plain_name(str(spelling))
        calls = role == "assistant" and name in CALLS
        if calls:
            read = _read_call_message(message, where, counted)
        else:
            read = _read_message(message, role, where, counted)
        switch = read_switch(message, where, options.loss_weights)
        if switch is True and role != "assistant":
            counted.append("switches_of_other_roles")
        if not (calls and name == "tool_call" and _join_calls(turns, read, switch)):
            turns.append((read, switch))
    return turns


def _check_spellings(message: Message, where: str, options: FormatOptions) -> None:
    """Refuse a message written as `role` and `content` and as `from` and `value`, which differ.

    A `from` that names no role (a person, an id) is a key like any other, and so is a `value` beside it.
    """
    speakers = {key: find_role(message[key], options.roles) for key in ("role", "from")}
    if speakers["from"] is None:
        return
    one, other = (plain_name(str(message[key])) in CALLS for key in speakers)
    texts = [message[key] for key in ("content", "value") if message.get(key) is not None]
    differing = "role and from" if len({*speakers.values()}) > 1 or one != other else ""
    differing = differing or ("content and value" if texts[1:] and texts[0] != texts[1] else "")
    if differing:
        raise RowError("said-twice", f"{where} has {differing}, which differ.", "keep one of them.")


def _is_plain(message: object) -> bool:
    return (
        type(message) is dict
        and message.keys() == _PLAIN_KEYS
        and type(message["content"]) is str
        and message["role"] in ROLES
    )


_PLAIN_KEYS = {"role", "content"}


def _content(message: Message) -> tuple[object, Message]:
    """Return a message's content (`content` outranks `value`), and its other keys that are not null."""
    spelling = "content" if message.get("content") is not None else "value"
    role = "role" if message.get("role") is not None else "from"
    rest = {
        key: item
        for key, item in message.items()
        if item is not None and key not in SWITCHES and key not in (role, spelling)
    }
    return message.get(spelling), rest


def _read_message(message: Message, role: str, where: str, counted: list[str]) -> Message:
    content, rest = _content(message)
    if isinstance(content, list):
        content, found = read_parts(content, f"{where}.content", counted)
        if twice := sorted(found.keys() & rest.keys()):
            what = f"{where} has {twice[0]} in its parts and beside them."
            raise RowError("said-twice", what, "keep one of them.")
        rest |= found
    elif "tool_calls" in rest:
        rest["tool_calls"] = read_calls(rest["tool_calls"], f"{where}.tool_calls", counted)
    if "function_call" in rest:
        rest["tool_calls"] = read_calls(rest.pop("function_call"), f"{where}.function_call", counted)
    _check_reasoning(rest, where)
    if content is None and not rest.get("tool_calls"):
        what = f"{where} has no content."
        raise RowError("no-content", what, 'fill it in ("" for an empty answer), or remove the row.')
    if content is not None and not isinstance(content, str | list):
        what = f"{where}.content is {kind_of(content)}; expected a string."
        raise RowError("not-text", what, "write it as a string.")
    return {"role": role, **({} if content is None else {"content": content}), **rest}


def _read_call_message(message: Message, where: str, counted: list[str]) -> Message:
    """Read a message whose content is a call, or several."""
    content, rest = _content(message)
    return {"role": "assistant", **rest, "tool_calls": read_calls(content, f"{where}.value", counted)}


def _join_calls(turns: list[Switched], message: Message, switch: Switch) -> bool:
    """Add calls to the assistant message before them, if both are one turn; return whether they were added.

    A turn is switched on as a whole where one of its messages is, and the others say nothing. So ms-swift
    writes them: `tool_call` after `tool_call` are parallel, and one after an answer's text belongs to that
    text.
    """
    if not turns or turns[-1][0]["role"] != "assistant" or message.keys() != {"role", "tool_calls"}:
        return False
    before, other = turns[-1]
    if switch != other and {switch, other} != {True, None}:
        return False
    earlier, calls = before.get("tool_calls", []), message["tool_calls"]
    assert isinstance(earlier, list)  # as read_calls and read_parts write them
    assert isinstance(calls, list)
    turns[-1] = {**before, "tool_calls": [*earlier, *calls]}, switch or other
    return True


def _check_reasoning(rest: Message, where: str) -> None:
    found = {key: rest[key] for key in REASONING if key in rest}
    for key, value in found.items():
        if not isinstance(value, str):
            what = f"{where}.{key} is {kind_of(value)}; expected a string."
            raise RowError("not-text", what, "write it as a string.")
    if len(set(found.values())) > 1:
        raise RowError("said-twice", f"{where} has {' and '.join(found)}, which differ.", "keep one of them.")


def _read_arguments(fields: Fields) -> Message:
    value = from_json(fields.get("chat_template_kwargs"))
    if value is None:
        return {}
    if not isinstance(value, dict):
        what = f"chat_template_kwargs is {kind_of(value)}; expected an object."
        raise RowError("bad-template-arguments", what, 'write it as {"enable_thinking": false}.')
    return value


def read_xtuner(value: object, column: str, *, weighted: bool) -> list[Switched]:
    """Read turns written as {system, input, output}; their switches are those of the answer.

    Raises:
        RowError: names the turn and what is wrong with it.
    """
    turns: list[Switched] = []
    value = from_json(value)
    if not isinstance(value, list):
        what = f"{column} is {kind_of(value)}; expected an array of turns."
        raise RowError("no-messages", what, "write one object a turn.")
    for index, turn in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            what = f"{where} is {kind_of(turn)}; expected an object."
            raise RowError("not-a-message", what, "write input and output.")
        fields = Fields(turn, {key: key for key in turn})
        if system := fields.optional_text("system"):
            turns.append(({"role": "system", "content": system}, None))
        if "input" in turn:
            turns.append(({"role": "user", "content": fields.text("input")}, None))
        rest = {
            key: item for key, item in turn.items() if item is not None and key not in _XTUNER_KEYS | SWITCHES
        }
        answer: Message = {"role": "assistant", "content": fields.text("output"), **rest}
        turns.append((answer, read_switch(turn, where, weighted)))
    return turns


_XTUNER_KEYS = {"system", "input", "output"}


# ------------------------------------------------------------------------------------- roles

ROLES = ("system", "developer", "user", "assistant", "tool")
CALLS = ("function_call", "tool_call")
"""Roles of messages whose content is a call."""
ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    **dict.fromkeys(CALLS, "assistant"),
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Only a model has these names. They are suggested, not read: a template may have a role of such a name.
_OF_MODELS = ("bot", "chatbot", "ai", "model", "llm")
_TYPO = 0.85  # as alike as "asistant" and "assistant"; "assistant_result" and "assistant" are not


def spelled_role(message: Mapping[str, object]) -> object:
    """Return the value of `role`, or of `from` where `role` is null or absent."""
    role = message.get("role")
    return message.get("from") if role is None else role


def find_role(spelling: object, mapping: Mapping[str, str]) -> str | None:
    """Return the role that a spelling stands for, in any case of its letters; None for an unknown one.

    >>> find_role("Human", {}), find_role("bot", {"bot": "assistant"}), find_role("context", {})
    ('user', 'assistant', None)
    """
    if not isinstance(spelling, str):
        return None
    name = plain_name(spelling)
    role = mapping.get(spelling, mapping.get(name))
    return role or (name if name in ROLES else ALIASES.get(name))


def plain_name(spelling: str) -> str:
    """Return a role's name without outer space and in lower case."""
    return spelling.strip().lower()


def unknown_roles(messages: Sequence[object], column: str, mapping: Mapping[str, str]) -> RowError:
    """Return the error that names every unknown role; its advice trains no question and no tool's result."""
    spellings = [
        (index, spelled_role(message)) for index, message in enumerate(messages) if isinstance(message, dict)
    ]
    unknown: dict[str | None, tuple[int, object]] = {}
    for index, spelling in spellings:
        if find_role(spelling, mapping) is None:
            unknown.setdefault(spelling if isinstance(spelling, str) else None, (index, spelling))
    found = ", ".join(
        f"{column}[{index}].role is {repr(spelling) if isinstance(spelling, str) else kind_of(spelling)}"
        for index, spelling in unknown.values()
    )
    fixes = ["give every message a role"] if None in unknown else []
    fixes += [_advice(name) for name in unknown if name is not None]
    return RowError("unknown-role", f"{found}; expected one of {', '.join(ROLES)}.", ", ".join(fixes))


def _advice(name: str) -> str:
    plain = plain_name(name)
    near = nearest(plain, [*ROLES, *ALIASES], _TYPO)
    target = "assistant" if plain in _OF_MODELS else ALIASES.get(near, near) if near else None
    if target:
        return f"--map-role {shell_quote(name)}={target}"
    return f"--map-role {shell_quote(name)}=ROLE, where ROLE is system, user, assistant (trained) or tool"


# ------------------------------------------------------------------------ switches and weights

WEIGHTS = ("weight", "loss_weight", "loss_scale")
ON = ("train", "training", "trainable", "loss", "loss_mask", "output_with_loss")  # true: trained
OFF = ("masked",)  # true: not trained
UNCLEAR = {
    "mask": ("it may mean either", 'call it "train" or "masked", by what true means'),
    **dict.fromkeys(
        ("train_detail", "training_detail"),
        ("a part of a message cannot be trained", 'split the message, and switch its parts with "train"'),
    ),
}
SWITCHES = frozenset({*WEIGHTS, *ON, *OFF, *UNCLEAR})


def read_switch(message: Mapping[str, object], where: str, weighted: bool) -> Switch:
    """Return a message's own switch; several must all be on. With `weighted`, the product of its weights.

    Raises:
        RowError: a value that is no switch, or a mask of which it is not known what it leaves out.
    """
    present = [(key, message[key]) for key in message if key in SWITCHES and message[key] is not None]
    if not present:
        return None
    for key, value in present:
        if key in UNCLEAR and value != []:
            why, fix = UNCLEAR[key]
            raise RowError("unclear-switch", f"{where}.{key} is {value!r}; {why}.", fix)
    values = [(key, value) for key, value in present if key not in UNCLEAR]
    strange = [(key, value) for key, value in values if value not in (0, 1)]
    for key, value in strange:
        if not weighted or key not in WEIGHTS or not _is_weight(value):
            expected, fix = "0 or 1, true or false", "write it as true or false."
            if key in WEIGHTS:
                expected = "a number from 0 that float32 can hold" if weighted else expected
                fix = "fix the weight." if weighted else "round the weight, or keep it with --loss-weights."
            raise RowError("fractional-weight", f"{where}.{key} is {value!r}; expected {expected}.", fix)
    on = all(not value if key in OFF else value for key, value in values)
    if not strange or not on:
        return on if values else None
    weight = math.prod((float(value) for _, value in strange if _is_weight(value)), start=1.0)
    if not _is_weight(weight):
        what = f"{where}: its weights multiply to {weight!r}."
        raise RowError("fractional-weight", what, "fix the weights.")
    return weight


def _is_weight(value: object) -> TypeGuard[float]:
    """Say whether float32 holds a number as one above 0 and finite."""
    return isinstance(value, int | float) and _SMALLEST <= value <= _LARGEST


_SMALLEST, _LARGEST = 2.0**-126, 3.4e38  # of the normal numbers of float32
