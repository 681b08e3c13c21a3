"""Advice of the trainer: what was refused goes through once the advice is followed, and what was advised takes effect."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

import sfttrain
from sftdata.errors import UsageError
from sfttrain.cli import main
from sfttrain.config import read_settings
from tests.train_runs import OUR_WARNINGS, tiny_llama
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands name: a set, models, adapters and settings of architectures."""
    folder = tmp_path_factory.mktemp("advised")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_set(Path("rows"), rows=4, shards=1)
        make_set(Path("more"), rows=6, shards=1, seed=5)
        make_set(Path("short"), rows=4, shards=1, max_length=16)
        tiny_llama(Path("llama"), num_hidden_layers=1)
        assert run("rows -m llama -o adapters --lora r=2") == 0
        shutil.copytree("llama", "moved")
        shutil.copytree("adapters", "renamed")
        named(Path("renamed"), "moved")
        shutil.copytree("adapters", "homeless")
        named(Path("homeless"), "gone")
        shutil.copytree("adapters", "on-quantized")
        named(Path("on-quantized"), "quantized")
        shutil.copytree("adapters", "unfit")
        tiny_llama(Path("wide"), num_hidden_layers=1, hidden_size=64)
        named(Path("unfit"), "wide")
        Path("quantized").mkdir()
        config = json.loads(Path("llama/config.json").read_text(encoding="utf-8"))
        quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        Path("quantized/config.json").write_text(json.dumps(config | quantization), encoding="utf-8")
        gpt2 = {
            "model_type": "gpt2",
            "vocab_size": 128,
            "n_positions": 16,
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 2,
        }
        Path("gpt2.json").write_text(json.dumps(gpt2), encoding="utf-8")
        mamba = {
            "model_type": "mamba2",
            "vocab_size": 128,
            "hidden_size": 32,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
        }
        Path("mamba.json").write_text(
            json.dumps(mamba | {"num_hidden_layers": 1, "n_groups": 1, "expand": 2}), encoding="utf-8"
        )
    return folder


def named(adapters: Path, base: str) -> None:
    """Let adapters name another base."""
    path = adapters / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")


def run(arguments: str) -> int:
    """Run `sfttrain run` for a step where the arguments do not say otherwise."""
    steps = "" if "--max-steps" in arguments else "--max-steps 1 "
    saving = "" if "save_" in arguments else "--set save_strategy=no "
    return main(["run", *shlex.split(f"{steps}{saving}{arguments}")])


# ------------------------------------------------------------------------------------------- refused at once

