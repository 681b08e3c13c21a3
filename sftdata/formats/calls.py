"""Tool calls of every spelling, the tools that may be called, and content written as a list of parts."""

from __future__ import annotations

from sftdata.errors import RowError
from sftdata.pictures.rows import PLACE
from sftdata.sources.jsonrows import JsonObject, from_json, kind_of

Message = JsonObject
"""A message, or a part of one."""


def read_calls(value: object, where: str, counted: list[str]) -> list[Message]:
    """Read one call or several, as values or as JSON text.

    Raises:
        RowError: names the call and what is wrong with it.
    """
    value = from_json(value)
    calls = value if isinstance(value, list) else [value]
    return [read_call(call, f"{where}[{index}]", counted) for index, call in enumerate(calls)]


def read_call(call: object, where: str, counted: list[str]) -> Message:
    """Return a tool call as {"type": "function", "function": {"name", "arguments"}}.

    Arguments stay an object, or the JSON text of one, as the row has them.

    Args:
        counted: where it is noted that arguments were encoded twice.

    Raises:
        RowError: not an object with a name, or arguments that are no object.
    """
    call = from_json(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str):
        what = f"{where} is {kind_of(call)} without a function name."
        raise RowError("bad-tool-call", what, 'write it as {"name": ..., "arguments": {...}}.')
    inner = {key: value for key, value in function.items() if value is not None and key != "type"}
    if function is call:  # without an object around it
        outer = {"type": "function"} | ({"id": inner.pop("id")} if "id" in inner else {})
    else:
        outer = {key: value for key, value in call.items() if value is not None}
    spelling = "arguments" if "arguments" in inner or "parameters" not in inner else "parameters"
    inner["arguments"] = _read_arguments(inner.pop(spelling, None), f"{where}.{spelling}", counted)
    return {"type": "function", **outer, "function": inner}


def _read_arguments(value: object, where: str, counted: list[str]) -> Message | str:
    """Return arguments as an object, or as the JSON text of one; a text inside a text is taken out."""
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        return value
    parsed = from_json(value)
    if isinstance(value, str) and isinstance(parsed, dict):
        return value
    if isinstance(parsed, str) and isinstance(from_json(parsed), dict) and parsed != value:
        counted.append("tool_arguments_decoded")
        return parsed
    found = kind_of(parsed)
    if parsed is value and isinstance(value, str):
        found = f"text that is not JSON ({value[:40]!r})"
    what = f"{where} is {found}; expected the arguments as one JSON object."
    raise RowError("bad-tool-call", what, 'write them as {"name": value, ...}, or remove the row.')


def read_tools(value: object) -> list[Message] | None:
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


def without_stray_nulls(messages: list[Message], tools: list[Message], counted: list[str]) -> list[Message]:
    """Remove null arguments that the called tool does not declare; leave calls of unknown tools as they are.

    Arrow gives every object of a column every field that any of them has: such a null says only that another
        call
    had it.
    """
    declared: dict[object, object] = {}  # parameters by name of the tool
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            declared[function["name"]] = function.get("parameters")
    return [
        {**message, "tool_calls": [_without_stray_nulls(call, declared, counted) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _without_stray_nulls(call: Message, declared: dict[object, object], counted: list[str]) -> Message:
    function = call["function"]
    assert isinstance(function, dict)  # as read_call writes it
    arguments = from_json(function["arguments"])
    cleaned = _declared_only(arguments, declared.get(function["name"]))
    if cleaned == arguments:
        return call
    counted.append("calls_with_stray_nulls")
    return {**call, "function": {**function, "arguments": cleaned}}


def _declared_only(value: object, schema: object) -> object:
    """Return a value without the nulls that its JSON schema does not declare, as deep as the schema goes."""
    if isinstance(value, list) and isinstance(schema, dict):
        return [_declared_only(item, schema.get("items")) for item in value]
    known = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or not isinstance(known, dict) or schema.get("additionalProperties"):
        return value
    if not isinstance(value, dict):
        return value
    return {
        key: _declared_only(item, known.get(key))
        for key, item in value.items()
        if item is not None or key in known
    }


# ------------------------------------------------------------------------------------------ parts of content

_TEXT = frozenset({"text", "input_text", "output_text"})
_REASONING = frozenset({"reasoning", "thinking"})
_CALLS = frozenset({"tool_call", "function_call"})
MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image-part"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio-part"),
    **dict.fromkeys(("video", "video_url"), "video-part"),
}
"""Type of a part -> code of the reject."""
WITH_PROCESSOR = "--processor FOLDER, of the model's processor; or leave out rows with pictures."


Content = str | list[Message]
"""The text of a message; where pictures stand in it, parts of text and `PLACE` for each picture."""


def read_parts(parts: list[object], where: str, counted: list[str]) -> tuple[Content | None, Message]:
    """Return the text of content parts, and what else they hold (`reasoning_content`, `tool_calls`, `tools`).

    Templates write reasoning, then text, then tool calls; parts in another order would change place unseen,
    so they are refused.

    Raises:
        RowError: a picture, sound or film; a part of an unknown kind or out of order.
    """
    reasoning: list[str] = []
    content: list[Message] = []
    calls: list[Message] = []
    rest: Message = {}
    order = ("reasoning", "text", "tool_calls")
    last = 0
    for index, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type") == "tools":
            rest["tools"] = part.get("value", part.get("tools"))
            continue
        name, value = _read_part(part, f"{where}[{index}]", counted)
        rank = order.index(name)
        if rank < last:
            template = "a template writes reasoning, text, tool calls, in this order"
            what = f"{where}[{index}]: {name} after {order[last]}; {template}."
            raise RowError("part-order", what, "split the message in two.")
        last = rank
        if isinstance(value, str) and name == "reasoning":
            reasoning.append(value)
        elif name == "text":
            content.append({"type": "text", "text": value} if isinstance(value, str) else value)
        elif not isinstance(value, str):
            calls.append(value)
    if reasoning:
        rest["reasoning_content"] = "".join(reasoning)
    if calls:
        rest["tool_calls"] = calls
    if any(part is PLACE for part in content):
        return content, rest
    return ("".join(str(part["text"]) for part in content) if content or not rest else None), rest


def _read_part(part: object, where: str, counted: list[str]) -> tuple[str, str | Message]:
    """Return what a part is, "text", "reasoning" or "tool_calls", and its text or call; pictures are text."""
    if isinstance(part, str):
        return "text", part
    if part is PLACE:
        return "text", PLACE
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    if isinstance(kind, str) and kind in MEDIA:
        what = f"{where} is {kind!r}, and no processor says what stands for it."
        fix = WITH_PROCESSOR if MEDIA[kind] == "image-part" else "leave out rows with films and sound."
        raise RowError(MEDIA[kind], what, fix)
    if isinstance(kind, str) and kind in _CALLS:
        return "tool_calls", read_call(fields.get("value", fields.get(kind, part)), where, counted)
    if not isinstance(kind, str) or kind not in _TEXT | _REASONING:
        found = repr(kind) if kind else kind_of(part)
        what = f"{where} is {found}; expected a part of type text, image, reasoning or tool_call."
        raise RowError("unknown-part", what, "give it one of these types, or write the content as a string.")
    value = next((fields[key] for key in ("text", "value", kind) if fields.get(key) is not None), None)
    if not isinstance(value, str):
        what = f"{where} holds {kind_of(value)}; expected its text under text or value."
        raise RowError("not-text", what, "write it as a string.")
    return ("text" if kind in _TEXT else "reasoning"), value
