"""What a chat template does not read: keys of messages and template arguments that were given for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

KNOWN = frozenset({"role", "content", "tool_calls", "reasoning_content", "reasoning", "thinking"})
"""Keys that are looked after in other ways: what they say is trained, or counted as swallowed."""


class WatchedMessage(dict[str, Any]):
    """A message that notes which of its keys are asked for."""

    __slots__ = ("asked",)

    def __init__(self, message: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.asked: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, noting it."""
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        self.asked.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        """Return all keys, noting them."""
        self.asked.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        """Return all values, noting their keys."""
        self.asked.update(super().keys())
        return super().values()

    def items(self) -> Any:
        """Return all items, noting their keys."""
        self.asked.update(super().keys())
        return super().items()

    def unread(self) -> set[str]:
        """Return the keys that nothing asked for."""
        return {key for key in dict.keys(self) if key not in self.asked} - KNOWN


def has_more(messages: list[dict[str, Any]]) -> bool:
    """Say whether any message has a key that may go unread."""
    return any(not message.keys() <= KNOWN for message in messages)


def unread_names(
    messages: list[WatchedMessage], arguments: Mapping[str, Any], read: frozenset[str]
) -> tuple[str, ...]:
    """Return the counters of what a template did not read, one entry for each message that has it.

    Args:
        messages: as rendered.
        arguments: template arguments of the row.
        read: names that the template looks up.
    """
    keys = Counter(f"message_key_unused:{key}" for message in messages for key in message.unread())
    named = [f"template_argument_unused:{name}" for name in sorted(set(arguments) - read)]
    return (*sorted(keys.elements()), *named)
