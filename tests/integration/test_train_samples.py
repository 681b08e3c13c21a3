"""`--sample`: answers in log and report at each evaluation, which take nothing from the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sftdata
from sftdata.errors import UsageError
from sfttrain.chat import open_chat
from sfttrain.progress import TrainLog
from sfttrain.report import make_report
from sfttrain.samples import Samples, read_samples
from tests.train_runs import OUR_WARNINGS, train_in_process
from tests.train_sets import make_set

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "tiny-model" / "config.json"
STEPS: dict[str, Any] = {
    "max_steps": 10, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no",
    "per_device_train_batch_size": 2,
}  # fmt: skip
ASKED = [
    {"role": "system", "content": "You are a patient gardener. Answer in one or two plain sentences."},
    {"role": "user", "content": "When should I water <b>tomatoes</b>?"},
]
ROWS = [
    {"messages": [*ASKED, {"role": "assistant", "content": "Early."}]},
    {"prompt": ASKED, "completion": [{"role": "assistant", "content": "Early."}]},
    {"messages": ASKED},
    {"prompt": "The capital of Norway is", "completion": " Oslo."},
    {"prompt": "The capital of Norway is"},
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    sftdata.prepare(
        EXAMPLES / "conversations.jsonl",
        tokenizer=EXAMPLES / "tokenizer",
        output=folder,
        max_length=256,
        workers=1,
    )
    return folder


@pytest.fixture
def held(tmp_path: Path) -> Path:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return tmp_path / "held.jsonl"


def _answers(run: Path) -> dict[int, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line["samples"] for line in lines if "samples" in line}


@pytest.mark.slow
@pytest.mark.feature("answers along the way")
def test_each_evaluation_and_the_end_are_answered_and_the_weights_are_those_without(
    shards: Path, held: Path, tmp_path: Path
) -> None:
    both = {"held": shards, "again": shards}
    train_in_process(shards, None, tmp_path / "plain", STEPS, init_from_config=CONFIG, eval=both)
    train_in_process(shards, None, tmp_path / "out", STEPS, init_from_config=CONFIG, eval=both, sample=held)
    answers = _answers(tmp_path / "out")
    assert list(answers) == [4, 8, 10]  # once, however many sets are evaluated
    assert [row["reference"] for row in answers[4]] == ["Early.", "Early.", None, " Oslo.", None]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    chat = open_chat(tmp_path / "out", None, lambda _: None, max_new_tokens=256)
    wanted = [chat.answer(ASKED)] * 3 + [chat.answer("The capital of Norway is")] * 2
    assert [row["answer"] for row in answers[10]] == wanted
    page = make_report(tmp_path / "out")
    assert "Answers</h2>" in page
    assert "&lt;b&gt;tomatoes&lt;/b&gt;" in page
    assert "<b>tomatoes" not in page


@pytest.mark.slow
def test_adapters_answer_too_and_without_evaluation_the_end_is_answered(
    shards: Path, held: Path, tmp_path: Path
) -> None:
    fresh = STEPS | {"eval_strategy": "no"}
    del fresh["eval_steps"]
    train_in_process(shards, None, tmp_path / "base", fresh, init_from_config=CONFIG)
    train_in_process(shards, tmp_path / "base", tmp_path / "out", fresh, lora={"r": 4}, sample=held)
    answers = _answers(tmp_path / "out")
    chat = open_chat(tmp_path / "out", None, lambda _: None, max_new_tokens=256)
    assert list(answers) == [10]
    assert answers[10][0]["answer"] == chat.answer(ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_that_is_killed_behind_its_last_step_is_answered_once(
    evaluated: bool, shards: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfttrain import training

    steps = {"max_steps": 2, "save_steps": 2, "eval_strategy": "steps" if evaluated else "no"}
    steps |= {"eval_steps": 2} if evaluated else {}
    more: dict[str, Any] = {"init_from_config": CONFIG, "sample": held}
    more |= {"eval": {"held": shards}} if evaluated else {}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "on_train_end", killed)
        patch.setattr(training, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            train_in_process(shards, None, tmp_path / "out", steps, **more)
    with (tmp_path / "out/train_log.jsonl").open("a") as file:
        file.write('{"step": 2, "sam')
    train_in_process(shards, None, tmp_path / "out", steps, **more)
    lines = (tmp_path / "out/train_log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if '"samples"' in line] == [2]
    chat = open_chat(tmp_path / "out", None, lambda _: None, max_new_tokens=256)
    assert _answers(tmp_path / "out")[2][0]["answer"] == chat.answer(ASKED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"0 rows; expected 1 to 20\. Fix: write rows as"),
        ('{"prompt": "a"}\n' * 21, r"21 rows; expected 1 to 20\. Fix: head -n 20 '/.*/held out\.jsonl' > few\.jsonl"),
        ('{"prompt": "a"}\n{', r"line 2: is no JSON"),
        ('{"text": "a"}', r"line 1: holds no question.*write rows as"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"line 1: holds no question"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"line 1: holds no question"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"no chat template\. Fix: give prompts as texts"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked_are_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "held out.jsonl").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=said):
        read_samples(tmp_path / "held out.jsonl", talks="no chat template" not in said)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "a\u2028b\x85c"}\n', "utf-8")
    (sample,) = read_samples(tmp_path / "held.jsonl", talks=False)
    assert sample.prompt == "a\u2028b\x85c"


def test_the_report_puts_answers_to_the_same_question_side_by_side(tmp_path: Path) -> None:
    """A run may go on with other rows, and answers hold what some take for the end of a line."""
    said = [("old", "first\u2028old"), ("new", "first\u2028new"), ("new", "last\x85new")]
    with (tmp_path / "train_log.jsonl").open("w", encoding="utf-8") as file:
        for step, (prompt, answer) in enumerate(said, 1):
            rows = [{"prompt": prompt, "reference": None, "answer": answer}]
            file.write(json.dumps({"step": step, "samples": rows}, ensure_ascii=False) + "\n")
        file.write(json.dumps({"step": 3, "samples": 24}) + "\n")  # a figure of a callback's own
    TrainLog(tmp_path / "train_log.jsonl").on_train_begin(
        SimpleNamespace(), SimpleNamespace(is_world_process_zero=True, global_step=3), SimpleNamespace()
    )
    page = make_report(tmp_path)
    assert "step 2</th>" in page
    assert r"first\u2028new" in page
    assert r"last\x85new" in page
    assert r"first\u2028old" not in page


def test_a_file_that_is_not_there_and_a_set_without_a_tokenizer_are_refused_before_the_model_is_loaded(
    shards: Path, held: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r'sample="none\.jsonl": cannot be read'):
        train_in_process(
            shards,
            None,
            tmp_path / "out",
            STEPS,
            init_from_config=CONFIG,
            eval={"a": shards},
            sample="none.jsonl",
        )
    bare = make_set(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"the set brings no tokenizer\. Fix: leave sample out"):
        train_in_process(
            bare, None, tmp_path / "out", STEPS, init_from_config=CONFIG, eval={"a": bare}, sample=held
        )
    train_in_process(
        bare, None, tmp_path / "out", STEPS | {"max_steps": 1}, init_from_config=CONFIG, eval={"a": bare}
    )