# Advice: what is refused with it, and each way to follow it; {} is a fresh folder.
REFUSED: dict[str, tuple[str, list[str]]] = {
    "set optim=adamw_torch": (
        "rows -m llama -o {} --set optim=apollo_adamw --set optim_target_modules=all-linear",
        ["rows -m llama -o {} --set optim=adamw_torch"],
    ),
    "set loss=auto.": (
        "rows -m llama -o {} --set objective=dft --set loss=plain", ["rows -m llama -o {} --set objective=dft --set loss=auto"]
    ),
    "loss=torch gives no losses of tokens; set loss=auto, or leave log_documents out": (
        "rows -m llama -o {} --log-documents --set loss=torch",
        ["rows -m llama -o {} --log-documents --set loss=auto", "rows -m llama -o {} --set loss=torch"],
    ),
    "set kernels=auto.": ("rows -m llama -o {} --liger", ["rows -m llama -o {} --set kernels=auto"]),
    "set objective=nll.": (
        "rows -m llama -o {} --lora r=2,target=q_proj+lm_head --set objective=dft",
        ["rows -m llama -o {} --lora r=2,target=q_proj+lm_head --set objective=nll"],
    ),
    "set attention=auto.": ("rows -m llama -o {} --attention flash_attention_2", ["rows -m llama -o {} --attention auto"]),
    "name a folder written by a run with --lora.": ("rows -o {} --adapter nowhere", ["rows -o {} --adapter adapters"]),
    "set --model {}; if that is the same model elsewhere, fix base_model_name_or_path in adapter_config.json.": (
        "rows -m moved -o {} --adapter adapters",
        ["rows -m llama -o {} --adapter adapters", "rows -m moved -o {} --adapter renamed"],
    ),
    "set eval_strategy=steps and --eval NAME=FOLDER.": (
        "rows -m llama -o {} --set do_eval=true", ["rows -m llama -o {} --set eval_strategy=steps --eval held=rows"]
    ),
    "an evaluation set, as --eval held=FOLDER": (
        "rows -m llama -o {} --set eval_on_start=true", ["rows -m llama -o {} --set eval_on_start=true --eval held=rows"]
    ),
    "name a set, as --eval held=FOLDER.": (
        "rows -m llama -o {} --set eval_strategy=steps", ["rows -m llama -o {} --set eval_strategy=steps --eval held=rows"]
    ),
    "give each set a name of its own, as --eval held=FOLDER.": (
        "rows -m llama -o {} --eval rows --eval rows=more", ["rows -m llama -o {} --eval rows --eval held=more"]
    ),
    "set metric_for_best_model=eval_{}_loss.": (
        "rows -m llama -o {} --set eval_strategy=steps --set eval_steps=1 --set save_steps=1 --eval held=rows"
        " --set load_best_model_at_end=true",
        ["rows -m llama -o {} --set eval_strategy=steps --set eval_steps=1 --set save_steps=1 --eval held=rows"
         " --set load_best_model_at_end=true --set metric_for_best_model=eval_held_loss"],
    ),
    "--set training.seed=1": ("rows -m llama -o {} --set training=1", ["rows -m llama -o {} --set training.seed=1"]),
    "prepare with --max-length {}.": (
        "rows --init-from-config gpt2.json -o {}", ["short --init-from-config gpt2.json -o {}"]
    ),
    "set packing=auto to train documents one by one.": (
        "rows --init-from-config mamba.json -o {} --set packing=require",
        ["rows --init-from-config mamba.json -o {} --set packing=auto"],
    ),
    "name a folder that `sftdata prepare` wrote.": ("-m llama -o {}", ["rows -m llama -o {}"]),
    "give each set one share, as --mix chats=70.": (
        "rows more -m llama -o {} --mix rows", ["rows more -m llama -o {} --mix rows=70 --mix more=30"]
    ),
    "--mix {}=SHARE, or leave the set out.": (
        "rows more -m llama -o {} --mix rows=70",
        ["rows more -m llama -o {} --mix rows=70 --mix more=30", "rows -m llama -o {} --mix rows=70"],
    ),
    "name sets, as {}; `sftdata view --mix` takes sources of sets.": (
        "rows more -m llama -o {} --mix x.jsonl=70 --mix more=30", ["rows more -m llama -o {} --mix rows=70 --mix more=30"]
    ),
    "lower learning_rate, set max_grad_norm=1, or look at the rows of that step, which --log-documents and `sftdata blame` name;"
    " then run into another output folder.": (
        "rows -m llama -o {} --max-steps 4 --set logging_steps=1 --set learning_rate=1e30 --set max_grad_norm=0",
        ["rows -m llama -o {} --max-steps 4 --set logging_steps=1 --set learning_rate=1e-3 --set max_grad_norm=1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("advice", REFUSED)
def test_a_run_that_was_refused_goes_through_when_the_advice_is_followed(
    advice: str,
    things: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(things)
    wrong, followed = REFUSED[advice]
    capsys.readouterr()
    assert run(wrong.format(tmp_path / "wrong")) in (2, 3)
    said = capsys.readouterr().err.replace(". Fix: ", "; ")  # as a check of settings raises it
    assert all(part in said for part in advice.split("{}")), said
    for number, right in enumerate(followed):
        assert run(right.format(tmp_path / f"right{number}")) == 0, right


def test_a_set_that_is_not_evaluated_is_when_the_advice_is_followed(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(things)
    for more in ("--set eval_strategy=no", "", "--set eval_strategy=steps"):
        capsys.readouterr()
        assert run(f"rows -m llama -o {tmp_path / f'out{more[-5:]}'} --eval held=rows {more}") == 0
        assert (
            "is not evaluated while training; set eval_strategy=epoch or steps" in capsys.readouterr().err
        ) == more.endswith("no")


# ------------------------------------------------------------------------------------------- going on

STEPS = "rows -m llama -o {} --max-steps {} --set save_steps=1 "


@pytest.fixture
def begun(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of two steps with a checkpoint of each."""
    monkeypatch.chdir(things)
    assert run(STEPS.format(tmp_path / "run", 2)) == 0
    return tmp_path / "run"


def test_advice_on_a_finished_run_is_followed(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, choose = (
        STEPS + "--set learning_rate=0.5",
        "Fix: choose another output folder, or --overwrite to start anew; ",
    )
    for steps in (2, 3):
        assert run(changed.format(begun, steps)) == 2
        held = f"{choose}with what it was started with, a higher max_steps trains it on."
        assert held in capsys.readouterr().err
    saved = STEPS + "--set save_total_limit=5"  # which may change on the way
    assert run(saved.format(begun, 2)) == 2
    assert f"{choose}a higher max_steps trains it on." in capsys.readouterr().err
    assert run(saved.format(begun, 3)) == 0
    assert run(STEPS.format(begun, 1)) == 2
    higher = "Fix: set a higher max_steps, choose another output folder, or --overwrite to start anew."
    assert higher in capsys.readouterr().err
    assert run(STEPS.format(begun, 4)) == 0
    next(begun.glob("*.safetensors")).unlink()
    assert run(changed.format(begun, 4)) == 2
    assert (
        "Fix: use what it was started with, another output folder, or --overwrite to start anew."
        in capsys.readouterr().err
    )
    assert run(STEPS.format(begun, 4)) == 0
    assert run(changed.format(tmp_path / "other", 1)) == 0
    assert run(changed.format(begun, 1) + " --overwrite") == 0


@pytest.mark.parametrize(
    ("saving", "advice"),
    [
        ("--set save_strategy=no", "choose another output folder, or --overwrite."),
        (
            "--set save_steps=1 --set save_only_model=true",
            "start anew with --overwrite, or in another output folder.",
        ),
    ],
)
def test_advice_on_a_run_that_cannot_go_on_is_followed(
    saving: str,
    advice: str,
    things: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(things)
    command = f"rows -m llama {saving}"
    assert run(f"{command} -o {tmp_path / 'run'}") == 0
    assert run(f"{command} -o {tmp_path / 'run'} --max-steps 2") == 2
    assert f"Fix: {advice}" in capsys.readouterr().err
    assert run(f"{command} -o {tmp_path / 'other'} --max-steps 2") == 0
    assert run(f"{command} -o {tmp_path / 'run'} --max-steps 2 --overwrite") == 0


# ------------------------------------------------------------------------------------------- other commands

# Advice: the command that is refused with it, and the commands that follow it; {} is a fresh folder.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "name it with --model.": ("merge homeless -o {}/a", ["merge homeless -o {}/b --model llama"]),
    "name the unquantized base with --model.": ("merge on-quantized -o {}/a", ["merge on-quantized -o {}/b --model llama"]),
    "sfttrain merge {} -o {}-merged": ("export adapters -o {}/a --set rows", ["merge adapters -o {}/b"]),
    "name the folder of a run: sfttrain run ... -o DIR.": ("report nowhere", ["report adapters --html {}/page.html"]),
    "see `sfttrain config`.": ("run rows -m llama -o {}/a --set wholly_unknown=1", ["config rows -m llama -o {}/a"]),
}  # fmt: skip


@pytest.mark.parametrize("advice", COMMANDS)
def test_a_command_that_was_refused_works_when_the_advice_is_followed(
    advice: str,
    things: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(things)
    wrong, followed = COMMANDS[advice]
    assert main(shlex.split(wrong.format(tmp_path))) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in advice.split("{}")), said
    for right in followed:
        assert main(shlex.split(right.format(tmp_path))) == 0


def test_adapters_that_do_not_fit_are_trained_once_they_name_their_model(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(things)
    shutil.copytree("unfit", tmp_path / "unfit")
    command = f"rows --adapter {tmp_path / 'unfit'} -o {tmp_path / 'out'}"
    assert run(command) == 2
    assert (
        "let base_model_name_or_path in their adapter_config.json name the model" in capsys.readouterr().err
    )
    named(tmp_path / "unfit", "llama")
    assert run(command) == 0


# ------------------------------------------------------------------------------------------- settings

# What needs a GPU or a package when it runs: here the settings that are advised are read as they are meant.
READ: dict[str, dict[str, object]] = {
    "quantize freezes the model, so it needs lora; add --lora r=16": {"quantize": "nf4", "lora": "r=16"},
    "--quantize int8 --lora r=16": {"quantize": "int8", "lora": "r=16"},
    "--quantize nf4 --lora r=16": {"quantize": "nf4", "lora": "r=16"},
    "--attention flash_attention_2": {"attention": "flash_attention_2"},
}


@pytest.mark.parametrize("advice", READ)
def test_settings_that_are_advised_are_read(advice: str, tmp_path: Path) -> None:
    config = read_settings(
        None, [], {"model": "m", "sets": (Path("rows"),), "output": tmp_path, **READ[advice]}
    )
    assert all(f"--{name}" in advice or f"{name} " in advice for name in READ[advice])
    assert config.attention == READ[advice].get(
        "attention", read_settings(None, [], {"model": "m", "output": tmp_path}).attention
    )
    assert config.quantize == READ[advice].get("quantize")
    assert (config.lora.r if config.lora else None) == (16 if "lora" in READ[advice] else None)


SAID_OF_OBJECTS = "give rows with a length, or --eval NAME=FOLDER."


def test_a_stream_to_evaluate_on_is_followed_by_a_set(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    training = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "steps"}
    with pytest.raises(UsageError, match="give rows with a length"):
        sfttrain.train(Path("rows"), model="llama", output=tmp_path / "a", eval_dataset=iter([]), **training)
    sfttrain.train(
        Path("rows"), model="llama", output=tmp_path / "b", eval={"held": Path("rows")}, **training
    )


FOLLOWED_IN_TRAINING = {
    *REFUSED, *COMMANDS, *READ, SAID_OF_OBJECTS,
    "evaluation: {} is not evaluated while training; set eval_strategy=epoch or steps for that",
    "choose another output folder, or --overwrite to start anew.",
    "use what it was started with, {}another output folder, or --overwrite to start anew.",
    "set a higher max_steps, choose another output folder, or --overwrite to start anew.",
    "use what it was started with, another output folder, or --overwrite to start anew.",
    "choose another output folder, or --overwrite.", "start anew with --overwrite, or in another output folder.",
}  # fmt: skip
