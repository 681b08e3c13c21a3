"""Write docs/masks.md: what TRL trains with its training templates and what we train with the plain ones, pair by pair.

Usage: python docs/masks_table.py (needs the `dev` extra; the templates are those of the installed trl).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate, control_tokens

PAGE = Path(__file__).with_name("masks.md")
FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOLD = {"cohere2": ["<|END_OF_TURN_TOKEN|>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"]}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Green."},
]
HEAD = """# Why is this token trained?

A token has a label if and only if the model must generate it. One package decides it:
[sftdata/masks](../sftdata/masks/__init__.py). `choose_mask` picks the mask once, in the plan.
To answer the question for one token, follow its row:

1. **Spans** (`Mask.spans`): which bytes of the row's text are trained. They are turns of the assistant, the
   completion, a whole text, or what follows response markers.
2. **Tokens** (`masks/tokens.py`): a token is trained if it begins inside a span; a text is split where a
   token would straddle an edge. BOS is never trained; EOS is, if a span runs to the end of a raw text. Ids
   that come with labels keep them.
3. **Flags** (`Mask.flags`): markers given as ids, and trl 0.7.10, search the ids and override the labels.
4. **Cut** (`limit_length`): a cut removes labels with their tokens and never adds one.
5. **First token** (`pack.py`): the first token of a document has no label, as nothing precedes it to predict
   it from. An example that trains nothing else is dropped.

| settings | mask | trains |
|---|---|---|
| none, or `--train-on` | `Mask` | by the kind of the row; [a turn's ends](templates-and-masks.md) come from the template |
| `--response-template TEXT` | `TextMarkers` | what follows [the markers](response-templates.md) |
| `--response-template IDS` | `IdMarkers` | the same, searched in the ids |
| `--mask-mode trl-0.7.10` | `TRL0710` | what the old collator did, quirks included |

`sftdata preview` and `sftdata inspect` show the labels in colour.

## Our masks and TRL's, template by template

Made by `python docs/masks_table.py` from the template pairs of trl {version};
`tests/integration/test_masks_trl.py` repeats it.

With a training template and `--boundary merge`, ids and labels are TRL's own, label for label, for all 31
pairs on every conversation that both accept. One kind of row differs: if a `{{% generation %}}` block ends in a
character of several tokens, transformers trains only the first of them, and we train all.

With the plain template, which TRL cannot mask, we train what the model must generate at inference: what comes
after the generation prompt, up to and including the token that stops generation. The table shows a chat of
two turns (`Red.`, then `Green.`) and what TRL's training template trains **besides**.

- *Before the answer*: text that the generation prompt writes at inference. Training it is harmless but
  wasted: the model never writes it. If the prompt opens `<think>`, that opening is given, not generated.
- *After the answer*: text after the stop token. Generation has ended there; the template writes the newline,
  before the next header.
- *Other text*: TRL's training template writes something that the model's own does not (empty thinking in
  earlier turns, an end token after the last answer), so that prompts stay prefixes. We keep the text of the
  model's own template.

| template | TRL also trains before | TRL also trains after | text |
|---|---|---|---|
"""


def trained(source: str, told: list[str] | None) -> tuple[str, list[str]] | str:
    """Return the rendered chat and what is trained of each answer, or why it is rejected."""
    finder = SpanFinder(ChatTemplate(source, SPECIAL), told or ["</s>"], control_tokens(source))
    try:
        rendered = finder.render(Conversation(CHAT, [None] * len(CHAT)))
    except RowError as error:
        return error.fault.reason
    turns: dict[int, str] = {}
    for turn in rendered.turns:
        turns[turn.message] = turns.get(turn.message, "") + rendered.text[turn.start : turn.stop]
    return rendered.text, list(turns.values())


def line(pair: str) -> str:
    """Return one line of the table."""
    plain, training = ((FOLDER / f"{name}.jinja").read_text("utf-8") for name in (pair, f"{pair}_training"))
    ours, theirs = trained(plain, TOLD.get(pair)), trained(training, TOLD.get(pair))
    if isinstance(ours, str) or isinstance(theirs, str):
        return f"| {pair} | — | — | takes lists of parts only; text messages are rejected |"
    before, after = [], []
    for own, other in zip(ours[1], theirs[1], strict=True):
        at = other.find(own)
        before.append(other[:at] if at >= 0 else other)
        after.append(other[at + len(own) :] if at >= 0 else "")
    text = "the same" if ours[0] == theirs[0] else "other text"
    return f"| {pair} | {cell(before)} | {cell(after)} | {text} |"


def cell(texts: list[str]) -> str:
    """Write the differing texts of both turns as code."""
    shown = [repr(text)[1:-1].replace("|", "\\|") for text in dict.fromkeys(texts) if text]
    return ", ".join(f"`{text}`" for text in shown) or "nothing"


def page() -> str:
    """Return the page."""
    pairs = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
    return HEAD.format(version=trl.__version__, count=len(pairs)) + "\n".join(map(line, pairs)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
