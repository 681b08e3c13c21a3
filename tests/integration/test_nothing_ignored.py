"""Every setting on every kind of input: it changes the set, or is refused by name. None is taken and then ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sftdata.choosing import CHOOSING
from sftdata.config import OF_PICTURES, PrepareConfig, make_config
from sftdata.errors import UsageError
from sftdata.limit import take_pieces
from sftdata.pack import gather, plan_packs
from sftdata.pipeline import load_stages, prepare_chunk
from sftdata.plan import make_plan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "examples/tokenizer")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ('!' if shout else '') + '\\n' + (message.content or '')"
    " + '<|im_end|>' + ('\\n' if message.role != 'user' else strftime_now('%Y') + '\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + ('!' if shout else '') + '\\n' }}{% endif %}"
)
PAD = 0  # of this tokenizer
LONG = " and so on" * 99


def chat(*texts: str, **keys: Any) -> list[dict[str, Any]]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text} | keys
        for number, text in enumerate(texts)
    ]


# Each kind of input, with something in it for every setting that can act on such rows.
KINDS: dict[str, list[dict[str, Any]]] = {
    "conversations": [
        {"messages": chat("Hi ### A: <|im_end|>", "Hello.", "Go on", f"### A: So{LONG}"), "more": "x"},
        {"messages": chat("Q ### A:", "A")},
        {"messages": chat("R ### A:", "B")},
    ],
    "prompts as messages": [
        {
            "prompt": chat("Hi ### A: <|im_end|>", "Hello.", "Go on"),
            "completion": chat("", f"### A: So{LONG}")[1:],
            "more": "x",
        },
        {"prompt": chat("Q ### A:"), "completion": chat("", "A")[1:]},
        {"prompt": chat("R ### A:"), "completion": chat("", "B")[1:]},
    ],
    "completions": [
        {"prompt": "Hi<|im_end|> wor", "completion": f"ld ### A: So{LONG}", "more": "x"},
        {"prompt": "Q", "completion": " ### A: B"},
        {"prompt": "R", "completion": " ### A: C"},
    ],
    "instructions": [
        {"instruction": "Hi ### A: <|im_end|>", "output": f"Hello.{LONG}", "more": "x"},
        {"instruction": "Q ### A:", "output": "B"},
        {"instruction": "R ### A:", "output": "C"},
    ],
    "text": [
        {"text": f"<|im_end|> ### A: wor{LONG}", "more": "x"},
        {"text": "Q ### A: B"},
        {"text": "R ### A: C"},
    ],
    "ids": [
        {"input_ids": [5, 6, 7] * 99, "labels": [-100, 6, 7] * 99, "more": "x"},
        {"input_ids": [5, 6, PAD, 7], "labels": [-100, 6, PAD, 7]},
        {"input_ids": [5, 6, 8], "labels": [-100, 6, 8]},
    ],
}
CHATS, TALK = (
    {"conversations", "prompts as messages", "instructions"},
    {"conversations", "prompts as messages"},
)
TEXTS = {*CHATS, "completions", "text"}
# setting -> values to try, and the kinds of input on which it acts; on all others it is refused by its name.
ACTS: dict[str, list[tuple[Any, set[str]]]] = {
    "format": [("messages", set()), ("text", set()), ("tokens", set())],
    "map": [({"system": "more"}, {*CHATS, "completions"})],
    "map_role": [({"user": "tool"}, TALK)],
    "formatter": [("tests.integration.test_nothing_ignored:as_text", {*KINDS})],
    "kind": [
        ("conversation", {"completions"}),
        ("completion", {"instructions"}),
        ("text", {"completions", "instructions"}),
    ],
    "prompt_template": [("prompt.txt", set())],
    "chat_template": [("chatml", {*KINDS})],  # it is stored with the tokenizer of the set
    "template_kwargs": [({"shout": True}, CHATS), ({"shuot": True}, set())],
    "date": [("2031-01-01", CHATS)],
    "train_on": [
        ("assistant", TALK),
        ("last-assistant", {"conversations"}),
        ("completion", set()),
        ("all", {*CHATS, "completions"}),
    ],
    "response_template": [("### A:", TEXTS), ((6,), {*KINDS})],
    "instruction_template": [("Hi", set())],
    "mask_mode": [("trl-0.7.10", set())],
    "loss_weights": [(True, CHATS)],
    "boundary": [("merge", {"completions"})],
    "eos_token": [("<|endoftext|>", TEXTS)],
    "trust_control_tokens": [(True, CHATS)],
    "max_length": [(40, {*KINDS})],
    "overlong": [(value, {*KINDS}) for value in ("truncate-left", "drop", "split")],
    "packing": [(value, {*KINDS}) for value in ("wrapped", "none")],
    "revision": [("v2", set())],
}
# What they do is what their name says, and it is said aloud where it is not what the defaults do anyway.
AS_BY_DEFAULT = {
    ("kind", "conversation"): {"instructions"},
    ("kind", "completion"): {"completions"},
    ("format", "messages"): {"conversations"},
    ("format", "text"): {"text"},
    ("format", "tokens"): {"ids"},
    ("train_on", "assistant"): {"conversations", "instructions"},
    ("train_on", "completion"): {"completions", "prompts as messages"},
    ("train_on", "last-assistant"): {"instructions", "prompts as messages"},
    ("train_on", "all"): {"text"},
    ("boundary", "merge"): TEXTS,  # where no token straddles an edge
}
# These name inputs and outputs, or say how the work is done.
APART = {"inputs", "registry", "tokenizer", "output", "split", "subset", "max_line_bytes", "max_rejects", "slice_bytes",
         "workers", "engine", "overwrite"}  # fmt: skip
# These act on what the rows became, or stand for the others: tests/integration/test_prepare_chosen.py, test_like.py.
APART |= {*CHOOSING, "like"}
APART |= {
    *OF_PICTURES
}  # refused on all of these kinds, and tried on rows with pictures: tests/integration/test_pictures.py


def as_text(row: dict[str, Any]) -> str:
    return " ".join(row)


def test_every_setting_is_tried() -> None:
    assert {*ACTS, *APART} == set(PrepareConfig.model_fields)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    Path("prompt.txt").write_text("Q: {instruction}\nA: ", encoding="utf-8")
    for kind, rows in KINDS.items():
        Path(f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def made(source: str, **settings: Any) -> tuple[Any, ...]:
    """Return all that a set of this input would hold: its rows, its tokenizer, its template."""
    settings = {
        "chat_template": "chat.jinja",
        "max_length": 200,
        "tokenizer": TOKENIZER,
        "output": "out",
    } | settings
    plan = make_plan(make_config(inputs=f"{source}.jsonl", **settings))
    stages, config = load_stages(plan.job), plan.job.config
    found: list[Any] = [
        plan.job.tokenizer.sha256,
        plan.job.tokenizer.eos_id,
        plan.job.tokenizer.chat_template,
    ]
    for planned in plan.sources:
        for piece in planned.chunks:
            done = prepare_chunk(stages, piece)
            found.append([reject.code for reject in done.tally.rejects])
            length, weighted = plan.job.max_length, config.loss_weights
            kept = done.pieces.kept()
            tokens, ids = take_pieces(done.documents, kept), done.example_ids[kept.example]
            packs = plan_packs(tokens.lengths, length, config.packing)
            rows = gather(tokens, ids, packs, plan.job.row_length, PAD, weighted=weighted)
            columns = (rows.input_ids, rows.labels, rows.seq_lengths, rows.row_offsets, rows.loss_weights)
            found += [None if column is None else column.tolist() for column in columns]
    return tuple(found)


TRIED = [(name, value, acts) for name, values in ACTS.items() for value, acts in values]


@pytest.mark.parametrize(
    ("name", "value", "acts"), TRIED, ids=[f"{name}={value}" for name, value, _ in TRIED]
)
def test_a_setting_acts_or_is_refused(name: str, value: Any, acts: set[str], place: Path) -> None:
    word = name.replace("_", "[-_]") if name != "format" else "columns"
    for kind in KINDS:
        said, with_it = attempt(kind, {name: value})
        if said:
            assert kind not in acts, (kind, said)
            assert re.search(rf"{word}.* Fix: ", said), (kind, said)
            assert "=VALUE" not in said, "what was given is shown, not how it is given"
        elif kind not in AS_BY_DEFAULT.get((name, str(value)), set()):
            assert kind in acts, f"{name} is taken on {kind}"
            assert with_it != made(kind), f"{name} changes nothing on {kind}"


def attempt(kind: str, settings: dict[str, Any]) -> tuple[str, Any]:
    """Return the refusal, or what is made."""
    try:
        return "", made(kind, **settings)
    except UsageError as error:
        return str(error), None


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt template": ("instructions", {"prompt_template": "prompt.txt", "kind": "completion"}),
    "the masks of an old collator": ("ids", {"response_template": (6,), "mask_mode": "trl-0.7.10"}),
    "an instruction template": ("text", {"response_template": "### A:", "instruction_template": "wor"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_needs_another_setting_acts_with_it(pair: str, place: Path) -> None:
    kind, settings = PAIRS[pair]
    last = list(settings)[0 if pair.startswith("a prompt") else -1]
    assert made(kind, **settings) != made(
        kind, **{name: value for name, value in settings.items() if name != last}
    )


AGAINST: dict[str, dict[str, Any]] = {
    "train_on": {"train_on": "all", "response_template": "### A:"},
    "format": {"format": "text", "formatter": "a:b"},
    "map": {"map": {"text": "x"}, "formatter": "a:b"},
    "overlong": {"overlong": "drop", "packing": "wrapped"},
    "loss_weights": {"loss_weights": True, "train_on": "all"},
    "max_length": {"max_length": 2**31 - 1},
}


@pytest.mark.parametrize("name", AGAINST)
def test_settings_that_leave_each_other_nothing_to_do_are_refused(name: str, place: Path) -> None:
    with pytest.raises(UsageError, match=f"^{name}"):
        make_plan(make_config(inputs="text.jsonl", tokenizer=TOKENIZER, output="out", **AGAINST[name]))


def test_one_source_on_which_a_setting_acts_is_enough(place: Path) -> None:
    settings = {"tokenizer": TOKENIZER, "output": "out", "trust_control_tokens": True}
    assert make_plan(make_config(inputs=["text.jsonl", "conversations.jsonl"], **settings))
    with pytest.raises(
        UsageError, match=r"text\.jsonl holds running text \(text\); ids\.jsonl holds ids \(tokens\)"
    ):
        make_plan(make_config(inputs=["text.jsonl", "ids.jsonl"], **settings))


def test_a_text_marker_is_refused_beside_any_ids(place: Path) -> None:
    config = make_config(
        inputs=["text.jsonl", "ids.jsonl"], tokenizer=TOKENIZER, output="out", response_template="### A:"
    )
    with pytest.raises(UsageError, match=r'response_template="### A:" is text, and ids\.jsonl holds ids'):
        make_plan(config)


def test_a_role_that_no_message_has_is_refused_with_those_that_there_are(place: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"no message has the role 'usr'; there are assistant, user\..* did you mean 'user'\?",
    ):
        made("conversations", map_role={"usr": "tool"})


def test_a_role_that_the_sample_lacks_is_said_where_there_is_more(place: Path) -> None:
    row = json.dumps(KINDS["conversations"][0]) + "\n"
    Path("many.jsonl").write_text(row * 20_000, encoding="utf-8")
    settings = {"tokenizer": TOKENIZER, "output": "out", "map_role": {"bot": "assistant"}}
    notes = make_plan(make_config(inputs="many.jsonl", **settings)).notes
    assert "--map-role bot=assistant: no sampled message has the role 'bot'." in notes


# ------------------------------------------------------------------------------------------------- hints


def notes_on(rows: list[dict[str, Any]], **settings: Any) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "\n".join(
        make_plan(make_config(inputs="rows.jsonl", tokenizer=TOKENIZER, output="out", **settings)).notes
    )


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("### Human:", "### Assistant:"), ("### Instruction:", "### Response:"), ("### Frage:", "### Antwort:"),
        ("\nUser:", "\nAssistant:"), ("<|im_start|>user\n", "<|im_start|>assistant\n"), ("[INST]", "[/INST]"),
    ],
)  # fmt: skip
def test_turns_in_running_text_are_hinted_at_with_flags_that_train_the_answers(
    asked: str, answered: str, place: Path
) -> None:
    rows = [
        {"text": f"{asked} What is {n}?\n{answered} It is {n}.\n{asked} And?\n{answered} Done."}
        for n in range(6)
    ]
    said = notes_on(rows)
    flags = re.search(r"--response-template (.+) --instruction-template (.+)$", said, re.MULTILINE)
    assert flags, said
    unquoted = [eval(text.removeprefix("$")) for text in flags.groups()]
    assert unquoted == [answered, asked]
    settings = {"response_template": answered, "instruction_template": asked}
    assert "--response-template" not in notes_on(rows, **settings)
    assert "--response-template" not in notes_on(rows, train_on="all")
    plan = make_plan(
        make_config(inputs="rows.jsonl", tokenizer=TOKENIZER, output="out", packing="none", **settings)
    )
    done = prepare_chunk(load_stages(plan.job), plan.sources[0].chunks[0])
    assert not done.tally.rejects


def test_text_without_turns_is_hinted_at_in_no_way(place: Path) -> None:
    assert "--response-template" not in notes_on(
        [{"text": f"# Title {n}\nA text: of lines.\n"} for n in range(6)]
    )


def test_raw_prompts_are_said_to_be_raw_with_the_way_to_the_template(place: Path) -> None:
    rows = [{"prompt": "What is a seed?", "response": "A young plant."}] * 3
    assert "--kind conversation renders them" in notes_on(rows)
    for kind in ("conversation", "completion"):
        assert "--kind" not in notes_on(rows, kind=kind)
    rendered = [
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "response": "Hello."}
    ] * 3
    assert "--kind" not in notes_on(rendered)
    assert "--kind" not in notes_on([{"prompt": "### Human: Hi\n### Assistant:", "response": "Hello."}] * 3)
