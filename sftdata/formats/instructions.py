"""Rows of question and answer in columns -> a conversation, prompt and completion, or text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeGuard

from sftdata.batches import Completion, Conversation, Row, Text
from sftdata.errors import RowError
from sftdata.formats.calls import Message
from sftdata.formats.chat import Switched, read_conversation, read_messages
from sftdata.formats.fields import ANSWERS, INPUTS, QUESTIONS, Fields, FormatOptions
from sftdata.sources.jsonrows import from_json, kind_of

Pair = tuple[str, str]  # question, answer


def read_instruction(fields: Fields, options: FormatOptions) -> Row:
    """Convert a row of question, optional input, answer, optional system text and history.

    Raises:
        RowError: a null or non-text column, or nothing asked.
    """
    question, given, answer = fields.text("question"), fields.optional_text("input"), fields.text("answer")
    if not question.strip() and not given.strip():
        what = f"{fields.names['question']} is empty; expected something to answer."
        raise RowError("empty-prompt", what, "fill it in, or remove the row.")
    history = _read_history(fields.get("history"))
    if options.as_conversation:
        pairs = [*history, ("\n".join(part for part in (question, given) if part), answer)]
        return _as_conversation(pairs, fields, options, fields.optional_text("reasoning"))
    return _lay_out(question, given, answer, history, fields, options)


def read_prompt_completion(fields: Fields, options: FormatOptions) -> Row:
    """Convert a prompt and its completion: two strings, taken as rendered text, or lists of messages.

    Raises:
        RowError: a null column, or both empty.
    """
    prompt, completion = from_messages(fields.get("prompt")), from_messages(fields.get("answer"))
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = _as_turns(prompt, "user", fields, "prompt", options)
        answered = _as_turns(completion, "assistant", fields, "answer", options)
        return read_conversation(asked + answered, fields, options, len(asked))
    prompt, completion = fields.text("prompt"), fields.text("answer")
    if not prompt and not completion:
        raise RowError("empty-row", "prompt and completion are both empty.", "remove the row.")
    if options.kind == "conversation":
        return _as_conversation([(prompt, completion)], fields, options)
    return _join(_before(fields) + prompt, completion, options)


def from_messages(value: object) -> object:
    """Return a list of messages written as JSON text as the list; anything else as it is."""
    if isinstance(value, str) and value.startswith("[{"):
        parsed = from_json(value)
        return parsed if is_messages(parsed) else value
    return value


def is_messages(value: object) -> TypeGuard[list[object]]:
    """Return True for a list whose first item is a message."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & value[0].keys())
    )


def _as_turns(
    value: object, role: str, fields: Fields, column: str, options: FormatOptions
) -> list[Switched]:
    if isinstance(value, list):
        return read_messages(value, fields.names[column], options, fields.counted)
    return [({"role": role, "content": fields.text(column)}, None)]


def _as_conversation(
    pairs: list[Pair], fields: Fields, options: FormatOptions, reasoning: str = ""
) -> Conversation:
    turns: list[Switched] = []
    for question, answer in pairs:
        asked: Message = {"role": "user", "content": question}
        turns += [(asked, None), ({"role": "assistant", "content": answer}, None)]
    if reasoning:
        turns[-1][0]["reasoning_content"] = reasoning
    return read_conversation(turns, fields, options)


def _lay_out(
    question: str, given: str, answer: str, history: list[Pair], fields: Fields, options: FormatOptions
) -> Row:
    """Fill the prompt template once for each earlier turn and once for this one."""
    columns = {name: value for name, value in fields.row.items() if isinstance(value, str)}
    prompt = "" if "system" in options.template.slots else _before(fields)
    columns.setdefault("system", "")
    for asked, answered in history:
        earlier = columns | _slots(asked, "", answered)
        before, completion = options.template.lay_out(earlier, answered)
        prompt += before + completion + "\n\n"
    before, completion = options.template.lay_out(_slots(question, given, answer) | columns, answer)
    return _join(prompt + before, completion, options)


def _slots(question: str, given: str, answer: str) -> dict[str, str]:
    """Return a turn under every name that a slot for it may have."""
    return dict.fromkeys(QUESTIONS, question) | dict.fromkeys(ANSWERS, answer) | dict.fromkeys(INPUTS, given)


def _before(fields: Fields) -> str:
    """Return the system text as it is put before a prompt that is plain text."""
    if fields.get("tools"):
        fix = "give --chat-template, or take the tools column out."
        raise RowError("tools-without-chat", "tools need a chat template.", fix)
    system = fields.optional_text("system")
    return f"{system}\n\n" if system else ""


def _join(prompt: str, completion: str, options: FormatOptions) -> Row:
    return Text(prompt + completion) if options.kind == "text" else Completion(prompt, completion)


def _read_history(value: object) -> list[Pair]:
    """Return the earlier (question, answer) pairs."""
    history = from_json(value) or []
    if not isinstance(history, list):
        what = f"history is {kind_of(history)}; expected pairs."
        raise RowError("bad-history", what, "write it as [[question, answer], ...].")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            what = f"history[{index}] is not a pair of strings."
            raise RowError("bad-history", what, 'write it as ["question", "answer"].')
    return [(question, answer) for question, answer in history]


# ------------------------------------------------------------------ markers of turns in running text

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
    """Return whether an instruction is followed by a response; the text begins a line."""
    asked = f"\n{text}".find(pair[0])
    return asked >= 0 and f"\n{text}".find(pair[1], asked + len(pair[0])) >= 0
