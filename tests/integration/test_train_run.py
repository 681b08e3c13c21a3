"""The command from end to end: what it writes, what it refuses, and how it says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftdata.errors import IntegrityError
from sftdata.set.opened import ShardSet
from sfttrain import cli
from tests.train_runs import OUR_WARNINGS, run, train_in_process
from tests.train_sets import EOS, make_set
from tests.waiting import HANGS

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=48)


@pytest.fixture(scope="module")
def output(shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the real command."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with_tokenizer = folder.parent / "set"
    shutil.copytree(shards, with_tokenizer)
    shutil.copytree(EXAMPLES / "tokenizer", with_tokenizer / "tokenizer")
    code, stdout, stderr = run([
        "run", str(with_tokenizer), "--model", str(model), "-o", str(folder), "--max-steps", "40", "--set", "learning_rate=1e-2",
        "--set", "logging_steps=5", "--set", "per_device_train_batch_size=4", "--eval", f"held={shards}",
        "--set", "eval_strategy=steps", "--set", "eval_steps=20",
    ])  # fmt: skip
    assert code == 0, stderr
    assert stdout == ""  # standard output is data
    assert len(stderr.splitlines()) < 30
    assert stderr.count("evaluation held: loss ") == 2
    return folder


def test_the_loss_falls(output: Path) -> None:
    losses = [line["loss"] for line in _log(output) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_every_logged_step_is_a_line_with_its_figures(output: Path) -> None:
    lines = [line for line in _log(output) if "loss" in line]
    assert [line["step"] for line in lines] == [1, *range(5, 41, 5)]  # the first step always
    figures = {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "mean_token_accuracy"}
    assert all(figures <= line.keys() for line in lines)
    assert lines[-1]["tokens"] == 40 * 4 * 48  # 48 rows are 12 whole batches: no filler


def test_a_named_evaluation_set_is_logged_by_its_name(output: Path) -> None:
    assert [line["step"] for line in _log(output) if "eval_held_loss" in line] == [20, 40]


def test_the_run_leaves_a_report_of_what_it_logged(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert all(told in page for told in ("<h2>Loss</h2>", "held loss", "gradient norm", "<h2>Settings</h2>"))
    assert "Not finished" not in page


def test_the_output_holds_everything_that_inference_needs(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    AutoModelForCausalLM.from_pretrained(output, use_safetensors=True)
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert EOS in _as_list(GenerationConfig.from_pretrained(output).eos_token_id)
    assert not list(output.glob("*.bin"))
    manifest = json.loads((output.parent / "set/manifest.json").read_text())
    assert json.loads((output / "run.json").read_text())["sets"] == [manifest["digest"]]
    assert "Loss" in (output / "README.md").read_text()


def test_the_effective_settings_can_be_run_again(output: Path, tmp_path: Path) -> None:
    from sfttrain.config import read_settings

    settings = yaml.safe_load((output / "settings.yaml").read_text())
    assert settings["training"]["learning_rate"] == 1e-2
    again = read_settings(output / "settings.yaml", [], {"output": tmp_path / "again"})
    assert again.training["max_steps"] == 40


@pytest.mark.slow
def test_a_finished_run_started_again_trains_nothing_more(output: Path) -> None:
    before = (output / "model.safetensors").read_bytes()
    code, _, stderr = run(["run", "-c", str(output / "settings.yaml")])
    assert code == 0, stderr
    assert "is up to date: finished after 40 steps" in stderr
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_set_without_its_tokenizer_trains_and_says_so(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(shards, model, tmp_path / "out", {"max_steps": 1})
    assert "no tokenizer folder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.slow
def test_an_unpacked_set_trains(model: Path, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", rows=24, packed=False)
    trainer = train_in_process(
        shards, model, tmp_path / "out", {"max_steps": 20, "learning_rate": 1e-2, "logging_steps": 5}
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_sets_are_trained_by_weight(model: Path, shards: Path, tmp_path: Path) -> None:
    other = make_set(tmp_path / "other", rows=10, seed=9)
    trainer = train_in_process(
        [shards, other], model, tmp_path / "out", {"num_train_epochs": 1}, weights=(0.5, 2.0)
    )
    assert trainer.state.global_step == 24 + 20


@pytest.mark.slow
def test_tokens_that_the_set_added_grow_the_embeddings(model: Path, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", vocabulary=131, tokens_added=3)
    trainer = train_in_process(shards, model, tmp_path / "out", {"max_steps": 1})
    assert trainer.model.get_input_embeddings().weight.shape[0] == 131


@pytest.mark.slow
def test_a_leaking_architecture_is_trained_unpacked(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    settings = {
        "model_type": "mamba2",
        "vocab_size": 128,
        "hidden_size": 32,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
    }
    config.write_text(json.dumps(settings | {"num_hidden_layers": 1, "n_groups": 1, "expand": 2}))
    given = [str(shards), "--init-from-config", str(config), "-o", str(tmp_path / "out")]
    assert cli.main(["plan", *given, "--max-steps", "1"]) == 0
    plan = capsys.readouterr().out.splitlines()
    trainer = train_in_process(shards, None, tmp_path / "out", {"max_steps": 1}, init_from_config=config)
    said = capsys.readouterr().err
    assert "leaks between packed documents" in said
    assert len(trainer.train_dataset) > 48  # documents, not rows
    assert f"an epoch is {len(trainer.train_dataset):,} steps" in plan[0]
    told_again = plan[: next(number for number, line in enumerate(plan) if line.startswith("time: "))]
    assert all(line in said for line in told_again)


# ------------------------------------------------------------------------------------------------- bad input


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["run", *arguments])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "nternal error" not in said
    return code, said.splitlines()[-1]


def test_a_folder_without_manifest_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = _refused(capsys, str(tmp_path), "--model", str(model), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "manifest.json" in line
    assert "Fix:" in line


def _once_rows_were_refused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the verification wait for someone who looks into damaged rows."""
    from sfttrain.refusals import verify_sets

    refused = threading.Event()
    own = ShardSet._shard

    def look(self: ShardSet, index: int) -> Any:
        try:
            return own(self, index)
        except IntegrityError:
            refused.set()
            raise

    monkeypatch.setattr(ShardSet, "_shard", look)

    def verify(sets: Any) -> None:
        assert refused.wait(HANGS)
        verify_sets(sets)

    return verify


