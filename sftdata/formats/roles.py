"""Who speaks: the roles of every spelling -> those that chat templates know, and advice for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftdata.errors import RowError, nearest
from sftdata.sources.jsonrows import kind_of

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
# No one but the model goes by these names. They are not read unasked: a template may know a role of such a name.
_OF_MODELS = ("bot", "chatbot", "ai", "model", "llm")
_TYPO = 0.85  # as alike as "asistant" and "assistant"; "assistant_result" and "assistant" are not


def spelled_role(message: Mapping[str, Any]) -> Any:
    """Return what stands under `role`, or under `from` where `role` is null or absent."""
    role = message.get("role")
    return message.get("from") if role is None else role


def find_role(spelling: Any, mapping: Mapping[str, str]) -> str | None:
    """Return the role that a spelling stands for, in any case of its letters; None for one that nothing is known of.

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


def unknown_roles(messages: Sequence[Any], column: str, mapping: Mapping[str, str]) -> RowError:
    """Return the error that names every unknown role of a conversation, with advice that trains no question and no result."""
    spellings = [
        (index, spelled_role(message)) for index, message in enumerate(messages) if isinstance(message, dict)
    ]
    unknown: dict[str | None, tuple[int, Any]] = {}
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
        return f"--map-role {name}={target}"
    return f"--map-role {name}=ROLE, where ROLE is system, user, assistant (trained) or tool"
