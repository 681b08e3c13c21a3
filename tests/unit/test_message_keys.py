"""Every key that a message may have in the formats of other tools is read, counted or refused: none is dropped unsaid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sftdata.batches import Conversation, RowBatch
from sftdata.errors import Fault
from sftdata.formats.fields import FormatOptions
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate
from tests.one_stage import convert_rows, render_rows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
READS_CHANNEL = CHATML.replace("'<|im_start|>' + m.role", "'<|im_start|>' + m.role + (m.channel or '')")
CALL = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"place": "Oslo"}}}

# What becomes of a key: "read" (the text changes, or the turn is not trained), "counted", or the code it is rejected with.
# Where the keys come from: platform.openai.com/docs/api-reference/chat, the messages, and its fine-tuning guide (`weight`);
# FastChat's ShareGPT files; docs/source_en/Customization/Custom-dataset.md of modelscope/ms-swift (`loss`, `loss_scale`);
# src/llamafactory/data/converter.py of hiyouga/LLaMA-Factory; docs/dataset-formats/conversation.qmd of axolotl-ai-cloud/axolotl
# (`train`, `train_detail`, and the names that `message_field_training` is given); verl/utils/dataset/multiturn_sft_dataset.py of
# verl-project/verl (`trainable`); tinker_cookbook/renderers/base.py of thinking-machines-lab/tinker-cookbook.
KEYS: dict[str, dict[str, tuple[Any, str]]] = {
    "openai": {
        "role": ("assistant", "read"), "content": ("Other.", "read"), "tool_calls": ([CALL], "read"), "weight": (0, "read"),
        "function_call": ({"name": "look", "arguments": "{}"}, "read"), "name": ("ann", "counted"),
        "refusal": ("No.", "counted"), "audio": ({"id": "a1"}, "counted"), "annotations": ([{"type": "url"}], "counted"),
        "tool_call_id": ("1", "counted"), "reasoning_content": ("Hm.", "counted"), "channel": ("analysis", "counted"),
    },
    "sharegpt": {
        "from": ("gpt", "read"), "value": ("Other.", "read"), "weight": (0, "read"), "markdown": ({"type": "text"}, "counted"),
        "text": ("<p>Yes.</p>", "counted"),
    },
    "ms-swift": {
        "role": ("assistant", "read"), "content": ("Other.", "read"), "loss": (False, "read"), "loss_scale": (0, "read"),
        "tool_calls": ('[{"name": "look", "arguments": {}}]', "read"),
    },
    "llama-factory": {
        "from": ("gpt", "read"), "value": ("Other.", "read"), "role": ("assistant", "read"), "content": ("Other.", "read"),
        "tool_calls": ([CALL], "read"),
    },
    "axolotl": {
        "train": (False, "read"), "training": (False, "read"), "weight": (0, "read"),
        "train_detail": ([{"begin_offset": 0, "end_offset": 1, "train": False}], "unclear-switch"),
        "training_detail": ([{"begin_offset": 0, "end_offset": 1, "train": False}], "unclear-switch"),
        "mask": (True, "unclear-switch"), "thinking": ("Hm.", "counted"),
    },
    "verl": {"trainable": (False, "read"), "tool_call_id": ("1", "counted"), "name": ("look", "counted")},
    "tinker": {
        "trainable": (False, "read"), "tool_calls": ([CALL], "read"), "name": ("look", "counted"), "thinking": ("Hm.", "counted"),
        "unparsed_tool_calls": ([{"raw_text": "<call", "error": "cut"}], "counted"), "tool_call_id": ("1", "counted"),
    },
    "others": {
        "masked": (True, "read"), "loss_mask": (0, "read"), "loss_weight": (0, "read"), "reasoning": ("Hm.", "counted"),
        "reasoning_details": ([{"type": "reasoning.text"}], "counted"), "prefix": (True, "counted"), "made_up": ("x", "counted"),
    },
}  # fmt: skip
CASES = [(f"{tool}.{key}", key, *wanted) for tool, keys in KEYS.items() for key, wanted in keys.items()]


def outcome(message: dict[str, Any], template: str = CHATML) -> tuple[str, list[Any], dict[str, int]] | Fault:
    """Return text, trained ranges and counts of a row that ends in this message, or the fault it is rejected with."""
    chat = {"messages": [{"role": "user", "content": "Is it?"}, message]}
    found = convert_rows(RowBatch([chat], *np.zeros((3, 1), np.int64)), "messages", FormatOptions())
    if found.faults:
        return found.faults[0][1]
    finder = SpanFinder(ChatTemplate(template), ("<|im_end|>",), ("<|im_start|>", "<|im_end|>"))
    rendered = render_rows(found.rows, found.row, Renderer(finder))
    if rendered.faults:
        return rendered.faults[0][1]
    assert rendered.conversations is not None
    return (
        rendered.conversations.texts[0],
        rendered.conversations.trained[0].tolist(),
        dict(rendered.tally.counts),
    )


@pytest.mark.parametrize(
    ("key", "value", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_key_of_another_tools_messages_is_read_counted_or_refused(
    key: str, value: Any, wanted: str
) -> None:
    plain = (
        {"from": "gpt", "value": "Yes."}
        if key in ("from", "value")
        else {"role": "assistant", "content": "Yes."}
    )
    before, after = outcome(plain), outcome(plain | {key: value})
    assert isinstance(before, tuple)
    if isinstance(after, Fault):
        assert after.code == wanted
        assert key in after.reason
        return
    changed = after[:2] != before[:2]
    counted = {
        name
        for name in after[2].keys() - before[2].keys()
        if name.partition(":")[2] in (key, "") and "turns" not in name
    }
    if wanted == "read":
        assert changed or plain.get(key) == value, "neither text nor labels changed"
        assert not counted
    else:
        assert (wanted, changed) == ("counted", False)
        assert counted == ({"reasoning_swallowed"} if key in ("thinking", "reasoning", "reasoning_content") else
                           {f"message_key_unused:{key}"})  # fmt: skip


def test_a_key_that_the_template_reads_is_not_counted() -> None:
    after = outcome({"role": "assistant", "content": "Yes.", "channel": "final"}, READS_CHANNEL)
    assert isinstance(after, tuple)
    assert "assistantfinal" in after[0]
    assert "message_key_unused:channel" not in after[2]


READING = {
    "attribute": "{{ m.tag }}",
    "item": "{{ m['tag'] }}",
    "get": "{{ m.get('tag', '') }}",
    "test": "{% if m.tag is defined %}!{% endif %}",
    "membership": "{% if 'tag' in m %}!{% endif %}",
    "items": "{% for key, value in m.items() %}{{ key }}{% endfor %}",
    "items filter": "{% for key, value in m | items %}{{ key }}{% endfor %}",
    "loop over keys": "{% for key in m %}{{ key }}{% endfor %}",
    "tojson": "{{ m | tojson }}",
    "selectattr": "{{ messages | selectattr('tag', 'defined') | list | length }}",
    "map": "{{ messages | map(attribute='tag') | join(',') }}",
    "a copy": "{% set n = dict(m) %}{{ n.tag }}",
}


@pytest.mark.parametrize("way", READING)
def test_whatever_way_a_template_reads_a_key_is_seen(way: str) -> None:
    template = ChatTemplate("{% for m in messages %}" + READING[way] + "{% endfor %}")
    watched = template.watch([{"role": "user", "content": "Hi", "tag": "t", "other": "o"}])
    template.render(watched)
    assert "tag" not in watched[0].unread()
    nothing = template.watch([{"role": "user", "content": "Hi", "tag": "t"}])
    ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}").render(nothing)
    assert nothing[0].unread() == {"tag"}


@pytest.mark.parametrize(
    ("message", "trained"),
    [
        ({"train": True, "weight": 0}, False),
        ({"masked": False}, True),
        ({"masked": True, "train": True}, False),
        ({"masked": 1}, False),
        ({"loss": 1.0, "trainable": True}, True),
        ({"loss": None, "training": None}, None),
        ({"loss_mask": 0, "loss": True}, False),
        ({"train_detail": []}, None),
    ],
)
def test_switches_are_all_heard(message: dict[str, Any], trained: bool | None) -> None:
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **message}]}
    [row] = convert_rows(RowBatch([chat], *np.zeros((3, 1), np.int64)), "messages", FormatOptions()).rows
    assert isinstance(row, Conversation)
    assert row.trained[1] is trained


def test_a_question_that_is_switched_on_is_counted() -> None:
    chat = {
        "messages": [{"role": "user", "content": "Q", "train": True}, {"role": "assistant", "content": "A"}]
    }
    [row] = convert_rows(RowBatch([chat], *np.zeros((3, 1), np.int64)), "messages", FormatOptions()).rows
    assert isinstance(row, Conversation)
    assert row.counted == ("switches_of_other_roles",)


def test_template_arguments_that_nothing_reads_are_counted() -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = Conversation(
        messages, [None, None], template_kwargs={"enable_thinking": False, "add_generation_prompt": False}
    )
    tally = render_rows(
        [row], np.zeros(1, np.int64), Renderer(SpanFinder(ChatTemplate(CHATML), ("<|im_end|>",)))
    ).tally
    assert tally.counts["template_argument_unused:enable_thinking"] == 1
    assert "template_argument_unused:add_generation_prompt" not in tally.counts
