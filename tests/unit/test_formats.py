"""Every row format becomes the canonical row that a person would write, and a bad row is one fault that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.batches import Completion, Conversation, Row, RowBatch, Text, Tokens
from sftdata.errors import Fault, UsageError
from sftdata.formats.fields import ALPACA, FormatOptions, PromptTemplate, load_prompt_template
from sftdata.formats.table import FORMATS
from sftdata.sources.source import open_source, plan_source, read_chunk
from tests.one_stage import Converted, convert_rows

CHAT = FormatOptions()
PLAIN = FormatOptions(chat=False)


def batch_of(*rows: Any) -> RowBatch:
    count = np.arange(len(rows), dtype=np.int64)
    return RowBatch(list(rows), count, count + 1, count)


def convert(row: Any, format_name: str, options: FormatOptions = CHAT) -> Row:
    found = convert_rows(batch_of(row), format_name, options)
    assert found.faults == []
    return found.rows[0]


def fault_of(row: Any, format_name: str, options: FormatOptions = CHAT) -> Fault:
    found = convert_rows(batch_of(row), format_name, options)
    assert found.rows == []
    return found.faults[0][1]


def say(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def talk(row: Any, format_name: str, options: FormatOptions = CHAT) -> Conversation:
    found = convert(row, format_name, options)
    assert isinstance(found, Conversation)
    return found


TURN = say(("user", "Q"), ("assistant", "A"))

# ----------------------------------------------------------------------------------------- what each format becomes

SIMPLE: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ("messages", {"messages": TURN}, TURN),
    "messages under conversations": ("messages", {"conversations": TURN}, TURN),
    "messages as JSON text": ("messages", {"messages": json.dumps(TURN)}, TURN),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        TURN,
    ),
    "sharegpt, other names": (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "chatgpt", "value": "A"}]},
        TURN,
    ),
    "xtuner": (
        "xtuner",
        {"conversation": [{"system": "S", "input": "Q", "output": "A"}]},
        [*say(("system", "S")), *TURN],
    ),
    "alpaca": ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, TURN),
    "alpaca without input": ("alpaca", {"instruction": "Q", "output": "A"}, TURN),
    "alpaca with null input": ("alpaca", {"instruction": "Q", "input": None, "output": "A"}, TURN),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "Q", "input": "I", "output": "A"},
        say(("user", "Q\nI"), ("assistant", "A")),
    ),
    "alpaca with only an input": ("alpaca", {"instruction": "", "input": "Q", "output": "A"}, TURN),
    "alpaca with response": ("alpaca", {"instruction": "Q", "response": "A"}, TURN),
    "alpaca with system": (
        "alpaca",
        {"instruction": "Q", "output": "A", "system": "S"},
        [*say(("system", "S")), *TURN],
    ),
    "alpaca with history": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
        [*say(("user", "q"), ("assistant", "a")), *TURN],
    ),
    "dolly": (
        "dolly",
        {"instruction": "Q", "context": "C", "response": "A"},
        say(("user", "Q\nC"), ("assistant", "A")),
    ),
    "question-answer": ("question-answer", {"question": "Q", "answer": "A"}, TURN),
    "query-response": ("query-response", {"query": "Q", "response": "A"}, TURN),
    "prompt-completion of messages": (
        "prompt-completion",
        {"prompt": TURN[:1], "completion": TURN[1:]},
        TURN,
    ),
    "prompt-completion, half messages": ("prompt-completion", {"prompt": TURN[:1], "completion": "A"}, TURN),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_chat_shaped_rows_become_conversations(name: str) -> None:
    format_name, row, messages = SIMPLE[name]
    found = talk(row, format_name)
    assert found.messages == messages
    assert found.trained == [None] * len(messages)


@pytest.mark.parametrize("name", SIMPLE)
def test_each_row_reads_as_exactly_one_format(name: str) -> None:
    format_name, row, _ = SIMPLE[name]
    assert [entry.name for entry in FORMATS.values() for _ in entry.readings(row, {})] == [format_name]


@pytest.mark.parametrize("answer", ["completion", "response", "answer", "output"])
def test_prompt_and_completion_strings_are_taken_as_rendered_text(answer: str) -> None:
    assert convert({"prompt": "2+2=", answer: "4"}, "prompt-completion") == Completion("2+2=", "4")
    assert (
        talk({"prompt": "Q", answer: "A"}, "prompt-completion", FormatOptions(kind="conversation")).messages
        == TURN
    )
    assert convert({"prompt": "a", answer: "b"}, "prompt-completion", FormatOptions(kind="text")) == Text(
        "ab"
    )


def test_prompt_messages_are_counted_with_the_system_text() -> None:
    row = {"prompt": TURN[:1], "completion": TURN[1:]}
    assert talk(row, "prompt-completion").prompt_messages == 1
    assert talk(row | {"system": "S"}, "prompt-completion").prompt_messages == 2


def test_text_rows_and_plain_lines_become_text() -> None:
    assert convert({"text": "T"}, "text") == Text("T")
    assert convert({"content": "T"}, "text") == Text("T")
    assert convert("T", "lines") == Text("T")


def test_tokens_pass_through_with_their_labels() -> None:
    ids = [5, 6, 7]
    assert convert({"input_ids": ids}, "tokens") == Tokens(ids, ids)
    assert convert({"input_ids": ids, "labels": [-100, 6, 7]}, "tokens") == Tokens(ids, [-100, 6, 7])
    assert convert({"input_ids": ids, "completion_mask": [0, 0, 1]}, "tokens") == Tokens(ids, [-100, -100, 7])
    assert convert({"input_ids": ids, "assistant_masks": [0, 1, 0]}, "tokens") == Tokens(ids, [-100, 6, -100])
    both = {"input_ids": ids, "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}
    assert convert(both, "tokens") == Tokens(ids, [-100, 6, -100])


# --------------------------------------------------------------------------------------------- messages in all forms


def test_parts_of_content_become_text_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    question = {"role": "user", "content": [{"type": "text", "value": "Q"}]}
    assert talk({"messages": [question, {"role": "assistant", "content": parts}]}, "messages").messages == [
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": "ab",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
    ]


CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS: dict[str, Any] = {
    "as the API has it, arguments as text": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    ],
    "arguments as an object": [CALL],
    "bare": [{"name": "f", "arguments": {"x": 1}}],
    "all as JSON text": '[{"name": "f", "arguments": {"x": 1}}]',
    "with nulls that Arrow put there": [{"id": None, **CALL, "function": {**CALL["function"], "z": None}}],
}


@pytest.mark.parametrize("form", CALLS)
def test_tool_calls_come_out_in_one_form_with_arguments_as_the_row_has_them(form: str) -> None:
    row = {
        "messages": [*say(("user", "Q")), {"role": "assistant", "content": None, "tool_calls": CALLS[form]}]
    }
    text = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    expected = CALL | (text if "as the API" in form else {})
    assert talk(row, "messages").messages[1] == {"role": "assistant", "tool_calls": [expected]}


def test_function_roles_of_sharegpt_become_calls_and_results() -> None:
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "R"},
        {"from": "gpt", "value": "A"},
    ]
    tools = '[{"name": "f", "parameters": {}}]'
    found = talk({"conversations": turns, "tools": tools}, "sharegpt")
    assert found.messages == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "R"},
        {"role": "assistant", "content": "A"},
    ]
    assert found.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


SWITCHES = [None, True, False]


@pytest.mark.parametrize("content", ["", "Let me look."])
@pytest.mark.parametrize("first", SWITCHES)
@pytest.mark.parametrize("second", SWITCHES)
def test_a_call_joins_the_answer_before_it_unless_one_of_them_alone_is_off(
    content: str, first: Any, second: Any
) -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    rows = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": content, "loss": first},
        call | {"loss": second},
    ]
    found = talk({"messages": [*rows, call | {"loss": second}]}, "messages")
    if (first is False) != (second is False):
        assert found.trained == [None, first, second]
        assert [len(message.get("tool_calls", ())) for message in found.messages] == [0, 0, 2]
    else:
        assert found.trained == [None, True if True in (first, second) else first]
        assert found.messages[1] == {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize(("role", "other", "agree"), [
    ("user", "gpt", False), ("assistant", "human", False), ("assistant", "function_call", False), ("tool_call", "gpt", False),
    ("user", "human", True), ("assistant", "GPT", True), ("user", "Ann", True), ("user", None, True), ("user", 3, True),
])  # fmt: skip
def test_a_message_in_two_spellings_must_say_the_same_in_both(role: str, other: Any, agree: bool) -> None:
    text = '{"name": "f", "arguments": {}}'
    message = {"role": role, "from": other, "content": text}
    both = [message, message | {"value": text}, message | {"value": "y"}]
    named = other in ("human", "GPT")  # of any other `from`, `value` is a key like any other
    wanted = [None, None, "said-twice" if named else None] if agree else ["said-twice"] * 3
    outcomes = [convert_rows(batch_of({"messages": [one, *TURN]}), "messages", CHAT).faults for one in both]
    assert [faults[0][1].code if faults else None for faults in outcomes] == wanted


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools_are_none(tools: Any) -> None:
    assert talk({"messages": TURN, "tools": tools}, "messages").tools is None


def test_tools_that_are_wrapped_already_stay_as_they_are() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert talk({"messages": TURN, "tools": tools}, "messages").tools == tools
    assert talk({"messages": TURN, "tools": tools[0]}, "messages").tools == tools


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
@pytest.mark.parametrize("value", [0, 0.0, False, 1, 1.0, True, None])
def test_a_message_may_switch_its_own_training(key: str, value: Any) -> None:
    messages = [TURN[0], TURN[1] | {key: value}]
    found = talk({"messages": messages}, "messages")
    assert found.trained == [None, None if value is None else bool(value)]
    assert found.messages == TURN  # the switch itself is no template data


def test_one_switch_off_is_off() -> None:
    assert talk({"messages": [TURN[0], TURN[1] | {"weight": 1, "train": False}]}, "messages").trained == [
        None,
        False,
    ]
    turn = {"input": "Q", "output": "A", "output_with_loss": False}
    assert talk({"conversation": [turn]}, "xtuner").trained == [None, False]


@pytest.mark.parametrize(
    "switch", [{"train": False}, {"weight": 0}, {"masked": True}, {"output_with_loss": 0}], ids=str
)
def test_a_turn_of_xtuner_is_switched_as_a_message_is(switch: dict[str, Any]) -> None:
    found = talk({"conversation": [{"input": "Q", "output": "A"} | switch]}, "xtuner")
    assert found.trained == [None, False]
    assert found.messages == say(("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize("key", ["train", "masked", "output_with_loss"])
def test_a_switch_that_is_a_text_is_refused_with_a_fix_that_helps(key: str) -> None:
    for row, style in (
        ({"messages": [TURN[0], TURN[1] | {key: "false"}]}, "messages"),
        ({"conversation": [{"input": "Q", "output": "A", key: "false"}]}, "xtuner"),
    ):
        fault = fault_of(row, style)
        assert fault.code == "fractional-weight"
        assert fault.fix == "write it as true or false."


def test_null_keys_are_dropped_and_other_keys_reach_the_template() -> None:
    message = {"role": "assistant", "content": "A", "tool_calls": None, "name": "n", "reasoning_content": "r"}
    found = talk(
        {"messages": [TURN[0], message], "chat_template_kwargs": {"enable_thinking": False}}, "messages"
    )
    assert found.messages[1] == {"role": "assistant", "content": "A", "name": "n", "reasoning_content": "r"}
    assert found.template_kwargs == {"enable_thinking": False}


def test_the_system_column_comes_first_unless_it_is_there_already() -> None:
    assert talk({"messages": TURN, "system": "S"}, "messages").messages == [*say(("system", "S")), *TURN]
    assert talk({"messages": TURN, "system": ""}, "messages").messages == TURN
    with_system = [*say(("system", "S")), *TURN]
    assert talk({"messages": with_system, "system": "S"}, "messages").messages == with_system
    assert fault_of({"messages": with_system, "system": "other"}, "messages").code == "two-system-texts"


# ------------------------------------------------------------------------------------------------------- bad rows


def asked(part: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


BAD: dict[str, tuple[str, Any, str, str]] = {
    "unknown role": (
        "messages",
        {"messages": [TURN[0], {"role": "bot", "content": "A"}]},
        "unknown-role",
        "messages[1].role is 'bot'; expected one of system, developer, user, assistant, tool.",
    ),
    "no role": ("messages", {"messages": [{"content": "A"}]}, "unknown-role", "messages[0].role is null"),
    "no messages": ("messages", {"messages": []}, "no-messages", "empty"),
    "messages of another kind": (
        "messages",
        {"messages": {"role": "user"}},
        "no-messages",
        "messages is an object",
    ),
    "a message that is text": (
        "messages",
        {"messages": [TURN[0], "A"]},
        "not-a-message",
        "messages[1] is a string",
    ),
    "no assistant": ("messages", {"messages": TURN[:1]}, "no-assistant", "found only user"),
    "null content": (
        "messages",
        {"messages": [TURN[0], {"role": "assistant", "content": None}]},
        "no-content",
        "messages[1]",
    ),
    "no content": ("sharegpt", {"conversations": [{"from": "gpt"}]}, "no-content", "conversations[0]"),
    "content of another kind": (
        "messages",
        {"messages": [TURN[0], {"role": "assistant", "content": 3}]},
        "not-text",
        "a number",
    ),
    "an image part": (
        "messages",
        {"messages": [asked({"type": "image_url"}), TURN[1]]},
        "image-part",
        "messages[0].content[0] is 'image_url'",
    ),
    "an audio part": (
        "messages",
        {"messages": [asked({"type": "input_audio"}), TURN[1]]},
        "audio-part",
        "'input_audio'",
    ),
    "a video part": ("messages", {"messages": [asked({"type": "video"}), TURN[1]]}, "video-part", "'video'"),
    "an unknown part": (
        "messages",
        {"messages": [asked({"type": "refusal"}), TURN[1]]},
        "unknown-part",
        "refusal",
    ),
    "parts that would change places": (
        "messages",
        {
            "messages": [
                TURN[0],
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_call", "value": '{"name": "f"}'},
                        {"type": "text", "text": "after"},
                    ],
                },
            ]
        },
        "part-order",
        "messages[1].content[1]",
    ),
    "half a weight": (
        "messages",
        {"messages": [TURN[0], TURN[1] | {"weight": 0.5}]},
        "fractional-weight",
        "weight is 0.5",
    ),
    "a call without a name": (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "bad-tool-call",
        "[0]",
    ),
    "a call that is no JSON": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "bad-tool-call",
        "",
    ),
    "tools that are not JSON": ("messages", {"messages": TURN, "tools": "f, g"}, "bad-tools", "a string"),
    "template arguments of another kind": (
        "messages",
        {"messages": TURN, "chat_template_kwargs": [1]},
        "bad-template-arguments",
        "an array",
    ),
    "null instruction": ("alpaca", {"instruction": None, "output": "A"}, "null-field", "instruction is null"),
    "null output": ("alpaca", {"instruction": "Q", "output": None}, "null-field", "output is null"),
    "a number for an answer": (
        "question-answer",
        {"question": "Q", "answer": 4},
        "not-text",
        "answer is a number",
    ),
    "nothing asked": (
        "alpaca",
        {"instruction": " ", "input": "", "output": "A"},
        "empty-prompt",
        "instruction is empty",
    ),
    "no answer column": ("alpaca", {"instruction": "Q"}, "missing-column", "output or response"),
    "two answer columns": (
        "alpaca",
        {"instruction": "Q", "output": "A", "response": "B"},
        "two-columns",
        "output and response",
    ),
    "a bad history": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [["q"]]},
        "bad-history",
        "history[0]",
    ),
    "null completion": (
        "prompt-completion",
        {"prompt": "P", "completion": None},
        "null-field",
        "completion is null",
    ),
    "both empty": ("prompt-completion", {"prompt": "", "completion": ""}, "empty-row", "both empty"),
    "empty text": ("text", {"text": " \n"}, "empty-text", "text is empty"),
    "another format": (
        "alpaca",
        {"messages": TURN},
        "wrong-format",
        "the row reads as messages, the input as alpaca",
    ),
    "another format of chat": (
        "messages",
        {"conversation": [{"input": "Q", "output": "A"}]},
        "wrong-format",
        "reads as xtuner",
    ),
    "a picture": (
        "sharegpt",
        {
            "image": "a.jpg",
            "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
        },
        "no-processor",
        "the row has a picture, and no processor says what stands for one",
    ),
    "labels too short": (
        "tokens",
        {"input_ids": [1, 2], "labels": [1]},
        "bad-tokens",
        "labels has 1 entries, input_ids has 2",
    ),
    "ids of another kind": ("tokens", {"input_ids": [1, "2"]}, "bad-tokens", "input_ids"),
    "no ids": ("tokens", {"input_ids": []}, "bad-tokens", "empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_fault_that_names_the_place(name: str) -> None:
    format_name, row, code, reason = BAD[name]
    good: Any = {"messages": TURN} if format_name == "messages" else None
    fault = fault_of(row, format_name)
    assert fault.code == code
    assert reason in fault.reason
    assert fault.fix
    assert "\n" not in f"{fault.reason}{fault.fix}"
    if good:  # a neighbour does not suffer
        assert len(convert_rows(batch_of(row, good), format_name, CHAT).rows) == 1


def test_an_unknown_role_is_mended_by_the_flag_that_its_fault_names() -> None:
    row = {"messages": [TURN[0], {"role": "bot", "content": "A"}]}
    assert fault_of(row, "messages").fix == "--map-role bot=assistant"
    assert talk(row, "messages", FormatOptions(roles={"bot": "assistant"})).messages == TURN
    assert (
        talk(
            {"messages": [{"role": "User", "content": "Q"}, {"role": " GPT ", "content": "A"}]}, "messages"
        ).messages
        == TURN
    )


def test_a_mapped_role_may_be_any_that_the_template_knows() -> None:
    row = {"messages": [*TURN, {"role": "ipython", "content": "R"}]}
    assert talk(row, "messages", FormatOptions(roles={"ipython": "ipython"})).messages[2]["role"] == "ipython"


def test_a_conversation_without_an_assistant_passes_when_all_is_trained() -> None:
    assert talk({"messages": TURN[:1]}, "messages", FormatOptions(need_assistant=False)).messages == TURN[:1]


def test_an_empty_answer_is_an_answer() -> None:
    assert talk({"instruction": "Q", "output": ""}, "alpaca").messages[1] == {
        "role": "assistant",
        "content": "",
    }
    assert convert({"prompt": "P", "completion": ""}, "prompt-completion") == Completion("P", "")


# ---------------------------------------------------------------------------------------------------- the columns


def test_a_mapped_column_wins_over_every_other_spelling() -> None:
    row = {"instruction": "Q", "output": "wrong", "response": "A"}
    for key in ("output", "response", "completion"):
        assert talk(row, "alpaca", FormatOptions(columns={key: "response"})).messages == TURN
    assert talk(row, "alpaca", FormatOptions(columns={"output": "output"})).messages[1]["content"] == "wrong"
    assert convert({"body": "T"}, "text", FormatOptions(columns={"text": "body"})) == Text("T")


def test_a_null_column_yields_to_the_other_spelling() -> None:
    assert talk({"instruction": "Q", "output": None, "response": "A"}, "alpaca").messages == TURN


def test_columns_that_nothing_reads_are_named_with_the_rows_that_have_them() -> None:
    rows = [{"text": "a", "url": "u"}, {"text": "b", "meta": {}, "url": "u"}, {"text": "c"}]
    found = convert_rows(batch_of(*rows), "text", CHAT)
    assert found.unused == {"meta": 1, "url": 2}
    assert found.row.tolist() == [0, 1, 2]


def test_every_row_is_kept_or_faulted_or_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = convert_rows(batch_of({"text": "a"}, {"text": None}, {"no": 1}, {"text": "d"}), "text", CHAT)
    assert (found.row.tolist(), [index for index, _ in found.faults], found.filtered.tolist()) == (
        [0, 3],
        [1, 2],
        [],
    )


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'sharegtp'.*messages, sharegpt"):
        convert_rows(batch_of(), "sharegtp", CHAT)


# ------------------------------------------------------------------------------------------------ prompt templates


def test_without_a_chat_template_instructions_are_laid_out_as_stanford_alpaca_did() -> None:
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nQ\n\n"
    assert convert({"instruction": "Q", "input": "", "output": "A"}, "alpaca", PLAIN) == Completion(
        f"{head}. {tail}### Response:\n", "A"
    )
    assert convert({"instruction": "Q", "input": "I", "output": "A"}, "alpaca", PLAIN) == Completion(
        f"{head}, paired with an input that provides further context. {tail}### Input:\nI\n\n### Response:\n",
        "A",
    )
    question = convert({"question": "Q", "answer": "A"}, "question-answer", PLAIN)
    assert question == Completion(f"{head}. {tail}### Response:\n", "A")
    as_text = convert({"question": "Q", "answer": "A"}, "question-answer", FormatOptions(kind="text"))
    assert as_text == Text(f"{head}. {tail}### Response:\nA")


def test_a_built_in_prompt_is_what_a_real_dataset_holds(shared_data: Path) -> None:
    path = shared_data / "datasets" / "prompt_completion" / "dolly_hhrlhf_train_small.jsonl"
    (piece,) = plan_source(open_source(str(path)), 0, 1 << 30).chunks
    prompt = read_chunk(piece)[0].rows[0]["prompt"]
    question = prompt.split("### Instruction:\n")[1].split("\n\n### Response:")[0]
    assert convert({"question": question, "answer": ""}, "question-answer", PLAIN) == Completion(prompt, "")


def test_braces_in_data_are_data_and_never_slots() -> None:
    row = {
        "instruction": "{input} {{name}} {% raw %} {0} {output}",
        "input": "{instruction}",
        "output": "I am {{name}}.",
    }
    found = convert(row, "alpaca", PLAIN)
    assert isinstance(found, Completion)
    assert (
        "### Instruction:\n{input} {{name}} {% raw %} {0} {output}\n\n### Input:\n{instruction}\n\n"
        in found.prompt
    )
    assert found.completion == "I am {{name}}."
    assert (
        talk(row, "alpaca").messages[0]["content"] == "{input} {{name}} {% raw %} {0} {output}\n{instruction}"
    )


def test_earlier_turns_and_the_system_text_are_laid_out_too() -> None:
    template = PromptTemplate.parse("Q: {instruction}\nA: ")
    row = {"instruction": "Q2", "output": "A2", "system": "S", "history": [["Q1", "A1"]]}
    options = FormatOptions(chat=False, template=template)
    assert convert(row, "alpaca", options) == Completion("S\n\nQ: Q1\nA: A1\n\nQ: Q2\nA: ", "A2")


def test_a_template_file_may_hold_the_answer_and_any_column(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("[{topic}] {question} {not a slot} => {answer} <end>\n")
    options = FormatOptions(chat=False, template=load_prompt_template(str(path)))
    row = {"topic": "t", "question": "Q", "answer": "A"}
    assert convert(row, "question-answer", options) == Completion("[t] Q {not a slot} => ", "A <end>")
    fault = fault_of({"question": "Q", "answer": "A"}, "question-answer", options)
    assert (fault.code, "{topic}" in fault.reason) == ("missing-column", True)


def test_a_template_file_without_slots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("no slots")
    with pytest.raises(UsageError, match=r"no \{field\} slot"):
        load_prompt_template(str(tmp_path / "prompt.txt"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompt_template(str(tmp_path / "none.txt"))


def test_tools_need_a_chat_template() -> None:
    row = {"question": "Q", "answer": "A", "tools": [{"name": "f"}]}
    assert fault_of(row, "question-answer", PLAIN).code == "tools-without-chat"
    assert talk(row, "question-answer").tools is not None


def test_options_are_small_and_picklable() -> None:
    import pickle

    options = FormatOptions(columns={"a": "b"}, template=ALPACA, formatter="m:f")
    assert pickle.loads(pickle.dumps(options)) == options


# -------------------------------------------------------------------------------------------- the user's formatter

FORMATTERS = """
def to_text(row): return row["q"] + row["a"]
def to_dict(row): return {"prompt": row["q"], "completion": row["a"]}
def to_messages(row): return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
def to_none(row): return None if row["q"] == "Q" else row["q"]
def to_number(row): return 3
def to_several(row): return ["a", "b"]
def to_nothing_known(row): return {"x": 1}
def to_two(row): return {"prompt": "p", "completion": "c", "text": "t"}
def raises(row): return row["missing"]
def mutates(row): row.clear(); return "x"
def to_row(row):
    from sftdata.batches import Completion
    return Completion(row["q"], row["a"])
