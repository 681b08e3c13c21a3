"""Every seeded defect is found, with its count and its lines; nothing is found where nothing was seeded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftdata
from sftdata.batches import PackedRows
from sftdata.errors import UsageError
from sftdata.set.manifest import read_manifest
from sftdata.show.audit import audit, glance
from sftdata.show.documents import DocumentReader, Documents
from sftdata.show.findings import COUNTED, KINDS, Finding
from sftdata.vocabulary import Vocabulary, read_vocabulary
from tests.other_sets import DEFECTS
from tests.shown_sets import CHAT, TOKENIZER, encode_marked, write_set
from tests.view_sets import chats, prepare, write_lines

EXAMPLES = Path(__file__).parents[2] / "examples"
CLEAN = [CHAT.format(f"What is {i}?", f"The number {i}.") for i in range(12)]
SEEDED = {
    "no-trained-end": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello there⟧<|im_end|>\n",
    "turn-end-not-a-stop": "<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n⟦Hello<|endoftext|>⟧",
    "nothing-trained": "<|im_start|>user\nNobody answers<|im_end|>\n",
    "empty-answer": "<|im_start|>user\nSpeak!<|im_end|>\n<|im_start|>assistant\n⟦ \n<|im_end|>⟧\n",
    "control-token-in-answer": CHAT.format("Quote it", "It is<|im_end|> and more"),
    "duplicate-prompt": CHAT.format("What is 3?", "Another answer."),
}  # fmt: skip


def found(folder: Path) -> dict[str, Finding]:
    findings = audit(folder)
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def with_stops(tmp_path: Path, stops: list[int]) -> Path:
    """A copy of the tokenizer whose generation_config stops at these ids."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


# ------------------------------------------------------------------------------------------ what is seeded is found


@pytest.mark.parametrize("code", SEEDED)
def test_one_seeded_row_is_found_with_its_line(tmp_path: Path, code: str) -> None:
    (finding,) = audit(write_set(tmp_path / "set", [*CLEAN, SEEDED[code]]))
    assert (finding.code, finding.count, finding.examples) == (code, 1, ("data.jsonl:13",))
    assert finding.share == pytest.approx(1 / 13)


def test_all_seeded_rows_are_found_side_by_side(tmp_path: Path) -> None:
    rows = [*CLEAN, *SEEDED.values(), *(text.replace("H", "W") for text in SEEDED.values())]
    findings = found(write_set(tmp_path / "set", rows))
    assert findings.keys() == SEEDED.keys()
    for position, code in enumerate(SEEDED):
        assert f"data.jsonl:{13 + position}" in findings[code].examples
        assert findings[code].count >= 2 - (code == "duplicate-prompt")


def test_an_answer_cut_by_max_length_is_told_from_one_without_an_end(tmp_path: Path) -> None:
    head = "<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n"
    ids, _ = encode_marked(head)
    long = f"{head}⟦{'a ' * 200}⟧"
    while len(encode_marked(long)[0]) > 96:
        long = long[:-2] + "⟧"
    assert len(encode_marked(long)[0]) == 96 > len(ids)
    findings = found(write_set(tmp_path / "set", [*CLEAN, long], cut=50))
    assert findings["answer-cut"].examples == ("data.jsonl:13",)
    assert findings.keys() == {"answer-cut"}
    assert "--max-length" in findings["answer-cut"].fix


