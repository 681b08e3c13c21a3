"""What the audit can find: one entry a code, with its sentence and its fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["defect", "note"]


class Kind(NamedTuple):
    """A kind of finding. `message` and `fix` may hold {slots}.

    Attributes:
        severity: a defect makes the model learn something else than meant; a note is harmless here, but worth knowing.
        of: what is counted, in the singular.
    """

    severity: Severity
    of: str
    message: str
    fix: str


KINDS: dict[str, Kind] = {
    # ---- seen in labels and ids
    "nothing-trained": Kind(
        "defect", "example", "no token of the example is trained", "another --train-on, or leave the rows out"
    ),
    "answer-cut": Kind(
        "defect", "example", "the answer is cut by max_length, so that it ends without a stop token",
        "a larger --max-length, or --overlong drop or split",
    ),
    "answer-split": Kind(
        "defect", "example", "the example is spread over several rows, and its stop token begins one, where it is not trained",
        "--packing bfd with a --max-length that holds the example",
    ),
    "turn-end-not-a-stop": Kind(
        "defect", "example", "an answer ends in {token}, and generation stops at {stops}", "{fix}"
    ),
    "no-trained-end": Kind(
        "defect", "example", "an answer never ends in a stop token, so that the model does not learn to stop", "{fix}"
    ),
    "double-bos": Kind(
        "defect", "example", "the example begins with {token} twice", "take it out of the data, or of the chat template"
    ),
    "missing-bos": Kind(
        "defect", "example", "the example does not begin with {token}, as the others or the chat template do",
        "begin their text or ids with {token}; chats, with a --chat-template that does so",
    ),
    "empty-answer": Kind(
        "defect", "example", "an answer holds nothing but its end", "leave the rows out, or switch the turn off: \"train\": false"
    ),
    "control-token-in-answer": Kind(
        "defect", "example", "{what} holds a stop token or BOS before its end{origin}", "{fix}"
    ),
    "duplicate-prompt": Kind(
        "note", "example", "the prompt was there before, in another example", "deduplicate the input where it is not meant"
    ),
    "prompt-in-other-set": Kind(
        "defect", "example", "the prompt is also in {other}, so neither is a fair test of a model trained on the other",
        "take it out of one of the two before preparing",
    ),
    # ---- what tokenizer, chat template and generation config disagree on
    "eos-not-in-generation-config": Kind(
        "note", "tokenizer", "the tokenizer ends with {token}, generation_config stops at {stops}",
        "{fix}",
    ),
    "pad-is-eos": Kind(
        "note", "tokenizer", "{token} is both pad and end token; harmless here, as labels never derive from the pad id",
        "nothing, unless another trainer masks by pad id",
    ),
    "tokens-added": Kind(
        "note", "token", "added to the tokenizer ({names}); adapters alone leave their embeddings as they were drawn",
        "train without --lora, add embed_tokens and lm_head to its target, or choose a --chat-template of known tokens",
    ),
    "raw-prompts": Kind(
        "note", "source", "prompts and completions are joined as raw text, and the tokenizer has a chat template",
        "--kind conversation, where the model is to be asked in chats",
    ),
    # ---- what `prepare` counted and no shard can tell
    "message-swallowed": Kind(
        "defect", "message", "the chat template leaves the text of a message out (a system message, most often)",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
    ),
    "reasoning-swallowed": Kind(
        "defect", "message", "the chat template leaves the reasoning of an answer out (of an earlier turn, most often),"
        " so that the answer is trained without it",
        "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
    ),
    "outside-generation": Kind(
        "defect", "message", "the chat template marks with `generation` blocks what is trained, and none holds anything"
        " of an assistant message, so that it is not trained",
        "--chat-template with a copy whose `generation` and `endgeneration` tags are taken out: then the spans are derived",
    ),
    "tools-left-out": Kind(
        "defect", "row", "the chat template does not tell the model which tools it may call",
        "--chat-template of a model that calls tools",
    ),
    "prompt-parted": Kind(
        "note", "row", "the generation prompt continues differently from the rendered turn (it opens <think>, say);"
        " the answer is trained from where they part", "a --chat-template whose turns begin as its generation prompt does",
    ),
    "control-token-in-data": Kind(
        "note", "row", "a message spells a control token; it is encoded as text", "nothing; --trust-control-tokens lets it count"
    ),
    "repeated-marker": Kind(
        "note", "row", "response markers follow each other with no instruction marker between them;"
        " without an instruction template only the last answer is trained",
        "--instruction-template",
    ),
    "masked-as-trl": Kind(
        "defect", "row", "trl 0.7.10 masks the row in an unintended way, without a warning", "--mask-mode default"
    ),
}  # fmt: skip

IN_CHATS = {
    "what": "an answer", "origin": ", which came with the data", "fix": "clean the rows, and leave out --trust-control-tokens"
}  # fmt: skip
IN_TEXTS = {
    "what": "a text", "origin": ", and it is trained there",
    "fix": "clean the rows; give chats that a template has rendered as messages, so that only answers are trained",
}  # fmt: skip
"""What `control-token-in-answer` says of answers of a chat template, and of running text."""

COUNTED = {
    "messages_swallowed": "message-swallowed",
    "reasoning_swallowed": "reasoning-swallowed",
    "messages_outside_generation": "outside-generation",
    "rows_without_their_tools": "tools-left-out",
    "rows_parted": "prompt-parted",
    "rows_with_control_tokens": "control-token-in-data",
    "rows_with_repeated_markers": "repeated-marker",
    "rows_masked_without_warning": "masked-as-trl",
}
"""Counters of the ledger that are findings."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the audit found.

    Attributes:
        code: key of `KINDS`.
        severity: defect or note.
        message: what was found, in one sentence.
        fix: how to fix it.
        count: how many.
        of: what is counted, in the singular.
        share: count over all of these in the set; None where there is no whole.
        examples: up to three, as file:line.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int
    of: str
    share: float | None = None
    examples: tuple[str, ...] = ()

    @property
    def amount(self) -> str:
        """How many, in words."""
        share = f" ({self.share:.1%})" if self.share is not None else ""
        return f"{self.count:,} {self.of}{'' if self.count == 1 else 's'}{share}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"examples": list(self.examples)}


def make_finding(
    code: str, count: int, whole: int | None = None, examples: tuple[str, ...] = (), **slots: str
) -> Finding:
    """Fill in the sentences of a kind; `whole` is what `count` is a share of."""
    kind = KINDS[code]
    share = count / whole if whole else None
    return Finding(
        code,
        kind.severity,
        kind.message.format(**slots),
        kind.fix.format(**slots),
        count,
        kind.of,
        share,
        examples,
    )
