"""Chat messages of every spelling -> messages as chat templates take them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.read.fields import Fields, FormatOptions, from_json, kind_of
from sftdata.read.parts import read_call, read_parts

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
SWITCHES = ("weight", "loss_weight", "train")
Message = dict[str, Any]
Turn = tuple[Message, bool | float | None]  # a message, and its own switch, or its weight


def read_conversation(turns: list[Turn], fields: Fields, options: FormatOptions, prompt_messages: int = 0) -> Conversation:
    """Join turns with the row's own system text, tools and template arguments.

    Raises:
        RowError: no message, no assistant message, two system texts, tools or arguments that cannot be read.
    """
    if not turns:
        raise RowError("no-messages", "the conversation is empty.", "remove the row.")
    messages, trained = [message for message, _ in turns], [switch for _, switch in turns]
    if options.need_assistant and "assistant" not in [message["role"] for message in messages]:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        what = f"no assistant message to train on; found only {roles}."
        raise RowError("no-assistant", what, "add the answer, name its role with --map-role ROLE=assistant, or --train-on all.")
    if len(fields.names) == 1:  # the row has messages and nothing beside them
        return Conversation(messages, trained, prompt_messages=prompt_messages)
    system = fields.optional_text("system")
    if system:
        if messages[0]["role"] not in ("system", "developer"):
            messages, trained = [{"role": "system", "content": system}, *messages], [None, *trained]
            prompt_messages += prompt_messages > 0
        elif messages[0].get("content") != system:
            raise RowError("two-system-texts", "the system column and the first message differ.", "keep one of them.")
    return Conversation(messages, trained, read_tools(fields.get("tools")), _read_arguments(fields), prompt_messages)


def read_messages(value: Any, column: str, options: FormatOptions) -> list[Turn]:
    """Read messages with `role` and `content`, or `from` and `value`.

    Raises:
        RowError: names the message and what is wrong with it.
    """
    value = from_json(value)
    if not isinstance(value, list):
        raise RowError("no-messages", f"{column} is {kind_of(value)}; expected an array of messages.", "write one per turn.")
    mapped = bool(options.roles)
    return [
        # Nearly all messages are plain: there is nothing to rewrite, and no place to name.
        (message, None) if not mapped and _is_plain(message) else _read_message(message, f"{column}[{index}]", options)
        for index, message in enumerate(value)
    ]


def _is_plain(message: Any) -> bool:
    return (
        type(message) is dict and message.keys() == _PLAIN_KEYS and type(message["content"]) is str and message["role"] in ROLES
    )


def _read_message(message: Any, where: str, options: FormatOptions) -> Turn:
    if not isinstance(message, dict):
        what = f"{where} is {kind_of(message)}; expected an object with role and content."
        raise RowError("not-a-message", what, "write each message as an object.")
    spelling = message.get("role", message.get("from"))
    role = _read_role(spelling, where, options.roles)
    content = message.get("content", message.get("value"))
    rest = {key: item for key, item in message.items() if item is not None and key not in _OWN_KEYS}
    if spelling == "function_call":
        rest["tool_calls"] = _read_calls(content, f"{where}.value")
        content = None
    elif isinstance(content, list):
        content, found = read_parts(content, f"{where}.content")
        if twice := sorted(found.keys() & rest.keys()):
            raise RowError("said-twice", f"{where} has {twice[0]} in its parts and beside them.", "keep one of them.")
        rest |= found
    if "tool_calls" in rest and spelling != "function_call":
        rest["tool_calls"] = _read_calls(rest["tool_calls"], f"{where}.tool_calls")
    if "function_call" in rest:
        rest["tool_calls"] = _read_calls(rest.pop("function_call"), f"{where}.function_call")
    if content is None and not rest.get("tool_calls"):
        raise RowError("no-content", f"{where} has no content.", 'fill it in ("" for an empty answer), or remove the row.')
    if content is not None and not isinstance(content, str):
        raise RowError("not-text", f"{where}.content is {kind_of(content)}; expected a string.", "write it as a string.")
    return {"role": role, **({} if content is None else {"content": content}), **rest}, _read_switch(
        message, where, options.loss_weights
    )


_PLAIN_KEYS = {"role", "content"}
_OWN_KEYS = frozenset({"role", "content", "from", "value", *SWITCHES})


def _read_role(role: Any, where: str, mapping: Mapping[str, str]) -> str:
    if not isinstance(role, str):
        what = f"{where}.role is {kind_of(role)}; expected one of {', '.join(ROLES)}."
        raise RowError("unknown-role", what, "give every message a role.")
    if role in mapping:
        return mapping[role]
    if role in ROLES:
        return role
    if role in ALIASES:
        return ALIASES[role]
    near = difflib.get_close_matches(role.lower(), [*ROLES, *ALIASES], n=1)
    target = ALIASES.get(near[0], near[0]) if near else "assistant"
    what = f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}."
    raise RowError("unknown-role", what, f"--map-role {role}={target}")


def _read_switch(message: Message, where: str, weighted: bool) -> bool | float | None:
    """Return a message's own switch; several must all be on. With `weighted`, the product of weights that are no switches."""
    values = [(key, message[key]) for key in SWITCHES if message.get(key) is not None]
    strange = [(key, value) for key, value in values if value not in (0, 1)]
    for key, value in strange:
        if not weighted or key == "train" or not _is_weight(value):
            wanted = "a number from 0 that float32 can hold" if weighted and key != "train" else "0 or 1, true or false"
            fix = "mend the weight." if weighted else "round the weight, or keep it with --loss-weights."
            raise RowError("fractional-weight", f"{where}.{key} is {value!r}; expected {wanted}.", fix)
    if not strange or not all(value for _, value in values):
        return all(value for _, value in values) if values else None
    weight = math.prod(float(value) for _, value in strange)
    if not _is_weight(weight):
        raise RowError("fractional-weight", f"{where}: its weights multiply to {weight!r}.", "mend the weights.")
    return weight


