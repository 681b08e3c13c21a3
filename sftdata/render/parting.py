"""Where a generation prompt and a rendered turn part ways."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG = re.compile(r"<[^<>\s]+>")


def common_prefix(one: Sequence[str], two: Sequence[str]) -> int:
    """Return the length of the common prefix: characters of texts, items of lists."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )


def find_parting(written: str, region: str) -> int:
    """Return where `written` and `region` part ways, never inside a tag of either.

    >>> find_parting("<|assistant|><think>", "<|assistant|><tool_call>")
    13
    """
    at = common_prefix(written, region)
    for text in (written, region):
        for tag in _TAG.finditer(text):
            if tag.start() < at < tag.end():
                at = tag.start()
    return at


def header_after(rest: str, region: str) -> int | None:
    r"""Return where the rest of a generation prompt ends in `region`, or its last tags do; None where they do not stand there.

    A template may write other space, one more end token or one instruction less before a rendered turn than before the generation
    prompt. The header itself is still fed at inference, so it is not for the model to generate.

    >>> header_after("### Answer:\n", "    ### Answer:\nYes"), header_after("<think>\n", "Yes")
    (16, None)
    """
    for opening in (0, *(tag.start() for tag in _TAG.finditer(rest))):
        core = rest[opening:].strip()
        if core and core in region:
            stop = region.index(core) + len(core)
            return stop + common_prefix(rest[len(rest.rstrip()) :], region[stop:])
    return None


def repeated_tag(rest: str, answer: str) -> int:
    r"""Return the length of the tag that the rest of a generation prompt opens and the answer repeats; 0 for none.

    >>> repeated_tag("<think>\n", "<think>Two.</think>Four."), repeated_tag("<think>\n", "Four.")
    (7, 0)
    """
    tag = _TAG.match(rest.lstrip())
    return len(tag[0]) if tag and answer.startswith(tag[0]) else 0


def find_tags(text: str) -> set[str]:
    """Return the tags of a text."""
    return set(_TAG.findall(text))
