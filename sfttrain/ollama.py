"""A Modelfile for Ollama: the chat template in its language, where that says the same, and the stop tokens.

Ollama runs no Jinja. Of a GGUF it compares the template with those that it knows, and sends the message as it
stands where none is near; so a Modelfile has to say it, in Go's templates. What is said here is learned from
the template itself: which texts it writes around a message of each role. It is held against the template on
conversations, and there is no Modelfile where it writes anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import TemplateError

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Renders a conversation; the flag asks for the opening of an answer."""

_ROLES = ("system", "user", "assistant")


def _said(*contents: str, system: str = "") -> list[Message]:
    """Return a conversation of question and answer in turns."""
    turns = [{"role": _ROLES[1 + number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


_PLAIN = (
    _said("a"), _said("a", system="s"), _said("a", "b", "c"),
    _said("a", "b", "c", "d", "e", system="Two\n\nlines."),
    _said("{{ .Content }} {% x %} \\n \"'", "Grüße, 🌍: <b> & &lt;", "1\n2", system="{{ if }}"),
    _said("1.\n\n2.\n\n\n- x  y\t# z", "`a`\n\n  b:\n\n### c", "x\n\ny", system="a\n\n\nb  c"),
)  # fmt: skip
_ODD = {
    "spaces around a message, which the template drops": _said(" a ", " b ", "c", system=" s "),
    "reasoning in earlier answers, which the template drops": _said("a", "<think>\nx\n</think>\n\nb", "c"),
    "a system message without text": [{"role": "system", "content": ""}, *_said("a")],
}


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat template that writes each message between two texts.

    Attributes:
        around: of each role, the texts before and behind a message.
        first: what begins a conversation without a system message.
        opening: of an answer.
    """

    around: dict[str, tuple[str, str]]
    first: str
    opening: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation, and the opening of the answer to it."""
        text = (
            ""
            if any(message["role"] == "system" and message["content"] for message in messages)
            else self.first
        )
        for message in messages:
            before, behind = self.around[message["role"]]
            text += before + message["content"] + behind
        return text + self.opening

    def without(self, bos: str) -> Turns:
        """Return the same for a program that writes BOS itself."""
        before, behind = self.around["system"]
        around = self.around | {"system": (before.removeprefix(bos), behind)}
        return replace(self, around=around, first=self.first.removeprefix(bos))

    def template(self) -> str:
        """Return it in the language of Ollama's templates."""
        cases = [
            f'if eq .Role "{role}" }}}}{_plain(before)}{{{{ .Content }}}}{_plain(behind)}'
            for role, (before, behind) in self.around.items()
        ]
        turns = "{{ " + "{{ else ".join(cases) + "{{ end }}"
        first = f"{{{{ if not .System }}}}{_plain(self.first)}{{{{ end }}}}" if self.first else ""
        return f"{first}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{_plain(self.opening)}"


def _plain(text: str) -> str:
    return text.replace("{", '{{ "{" }}')


def learn_turns(render: Render) -> tuple[Turns | None, list[str]]:
    """Learn what a chat template writes around messages.

    Returns:
        The texts, None where they are not all that it writes; and what conversations they do not hold for, or
        why there are none.
    """
    try:
        turns = _learned(render)
        if '"""' in turns.template() + '""':
            raise ValueError('it holds """, or ends in a quote')
        holds = all(turns.render(messages) == render(messages, True) for messages in _PLAIN)
    except (TemplateError, ValueError, TypeError) as error:
        return None, [f"the chat template does more than write each message between two texts ({error})"]
    if not holds:
        return None, ["the chat template does more than write each message between two texts"]
    return turns, [what for what, messages in _ODD.items() if _differs(turns, render, messages)]


def _differs(turns: Turns, render: Render, messages: list[Message]) -> bool:
    try:
        return turns.render(messages) != render(messages, True)
    except (TemplateError, TypeError):
        return True


def _learned(render: Render) -> Turns:
    """Take the texts around messages out of conversations; those between two messages are two texts."""
    marks = ("@system@", "@first@", "@answer@", "@second@")
    begin, to_user, to_answer, to_next, end = _cut(render(_said(*marks[1:], system=marks[0]), True), marks)
    alone, *_ = _cut(render(_said(*marks[1:]), True), marks[1:])
    # Some templates write more where no answer is opened; what is common is of the message.
    closed_user, closed_answer = (
        _cut(render(_said(*marks[1:stop]), False), marks[1:stop])[-1] for stop in (2, 3)
    )
    behind_user = _common([to_answer, end, closed_user])
    behind_answer = _common([to_next, closed_answer])
    before_user = to_next.removeprefix(behind_answer)
    return Turns(
        around={
            "system": (begin, _start(to_user, before_user)),
            "user": (before_user, behind_user),
            "assistant": (to_answer.removeprefix(behind_user), behind_answer),
        },
        first=_start(alone, before_user),
        opening=end.removeprefix(behind_user),
    )


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """Return what stands before, between and behind marks, which come in this order, once."""
    found = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there or mark in text:
            raise ValueError(f"{mark.strip('@')} is not written once")
        found.append(before)
    return [*found, text]


def _common(texts: Sequence[str]) -> str:
    """Return what all begin with."""
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _start(text: str, rest: str) -> str:
    if not text.endswith(rest):
        raise ValueError("the first question is opened by other texts than the next")
    return text[: len(text) - len(rest)]


def modelfile(model: Path, turns: Turns, stops: Sequence[str]) -> str:
    """Return a Modelfile for a GGUF beside it."""
    lines = [
        f"FROM ./{model.name}",
        f'TEMPLATE """{turns.template()}"""',
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
