"""Chat templates render what transformers renders, refuse what it refuses, and cannot exhaust the machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sftdata.errors import UsageError
from sftdata.render.template import BUILT_IN, ChatTemplate, TemplateRefusal, choose_template, control_tokens
from tests.chats import CHATS, bot, system, user
from tests.oracles.char_masks import Format
from tests.waiting import pace

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [user("Hello"), bot("Good day.")]


def _templates(folder: Path) -> list[Path]:
    return sorted((folder / "templates").rglob("*.jinja"))


@pytest.mark.parametrize(("name", "count"), [("made", 12), ("real", 69)])
@pytest.mark.parametrize("part", range(4))
def test_every_template_renders_every_conversation_as_transformers_does(
    part: int, name: str, count: int, home: Path
) -> None:
    paths = _templates(home)
    assert len(paths) == count
    for path in paths[part::4]:
        more: dict[str, Any] = (
            {"functions": "[]", "datetime": "today"} if path.stem == "firefunction-v2" else {}
        )
        form = Format(
            path.read_text(encoding="utf-8"), arguments=SPECIAL | more, parts="llava-next" in path.stem
        )
        template = ChatTemplate(form.source, SPECIAL)
        for title, chat in CHATS.items():
            for prompt in (False, True):
                try:
                    expected = form.render(chat["messages"], chat.get("tools"), prompt)
                except Exception:  # templates raise whatever they like
                    expected = None
                try:
                    rendered = template.render(
                        chat["messages"], chat.get("tools"), more, add_generation_prompt=prompt
                    )
                except TemplateRefusal:
                    rendered = None
                assert rendered == expected, (path.stem, title, prompt)


def test_the_clock_stands_still() -> None:
    template = "{{ strftime_now('%d %B %Y') }}"
    assert ChatTemplate(template).render(HELLO) == "01 January 2025"
    assert ChatTemplate(template, date="2024-02-29").render(HELLO) == "29 February 2024"


def test_null_fields_are_left_out_and_reasoning_goes_by_every_name() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ [m.thinking, m.reasoning_content, m.name is defined] }}{% endfor %}"
    )
    assert template.render([bot("x", reasoning="why", name=None)]) == "['why', 'why', False]"


def test_template_arguments_of_the_row_outrank_those_of_the_run() -> None:
    template = ChatTemplate("{{ bos_token }}{{ a }}{{ b }}", SPECIAL, template_kwargs={"a": 1, "b": 2})
    assert template.render(HELLO, template_kwargs={"b": 3}) == "<s>13"


def test_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must\n alternate') }}").render(HELLO)


def test_a_template_that_does_not_compile_is_one_line() -> None:
    with pytest.raises(UsageError) as caught:
        ChatTemplate("{% for %}")
    assert str(caught.value).startswith("Chat template, line 1: ")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- escapes and bombs


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ dict.__call__.__globals__ }}",
    "{% include 'x' %}",
    "{{ raise_exception.__globals__.x }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateRefusal):
        ChatTemplate(source).render(HELLO)


GROW = "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{{{ ns.x }}}}"
BOMBS = [
    "{{ 'a' * 10**12 }}",
    "{{ [1] * 10**10 }}",
    "{{ 9**(9**9) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    GROW.format(start="[1]", step="ns.x + ns.x"),
    GROW.format(start="7", step="ns.x * ns.x"),
    GROW.format(start="'ab'", step="ns.x.join([ns.x, ns.x])"),
    GROW.format(start="'ab'", step="[ns.x, ns.x] | join(ns.x)"),
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a\nb' | indent(9999999999) }}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{{ [1] | batch(9999999999, 'x') | list }}",
]
SLOW_BOMBS = [  # a second or two each until their budget is spent
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    GROW.format(start="'ab'", step="ns.x + ns.x"),
    GROW.format(start="'ab'", step="ns.x ~ ns.x"),
    GROW.format(start="1", step="[ns.x, ns.x]"),
    GROW.format(start="1", step="{'a': ns.x, 'b': ns.x}"),
    GROW.format(start="'ab'", step="ns.x.replace('a', ns.x)"),
    GROW.format(start="'ab'", step="ns.x | replace('a', ns.x)"),
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize(
    "source", [*BOMBS, *(pytest.param(source, marks=pytest.mark.slow) for source in SLOW_BOMBS)]
)
def test_a_template_cannot_exhaust_the_machine(source: str) -> None:
    template = ChatTemplate(source)
    begun = time.process_time()
    with pytest.raises(TemplateRefusal):
        template.render(HELLO)
    assert time.process_time() - begun < 12 * pace()
    assert (
        ChatTemplate("{{ messages[0].content }}").render(HELLO) == "Hello"
    )  # the next render has a budget of its own


@pytest.mark.parametrize("source", ["{{ lipsum() }}", "{{ messages | random }}"])
def test_a_template_cannot_depend_on_chance(source: str) -> None:
    with pytest.raises((TemplateRefusal, UsageError)):
        ChatTemplate(source).render(HELLO)


def test_a_long_row_is_well_within_the_budget() -> None:
    """Sixty-four megabytes, the longest line that is read by default."""
    text = choose_template("llama-3", None, _no_clone)
    assert text is not None
    messages = [user("x" * (32 << 20)), bot("y" * (32 << 20))]
    assert len(ChatTemplate(text.text, SPECIAL).render(messages)) > 64 << 20


# ------------------------------------------------------------------------------------------------ which template


def _no_clone(name: str) -> tuple[str | None, list[str], str | None]:
    raise UsageError(f"{name} is nothing")


def test_without_a_choice_the_tokenizers_own_template_stays() -> None:
    own = choose_template(None, "{{ messages }}", _no_clone)
    assert own is not None
    assert (own.text, own.origin, own.tokens) == ("{{ messages }}", "tokenizer", ())
    assert choose_template(None, None, _no_clone) is None


# The formats as their authors describe them, for a system message, an exchange and a question.
WRITTEN = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nA?\n\n### Response:\nB.</s>\n\n### Instruction:\nC?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
    "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nA?<end_of_turn>\n<start_of_turn>model\nB.<end_of_turn>\n"
    "<start_of_turn>user\nC?<end_of_turn>\n<start_of_turn>model\n",
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nA? [/INST] B. </s><s>[INST] C? [/INST]",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nA?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nC?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nA? [/INST] B.</s>[INST] C? [/INST]",
    "vicuna": "<s>Be brief.\n\nUSER: A?\nASSISTANT: B.</s>\nUSER: C?\nASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nA?</s>\n<|assistant|>\nB.</s>\n<|user|>\nC?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_template_writes_its_format(name: str) -> None:
    chosen = choose_template(name, None, _no_clone)
    assert chosen is not None
    chat = [system("Be brief."), user("A?"), bot("B."), user("C?")]
    assert ChatTemplate(chosen.text, SPECIAL).render(chat, add_generation_prompt=True) == WRITTEN[name]


# name -> (the same format in the shared folder, whether it knows a system message)
UPSTREAM = {
    "alpaca": "alpaca", "chatml": "chatml", "gemma": "gemma-2-2b-it", "llama-2": "llama-2-chat", "llama-3": "llama-3",
    "mistral": "mistral-instruct-merged-system", "vicuna": "vicuna", "zephyr": "zephyr",
}  # fmt: skip
# Their models (Qwen, Zephyr) have no BOS in front of a chat.
WITHOUT_BOS = {"chatml", "zephyr"}
STANFORD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_template_writes_what_the_real_one_does(name: str, shared_data: Path) -> None:
    source = (shared_data / f"templates/plain/{UPSTREAM[name]}.jinja").read_text(encoding="utf-8")
    if "\n    " in source and name not in (
        "gemma",
        "llama-3",
    ):  # pretty-printed: its README says to strip this first
        source = source.replace("    ", "").replace("\n", "")
    upstream = Format(source, arguments=SPECIAL)
    chosen = choose_template(name, None, _no_clone)
    assert chosen is not None
    template = ChatTemplate(chosen.text, SPECIAL)
    chat = [user("Name a colour."), bot("Red."), user("Another?"), bot("Green.")]
    for messages in (chat, [system("Be brief."), *chat], chat[:1], chat[:3]):
        if name == "gemma" and messages[0]["role"] == "system":
            continue  # the original refuses it; the built-in merges it into the first user message
        prompt = messages[-1]["role"] == "user"
        rendered = template.render(messages, add_generation_prompt=prompt)
        if (
            name == "mistral" and messages[0]["role"] == "system"
        ):  # inside the first instruction, as mistral-common writes it
            messages = [user("Be brief.\n\nName a colour."), *chat[1:]]
        expected = upstream.render(messages, prompt=prompt)
        if (
            name == "alpaca" and messages[0]["role"] != "system"
        ):  # the original work begins every prompt with this
            expected = expected.replace("<s>", f"<s>{STANFORD}\n\n", 1)
        assert rendered == (expected.removeprefix("<s>") if name in WITHOUT_BOS else expected)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_template_brings_its_end_of_turn_token(name: str) -> None:
    chosen = choose_template(name, None, _no_clone)
    assert chosen is not None
    end = BUILT_IN[name] or "</s>"
    assert chosen.eos_token == BUILT_IN[name]
    assert end in ChatTemplate(chosen.text, SPECIAL).render(HELLO)
    assert BUILT_IN[name] is None or BUILT_IN[name] in chosen.tokens


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("<|a|>{{ messages }}<|b|><|a|>", encoding="utf-8")
    chosen = choose_template(str(path), "own", _no_clone)
    assert chosen is not None
    assert (chosen.origin, chosen.tokens, chosen.eos_token) == ("file mine.jinja", ("<|a|>", "<|b|>"), None)


def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"{{ \xff }}")
    with pytest.raises(UsageError, match="not utf-8 at byte 3"):
        choose_template(str(path), None, _no_clone)


def test_a_template_is_cloned_with_the_tokens_it_writes() -> None:
    chosen = choose_template(
        "other", None, lambda _: ("<|a|>{{ messages }}", ["<|a|>", "<|z|>", "<|e|>"], "<|e|>")
    )
    assert chosen is not None
    assert (chosen.origin, chosen.tokens, chosen.eos_token) == (
        "cloned from other",
        ("<|a|>", "<|e|>"),
        "<|e|>",
    )


def test_a_choice_that_is_nothing_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="neither a built-in template \\(alpaca, chatml.*nothing"):
        choose_template("nope", None, _no_clone)
    with pytest.raises(UsageError, match="has no chat template"):
        choose_template("bare", None, lambda _: (None, [], None))


def test_control_tokens_are_told_from_tags() -> None:
    text = (
        "<|im_start|> <think> </tool_call> <|tool_response> <tool_call|> <start_of_turn> <｜User｜> a<|b c|>"
    )
    assert control_tokens(text) == (
        "<|im_start|>",
        "<|tool_response>",
        "<tool_call|>",
        "<start_of_turn>",
        "<｜User｜>",
    )
