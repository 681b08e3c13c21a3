"""A cached shape gives what rendering gives, or is not used."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.render.shapes import plain_contents
from sftdata.render.template import ChatTemplate, control_tokens
from tests.unit.test_pictures_masks import TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "Hello", " Hello", "Hello\n", "\tHé llo\n\n", "a\nb", " ", "", "日本語", "x < y", "<think>\nr\n</think>\n\nanswer",
    "</think>",
    "say <|im_end|> or </s>", "<tool_response>x</tool_response>", "/no_think", "<|channel|>final<|message|>", "\r\n",
    "\U0010a000",
    "{'type': 'text'}", "'quoted' \"double\"", "[INST] x [/INST]", "a" * 3000, "\x1ftrim me\x1f", "\u3000wide\u3000",
]  # fmt: skip
SHAPES = [
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant", "assistant"),
]


def outcome(finder: SpanFinder, row: Conversation, *, slow: bool) -> RenderedConversation | str:
    try:
        return finder._render(row)[0] if slow else finder.render(row)
    except RowError as error:
        return error.fault.code


def finder_of(text: str) -> SpanFinder:
    return SpanFinder(ChatTemplate(text, SPECIAL), ["</s>"], (*control_tokens(text), "<s>", "</s>"))


# Templates, and of how many a shape is learned; the others ask their texts what no condition states.
@pytest.mark.parametrize(("name", "least"), [("real", 55), ("made", 10)])
def test_shapes_equal_rendering_on_every_template_shape_and_text(name: str, least: int, home: Path) -> None:
    learned = 0
    for path in sorted((home / "templates").glob("*/*.jinja")):
        finder = finder_of(path.read_text())
        for shape in SHAPES:
            for user, assistant in [
                *product(TEXTS[:7], TEXTS[:7]),
                *zip(TEXTS, reversed(TEXTS), strict=True),
                *zip(TEXTS, TEXTS, strict=True),
            ]:
                said = {"system": "Be brief.", "user": user, "assistant": assistant}
                row = Conversation(
                    [{"role": role, "content": said[role]} for role in shape], [None] * len(shape)
                )
                assert outcome(finder, row, slow=False) == outcome(finder, row, slow=True), (
                    path.name,
                    shape,
                    user,
                    assistant,
                )
        learned += any(shape is not None for shape in finder.shapes._shapes.values())
    assert learned >= least


PART_BY_PART = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "@{% endfor %}{% endif %}</s>{% endfor %}"
)
ODD = [  # pictures before all text, a text twice and numbered pictures, a question about the text of a part
    PART_BY_PART.replace("@", body)
    for body in (
        "{% if p.type == 'image' %}<image>{% endif %}{% endfor %}{% for p in m.content %}{{ p.text }}",
        "{{ p.text }}{{ p.text | trim }}{{ loop.index if p.type == 'image' }}",
        "{{ '<image>' if p.type == 'image' else p.text if 'a' in p.text else p.text | upper }}",
    )
]


def laid_out(parts: str, texts: list[str]) -> list[dict[str, str]]:
    """Return parts: `i` is a picture, `t` the next of the texts."""
    coming = iter(texts)
    return [{"type": "image"} if kind == "i" else {"type": "text", "text": next(coming)} for kind in parts]


def test_shapes_of_parts_equal_rendering_whatever_stands_between_pictures() -> None:
    """Templates of vision-language models, and others, which refuse parts or write them as they are."""
    cases = [
        ("it", "?"),
        ("i", ""),
        ("titti", "And?"),
        ("iti", "\n"),
        ("t", " "),
        ("ii", "<image>"),
        ("tit", "<|im_end|>"),
    ]
    for number, text in enumerate([*TEMPLATES.values(), *ODD]):
        finder = finder_of(text)
        for (first, more), said in product(cases, [*TEXTS[:9], *TEXTS[11:13], "\n\u2028"]):
            asked = laid_out(first, [said, more, f"{said}{more}", said])
            rows = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": laid_out("t", ["Red"])},
            ]
            for messages in (rows, [rows[0], {"role": "assistant", "content": said}, *rows]):
                row = Conversation(messages, [None] * len(messages))
                found = [outcome(finder, row, slow=slow) for slow in (False, True)]
                assert found[0] == found[1], (number, first, said, more)
        assert number >= len(TEMPLATES) or any(
            key[2] for key, shape in finder.shapes._shapes.items() if shape
        ), number
    assert (
        plain_contents(Conversation([{"role": "user", "content": [{"type": "image", "image": "a"}]}], [None]))
        is None
    )
    assert plain_contents(Conversation([{"role": "user", "content": ["a"]}], [None])) is None


@pytest.mark.parametrize(
    "body",
    [
        "{{ c | length }}", "{{ c[0] }}", "{{ c[:3] }}", "{{ c | upper }}", "{{ c | tojson }}", "{{ c.split() | first }}",
        "{% for letter in c %}{{ letter }}{% endfor %}", "{{ (c ~ 'x') | length }}", "{{ c | replace('e', 'E') }}{{ c }}",
        "{% if c > 'm' %}{{ c }}{% endif %}", "{{ 'yes' if c | lower == 'text' else c }}", "{{ '%s' % c }}",
        "{{ c | trim('T') }}",
        "{{ ('a' + c) | trim }}", "{{ {c: 1}[c] }}{{ c }}", "{{ c.title() }}", "{{ c | urlencode }}", "{{ c | reverse }}",
        "{% set d %}{{ c }}!{% endset %}{{ d | length }}",
        "{% macro f(x) %}{{ x }}.{% endmacro %}{{ f(c) | length }}{{ c }}",
        "{{ c.encode() }}", "{{ c | e }}", "{{ c.format(1) }}", "{{ c | int }}", "{{ c.isdigit() }}{{ c }}", "{{ c * 2 }}",
        "{{ c is sequence }}{{ c }}", "{{ c | pprint }}", "{{ [c, c] | join('-') | length }}", "{{ 'x-'.join([c]) | upper }}",
        "{{ {'a': [c]} | tojson }}", "{{ c | safe }}", "{{ c | float }}", "{{ 'a%sb' | format(c) | length }}",
        "{{ c | wordcount }}", "{{ 'axb'.replace('x', c) | length }}", "{{ c | escape | length }}",
        "{{ c in ['Text 0.', '12'] }}",
        "{{ c | string | length }}",
    ],
)  # fmt: skip
def test_a_template_that_looks_into_texts_gets_no_shape_or_a_true_one(body: str) -> None:
    text = f"{{% for m in messages %}}{{% set c = m['content'] %}}<|{{{{ m['role'] }}}}|>{body}{{{{ c }}}}</s>{{% endfor %}}"
    finder = finder_of(text)
    for content in ("Text 0.", "eee", "m", "TtT", " x ", "12", "{}", "ab" * 9, 'a < b & "c"', "a\nb", "é"):
        row = Conversation(
            [{"role": "user", "content": content}, {"role": "assistant", "content": content}], [None, None]
        )
        assert outcome(finder, row, slow=False) == outcome(finder, row, slow=True)


def test_rows_that_need_care_are_rendered() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}", SPECIAL
    )
    finder = SpanFinder(template, ["</s>"], ["</s>", "<|user|>"])
    shape = finder.shapes.shape_of(("user", "assistant"))
    assert shape is not None
    assert finder.shapes.accepts(shape, ["a", "b < c"])
    assert not any(
        finder.shapes.accepts(shape, ["a", text])
        for text in (" ", " b", "b\n", "x</s>", "<|user|>", "\U0010a000")
    )
    unanswered = Conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], [None, None]
    )
    cached = finder.shapes.render(unanswered)
    assert cached is not None
    assert cached[0] is finder.shapes.shape_of(("user", "assistant"), (1,)) is not shape
    assert outcome(finder, unanswered, slow=False) == outcome(finder, unanswered, slow=True)
    assert plain_contents(Conversation([{"role": "user", "content": "a", "name": "n"}], [None])) is None