def test_a_stop_token_that_begins_a_row_is_found(tmp_path: Path) -> None:
    rows = ["⟦a b c d<|im_end|>⟧", "⟦e f g h i j k<|im_end|>⟧"]
    first, second = (len(encode_marked(row)[0]) for row in rows)
    (finding,) = audit(write_set(tmp_path / "set", rows, max_length=first + second - 1, strategy="wrapped"))
    assert (finding.code, finding.examples) == ("answer-split", ("data.jsonl:2",))
    assert not audit(write_set(tmp_path / "fits", rows, max_length=first + second, strategy="wrapped"))


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_last_piece_that_is_but_a_stop_token_is_found_and_mended(tmp_path: Path, pieces: int) -> None:
    rows = [*chats(20, 5, 30)]
    long = {"messages": [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "fox " * 60}]}
    source = write_lines(tmp_path / "a.jsonl", [*rows, long])
    prepare(tmp_path / "whole", [source], max_length=4096)
    ids, labels = next(
        (document.input_ids, document.labels)
        for row in sftdata.open(tmp_path / "whole")
        for document in row.documents()
        if document.example_id == 21  # one line is blank
    )
    stop = int((labels >= 0).nonzero()[0][-1])
    assert labels[stop] == ids[stop]
    length = stop // pieces
    assert length * pieces == stop
    prepare(tmp_path / "set", [source], overlong="split", max_length=length)
    found = {finding.code: finding for finding in audit(tmp_path / "set")}
    assert found["answer-split"].examples == ("a.jsonl:22",)
    assert "no-trained-end" not in found
    assert found["answer-split"].fix == "--packing bfd with a --max-length that holds the example"
    prepare(tmp_path / "mended", [source], overlong="split", packing="bfd", max_length=len(ids))
    assert not {"answer-split", "no-trained-end"} & {finding.code for finding in audit(tmp_path / "mended")}


def test_the_fix_for_a_turn_end_that_is_no_stop_names_the_token(tmp_path: Path) -> None:
    finding = found(write_set(tmp_path / "set", [SEEDED["turn-end-not-a-stop"]]))["turn-end-not-a-stop"]
    assert finding.fix == "--eos-token '<|endoftext|>'"
    assert finding.message == "an answer ends in <|endoftext|>, and generation stops at <|im_end|>"


@pytest.mark.parametrize("place", ["last", "first"])
def test_where_other_answers_end_in_the_stop_token_the_fix_is_another_stop(
    tmp_path: Path, place: str
) -> None:
    """As with the end of a tool call beside that of answers: another EOS would take the stop from the others."""
    odd = SEEDED["turn-end-not-a-stop"]
    row = f"{CHAT.format('Hi', 'Hello')}{odd}" if place == "last" else f"{odd}\n{CHAT.format('Hi', 'Hello')}"
    finding = found(write_set(tmp_path / "set", [*CLEAN, row]))["turn-end-not-a-stop"]
    assert (finding.count, finding.examples) == (1, ("data.jsonl:13",))
    assert finding.fix.startswith(
        "list <|endoftext|> in eos_token_id of the tokenizer's generation_config.json"
    )
    assert not audit(write_set(tmp_path / "followed", [*CLEAN, row], tokenizer=with_stops(tmp_path, [0, 2])))


def test_every_turn_of_a_chat_is_looked_at(tmp_path: Path) -> None:
    row = f"{SEEDED['no-trained-end']}{CHAT.format('Hi', 'Hello')}"
    assert not audit(
        write_set(tmp_path / "markers", [*CLEAN, row])
    )  # where markers say what is trained, turns have no end
    counters = {"turns": 14, "turns_without_stop": 1}
    finding = found(write_set(tmp_path / "chat", [*CLEAN, row], counters=counters))["no-trained-end"]
    assert (finding.count, finding.examples) == (1, ("data.jsonl:13",))
    assert finding.fix == "--eos-token '<|im_end|>'"


def test_a_stop_token_inside_running_text_is_not_blamed_on_answers(tmp_path: Path) -> None:
    row = SEEDED["control-token-in-answer"]
    chat = found(write_set(tmp_path / "chat", [row], counters={"turns": 1}))["control-token-in-answer"]
    text = found(write_set(tmp_path / "text", [row]))["control-token-in-answer"]
    assert "came with the data" in chat.message
    assert "came with the data" not in text.message
    assert "as messages" in text.fix


def test_generation_config_stops_count_as_stops(tmp_path: Path) -> None:
    rows = [*CLEAN, SEEDED["turn-end-not-a-stop"]]
    assert not audit(write_set(tmp_path / "set", rows, tokenizer=with_stops(tmp_path, [0, 2])))


def test_a_newline_trained_after_the_stop_token_is_no_missing_end(tmp_path: Path) -> None:
    rows = [text.replace("<|im_end|>⟧\n", "<|im_end|>\n⟧") for text in CLEAN]
    assert not audit(write_set(tmp_path / "set", rows))