@pytest.mark.parametrize("late", [False, True])
def test_one_flipped_byte_is_found_before_step_one(
    shards: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    """Late: the sets are read only once the model is loaded, and its vocabulary was looked for in damaged rows."""
    broken = tmp_path / "set"
    shutil.copytree(shards, broken)
    shard = broken / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    if late:
        monkeypatch.setattr("sfttrain.refusals.verify_sets", _once_rows_were_refused(monkeypatch))
    code, line = _refused(capsys, str(broken), "--model", str(model), "-o", str(tmp_path / "out"))
    assert code == 4
    assert "shard-00001.arrow: " in line  # its hash, or a law that its rows break, whichever is read first


def test_a_model_with_too_small_a_vocabulary_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = make_set(tmp_path / "set", vocabulary=500)
    code, line = _refused(capsys, str(large), "--model", str(model), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "500 ids; the model has embeddings for 128" in line


def test_a_pickle_is_not_loaded(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "model"
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, line = _refused(capsys, str(shards), "--model", str(pickled), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "pickle" in line
    assert "safetensors" in line


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("learning_rat=1", "did you mean 'learning_rate'"),
        ("atention=sdpa", "did you mean 'attention'"),
        ("save_total_limit=1", "set 2"),
    ],
)
def test_a_wrong_setting_names_the_right_one(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, hint: str
) -> None:
    code, line = _refused(
        capsys, str(shards), "--model", str(model), "-o", str(tmp_path / "out"), "--set", setting
    )
    assert code == 2
    assert hint in line


@pytest.mark.slow
def test_a_set_that_changed_since_the_checkpoint_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (make_set(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    train_in_process(first, model, tmp_path / "out", {"max_steps": 2})
    capsys.readouterr()
    arguments = [str(second), "--model", str(model), "-o", str(tmp_path / "out"), "--max-steps", "2"]
    code, line = _refused(capsys, *arguments)
    assert code == 2
    assert "sets was" in line
    assert cli.main(["run", *arguments, "--overwrite"]) == 0


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_counts_for_nothing(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    code, line = _refused(
        capsys, str(shards), "--model", str(model), "-o", str(tmp_path / "out"), "--max-steps", "2"
    )
    assert code == 1
    assert "No space left on device" in line
    assert "resumes from the checkpoint before" in line
    assert not list((tmp_path / "out").glob("*/complete.json"))


def test_too_little_room_is_said_before_step_one(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, line = _refused(capsys, str(shards), "--model", str(model), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "a checkpoint beside the one before it needs" in line


def test_config_prints_what_run_would_use(
    shards: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        [
            "config",
            str(shards),
            "--model",
            str(model),
            "-o",
            "out",
            "--lora",
            "r=8",
            "--set",
            "save_strategy=no",
        ]
    )
    settings = yaml.safe_load(capsys.readouterr().out)
    assert code == 0
    assert settings["lora"]["r"] == 8
    assert settings["training"]["save_strategy"] == "no"
    assert settings["training"]["logging_nan_inf_filter"] is False


def test_help_is_light() -> None:
    script = (
        "import sys; from sfttrain.cli import main; main(['run', '--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_plan_of_a_set_that_is_not_there_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from sfttrain.cli import main;"
        "code = main(['plan', 'nowhere', '--model', 'm', '-o', 'out']); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("nowhere: no such folder.")


def _log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
