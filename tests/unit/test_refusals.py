"""What a refused row is told: what the template refuses in it, and a mending that works."""

from __future__ import annotations

from importlib import resources

import pytest

from sftdata.batches import Conversation
from sftdata.errors import Fault, RowError
from sftdata.render.proof import ProvenRenderer
from sftdata.render.template import ChatTemplate
from tests.chats import WEATHER, bot, call, result, system, user

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CALLING = [user("Rain?"), {"role": "assistant", "tool_calls": [call("Rome")]}, result("dry"), bot("No.")]


def fault_of(template: str, *messages: dict[str, object], tools: bool = False) -> Fault:
    row = Conversation(list(messages), [None] * len(messages), [WEATHER] if tools else None)
    with pytest.raises(RowError) as caught:
        ProvenRenderer(ChatTemplate(template, SPECIAL)).render(row)
    assert caught.value.fault.code == "template-error"
    return caught.value.fault


def built_in(name: str) -> str:
    return resources.files("sftdata.render").joinpath(f"templates/{name}.jinja").read_text("utf-8")


def test_a_system_message_is_named_where_the_template_speaks_of_alternation() -> None:
    fault = fault_of(MISTRAL, system("Be brief."), user("Hi"), bot("Hi."))
    assert fault.reason.startswith(
        "the chat template refuses its system message (Conversation roles must alternate"
    )
    assert fault.fix.startswith("--chat-template mistral,")
    row = [system("Be brief."), user("Hi"), bot("Hi.")]
    assert "Be brief." in ChatTemplate(built_in("mistral"), SPECIAL).render(row)


def test_tool_calls_are_named_where_the_template_trips_over_a_missing_key() -> None:
    tripping = "{% for m in messages %}{{ m.content + (m.tool_calls[0].text + '' if m.tool_calls else '') }}{% endfor %}"
    fault = fault_of(tripping, *CALLING, tools=True)
    assert fault.reason.startswith("the chat template refuses its tool calls (")
    assert "tool calls" in fault.fix


def test_two_messages_of_one_role_are_named() -> None:
    fault = fault_of(MISTRAL, user("Hi"), user("You there?"), bot("Yes."))
    assert fault.reason.startswith("the chat template refuses messages of one role in a row (")
    assert fault.fix.startswith("--chat-template chatml,")


def test_all_that_is_refused_at_once_is_named() -> None:
    fault = fault_of(MISTRAL, system("Be brief."), *CALLING, tools=True)
    assert fault.reason.startswith("the chat template refuses its tool calls and its system message (")


def test_what_is_refused_for_another_reason_keeps_the_words_of_the_template() -> None:
    fault = fault_of("{{ raise_exception('No chats on Sundays!') }}", user("Hi"), bot("Hi."))
    assert fault.reason == "the chat template refuses the row (No chats on Sundays)"