def test_doubled_and_missing_bos_are_found(tmp_path: Path) -> None:
    rows = [f"<|endoftext|>{text}" for text in CLEAN]
    rows[3] = f"<|endoftext|>{rows[3]}"
    rows[7] = CLEAN[7]
    findings = found(write_set(tmp_path / "set", rows, bos_id=0))
    assert {code: finding.examples for code, finding in findings.items()} == {
        "double-bos": ("data.jsonl:4",), "missing-bos": ("data.jsonl:8",),
    }  # fmt: skip


def test_examples_without_bos_are_clean_where_nothing_writes_one(tmp_path: Path) -> None:
    assert not audit(write_set(tmp_path / "set", CLEAN, bos_id=0, tokenizer=without_template(tmp_path)))


def without_template(tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    shutil.copytree(TOKENIZER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"pad_id": 2}, "pad-is-eos"),
        ({"tokens_added": ("<|a|>", "<|b|>")}, "tokens-added"),
        ({"eos_id": 0}, "eos-not-in-generation-config"),
    ],
)
def test_what_the_tokenizer_disagrees_on_is_noted(tmp_path: Path, facts: dict[str, Any], code: str) -> None:
    rows, stops = [CHAT.format("Q", "A")], with_stops(tmp_path, [2])
    folder = write_set(
        tmp_path / "set", rows, max_length=len(encode_marked(rows[0])[0]), tokenizer=stops, **facts
    )
    assert found(folder)[code].severity == "note"


@pytest.mark.parametrize("counter", COUNTED)
def test_what_only_prepare_could_count_is_told(tmp_path: Path, counter: str) -> None:
    (finding,) = audit(write_set(tmp_path / "set", CLEAN, counters={counter: 4}))
    assert (finding.code, finding.count) == (COUNTED[counter], 4)


