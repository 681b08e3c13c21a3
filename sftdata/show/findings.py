"""What the audit may find: each kind of finding with its sentence and its fix."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np

from sftdata.batches import Int64
from sftdata.output import counted

Severity = Literal["defect", "note"]


class Kind(NamedTuple):
    """A kind of finding. `message` and `fix` may hold {slots}.

    Attributes:
        severity: a defect teaches the model something unintended; a note is harmless here, but worth knowing.
        of: what is counted, in the singular.
        elsewhere: the fix in rows that another tool prepared, where it is not the same.
    """

    severity: Severity
    of: str
    message: str
    fix: str
    elsewhere: str = ""


KINDS: dict[str, Kind] = {
    # ---- seen in labels and ids
    "nothing-trained": Kind(
        "defect", "example", "no token of the example is trained",
        "another --train-on, or leave the rows out",
        "leave the rows out, or mend their mask",
    ),
    "answer-cut": Kind(
        "defect", "example", "the answer is cut by max_length, so that it ends without a stop token",
        "a larger --max-length, or --overlong drop or split (drop where there are pictures)",
        "a larger maximal length in the tool that prepared them, if it cut them;"
        " if not, let ids and labels end in a stop token",
    ),
    "answer-split": Kind(
        "defect", "example",
        "the example is spread over several rows, and its stop token begins one, where it is not trained",
        "--packing bfd with a --max-length that holds the example",
    ),
    "turn-end-not-a-stop": Kind(
        "defect", "example", "an answer ends in {token}, and generation stops at {stops}", "{fix}",
    ),
    "no-trained-end": Kind(
        "defect", "example",
        "an answer never ends in a stop token, so that the model does not learn to stop", "{fix}",
    ),
    "double-bos": Kind(
        "defect", "example", "the example begins with {token} twice",
        "take it out of the data, or of the chat template",
        "tokenize rendered chats with add_special_tokens=False",
    ),
    "missing-bos": Kind(
        "defect", "example", "the example does not begin with {token}, as the others or the chat template do",
        "begin their text or ids with {token}; chats, with a --chat-template that does so",
        "let their ids begin with {token}, and mask it",
    ),
    "empty-answer": Kind(
        "defect", "example", "an answer holds nothing but its end",
        'leave the rows out, or switch the turn off: "train": false',
        "leave the rows out, or mask the answer",
    ),
    "control-token-in-answer": Kind(
        "defect", "example", "{what} holds a stop token or BOS before its end{origin}", "{fix}",
        "clean the rows",
    ),
    "duplicate-prompt": Kind(
        "note", "example", "an earlier example has the same prompt",
        "deduplicate the input, unless the repetition is intended",
    ),
    "prompt-in-other-set": Kind(
        "defect", "example",
        "the prompt is also in {other}, so neither is a fair test of a model trained on the other",
        "take it out of one of the two before preparing",
    ),
    # ---- seen in token rows, prepared here or not: what `prepare` proves, others may have got wrong
    "prompt-trained": Kind(
        "defect", "example", "text that the model is given is trained: a system, user or tool turn",
        "mask it; with TRL, assistant_only_loss=True, or rows of prompt and completion",
    ),
    "header-trained": Kind(
        "defect", "example", "the header of an answer is trained, which the generation prompt writes",
        "begin the mask behind the generation prompt",
    ),
    "mask-shifted": Kind(
        "defect", "example",
        "what is trained lies one token before or behind an answer and its end token",
        "shift the mask by one token; it marks the token that is trained, not the one before it",
    ),
    "everything-trained": Kind(
        "defect", "set", "every token of every example is trained, prompts included",
        "build the masks again; in rows of text that are meant so, leave them out",
    ),
    "padding-trained": Kind(
        "defect", "example", "padding is trained",
        "label it -100, and 0 in masks, wherever attention_mask is 0",
    ),
    "packed-unmarked": Kind(
        "defect", "example",
        "the row holds several documents, and nothing says where this one begins: it attends to those before",
        "store seq_lengths, or position_ids that begin again at 0; or one document a row",
    ),
    "other-tokenizer": Kind(
        "defect", "example",
        "encoded again, the text of the ids gives other ids: another tokenizer made them",
        "name that one: -t TOKENIZER",
    ),
    # ---- what tokenizer, chat template and generation config disagree on
    "eos-not-in-generation-config": Kind(
        "note", "tokenizer", "the tokenizer ends with {token}, generation_config stops at {stops}", "{fix}",
    ),
    "pad-is-eos": Kind(
        "note", "tokenizer",
        "{token} is both pad and end token; harmless here, as labels never derive from the pad id",
        "nothing, unless another trainer masks by pad id",
        "nothing, where labels are stored and padding is masked by attention_mask",
    ),
    "tokens-added": Kind(
        "note", "token",
        "added to the tokenizer ({names}); adapters alone leave their embeddings as they were drawn",
        "train without --lora, add embed_tokens and lm_head to its target,"
        " or choose a --chat-template of known tokens",
    ),
    "raw-prompts": Kind(
        "note", "source",
        "prompts and completions are joined as raw text, and the tokenizer has a chat template",
        "--kind conversation, where the model is to be asked in chats",
    ),
    # ---- counted by `prepare`, and not visible in the shards
    "message-swallowed": Kind(
        "defect", "message",
        "the chat template leaves the text of a message out (a system message, most often)",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
    ),
    "reasoning-swallowed": Kind(
        "defect", "message",
        "the chat template leaves the reasoning of an answer out (of an earlier turn, most often),"
        " so that the answer is trained without it",
        "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
    ),
    "outside-generation": Kind(
        "defect", "message",
        "the chat template marks with `generation` blocks what is trained, and none holds anything"
        " of an assistant message, so that it is not trained",
        "--chat-template with a copy whose `generation` and `endgeneration` tags are taken out:"
        " then the spans are derived",
    ),
    "tools-left-out": Kind(
        "defect", "row", "the chat template does not tell the model which tools it may call",
        "--chat-template of a model that calls tools",
    ),
    "prompt-parted": Kind(
        "note", "row",
        "the generation prompt continues differently from the rendered turn (it opens <think>, say);"
        " the answer is trained from where they diverge",
        "a --chat-template whose turns begin as its generation prompt does",
    ),
    "control-token-in-data": Kind(
        "note", "row", "a message spells a control token; it is encoded as text",
        "nothing; --trust-control-tokens lets it count",
    ),
    "repeated-marker": Kind(
        "note", "row",
        "response markers follow each other with no instruction marker between them;"
        " without an instruction template only the last answer is trained",
        "--instruction-template",
    ),
    "masked-as-trl": Kind(
        "defect", "row", "trl 0.7.10 masks the row in an unintended way, without a warning",
        "--mask-mode default",
    ),
}  # fmt: skip

# The slots of `control-token-in-answer`: for answers of a chat template, and for running text.
IN_CHATS = {
    "what": "an answer",
    "origin": ", which came with the data",
    "fix": "clean the rows, and leave out --trust-control-tokens",
}
IN_TEXTS = {
    "what": "a text",
    "origin": ", and it is trained there",
    "fix": "clean the rows; give chats that a template has rendered as messages,"
    " so that only answers are trained",
}

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
    """One result of the audit.

    Attributes:
        code: key of `KINDS`.
        severity: defect or note.
        message: one sentence.
        fix: how to fix it.
        count: number of occurrences.
        of: what is counted, in the singular.
        share: `count` over all of these in the set; None where there is no total.
        examples: up to three, as file:line.
        ids: int64[N], example ids of all; of what `prepare` counted only those of `examples`.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int
    of: str
    share: float | None = None
    examples: tuple[str, ...] = ()
    ids: Int64 = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)

    @property
    def amount(self) -> str:
        """How many, in words."""
        share = f" ({self.share:.1%})" if self.share is not None else ""
        return f"{counted(self.count, self.of)}{share}"

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "ids"}
        return plain | {"examples": list(self.examples)}


def make_finding(
    code: str, count: int, total: int | None = None, examples: tuple[str, ...] = (), *,
    elsewhere: bool = False, **slots: str,
) -> Finding:  # fmt: skip
    """Fill in the sentences of a kind; `count` is a share of `total`, `elsewhere` in rows of another tool."""
    kind = KINDS[code]
    fix = (elsewhere and kind.elsewhere) or kind.fix
    message, fix = kind.message.format(**slots), fix.format(**slots)
    share = count / total if total else None
    return Finding(code, kind.severity, message, fix, count, kind.of, share, examples)