def _is_weight(value: Any) -> bool:
    """Say whether float32 holds a number as one above 0 and finite."""
    return isinstance(value, int | float) and _SMALLEST <= value <= _LARGEST


_SMALLEST, _LARGEST = 2.0**-126, 3.4e38  # of the normal numbers of float32


def _read_calls(value: Any, where: str) -> list[Message]:
    value = from_json(value)
    calls = value if isinstance(value, list) else [value]
    return [read_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return tool schemas, each as {"type": "function", "function": ...}; None when there is none.

    Raises:
        RowError: not a list of objects, or a string that is not JSON.
    """
    tools = from_json(value)
    if not tools:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        what = f"tools is {kind_of(value)} that holds no list of tool schemas."
        raise RowError("bad-tools", what, "give a list of JSON schemas, or that list as JSON text.")
    return [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]


def _read_arguments(fields: Fields) -> dict[str, Any]:
    value = from_json(fields.get("chat_template_kwargs"))
    if value is None:
        return {}
    if not isinstance(value, dict):
        what = f"chat_template_kwargs is {kind_of(value)}; expected an object."
        raise RowError("bad-template-arguments", what, 'write it as {"enable_thinking": false}.')
    return value


def read_xtuner(value: Any, column: str) -> list[Turn]:
    """Read turns written as {system, input, output}; `output_with_loss: false` switches an answer off.

    Raises:
        RowError: names the turn and what is wrong with it.
    """
    turns: list[Turn] = []
    value = from_json(value)
    if not isinstance(value, list):
        raise RowError("no-messages", f"{column} is {kind_of(value)}; expected an array of turns.", "write one object a turn.")
    for index, turn in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise RowError("not-a-message", f"{where} is {kind_of(turn)}; expected an object.", "write input and output.")
        fields = Fields(turn, {key: key for key in turn})
        if system := fields.optional_text("system"):
            turns.append(({"role": "system", "content": system}, None))
        if "input" in turn:
            turns.append(({"role": "user", "content": fields.text("input")}, None))
        loss = turn.get("output_with_loss")
        turns.append(({"role": "assistant", "content": fields.text("output")}, None if loss is None else bool(loss)))
    return turns
