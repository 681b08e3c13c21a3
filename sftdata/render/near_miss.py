"""Say what a text holds instead of the marker that was asked for: the words of a `no-...-marker` fault."""

from __future__ import annotations

import re
import shlex

_HEADERS_SHOWN = 3
_TEXT_SHOWN = 40
_SHELL_ESCAPES = str.maketrans({"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\", "'": r"\'"})


def describe_missing(kind: str, marker: str, text: str) -> tuple[str, str]:
    r"""Return reason and fix for a text in which a marker does not occur.

    Args:
        kind: `response` or `instruction`, as in the option's name.
        marker: what was looked for.
        text: where.

    >>> describe_missing("response", "### Assistant:", "### Human: hi\n### assistant : yes")[0]
    "the response template '### Assistant:' does not occur in the text; found '### assistant :'."
    """
    reason = f"the {kind} template {marker!r} does not occur in the text"
    if near := nearest_variant(marker, text):
        return f"{reason}; found {near!r}.", f"--{kind}-template {shell_quote(near)}, or mend the row."
    fix = f"set --{kind}-template to the marker that this text uses, or take the row out."
    if headers := _headers_like(marker, text):
        return f"{reason}; it has {', '.join(map(repr, headers))}.", fix
    return f"{reason}, which begins {text[:_TEXT_SHOWN]!r}.", fix


def nearest_variant(marker: str, text: str) -> str | None:
    r"""Return the first stretch of the text that differs from the marker only in spacing, case, or colon width.

    A marker typed with a backslash and an n, as shells pass it, is tried as the newline it stands for.

    >>> nearest_variant("\\n### Answer:", "x\n### Answer: y")
    '\n### Answer:'
    """
    unescaped = marker.replace(r"\n", "\n").replace(r"\t", "\t")
    if unescaped in text:
        return unescaped
    pieces = [
        re.escape(piece) if piece not in ":：" else "[:：]" for piece in re.findall(r"\w+|[^\w\s]", unescaped)
    ]
    found = re.search(r"\s*".join(pieces), text, re.IGNORECASE) if pieces else None
    return found.group() if found else None


def _headers_like(marker: str, text: str) -> list[str]:
    """Return the first distinct line starts that open with the marker's own punctuation (`###`, `<|`, `[`)."""
    lead = re.match(r"\s*([^\w\s]+)", marker)
    if lead is None:
        return []
    header = rf"^[ \t]*({re.escape(lead.group(1))}[^\n:\]>]{{0,24}}[:\]>]?)"
    return list(dict.fromkeys(re.findall(header, text, re.MULTILINE)))[:_HEADERS_SHOWN]


def shell_quote(value: str) -> str:
    r"""Return a value as a shell takes it; one with a newline or tab in `$'...'` form.

    >>> shell_quote("### Answer:"), shell_quote("\n### Answer:")
    ("'### Answer:'", "$'\\n### Answer:'")
    """
    return f"$'{value.translate(_SHELL_ESCAPES)}'" if re.search(r"[\n\t\r]", value) else shlex.quote(value)
