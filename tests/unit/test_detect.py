"""The right format of every real file, whatever the hash seed and the order of rows; what cannot be told is refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftdata.errors import UsageError
from sftdata.formats.detect import Detection, detect
from sftdata.formats.fields import FormatOptions
from sftdata.formats.table import FORMATS
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams
from tests.one_stage import convert_rows

# Written by hand from what the files hold: container; format and columns in their canonical order, or words of the refusal.
ALPACA = "alpaca: instruction, output, input"
EXPECTED = {
    "dirty/axolotl_conversation_missingturns.json": ("json", "sharegpt: conversations"),
    "dirty/belle_1k_jsonl_named.json": ("jsonl", ALPACA),
    "dirty/gorilla_huggingface_api_nulls_mixed.jsonl": (
        "jsonl",
        "fits: 936 of 936 sampled rows have the columns api_",
    ),
    "dirty/huatuo_8658_jsonl_named.json": ("jsonl", ALPACA),
    "dirty/huatuo_liver_cancer_inline_turns.json": ("json", ALPACA),
    "dirty/instruction_null_field_5rows.json": ("json", "alpaca: instruction, output"),
    "dirty/new_codealpaca_two_answer_columns.json.gz": (
        "json",
        'map={"output": "output"} or map={"output": "response"}',
    ),
    "dirty/ruozhiba_emo_json_array_named.jsonl": ("json", "xtuner: conversation"),
    "instruction/alpaca_5000.json": ("json", ALPACA),
    "instruction/code_alpaca_2k.json": ("json", ALPACA),
    "instruction/gpteacher_roleplay.json": ("json", "alpaca: instruction, response, input"),
    "instruction/gpteacher_toolformer.json": ("json", "alpaca: instruction, response, input"),
    "instruction/lf_alpaca_en_demo.json": ("json", ALPACA),
    "instruction/lf_alpaca_zh_demo.json": ("json", ALPACA),
    "instruction/lf_identity.json": ("json", ALPACA),
    "instruction/lf_oaast_sft_zh_history.json": ("json", f"{ALPACA}, history"),
    "instruction/llms_from_scratch_1100.json": ("json", ALPACA),
    "instruction/ruozhiba_2449_zh.json": ("json", ALPACA),
    "messages/lf_reason_tool_use_demo_50.jsonl": ("jsonl", "messages: messages, tools"),
    "messages/lf_v1_sft_demo.jsonl": ("jsonl", "messages: messages"),
    "messages/tinker_conversations.jsonl": ("jsonl", "messages: messages"),
    "prompt_completion/dolly_hhrlhf_train_small.jsonl": ("jsonl", "prompt-completion: prompt, response"),
    "prompt_completion/gsm8k_test.jsonl": ("jsonl", "question-answer: question, answer"),
    "prompt_completion/gsm8k_train.jsonl": ("jsonl", "question-answer: question, answer"),
    "prompt_completion/mlx_wwdc25_train.jsonl": ("jsonl", "prompt-completion: prompt, completion"),
    "prompt_completion/mlx_wwdc25_valid.jsonl": ("jsonl", "prompt-completion: prompt, completion"),
    "prompt_completion/t0_train.jsonl.gz": ("jsonl", "prompt-completion: prompt, completion"),
    "sharegpt/axolotl_conversation.json": ("json", "sharegpt: conversations"),
    "sharegpt/emollm_xtuner_multiturn_zh.json": ("json", "xtuner: conversation"),
    "sharegpt/fastchat_dummy_conversation.json": ("json", "sharegpt: conversations"),
    "sharegpt/fastchat_dummy_with_system.json": ("json", "sharegpt: conversations, system"),
    "sharegpt/numina_cot_1k.jsonl": ("jsonl", "sharegpt: conversations"),
    "sharegpt/sharegpt_zh_1k.jsonl": ("jsonl", "sharegpt: conversations"),
    "text/arxiv_long.jsonl": ("jsonl", "text: text"),
    "text/c4_demo.jsonl": ("jsonl", "text: text"),
    "text/mlx_wikisql_train.jsonl": ("jsonl", "text: text"),
    "text/multilingual.txt": ("text", "lines: "),
    "text/wiki_demo.txt": ("text", "lines: "),
    "tools/bfcl_v4_live_multiple.jsonl.gz": (
        "jsonl",
        "the column 'question' asks, but there is no answer column",
    ),
    "tools/bfcl_v4_live_simple_jsonl_named.json": (
        "jsonl",
        "the column 'question' asks, but there is no answer column",
    ),
    "tools/glaive_toolcall_en.json": ("json", "sharegpt: conversations, tools"),
    "tools/glaive_toolcall_zh.json": ("json", "sharegpt: conversations, tools"),
    "tools/gorilla_openfunctions_v1_test.json": (
        "json",
        'if \'model_answer\' is the answer: map={"answer": "model_answer"}.',
    ),
    "vision/lf_mllm_demo.json": ("json", "messages: messages"),
    "vision/lf_v1_multimodal_demo.jsonl": ("jsonl", "messages: messages"),
    "vision/llava_instruct_100.json": ("json", "sharegpt: conversations"),
    "vision/llava_tables_252.jsonl": ("jsonl", "sharegpt: conversations"),
    "vision/qwen_vl_single_images.json": ("json", "sharegpt: conversations"),
    "vision/qwen_vl_video.json": ("json", "video-row: the column 'video' holds a film"),
}


def detect_file(path: Path, **options: Any) -> Detection:
    try:
        return detect([plan_source(open_source(str(path)), 0, 32 << 20)], **options)
    finally:
        close_streams()


def words_of(path: Path) -> str:
    """Return format and columns, or the refusal."""
    try:
        found = detect_file(path)
    except UsageError as error:
        return str(error)
    return f"{found.format}: {', '.join(found.columns.values())}"


def test_the_table_names_every_real_file(shared_data: Path) -> None:
    folder = shared_data / "datasets"
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".jpg"
    }
    assert files == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_file_is_read_as_what_it_is(name: str, shared_data: Path) -> None:
    container, expected = EXPECTED[name]
    path = shared_data / "datasets" / name
    words = words_of(path)
    assert open_source(str(path)).container == container
    assert words == expected or (words.startswith(str(path)) and expected in words)
    assert "\n" not in words


def rows_of(path: Path) -> list[Any]:
    pieces = plan_source(open_source(str(path)), 0, 1 << 30).chunks
    rows = [row for piece in pieces for row in read_chunk(piece)[0].rows]
    close_streams()
    return rows


@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.startswith("prompt_completion/t0")])
def test_the_order_of_rows_does_not_matter(name: str, shared_data: Path, tmp_path: Path) -> None:
    rows = rows_of(shared_data / "datasets" / name)
    expected = words_of(shared_data / "datasets" / name).partition("datasets/")[2].partition(": ")[2]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        path = tmp_path / "datasets" / "shuffled"
        path.parent.mkdir(exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        found = words_of(path).partition("datasets/")[2].partition(": ")[2]
        # A sample of a large file differs in its size, not in its verdict.
        assert found.rpartition(" sampled rows")[2] == expected.rpartition(" sampled rows")[2]
        if not expected:
            assert words_of(path) == words_of(shared_data / "datasets" / name)


@pytest.mark.slow
def test_detection_is_the_same_under_ten_hash_seeds(shared_data: Path) -> None:
    code = (
        "import sys, json, pathlib\n"
        "from sftdata.errors import UsageError\n"
        "from sftdata.formats.detect import detect\n"
        "from sftdata.sources.source import open_source, plan_source\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(json.dumps(detect([plan_source(open_source(path), 0, 1 << 25)]).to_json()))\n"
        "    except UsageError as error: print(error)\n"
    )
    files = [str(shared_data / "datasets" / name) for name in EXPECTED if "t0_train" not in name]
    outputs = set()
    for seed in range(10):
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        done = subprocess.run(
            [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True, env=environment
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == len(files)


def test_the_fix_of_a_refusal_works(shared_data: Path) -> None:
    two = shared_data / "datasets" / "dirty" / "new_codealpaca_two_answer_columns.json.gz"
    with pytest.raises(
        UsageError, match='choose one with map={"output": "output"} or map={"output": "response"}'
    ):
        detect_file(two)
    for column in ("output", "response"):
        assert detect_file(two, columns={"output": column}).format == "alpaca"
    gorilla = shared_data / "datasets" / "tools" / "gorilla_openfunctions_v1_test.json"
    columns = {"answer": "model_answer"}
    assert detect_file(gorilla, columns=columns).format == "question-answer"
    (piece,) = plan_source(open_source(str(gorilla)), 0, 1 << 30).chunks
    converted = convert_rows(read_chunk(piece)[0], "question-answer", FormatOptions(columns=columns))
    assert (len(converted.rows), converted.faults, converted.unused) == (112, [], {"function": 112})


def test_every_row_of_a_real_file_is_converted_but_the_known_bad_ones(shared_data: Path) -> None:
    known_bad = {
        "dirty/instruction_null_field_5rows.json": ["null-field"],
        "sharegpt/sharegpt_zh_1k.jsonl": ["no-assistant"],
    }
    for name, (_, expected) in EXPECTED.items():
        format_name = expected.partition(": ")[0]
        if format_name not in FORMATS or "t0_train" in name:
            continue
        plan = plan_source(open_source(str(shared_data / "datasets" / name)), 0, 1 << 30)
        for piece in plan.chunks:
            rows = read_chunk(piece)[0]
            found = convert_rows(rows, format_name, FormatOptions())
            codes = [fault.code for _, fault in found.faults]
            if name.startswith("vision/"):  # pictures want a processor, which nothing names here
                assert {"no-processor", "image-part"}.issuperset(codes), name
                assert len(codes) == sum(map(_has_pictures, rows.rows)), name
            else:
                assert codes == known_bad.get(name, []), name


def _has_pictures(row: dict[str, Any]) -> bool:
    text = json.dumps(row)
    return "<img>" in text or '"image' in text


# ------------------------------------------------------------------------------------------------ made-up inputs


def detect_rows(folder: Path, rows: list[Any], **options: Any) -> Detection:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return detect_file(path, **options)


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
AMBIGUOUS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two answer columns": (
        {"instruction": "Q", "output": "A", "response": "B"},
        ["--map output=output", "--map output=response"],
    ),
    "two answers to a prompt": (
        {"prompt": "Q", "completion": "A", "answer": "B"},
        ["--map completion=completion"],
    ),
    "text beside instruction": (
        {"instruction": "Q", "output": "A", "text": "T"},
        ["--format alpaca", "--format text"],
    ),
    "messages beside a prompt": (
        {"messages": TURNS, "prompt": "Q", "completion": "A"},
        ["--format messages", "--format prompt-completion"],
    ),
    "input beside context": (
        {"instruction": "Q", "input": "I", "context": "C", "output": "A"},
        ["--format alpaca", "--format dolly"],
    ),
    "text and content": ({"text": "T", "content": "C"}, ["--map text=text", "--map text=content"]),
    "ids beside text": ({"input_ids": [1], "text": "T"}, ["--format text", "--format tokens"]),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_two_readings_are_refused_with_the_flags_that_choose(kind: str, tmp_path: Path) -> None:
    row, flags = AMBIGUOUS[kind]
    with pytest.raises(UsageError, match="2 readings fit 9 of 9 sampled rows") as caught:
        detect_rows(tmp_path, [row] * 9)
    for flag in flags:
        assert flag in caught.value.fix
        name, _, value = flag.partition(" ")
        chosen = {"format": value} if name == "--format" else {"columns": dict([value.split("=")])}
        found = detect_rows(tmp_path, [row] * 9, **chosen)
        assert found.format in str(caught.value)
        converted = convert_rows(
            read_chunk(plan_source(open_source(str(tmp_path / "rows.jsonl")), 0, 1 << 20).chunks[0])[0],
            found.format,
            FormatOptions(columns=chosen.get("columns", {})),
        )
        assert len(converted.rows) == 9


NEAR_MISSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "several answers": (
        {"prompt": "P", "completions": ["a", "b"]},
        "'completions' is a list of answers",
        "--formatter",
    ),
    "prompts alone": (
        {"prompt": "P"},
        "the column 'prompt' asks, but there is no answer column",
        "add an answer",
    ),
    "prompts as messages": (
        {"question": [[{"role": "user", "content": "Q"}]], "id": "a"},
        "no answer column",
        "--formatter",
    ),
    "an answer under another name": (
        {"question": "Q", "solution": "A", "id": "1"},
        "no answer column",
        "--map answer=solution",
    ),
    "preference pairs": (
        {"prompt": "P", "chosen": "a", "rejected": "b"},
        "preference pairs",
        "--map completion=chosen",
    ),
    "preferred conversations": (
        {"chosen": TURNS, "rejected": TURNS},
        "preference pairs",
        "--map messages=chosen",
    ),
    "single messages": ({"role": "user", "content": "Q"}, "one message of a conversation", "messages"),
    "pictures": (
        {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "A"}]},
        "images-unplaced: image holds 1 picture; the messages place 0 of them",
        "write <image> where each of them stands",
    ),
    "rows inside an object": (
        {"version": 1, "data": [{"prompt": "P", "completion": "C"}]},
        "under 'data'",
        "jq -c '.data[]'",
    ),
    "nothing known": (
        {"foo": 1, "bar": "x"},
        "no known row format fits: 9 of 9 sampled rows have the columns bar, foo",
        "--map",
    ),
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_a_near_miss_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    row, reason, fix = NEAR_MISSES[kind]
    with pytest.raises(UsageError) as caught:
        detect_rows(tmp_path, [row] * 9)
    assert reason in str(caught.value)
    assert fix in caught.value.fix
    if "--map" in fix and "=" in fix:
        canonical, actual = fix.removeprefix("--map ").split("=")
        assert detect_rows(tmp_path, [row] * 9, columns={canonical: actual}).matched == 9


def test_most_rows_decide_and_the_others_are_counted(tmp_path: Path) -> None:
    two_answers = {"instruction": "Q", "output": "A", "response": "B"}
    rows: list[Any] = [{"text": "a"}] * 3 + [{"messages": TURNS}] * 20 + [two_answers] * 2 + [{"x": 1}]
    found = detect_rows(tmp_path, rows)
    assert (found.format, found.matched, found.sampled) == ("messages", 20, 26)
    assert dict(found.alternatives) == {
        "text": 3,
        "alpaca (instruction, output) or alpaca (instruction, response)": 2,
        "no known format": 1,
    }
    piece = plan_source(open_source(str(tmp_path / "rows.jsonl")), 0, 1 << 20).chunks[0]
    faults = [
        fault.code for _, fault in convert_rows(read_chunk(piece)[0], "messages", FormatOptions()).faults
    ]
    assert faults == ["wrong-format"] * 5 + ["missing-column"]


def test_answer_columns_may_differ_by_row(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "output": "A"}] * 2 + [{"instruction": "Q", "response": "A"}] * 3
    found = detect_rows(tmp_path, rows)
    assert (found.format, found.matched) == ("alpaca", 5)
    assert found.columns["answer"] == "response"
    assert "response in 3, output in 2" in found.evidence[0]


def test_the_first_rows_do_not_decide(tmp_path: Path) -> None:
    rows = [{"text": "x" * 1000}] * 300 + [{"prompt": "p" * 1000, "completion": "c"}] * 3000
    assert detect_rows(tmp_path, rows).format == "prompt-completion"


def test_damaged_rows_are_counted_in_the_evidence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    assert detect_file(tmp_path / "a.jsonl").evidence[1] == "1 sampled row could not be read."


def test_a_format_that_the_user_names_is_checked(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "output": "A", "text": "T"}] * 5
    assert detect_rows(tmp_path, rows, format="text").columns == {"text": "text"}
    with pytest.raises(
        UsageError, match=r"5 of 5 sampled rows have the columns instruction, output, text; dolly needs "
    ):
        detect_rows(tmp_path, rows, format="dolly")
    with pytest.raises(UsageError, match=r'format="alpacca": no such format.*did you mean .alpaca.'):
        detect_rows(tmp_path, rows, format="alpacca")


def test_a_mapping_that_names_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "response": "A"}] * 5
    with pytest.raises(
        UsageError,
        match=r'no sampled row has a column .respons.*did you mean map={"output": "response"}',
    ):
        detect_rows(tmp_path, rows, columns={"output": "respons"})
    with pytest.raises(UsageError, match=r"map outptu: no such column of any format.*did you mean 'output'"):
        detect_rows(tmp_path, rows, columns={"outptu": "response"})


def test_an_input_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UsageError, match="no row could be read"):
        detect_file(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("{'text': 1}\n{'text': 2}\n")
    with pytest.raises(
        UsageError, match=r"b\.jsonl: no row could be read \(record 1: .*object keys must be strings"
    ):
        detect_file(tmp_path / "b.jsonl")


def test_detection_speaks_json(tmp_path: Path) -> None:
    found = detect_rows(tmp_path, [{"text": "a"}, {"text": "b"}])
    assert json.loads(json.dumps(found.to_json())) == {
        "format": "text",
        "columns": {"text": "text"},
        "evidence": ["text (running text): 2 of 2 sampled rows, of 2 records: text in 2."],
        "sampled": 2,
        "matched": 2,
        "total": 2,
        "alternatives": [],
        "sources": [{"path": str(tmp_path / "rows.jsonl"), "container": "jsonl", "compression": "none"}],
    }


def test_csv_rows_are_detected_by_their_header(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a", "wt", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer"], ["Q, really?", "A"], ["Q", "A\nB"]])
    assert words_of(tmp_path / "a") == "question-answer: question, answer"


def test_rejected_lines_of_text_are_detected_as_lines(tmp_path: Path) -> None:
    keys = ("file", "line", "byte_offset", "code", "reason", "fix", "row")
    reject = dict(zip(keys, ("a.txt", 1, 0, "no-response-template", "r", "f", "a document"), strict=True))
    assert detect_rows(tmp_path, [reject] * 3).format == "lines"
