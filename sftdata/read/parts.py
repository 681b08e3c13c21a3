"""Content written as a list of parts, and tool calls."""

from __future__ import annotations

from typing import Any

from sftdata.errors import RowError
from sftdata.read.fields import from_json, kind_of

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


def read_parts(parts: list[Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """Return the text of content parts, and what else they hold: `reasoning_content` and `tool_calls`.

    Templates write reasoning, then text, then tool calls; parts in another order would change place unseen, so they are refused.

    Raises:
        RowError: a picture, sound or film; a part of an unknown kind or out of order.
    """
    found: dict[str, list[Any]] = {"reasoning": [], "text": [], "tool_calls": []}
    order = list(found)
    last = 0
    for index, part in enumerate(parts):
        name, value = _read_part(part, f"{where}[{index}]")
        rank = order.index(name)
        if rank < last:
            what = f"{where}[{index}]: {name} after {order[last]}; a template writes reasoning, text, tool calls, in this order."
            raise RowError("part-order", what, "split the message in two.")
        last = rank
        found[name].append(value)
    rest: dict[str, Any] = {}
    if found["reasoning"]:
        rest["reasoning_content"] = "".join(found["reasoning"])
    if found["tool_calls"]:
        rest["tool_calls"] = found["tool_calls"]
    return ("".join(found["text"]) if found["text"] or not rest else None), rest


def _read_part(part: Any, where: str) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in MEDIA:
        raise RowError(MEDIA[kind], f"{where} is {kind!r}; only text can be prepared.", "leave out rows with media.")
    if kind in CALLS:
        return "tool_calls", read_call(part.get("value", part.get(kind, part)), where)
    if kind not in TEXT | REASONING:
        what = f"{where} is {repr(kind) if kind else kind_of(part)}; expected a part of type text, reasoning or tool_call."
        raise RowError("unknown-part", what, "write the content as a string.")
    value = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
    if not isinstance(value, str):
        what = f"{where} holds {kind_of(value)}; expected its text under text or value."
        raise RowError("not-text", what, "write it as a string.")
    return ("text" if kind in TEXT else "reasoning"), value


def read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call as {"type": "function", "function": {"name", "arguments"}}, arguments as an object where they are one.

    Raises:
        RowError: not an object with a name.
    """
    call = from_json(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        what = f"{where} is {kind_of(call)} without a function name."
        raise RowError("bad-tool-call", what, 'write it as {"name": ..., "arguments": {...}}.')
    arguments = function.get("arguments", {})
    parsed = from_json(arguments) if arguments else {}
    outer = {key: value for key, value in call.items() if value is not None} if function is not call else {"type": "function"}
    inner = {key: value for key, value in function.items() if value is not None and key != "type"}
    if function is call and "id" in inner:
        outer["id"] = inner.pop("id")
    inner["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", **outer, "function": inner}
