"""What the audit advises for turns without an end, or with one that stops nothing, gives the right set when it is followed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.show.audit import audit
from sftdata.show.findings import Finding
from sftdata.vocabulary import read_vocabulary
from tests.shown_sets import TOKENIZER

pytestmark = pytest.mark.slow

# As GLM-4: no message has an end of its own; inference waits for the next header.
NEXT_HEADER = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name + (c.function.arguments | tojson) }}</call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{# <|user|> <|assistant|> <|tool|> #}"""
# Calls end in another token than answers.
TWO_ENDS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}<|tc|>{{ c.function.name + (c.function.arguments | tojson) }}<|/tc|>{% endfor %}
{{- '<|calls|>' if m.tool_calls else '<|im_end|>' }}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ASK, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "It rains."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}
CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4 mm"}
SPOKEN_CALL = 'look{"city": "Oslo"}'


def prepared(
    folder: Path, template: str, chats: list[list[dict[str, Any]]], tokenizer: Path = TOKENIZER, **more: Any
) -> Path:
    folder.mkdir()
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "own.jinja").write_text(template)
    settings = {
        "packing": "none",
        "max_length": 256,
        "workers": 1,
        "chat_template": str(folder / "own.jinja"),
    } | more
    sftdata.prepare(folder / "chats.jsonl", tokenizer=str(tokenizer), output=folder / "set", **settings)
    return folder / "set"


def trained(folder: Path) -> list[list[str]]:
    """Return the trained stretches of each row."""
    vocabulary = read_vocabulary(folder / "tokenizer")
    found = []
    for row in sftdata.open(folder):
        stretches: list[list[int]] = []
        for place, label in enumerate(row.labels.tolist()):
            if label != -100:
                if row.labels[place - 1] == -100:
                    stretches.append([])
                stretches[-1].append(label)
        found.append([vocabulary.text_of(stretch) for stretch in stretches])
    return found


def finding(folder: Path, code: str) -> Finding:
    return next(found for found in audit(folder) if found.code == code)


def test_last_turns_without_an_end_are_closed_with_what_inference_waits_for(tmp_path: Path) -> None:
    chats = [[ASK, ANSWER], [ASK, ANSWER, ASK, ANSWER], [ASK, CALLING], [ASK, CALLING, RESULT, ANSWER]]
    advice = finding(prepared(tmp_path / "before", NEXT_HEADER, chats), "no-trained-end")
    assert advice.count == 4
    assert advice.fix == "--eos-token '<|user|>'"
    after = prepared(tmp_path / "after", NEXT_HEADER, chats, eos_token=shlex.split(advice.fix)[1])
    call = f"<call>{SPOKEN_CALL}</call><|tool|>"
    assert trained(after) == [
        ["It rains.<|user|>"],
        ["It rains.<|user|>"] * 2,
        [call],
        [call, "It rains.<|user|>"],
    ]
    assert "no-trained-end" not in {found.code for found in audit(after)}


def test_an_end_of_calls_that_stops_nothing_is_listed_beside_the_end_of_answers(tmp_path: Path) -> None:
    chats = [[ASK, CALLING, RESULT, ANSWER], [ASK, ANSWER]]
    before = prepared(tmp_path / "before", TWO_ENDS, chats)
    spans = [[f"<|tc|>{SPOKEN_CALL}<|/tc|><|calls|>", "It rains.<|im_end|>"], ["It rains.<|im_end|>"]]
    assert trained(before) == spans
    advice = finding(before, "turn-end-not-a-stop")
    assert (advice.count, advice.examples) == (1, ("chats.jsonl:1",))
    assert advice.fix.startswith("list <|calls|> in eos_token_id of the tokenizer's generation_config.json")
    own = tmp_path / "tokenizer"
    shutil.copytree(before / "tokenizer", own)  # the token has its id there
    number = next(index for index, text in read_vocabulary(own).added.items() if text == "<|calls|>")
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, number]}))
    after = prepared(tmp_path / "after", TWO_ENDS, chats, own)
    assert trained(after) == spans
    assert "turn-end-not-a-stop" not in {found.code for found in audit(after)}


def test_the_end_of_calls_is_not_advised_where_answers_have_none(tmp_path: Path) -> None:
    """As in GLM-4, whose last answer would be closed with it: `--eos-token` names what ends answers, and that alone."""
    chats = [[ASK, CALLING, RESULT, ANSWER]]
    before = prepared(tmp_path / "before", NEXT_HEADER, chats)
    assert finding(before, "no-trained-end").fix == "--eos-token '<|user|>'"
    assert finding(before, "turn-end-not-a-stop").fix.startswith("list <|tool|> in eos_token_id")


BARS = """{% for m in messages %}[|{{ m.role }}|]{{ m.content }}[|end|]\n{% endfor %}
{%- if add_generation_prompt %}[|assistant|]{% endif %}"""


def test_an_end_in_brackets_that_the_tokenizer_lacks_is_added_and_trained_as_one_id(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "bars", BARS, [[ASK, ANSWER, ASK, ANSWER]])
    assert trained(folder) == [["It rains.[|end|]"] * 2]
    added = {text: index for index, text in read_vocabulary(folder / "tokenizer").added.items()}
    (row,) = sftdata.open(folder)
    assert row.labels.tolist().count(added["[|end|]"]) == 2
    assert finding(folder, "turn-end-not-a-stop").fix == "--eos-token '[|end|]'"
    after = prepared(tmp_path / "after", BARS, [[ASK, ANSWER, ASK, ANSWER]], eos_token="[|end|]")
    assert trained(after) == trained(folder)
    assert "turn-end-not-a-stop" not in {found.code for found in audit(after)}
