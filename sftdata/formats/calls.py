"""Tool calls of every spelling, and the tools that may be called."""

from __future__ import annotations

from typing import Any

from sftdata.errors import RowError
from sftdata.sources.jsonrows import from_json, kind_of

Message = dict[str, Any]


def read_calls(value: Any, where: str, counted: list[str]) -> list[Message]:
    """Read one call or several, as values or as JSON text.

    Raises:
        RowError: names the call and what is wrong with it.
    """
    value = from_json(value)
    calls = value if isinstance(value, list) else [value]
    return [read_call(call, f"{where}[{index}]", counted) for index, call in enumerate(calls)]


def read_call(call: Any, where: str, counted: list[str]) -> Message:
    """Return a tool call as {"type": "function", "function": {"name", "arguments"}}, arguments in the form that the row has.

    Args:
        counted: where it is noted that arguments were encoded twice.

    Raises:
        RowError: not an object with a name, or arguments that are no object.
    """
    call = from_json(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        what = f"{where} is {kind_of(call)} without a function name."
        raise RowError("bad-tool-call", what, 'write it as {"name": ..., "arguments": {...}}.')
    outer = (
        {key: value for key, value in call.items() if value is not None}
        if function is not call
        else {"type": "function"}
    )
    inner = {key: value for key, value in function.items() if value is not None and key != "type"}
    if function is call and "id" in inner:
        outer["id"] = inner.pop("id")
    spelling = "arguments" if "arguments" in inner or "parameters" not in inner else "parameters"
    inner["arguments"] = _read_arguments(inner.pop(spelling, None), f"{where}.{spelling}", counted)
    return {"type": "function", **outer, "function": inner}


def _read_arguments(value: Any, where: str, counted: list[str]) -> dict[str, Any] | str:
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
    found = (
        f"text that is not JSON ({value[:40]!r})"
        if parsed is value and isinstance(value, str)
        else kind_of(parsed)
    )
    what = f"{where} is {found}; expected the arguments as one JSON object."
    raise RowError("bad-tool-call", what, 'write them as {"name": value, ...}, or remove the row.')


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


def without_stray_nulls(
    messages: list[Message], tools: list[dict[str, Any]], counted: list[str]
) -> list[Message]:
    """Take out null arguments that the called tool does not declare; calls of tools that are not there stay as they are.

    Arrow gives every object of a column every field that any of them has: such a null says only that another call had it.
    """
    declared = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict):
            declared[function.get("name")] = function.get("parameters")
    return [
        {
            **message,
            "tool_calls": [_without_stray_nulls(call, declared, counted) for call in message["tool_calls"]],
        }
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _without_stray_nulls(call: Message, declared: dict[Any, Any], counted: list[str]) -> Message:
    function = call["function"]
    arguments = from_json(function["arguments"])
    cleaned = _declared_only(arguments, declared.get(function["name"]))
    if cleaned == arguments:
        return call
    counted.append("calls_with_stray_nulls")
    return {**call, "function": {**function, "arguments": cleaned}}


def _declared_only(value: Any, schema: Any) -> Any:
    """Return a value without the nulls that its JSON schema does not know of, at every depth that the schema describes."""
    if isinstance(value, list) and isinstance(schema, dict):
        return [_declared_only(item, schema.get("items")) for item in value]
    known = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(value, dict) or not isinstance(known, dict) or schema.get("additionalProperties"):
        return value
    return {
        key: _declared_only(item, known.get(key))
        for key, item in value.items()
        if item is not None or key in known
    }


# ------------------------------------------------------------------------------------------

TEXT = {"text", "input_text", "output_text"}
REASONING = {"reasoning", "thinking"}
CALLS = {"tool_call", "function_call"}
MEDIA = {
    "image": "image-part",
    "image_url": "image-part",
    "input_image": "image-part",
    "audio": "audio-part",
    "audio_url": "audio-part",
    "input_audio": "audio-part",
    "video": "video-part",
    "video_url": "video-part",
}


def read_parts(parts: list[Any], where: str, counted: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the text of content parts, and what else they hold: `reasoning_content`, `tool_calls` and `tools`.

    Templates write reasoning, then text, then tool calls; parts in another order would change place unseen, so they are refused.

    Raises:
        RowError: a picture, sound or film; a part of an unknown kind or out of order.
    """
    found: dict[str, list[Any]] = {"reasoning": [], "text": [], "tool_calls": []}
    rest: dict[str, Any] = {}
    order = list(found)
    last = 0
    for index, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type") == "tools":
            rest["tools"] = part.get("value", part.get("tools"))
            continue
        name, value = _read_part(part, f"{where}[{index}]", counted)
        rank = order.index(name)
        if rank < last:
            what = f"{where}[{index}]: {name} after {order[last]}; a template writes reasoning, text, tool calls, in this order."
            raise RowError("part-order", what, "split the message in two.")
        last = rank
        found[name].append(value)
    if found["reasoning"]:
        rest["reasoning_content"] = "".join(found["reasoning"])
    if found["tool_calls"]:
        rest["tool_calls"] = found["tool_calls"]
    return ("".join(found["text"]) if found["text"] or not rest else None), rest


def _read_part(part: Any, where: str, counted: list[str]) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in MEDIA:
        raise RowError(
            MEDIA[kind], f"{where} is {kind!r}; only text can be prepared.", "leave out rows with media."
        )
    if kind in CALLS:
        return "tool_calls", read_call(part.get("value", part.get(kind, part)), where, counted)
    if kind not in TEXT | REASONING:
        what = f"{where} is {repr(kind) if kind else kind_of(part)}; expected a part of type text, reasoning or tool_call."
        raise RowError("unknown-part", what, "write the content as a string.")
    value = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
    if not isinstance(value, str):
        what = f"{where} holds {kind_of(value)}; expected its text under text or value."
        raise RowError("not-text", what, "write it as a string.")
    return ("text" if kind in TEXT else "reasoning"), value
