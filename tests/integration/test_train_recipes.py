"""Every recipe in examples/ is run, on a tiny model and for two steps; only names of folders, model and length are changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from sfttrain import cli
from sfttrain.config import read_settings
from tests.train_runs import OUR_WARNINGS, ROOT, _free_port, tiny_llama, train_in_process
from tests.train_sets import make_set
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
ON_A_GPU = {"liger"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets that the recipes name, and a model."""
    folder = tmp_path_factory.mktemp("recipes")
    make_set(folder / "shards", rows=16)
    make_set(folder / "held", rows=4, seed=5)
    model = tiny_llama(folder / "model", hidden_size=64, intermediate_size=128)
    train_in_process(
        folder / "shards", model, folder / "out/lora", {"max_steps": 1, "save_strategy": "no"}, lora={"r": 4}
    )
    (folder / "examples").symlink_to(EXAMPLES)
    return folder


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.feature("recipes")
@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem not in ON_A_GPU], ids=lambda path: path.stem
)
def test_a_recipe_runs(
    recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(recipe, workplace, monkeypatch, capsys)


@pytest.mark.gpu
@pytest.mark.feature("recipes")
@pytest.mark.parametrize("name", sorted(ON_A_GPU))
def test_a_recipe_for_a_gpu_runs(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("liger_kernel")
    _run(EXAMPLES / "recipes" / f"{name}.yaml", workplace, monkeypatch, capsys)


@pytest.mark.feature("recipes")
@pytest.mark.parametrize("name", sorted(ON_A_GPU))
def test_the_settings_of_a_recipe_for_a_gpu_are_read(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    recipe = EXAMPLES / "recipes" / f"{name}.yaml"
    wanted = yaml.safe_load(recipe.read_text("utf-8"))
    assert read_settings(recipe, [], {}).kernels == wanted["kernels"]
    assert cli.main(["run", "-c", str(recipe), "--set", "model=model"]) == 2
    assert "its kernels need a GPU" in capsys.readouterr().err


def _run(
    recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run two steps of a recipe."""
    monkeypatch.chdir(workplace)
    settings = yaml.safe_load(recipe.read_text("utf-8"))
    changed = ["--set", "model=model"] if "model" in settings else []
    if "eval_steps" in settings:
        changed += ["--set", "eval_steps=1", "--set", "save_steps=1"]
    code = cli.main(["run", "-c", str(recipe), "--overwrite", "--max-steps", "2", *changed])
    assert code == 0, capsys.readouterr().err
    assert (workplace / settings["output"] / "run.json").is_file()


@pytest.mark.feature("memory")
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_an_accelerate_file_is_one_that_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8
    assert str(config.distributed_type).rpartition(".")[2] in ("MULTI_GPU", "FSDP", "DEEPSPEED")


@pytest.mark.feature("memory")
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_two_ranks_with_parts_of_a_model_train_as_one(workplace: Path, kind: str) -> None:
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    import os
    import subprocess

    from safetensors.torch import load_file

    settings = yaml.safe_load((EXAMPLES / "accelerate" / f"{kind}.yaml").read_text("utf-8"))
    settings |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (workplace / f"{kind}.yaml").write_text(yaml.safe_dump(settings))
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(workplace / f"{kind}.yaml"),
        "--main_process_port", str(_free_port()), "-m", "sfttrain", "run", str(workplace / "shards"),
        "--model", str(workplace / "model"), "-o", str(workplace / "out" / kind),
        *[word for key, value in training.items() for word in ("--set", f"{key}={value}")],
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone = {**training, "per_device_train_batch_size": 4}
    train_in_process(workplace / "shards", workplace / "model", workplace / f"out/alone-{kind}", alone)
    sharded, whole = (
        load_file(workplace / f"out/{name}/model.safetensors") for name in (kind, f"alone-{kind}")
    )
    assert sharded.keys() == whole.keys()
    for name, weight in whole.items():
        assert (sharded[name] - weight).abs().max() < 1e-4, name  # two steps move weights by 2e-2
