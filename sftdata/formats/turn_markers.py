"""Markers of turns in running text (`### Human:` ... `### Assistant:`), found in the text itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

Markers = tuple[str, str]  # of an instruction, and of a response

_PAIRS: tuple[Markers, ...] = (
    ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<start_of_turn>user\n", "<start_of_turn>model\n"),
    ("<|user|>", "<|assistant|>"),
    ("[INST]", "[/INST]"),
    ("\nHuman:", "\nAssistant:"),
    ("\nUser:", "\nAssistant:"),
    ("\nUSER:", "\nASSISTANT:"),
)
_HEADER = re.compile(r"^#{2,4} [A-Z][\w ]{0,24}:", re.MULTILINE)


def find_turn_markers(texts: Sequence[str]) -> Markers | None:
    r"""Return the markers that most of some texts use for their turns; None where most use none.

    >>> find_turn_markers(["### Human: Hi\n### Assistant: Hello."])
    ('### Human:', '### Assistant:')
    """
    headers = [list(dict.fromkeys(_HEADER.findall(text))) for text in texts]
    pairs = [*_PAIRS, *sorted({(found[0], found[-1]) for found in headers if len(found) > 1})]
    return next(
        (pair for pair in pairs if texts and sum(_marked(text, pair) for text in texts) * 2 > len(texts)),
        None,
    )


def _marked(text: str, pair: Markers) -> bool:
    """Say whether an instruction is followed by a response; a text begins a line of its own."""
    asked = f"\n{text}".find(pair[0])
    return asked >= 0 and f"\n{text}".find(pair[1], asked + len(pair[0])) >= 0
