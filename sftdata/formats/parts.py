"""Content written as a list of parts: text, reasoning, tool calls, tools."""

from __future__ import annotations

from typing import Any

from sftdata.errors import RowError
from sftdata.formats.calls import read_call
from sftdata.sources.jsonrows import kind_of

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
