"""Settings in messages: flags where a command says them, keywords where a Python function raises them.

Messages are written with flags. Where they leave a process that runs no command, `worded` spells them anew:

    a larger --max-length, or --overlong drop       a larger max_length, or overlong="drop"

The signatures of the public functions say what is a keyword, and what its value may be. So that this is
exact, messages keep to a form, which tests/unit/test_wording.py enforces: a flag that takes any text is
followed by its value, quoted for a shell, by punctuation, or by a word of `_BETWEEN`; where a message begins
with it, its value ends at the first colon; a command stands in backquotes, or at the end.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

Keywords = Mapping[str, str]
"""The keywords of a function, and the type of each, as it is written."""

_PARTS = re.compile(
    r"`[^`]*`|\b(?:sft(?:data|train) [a-z]|iconv -).*"  # commands stay as they are
    r"|(?<!\w)'[^']*'(?!\w)|(?<!\w)\"(?:\\.|[^\"\\])*\"(?!\w)"  # and so does data
    r"|(?<![\w./-])(?P<flag>--[a-z][a-z-]*|-[to])(?![\w-])"
    r"|(?<![\w./-])(?P<name>[a-z]\w+(?:\.\w+)*)=(?P<value>[\w./+:=-]*[\w%])"
)
_QUOTED = r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\$(?P<escaped>'(?:\\.|[^'\\])*')"
_WORD = re.compile(rf" (?P<word>(?:{_QUOTED}|[^\s'\"`])+)")
_UP_TO_A_COLON = re.compile(r" (?P<word>(?:(?! -|: )[^,;`'\"$])+)(?=: )")
_ENDING = re.compile(r"[.,:;?)]+\Z")
_BETWEEN = re.compile(
    r"and|or|with|without|of|that|whose|where|in|is|beside|names|allows|chooses|acts|overrides|would"
)
_AS_IT_IS = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?|[A-Z_]+|True|False|None")  # N stands for a number
_SHELL_ESCAPES = str.maketrans({"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\", "'": r"\'"})
_YAML = {"true": "True", "false": "False", "null": "None"}

_sources: list[Callable[[], Iterable[Keywords]]] = []
_others = {"-t": "tokenizer", "-o": "output"}
_in_a_shell = False


def shell_quote(value: object) -> str:
    r"""Return a value, such as a path, as a shell takes it; one with a newline or tab in `$'...'` form.

    >>> shell_quote("### Answer:"), shell_quote("\n### Answer:")
    ("'### Answer:'", "$'\\n### Answer:'")
    """
    text = str(value)
    plain = f"'{text}'" if text.endswith((".", ",", ":")) and "'" not in text else shlex.quote(text)
    return f"$'{text.translate(_SHELL_ESCAPES)}'" if re.search(r"[\n\t\r]", text) else plain


def know(keywords: Callable[[], Iterable[Keywords]], others: Mapping[str, str] = {}) -> None:
    """Add the keywords of a package's functions; they are asked for when the first message needs them.

    Args:
        others: keywords by flag, where the flag has another name.
    """
    _sources.append(keywords)
    _others.update(others)
    _known.cache_clear()


def keywords_of(function: Callable[..., object]) -> Keywords:
    """Return the keywords of a function."""
    import inspect  # here: `import sftdata` can do without

    return {name: str(one.annotation) for name, one in inspect.signature(function).parameters.items()}


@cache
def _known() -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for keywords in (keywords for source in _sources for keywords in source()):
        for name, kind in keywords.items():
            known.setdefault(name, []).append(kind)
    return known


@contextmanager
def in_a_shell() -> Iterator[None]:
    """Leave flags as they are, while this process runs a command."""
    global _in_a_shell
    before, _in_a_shell = _in_a_shell, True
    try:
        yield
    finally:
        _in_a_shell = before


def worded(text: str) -> str:
    """Return a message in the words of the caller, who is in a shell or in Python."""
    return text if _in_a_shell else as_keywords(text)


def as_keywords(text: str) -> str:
    """Return a message with keywords in place of flags."""
    said, at = "", 0
    while part := _PARTS.search(text, at):
        call, end = _call_at(text, part.start())
        said += text[at : part.start()] + (call or part[0])
        at = end if call else part.end()
    return said + text[at:]


def _call_at(text: str, start: int) -> tuple[str, int]:
    """Return the settings named here, one after another, as those of a call, and their end; "" for none."""
    values: dict[str, str] = {}
    at = start
    while part := _PARTS.match(text, at + bool(values)):
        name, value, end = _setting(text, part)
        if not value:
            return (name, end) if not values else (_call(values), at)
        before = values.get(name, "")
        both = before.startswith("{") and value.startswith("{")
        values[name], at = f"{before[:-1]}, {value[1:]}" if both else value, end
        if not text.startswith(" ", at):
            break
    return _call(values), at


def _call(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _setting(text: str, part: re.Match[str]) -> tuple[str, str, int]:
    """Return the keyword that a part of a text names, its value in Python, and its end; "" for none."""
    if part["name"]:
        return *_assigned(part["name"], part["value"]), part.end()
    if not part["flag"]:
        return "", "", part.end()
    flag, (word, end) = part["flag"], _word_after(text, part)
    if flag == "--set":
        key, equals, value = _unquoted(word).partition("=")
        if key.partition(".")[0] not in _known() | {"training": []}:
            return "", "", part.end()
        return (*_assigned(key, value), end) if equals else (key, "", end)
    name = _others.get(flag, flag[2:].replace("-", "_"))
    if name not in _known():
        return "", "", part.end()
    value = _value(_known()[name], word)
    return name, value, part.end() if value in ("", "True") else end


def _word_after(text: str, flag: re.Match[str]) -> tuple[str, int]:
    """Return the word that may be the value of a flag, as a shell takes it, and its end; "" for none."""
    found = _WORD.match(text, flag.end())
    word = _ENDING.sub("", found["word"]) if found else ""
    if not word or _BETWEEN.fullmatch(word) or re.match(r"-\D", word):
        return "", flag.end()
    if word == "out" and text[: flag.start()].endswith("leave "):
        return "", flag.end()
    if not flag.start() and (found := _UP_TO_A_COLON.match(text, flag.end())):
        return shlex.quote(found["word"]), found.end()
    return word, flag.end() + len(" ") + len(word)


def _assigned(key: str, value: str) -> tuple[str, str]:
    """Return the keyword and the value of `key=value`, where `a.b` is a key inside `a`; "" for no setting."""
    name, *inner = key.removeprefix("training.").split(".")
    if name not in _known():
        return "", ""
    value = _YAML.get(value, value)
    value = value if _AS_IT_IS.fullmatch(value) else _quoted(value)
    for one in reversed(inner):
        value = f"{{{_quoted(one)}: {value}}}"
    return name, value


def _value(kinds: Iterable[str], word: str) -> str:
    """Return the word after a flag as a value of its keyword, in Python; "" if it is none."""
    kinds = [kind.removesuffix(" | None") for kind in kinds]
    if "bool" in kinds:
        return "True"
    if not word:
        return ""
    text = _unquoted(word)
    if "=" in text and (mappings := [kind for kind in kinds if kind.startswith("Mapping")]):
        key, _, item = text.rpartition("=")
        number = "float" in mappings[0] and _AS_IT_IS.fullmatch(item)
        return f"{{{_quoted(key)}: {item if number else _quoted(item)}}}"
    if _AS_IT_IS.fullmatch(word) and any({"int", "float"} & {*kind.split(" | ")} for kind in kinds):
        return word
    if text.startswith("[") and any("Sequence[int]" in kind for kind in kinds):
        return text
    choices = [one for kind in kinds if kind.startswith("Literal") for one in re.findall("'(.+?)'", kind)]
    any_text = not all(kind.startswith(("Literal", "Mapping", "int", "float")) for kind in kinds)
    return _quoted(text) if any_text or text in choices else ""


def _unquoted(word: str) -> str:
    """Return a word as a shell would pass it on."""
    word = re.sub(_QUOTED, lambda part: shlex.quote(ast.literal_eval(part[1])) if part[1] else part[0], word)
    try:
        return "".join(shlex.split(word))
    except ValueError:  # a quote that does not close
        return word


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