def to_weighted(row):
    from sftdata.batches import Conversation
    return Conversation(to_messages(row), [None, 0.5])
not_a_function = 3
"""


@pytest.fixture
def formatters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rows_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FORMATTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def format_with(spec: str) -> Converted:
    return convert_rows(batch_of({"q": "Q", "a": "A"}), "", FormatOptions(formatter=spec))


def test_a_formatter_may_return_text_columns_messages_or_a_canonical_row(formatters: str) -> None:
    assert format_with(f"{formatters}:to_text").rows == [Text("QA")]
    assert format_with(f"{formatters}:to_dict").rows == [Completion("Q", "A")]
    assert format_with(f"{formatters}:to_row").rows == [Completion("Q", "A")]
    (conversation,) = format_with(f"{formatters}:to_messages").rows
    assert isinstance(conversation, Conversation)
    assert conversation.messages == TURN


def test_a_weight_of_a_formatter_is_kept_or_refused(formatters: str) -> None:
    (fault,) = (fault for _, fault in format_with(f"{formatters}:to_weighted").faults)
    assert fault.code == "fractional-weight"
    assert fault.reason == "trained[1] of the formatter's row is 0.5; expected True, False or None."
    options = FormatOptions(formatter=f"{formatters}:to_weighted", loss_weights=True)
    (row,) = convert_rows(batch_of({"q": "Q", "a": "A"}), "", options).rows
    assert isinstance(row, Conversation)
    assert row.trained == [None, 0.5]


def test_a_formatter_that_returns_none_filters_the_row(formatters: str) -> None:
    found = format_with(f"{formatters}:to_none")
    assert (found.rows, found.faults, found.filtered.tolist()) == ([], [], [0])


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("raises", "formatter-error", "raised KeyError: 'missing'"),
        ("to_number", "formatter-output", "returned a number"),
        ("to_several", "formatter-output", "returned an array"),
        ("to_nothing_known", "formatter-output", "the columns x, which read as no format"),
        ("to_two", "formatter-output", "read as prompt-completion and text"),
    ],
)
def test_what_a_formatter_does_wrong_is_a_fault_of_the_row(
    formatters: str, name: str, code: str, reason: str
) -> None:
    ((_, fault),) = format_with(f"{formatters}:{name}").faults
    assert (fault.code, reason in fault.reason) == (code, True)


def test_a_formatter_cannot_change_the_row_that_a_reject_would_show(formatters: str) -> None:
    batch = batch_of({"q": "Q"})
    convert_rows(batch, "", FormatOptions(formatter=f"{formatters}:mutates"))
    assert batch.rows == [{"q": "Q"}]


@pytest.mark.parametrize("spec", ["no_such_module:f", "{}:no_such", "{}:not_a_function", "{}", ":f"])
def test_a_formatter_that_cannot_be_found_is_one_line(formatters: str, spec: str) -> None:
    with pytest.raises(UsageError, match="formatter") as caught:
        format_with(spec.format(formatters))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- real data


def rows_of(path: Path) -> list[Any]:
    return [
        row
        for piece in plan_source(open_source(str(path)), 0, 1 << 30).chunks
        for row in read_chunk(piece)[0].rows
    ]


def test_real_reasoning_and_tool_rows_keep_every_word(shared_data: Path) -> None:
    rows = rows_of(shared_data / "datasets" / "messages" / "lf_reason_tool_use_demo_50.jsonl")
    for row in rows:
        found = talk(row, "messages")
        assert found.tools == (json.loads(row["tools"]) or None)
        for message, raw in zip(found.messages, row["messages"], strict=True):
            said = {"reasoning": message.get("reasoning_content"), "text": message.get("content")}
            for kind, text in said.items():
                assert (text or "") == "".join(
                    part["value"] for part in raw["content"] if part["type"] == kind
                )
            calls = [json.loads(part["value"]) for part in raw["content"] if part["type"] == "tool_call"]
            assert [call["function"]["name"] for call in message.get("tool_calls", [])] == [
                call["name"] for call in calls
            ]


def test_real_loss_weights_become_switches(shared_data: Path) -> None:
    for row in rows_of(shared_data / "datasets" / "messages" / "lf_v1_sft_demo.jsonl"):
        assert talk(row, "messages").trained == [bool(message["loss_weight"]) for message in row["messages"]]


def test_real_history_becomes_earlier_turns(shared_data: Path) -> None:
    rows = rows_of(shared_data / "datasets" / "instruction" / "lf_oaast_sft_zh_history.json")
    assert sum(bool(row["history"]) for row in rows) == 524
    for row in rows:
        contents = [message["content"] for message in talk(row, "alpaca").messages]
        assert contents[:-2] == [text for pair in row["history"] for text in pair]
        assert contents[-1] == row["output"]


def test_real_sparse_system_texts_are_kept(shared_data: Path) -> None:
    rows = rows_of(shared_data / "datasets" / "sharegpt" / "fastchat_dummy_with_system.json")
    first = [talk(row, "sharegpt").messages[0] for row in rows]
    expected = [row["system"] for row in rows if "system" in row]
    assert len(expected) == 6
    assert [message["content"] for message in first if message["role"] == "system"] == expected


@pytest.mark.parametrize("kind", [[], {}, 1, True])
def test_a_part_whose_type_is_no_string_is_a_fault_of_the_row(kind: Any) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": kind, "text": "Q"}]}, TURN[1]]}
    assert fault_of(row, "messages").code == "unknown-part"


@pytest.mark.parametrize("name", [[], {}, None])
def test_a_tool_whose_name_is_no_string_declares_nothing(name: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    row = {
        "messages": [TURN[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": {}}}}],
    }
    assert talk(row, "messages").messages[1]["tool_calls"] == [call]