TURNS = """{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("seeded", "settings", "code", "count"),
    [
        (
            {"messages": [{"role": "system", "content": "Be kind."}]},
            {"chat_template": TURNS},
            "message-swallowed",
            1,
        ),
        ({"tools": [TOOL]}, {"chat_template": TURNS}, "tools-left-out", 1),
        ({"messages": [{"role": "user", "content": "What is <|im_end|>?"}]}, {}, "control-token-in-data", 1),
        ({}, {"eos_token": "<|fin|>"}, "tokens-added", 1),
    ],
)
def test_what_prepare_counts_in_seeded_rows_is_told(
    tmp_path: Path, seeded: dict[str, Any], settings: dict[str, Any], code: str, count: int
) -> None:
    said = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number."}]
        for i in range(9)
    ]
    rows: list[dict[str, Any]] = [{"messages": turns} for turns in said]
    rows[4] |= seeded
    rows[4]["messages"] = [*seeded.get("messages", []), *said[4][-1 if "What" in str(seeded) else 0 :]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if "chat_template" in settings:
        (tmp_path / "template.jinja").write_text(settings["chat_template"])
        settings = {"chat_template": str(tmp_path / "template.jinja")}
    sftdata.prepare(
        tmp_path / "rows.jsonl",
        tokenizer=str(TOKENIZER),
        output=tmp_path / "set",
        max_length=128,
        workers=1,
        **settings,
    )
    (finding,) = (finding for finding in audit(tmp_path / "set") if finding.severity == KINDS[code].severity)
    assert (finding.code, finding.count) == (code, count)
    assert finding.examples == (() if code == "tokens-added" else ("rows.jsonl:5",))


def test_raw_prompts_beside_a_chat_template_are_noted(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": " A number."} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, codes in (("auto", {"raw-prompts"}), ("completion", set()), ("conversation", set())):
        sftdata.prepare(
            tmp_path / "rows.jsonl", tokenizer=str(TOKENIZER), output=tmp_path / kind, workers=1, kind=kind
        )
        assert {finding.code for finding in audit(tmp_path / kind)} & {"raw-prompts"} == codes


def test_training_on_everything_has_control_tokens_by_intent(tmp_path: Path) -> None:
    rows = [f"⟦<|im_start|>user\nHi {i}<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>⟧" for i in range(5)]
    meant = write_set(tmp_path / "meant", rows, settings={"train_on": "all"}, counters={"turns": 5})
    assert "control-token-in-answer" not in found(meant)
    assert found(write_set(tmp_path / "raw", rows))["control-token-in-answer"].count == 5


# ------------------------------------------------------------------------------------------------- and nothing else


def test_a_clean_set_has_no_findings(tmp_path: Path) -> None:
    assert not audit(write_set(tmp_path / "set", CLEAN))


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_the_example_corpus_is_clean_however_it_is_packed(tmp_path: Path, packing: str) -> None:
    inputs = [
        EXAMPLES / name
        for name in ("conversations.jsonl", "instructions.json", "completions.jsonl", "text.txt")
    ]
    sftdata.prepare(
        inputs, tokenizer=str(TOKENIZER), output=tmp_path / "set", max_length=256, packing=packing, workers=1
    )
    assert [finding.code for finding in audit(tmp_path / "set")] == [
        "raw-prompts"
    ]  # completions.jsonl, which is meant so


def test_a_glance_at_all_shards_finds_what_the_audit_finds(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [*CLEAN, *SEEDED.values()])
    seen = glance(folder, read_manifest(folder))
    assert (seen.findings, seen.looked) == (audit(folder), seen.documents)


def test_a_glance_looks_at_whole_shards_and_says_how_much_it_saw(tmp_path: Path) -> None:
    rows = [
        json.dumps({"prompt": f"Question {i}?", "completion": "" if i % 2 else "Yes."}) for i in range(400)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    made = sftdata.prepare(
        tmp_path / "rows.jsonl",
        tokenizer=str(TOKENIZER),
        output=tmp_path / "set",
        max_length=64,
        slice_bytes=4096,
        workers=1,
    )
    assert len(made.shards) > 2
    seen = glance(tmp_path / "set", made, tokens=made.ledger.tokens // 3)
    assert 0 < seen.looked < seen.documents == 400
    (empty,) = (finding for finding in seen.findings if finding.code == "empty-answer")
    assert empty.share == pytest.approx(empty.count / seen.looked)
    assert empty.count == pytest.approx(seen.looked / 2, abs=4)


def test_the_same_set_gives_the_same_findings(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [*CLEAN, *SEEDED.values()])
    assert audit(folder) == audit(folder)


def test_defects_come_before_notes(tmp_path: Path) -> None:
    severities = [
        finding.severity for finding in audit(write_set(tmp_path / "set", [*CLEAN, *SEEDED.values()]))
    ]
    assert severities == sorted(severities)
    assert set(severities) == {"defect", "note"}


def test_prompts_that_the_evaluation_set_has_too_are_found(tmp_path: Path) -> None:
    train = write_set(tmp_path / "train", CLEAN)
    leaking = write_set(
        tmp_path / "eval",
        [CHAT.format("What is 5?", "Unlike."), CHAT.format("What is 99?", "New.")],
        max_length=80,
    )
    (finding,) = audit(train, leaking)
    assert (finding.code, finding.examples) == ("prompt-in-other-set", ("data.jsonl:6",))
    assert not audit(train, write_set(tmp_path / "apart", [CHAT.format("What is 99?", "New.")]))


def test_sets_of_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    train = write_set(tmp_path / "train", CLEAN)
    with pytest.raises(UsageError, match="made with another tokenizer"):
        audit(train, write_set(tmp_path / "eval", CLEAN, sha256="b" * 64))


def test_every_kind_of_finding_can_be_found_by_these_tests() -> None:
    elsewhere = {
        "answer-cut",
        "raw-prompts",
        "answer-split",
        "prompt-in-other-set",
        "double-bos",
        "missing-bos",
        "pad-is-eos",
        "tokens-added",
        "eos-not-in-generation-config",
        *{code for _, code in DEFECTS.values() if code in KINDS},
        "everything-trained",
    }
    assert SEEDED.keys() | elsewhere | set(COUNTED.values()) == KINDS.keys()


# --------------------------------------------------------------------------------- columns against a slow oracle


def slow_document(ids: list[int], labels: list[int], vocabulary: Vocabulary, bos: int) -> dict[str, Any]:
    """Judge one document token by token."""
    runs: list[list[int]] = []
    for position, label in enumerate(labels):
        if label != -100 and (position == 0 or labels[position - 1] == -100):
            runs.append([])
        if label != -100:
            runs[-1].append(position)

    def core(run: list[int]) -> list[int]:
        while run and not vocabulary.text_of([ids[run[-1]]]).strip():
            run = run[:-1]
        return run

    last = [ids[core(run)[-1]] if core(run) else -1 for run in runs]
    enders = {
        token
        for token in vocabulary.added
        if token not in vocabulary.stop_ids and vocabulary.added[token].strip()
    }
    ended = [bool(core(run)) and ids[core(run)[-1]] in vocabulary.stop_ids for run in runs]
    ends = bool(runs) and ended[-1]
    controls = [
        sum(ids[position] in vocabulary.stop_ids or ids[position] == bos for position in run if position)
        - is_ended
        > 0
        for run, is_ended in zip(runs, ended, strict=True)
    ]
    return {
        "trained": sum(map(len, runs)),
        "ends": ends,
        "cut": labels[-1] != -100 and not ends,
        "empty": any(
            all(
                ids[position] in vocabulary.stop_ids or not vocabulary.text_of([ids[position]]).strip()
                for position in run
            )
            for run in runs
        ),
        "control": any(controls),
        "wrong_end": max((token for token in last if token in enders), default=-1),
        "unended": any(token not in vocabulary.stop_ids and token not in enders for token in last),
        "prompt_length": runs[0][0] if runs else len(ids),
    }


VOCABULARY = read_vocabulary(TOKENIZER)
SPACE = encode_marked(" ")[0][0]
NEWLINE = encode_marked("\n")[0][0]
DOCUMENT = st.lists(
    st.tuples(st.sampled_from([0, 2, SPACE, NEWLINE, 50, 60, 70]), st.booleans()), min_size=1, max_size=9
)


@given(st.lists(st.tuples(DOCUMENT, st.integers(0, 3)), min_size=1, max_size=5))
def test_columns_say_what_a_walk_over_the_tokens_says(rows: list[tuple[list[tuple[int, bool]], int]]) -> None:
    segments: list[tuple[list[int], list[int], int]] = []
    bounds = [0]
    for number, (document, padding) in enumerate(rows):
        ids = [token for token, _ in document]
        # As in a packed set, the first token of a document has no label.
        labels = [token if trained and place else -100 for place, (token, trained) in enumerate(document)]
        segments += [(ids, labels, number)] + ([([0] * padding, [-100] * padding, -1)] if padding else [])
        bounds.append(len(segments))
    tokens = np.array([token for ids, _, _ in segments for token in ids], np.int32)
    packed = PackedRows(
        tokens,
        np.array([label for _, labels, _ in segments for label in labels], np.int32),
        np.array([0, len(tokens)]),
        np.array([len(ids) for ids, _, _ in segments], np.int32),
        np.array([number for _, _, number in segments]),
        np.array([0, len(segments)]),
    )
    found = DocumentReader(VOCABULARY, 0).read(packed)
    real = [(ids, labels) for ids, labels, number in segments if number >= 0]
    for index, (ids, labels) in enumerate(real):
        for name, value in slow_document(ids, labels, VOCABULARY, 0).items():
            assert getattr(found, name)[index] == value, name
    prompts = [tuple(ids[: found.prompt_length[index]]) for index, (ids, _) in enumerate(real)]
    for index, prompt in enumerate(prompts):
        for other in range(index):
            assert (found.prompt[index] == found.prompt[other]) == (prompt == prompts[other])


def test_stretches_of_one_example_are_judged_together() -> None:
    ids = np.array([50, 60, 70, 50, 60, 2], np.int32)
    labels = np.array([-100, 60, 70, -100, 60, 2], np.int32)
    packed = PackedRows(
        ids, labels, np.array([0, 6]), np.array([3, 3], np.int32), np.array([9, 9]), np.array([0, 2])
    )
    merged, stretches = Documents.join([DocumentReader(VOCABULARY, None).read(packed)]).by_example()
    assert (len(merged), stretches.tolist(), merged.ends.tolist(), merged.trained.tolist()) == (
        1,
        [2],
        [True],
        [4],
    )
