"""Chat templates: choose, compile and render them, with the text of transformers' own renderer.

What a render leaves unread of a message or of the template's arguments is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import jinja2.exceptions
import jinja2.meta
import jinja2.nodes

from sftdata.errors import UsageError, did_you_mean
from sftdata.render.environment import (
    GENERATION_CLOSE,
    GENERATION_OPEN,
    BoundedEnvironment,
    join_bounded,
    make_environment,
)

if TYPE_CHECKING:
    from _collections_abc import dict_items, dict_keys, dict_values

Message = dict[str, object]
"""A message of a conversation: plain JSON data."""

# Template text that looks like a control token; a tokenizer that lacks it would spell it out in pieces.
CONTROL_SHAPE = re.compile(r"<\|[^\s<>|\"]+\|?>|<[^\s<>|/\"]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_[a-z]+>")

# Names a message's reasoning is passed under; transformers fills `reasoning_content` (and `thinking`, for
# gpt-oss) from any.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A chat template as chosen, before any tokenizer is changed for it.

    Attributes:
        text: the Jinja source.
        origin: where it comes from, in words: "tokenizer", "built-in chatml", a file, another tokenizer's
            name.
        tokens: control tokens it writes that the tokenizer must hold as single ids.
        eos_token: the token that ends its turns, when it comes with one; None keeps the tokenizer's.
    """

    text: str
    origin: str
    tokens: tuple[str, ...] = ()
    eos_token: str | None = None


# name -> the end-of-turn token that becomes EOS with it (None: the template writes the tokenizer's own EOS)
BUILT_IN: Mapping[str, str | None] = {
    "alpaca": None,
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama-2": None,
    "llama-3": "<|eot_id|>",
    "mistral": None,
    "vicuna": None,
    "zephyr": None,
}


def choose_template(
    choice: str | None, own: str | None, clone: Callable[[str], tuple[str | None, Sequence[str], str | None]]
) -> TemplateChoice | None:
    """Resolve `--chat-template`: a built-in name, a file, a tokenizer to clone; None keeps its own.

    Args:
        choice: the setting.
        own: the tokenizer's own template.
        clone: loads another tokenizer: (its chat template, its added tokens, its eos token).

    Raises:
        UsageError: no such template.
    """
    if choice is None:
        return None if own is None else TemplateChoice(own, "tokenizer")
    if choice in BUILT_IN:
        text = resources.files("sftdata.render").joinpath(f"templates/{choice}.jinja").read_text("utf-8")
        return TemplateChoice(text, f"built-in {choice}", control_tokens(text), BUILT_IN[choice])
    if Path(choice).is_file():
        try:
            text = Path(choice).read_text("utf-8")
        except UnicodeDecodeError as error:
            what = f"--chat-template {choice}: not utf-8 at byte {error.start}."
            raise UsageError(what, "save it as utf-8.") from None
        return TemplateChoice(text, f"file {Path(choice).name}", control_tokens(text))
    try:
        text_or_none, added, eos_token = clone(choice)
    except UsageError as error:
        names = ", ".join(sorted(BUILT_IN))
        raise UsageError(
            f"--chat-template {choice}: neither a built-in template ({names}), a file,"
            f" nor a tokenizer ({error.message})",
            did_you_mean(choice, BUILT_IN, "give one of these."),
        ) from None
    if text_or_none is None:
        what = f"--chat-template {choice}: that tokenizer has no chat template."
        raise UsageError(what, "name another, or a template file.")
    tokens = tuple(token for token in added if token in text_or_none or token == eos_token)
    return TemplateChoice(text_or_none, f"cloned from {choice}", tokens, eos_token)


def control_tokens(text: str) -> tuple[str, ...]:
    """Return the control-token-like strings a template writes, in order of appearance, each once.

    >>> control_tokens("{{ '<|im_start|>' + role }}<|im_end|>{{ '<|im_start|>' }}")
    ('<|im_start|>', '<|im_end|>')
    """
    return tuple(dict.fromkeys(CONTROL_SHAPE.findall(text)))


def variables_of(text: str) -> frozenset[str]:
    """Return the names that a template reads and does not set: its arguments, and the clock.

    >>> sorted(variables_of("{% set a = b %}{{ a }}{{ strftime_now('%Y') }}"))
    ['b', 'strftime_now']
    """
    tree = make_environment("2025-01-01", BoundedEnvironment).parse(text)
    read = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "load"}
    return frozenset(jinja2.meta.find_undeclared_variables(tree) | (read & {"strftime_now"}))


