"""Time to render and mask one conversation of 10, 20, 40 and 80 turns: it must grow with the turns, not with their square.

Each row is one of its own, so that nothing but the layout of turns may be remembered. Usage: python benchmarks/masks.py [--json]
"""

from __future__ import annotations

import json
import sys
import time
from importlib import resources
from itertools import pairwise
from typing import Any

from sftdata.batches import Conversation
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import BUILT_IN, ChatTemplate

TURNS = (10, 20, 40, 80)
ROWS, PASSES = 10, 25
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What Qwen3 does: reasoning of earlier turns is left out, so no prompt is a prefix of the conversation.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(turns: int, row: int, reasoning: bool) -> Conversation:
    """Make a row of `turns` questions and answers, with about fifty words each."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn} of row {row}. " + "What else? " * 25})
        answer = {"role": "assistant", "content": f"Answer {turn} of row {row}. " + "As before. " * 25}
        messages.append(answer | ({"reasoning_content": f"Thought {turn}."} if reasoning else {}))
    return Conversation(messages, [None] * len(messages))


def milliseconds_per_row(template: str, reasoning: bool) -> list[float]:
    """Return the best of many passes over rows of each length, processor time.

    Passes take turns, so that a busy machine slows all lengths alike.
    """
    finder = SpanFinder(ChatTemplate(template, SPECIAL), ("</s>",), ("<|im_start|>", "<|im_end|>"))
    rows = {turns: [conversation(turns, row, reasoning) for row in range(ROWS)] for turns in TURNS}
    best = dict.fromkeys(TURNS, float("inf"))
    for _ in range(PASSES):
        for turns in TURNS:
            begun = time.process_time()
            for row in rows[turns]:
                finder.render(row)
            best[turns] = min(best[turns], (time.process_time() - begun) / ROWS * 1e3)
    return list(best.values())


def main() -> None:
    """Print milliseconds per row and the growth per doubling."""
    folder = resources.files("sftdata.render").joinpath("templates")
    cases = {name: (folder.joinpath(f"{name}.jinja").read_text("utf-8"), False) for name in BUILT_IN}
    cases["reasoning dropped"] = (REWRITING, True)
    figures = {}
    for name, (template, reasoning) in cases.items():
        times = milliseconds_per_row(template, reasoning)
        figures[name] = {"ms": times, "growth": [after / before for before, after in pairwise(times)]}
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    print(f"{'template':20}" + "".join(f"{turns:>7} turns" for turns in TURNS) + "   growth per doubling")
    for name, figure in figures.items():
        growth = "  ".join(f"{ratio:.2f}" for ratio in figure["growth"])
        print(f"{name:20}" + "".join(f"{value:>10.2f} ms" for value in figure["ms"]) + f"   {growth}")
    print(f"worst growth: {max(max(figure['growth']) for figure in figures.values()):.2f} (at most 2.3)")


if __name__ == "__main__":
    main()