class TemplateRefusal(Exception):
    """The template would not render this conversation (its own raise_exception, or an error inside it)."""


class SandboxRefusal(TemplateRefusal):
    """The template was stopped: it reached for what it must not have, or worked without end."""


class ChatTemplate:
    """A compiled chat template with the special tokens and the date it renders with.

    Args:
        text: Jinja source.
        special_tokens: the tokenizer's map (`bos_token`, `eos_token`, ...), visible to the template.
        date: ISO date that `strftime_now` formats.
        template_kwargs: arguments for every render.

    Raises:
        UsageError: the source does not compile.
    """

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, str] | None = None,
        date: str = "2025-01-01",
        template_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        self.text = text
        self.date = date
        self.special_tokens = dict(special_tokens or {})
        self.template_kwargs = dict(template_kwargs or {})
        self.has_generation = re.search(r"\{%-?\+?\s*generation\s*[-+]?%\}", text) is not None
        environment = make_environment(date, BoundedEnvironment)
        try:
            self._compiled = environment.from_string(text)
            tree = environment.parse(text)
            self.constants = _compared_constants(tree)
            self.names = frozenset(jinja2.meta.find_undeclared_variables(tree))
            self.takes_tools = "tools" in self.names
        except jinja2.TemplateSyntaxError as error:
            what = f"Chat template, line {error.lineno}: {error.message}."
            raise UsageError(what, "fix the template.") from None

    @cached_property
    def roles_in_parts(self) -> frozenset[str]:
        """Roles whose content the template takes as a list of parts only; nearly all templates take text."""
        self.__dict__["roles_in_parts"] = frozenset()  # until this is answered, contents go as they are
        conversations = (
            ("user", "assistant"),
            ("system", "user", "assistant"),
            ("user", "assistant", "tool"),
        )
        try:
            return frozenset().union(*map(self._iterated, conversations))
        except SandboxRefusal:  # it would be stopped again each time, after all its budget
            return frozenset()

    def _iterated(self, roles: Sequence[str]) -> frozenset[str]:
        """Return the fewest of these roles that need parts for all texts to show; none if no help."""
        texts = {role: f"{role[0].upper()}0" for role in roles}
        for count in range(len(roles) + 1):
            for chosen in combinations(roles, count):
                contents = {
                    role: [{"type": "text", "text": texts[role]}] if role in chosen else texts[role]
                    for role in roles
                }
                try:
                    shown = self.render(
                        [{"role": role, "content": content} for role, content in contents.items()]
                    )
                except SandboxRefusal:
                    raise
                except TemplateRefusal:
                    continue
                if all(text in shown for text in texts.values()):
                    return frozenset(chosen)
        return frozenset()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        *,
        add_generation_prompt: bool = False,
        keep_generation: bool = False,
    ) -> str:
        """Render one conversation of plain JSON data.

        Args:
            keep_generation: keep the sentinels around `{% generation %}` blocks in the text.

        Raises:
            TemplateRefusal: the template raised.
        """
        arguments = self.arguments(
            messages, tools, template_kwargs, add_generation_prompt=add_generation_prompt
        )
        try:
            text = join_bounded(self._compiled.root_render_func(self._compiled.new_context(arguments)))
        except jinja2.exceptions.SecurityError as error:
            raise SandboxRefusal(str(error)) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from None
        except (MemoryError, OverflowError, RecursionError, ZeroDivisionError) as error:
            raise TemplateRefusal(f"{type(error).__name__} while rendering") from None
        if self.has_generation and not keep_generation:
            text = text.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")
        return text

    def watch(self, messages: Sequence[Mapping[str, object]]) -> list[WatchedMessage]:
        """Return messages that note what a render asks of them."""
        return [WatchedMessage(self._normal(message)) for message in messages]

    def _normal(self, message: Mapping[str, object]) -> Message:
        if isinstance(message, WatchedMessage):
            return message
        normal = _normal_message(message)
        content = normal.get("content")
        if isinstance(content, str) and self.roles_in_parts and normal.get("role") in self.roles_in_parts:
            normal["content"] = [{"type": "text", "text": content}]
        return normal

    def arguments(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Message:
        """Return all the names that the template sees."""
        arguments = {**self.special_tokens, **self.template_kwargs, **(template_kwargs or {})}
        return arguments | {
            "messages": [self._normal(message) for message in messages],
            "tools": tools,
            "documents": arguments.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }


def _normal_message(message: Mapping[str, object]) -> Message:
    """Drop None values and alias reasoning fields, as transformers does before it renders."""
    normal = {key: value for key, value in message.items() if value is not None}
    reasoning = next((normal[key] for key in REASONING_FIELDS if key in normal), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _compared_constants(tree: jinja2.nodes.Template) -> tuple[str, ...]:
    """Return the strings a template compares, searches or splits with: what it can tell contents apart by."""
    found: set[str] = set()
    for node in tree.find_all(
        (jinja2.nodes.Compare, jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Test)
    ):
        found |= {
            constant.value
            for constant in node.find_all(jinja2.nodes.Const)
            if isinstance(constant.value, str) and constant.value.strip()
        }
    return tuple(sorted(found))


# ------------------------------------------------------------------------------------ texts of a message


def calls_of(message: Message) -> list[Message]:
    """Return the tool calls of a message, but for what is no object."""
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def functions_of(message: Message) -> list[Message]:
    """Return the functions that a message calls, as {"name": ..., "arguments": ...}."""
    functions = [call.get("function", call) for call in calls_of(message)]
    return [function for function in functions if isinstance(function, dict)]


def content_of(message: Message) -> str:
    """Return the content of a message where it is text, the text of its parts joined, else ""."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(text for text in texts_of_parts(content) if isinstance(text, str))
    return content if isinstance(content, str) else ""


def texts_of_parts(parts: Sequence[object]) -> list[object]:
    """Return what the parts of a content hold under `text`."""
    return [part["text"] for part in parts if isinstance(part, dict) and "text" in part]


def reasoning_of(message: Message) -> object:
    """Return the reasoning of a message, under whatever name: several hold the same."""
    return next((message[key] for key in REASONING_FIELDS if message.get(key) is not None), None)


def message_texts(message: Message) -> Iterator[str]:
    """Yield the texts of a message: content, reasoning and the strings in the arguments of its tool calls.

    >>> call = {"function": {"arguments": {"city": "Rome"}}}
    >>> list(message_texts({"role": "assistant", "content": "", "tool_calls": [call]}))
    ['Rome']
    """
    content = message.get("content")
    stack = [texts_of_parts(content) if isinstance(content, list) else content, reasoning_of(message)]
    if "tool_calls" in message:
        stack += [function.get("arguments") for function in functions_of(message)]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value.strip():
                yield value
        elif isinstance(value, dict | list):
            stack += value.values() if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------ what goes unread

TRACKED_KEYS = frozenset({"role", "content", "tool_calls", "reasoning_content", "reasoning", "thinking"})
"""Keys that are tracked in other ways: what they say is trained, or counted as dropped by the template."""


class WatchedMessage(Message):
    """A message that notes which of its keys a template looks up."""

    __slots__ = ("looked_up",)

    def __init__(self, message: Mapping[str, object]) -> None:
        super().__init__(message)
        self.looked_up: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        """Return the value of a key, noting it."""
        self.looked_up.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.looked_up.update(super().keys())
        return super().__iter__()

    def keys(self) -> dict_keys[str, object]:
        """Return all keys, noting them."""
        self.looked_up.update(super().keys())
        return super().keys()

    def values(self) -> dict_values[str, object]:
        """Return all values, noting their keys."""
        self.looked_up.update(super().keys())
        return super().values()

    def items(self) -> dict_items[str, object]:
        """Return all items, noting their keys."""
        self.looked_up.update(super().keys())
        return super().items()

    def unread(self) -> set[str]:
        """Return the keys that nothing looked up."""
        return {key for key in dict.keys(self) if key not in self.looked_up} - TRACKED_KEYS


def has_untracked_keys(messages: Sequence[Mapping[str, object]]) -> bool:
    """Return whether any message has a key that may go unread."""
    return any(not message.keys() <= TRACKED_KEYS for message in messages)


def unread_names(
    messages: list[WatchedMessage], arguments: Mapping[str, object], read: frozenset[str]
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
