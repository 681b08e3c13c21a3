"""`sftdata init --from`: 12 configurations of each tool, no setting of which goes unmentioned; what they mean."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sftdata
from sftdata import other_tools
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.other_tools import carry_over
from sftdata.registry import read_registry
from sftdata.set.opened import open_set
from sfttrain.config import read_settings
from tests.train_runs import OUR_WARNINGS, tiny_llama

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    (ROOT / "tests/other_configs.yaml").read_text("utf-8")
)
TOOLS = {"axolotl": "axolotl", "factory": "LLaMA-Factory", "trl": "TRL"}
ALL = [(tool, name) for tool, configs in CONFIGS.items() for name in configs]


def _write(folder: Path, given: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False), "utf-8")
    return path


def test_there_are_twelve_of_each_tool() -> None:
    assert {tool: len(configs) for tool, configs in CONFIGS.items()} == dict.fromkeys(TOOLS, 12)


@pytest.mark.feature("settings of other tools")
@pytest.mark.parametrize(("tool", "name"), ALL)
def test_every_setting_is_carried_over_or_named_and_what_is_written_is_read(
    tool: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = CONFIGS[tool][name]
    assert main(["init", "--from", str(_write(tmp_path, given))]) == 0
    assert f"of {TOOLS[tool]}." in capsys.readouterr().err
    written = {path: (tmp_path / path).read_text("utf-8") for path in ("sft.yaml", "sft-train.yaml")}
    found = carry_over(tmp_path / "theirs.yaml", "shards")
    said = {re.split(r"[.\[:]", part)[0] for part in (*found.needless, *found.lost)} | found.carried
    assert said >= set(given)
    for part in (*found.needless, *found.lost):
        assert all(f"# {part}: " in text for text in written.values()), part
    for (program, _), origins in found.origins.items():
        assert f"# {', '.join(origins)}\n" in written["sft.yaml" if program == "data" else "sft-train.yaml"]
    assert main(["config", "check", "sft.yaml"]) == 0
    settings = read_settings(tmp_path / "sft-train.yaml", [], {})
    data = yaml.safe_load(written["sft.yaml"])
    made = [data["output"]] if "eval" not in data else [f"{data['output']}/train"]
    assert [str(folder) for folder in settings.sets] == made


@pytest.mark.parametrize(("tool", "name"), ALL)
def test_training_takes_what_is_carried_over(tool: str, name: str, tmp_path: Path) -> None:
    """Each field exists, by this name, and takes this value."""
    from sfttrain.arguments import checked_training

    found = carry_over(_write(tmp_path, CONFIGS[tool][name]), "set")
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(found.train), "utf-8")
    training = read_settings(path, [], {}).training
    checked_training(
        {name: value for name, value in training.items() if name not in ("bf16", "tf32", "deepspeed")}
    )


EXPECTED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        {"base_model": "a/b", "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "sequence_len": 64,
         "datasets": [{"path": "x/y", "type": "alpaca"}], "val_set_size": 0.1, "sample_packing": False, "output_dir": "o"},
        {"tokenizer": "a/b", "max_length": 64, "inputs": ["x/y"], "kind": "completion", "eval": "10%", "packing": "none"},
        {"model": "a/b", "quantize": "nf4", "lora": {"r": 4, "alpha": 8, "target": "all-linear"}, "output": "o",
         "sets": ["set/train"], "eval": {"held": "set/eval"}},
    ),
    (
        {"model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "lora", "lora_target": "q_proj,v_proj", "cutoff_len": 99,
         "mask_history": True, "quantization_bit": 4, "max_samples": 7, "template": "qwen"},
        {"max_length": 99, "train_on": "last-assistant", "cap": {"*": "7 rows"}, "packing": "none"},
        {"lora": {"r": 8, "alpha": 16, "target": "q_proj+v_proj"}, "quantize": "nf4", "learning_rate": 5e-5,
         "num_train_epochs": 3, "sets": ["set"]},
    ),
    (
        {"model_name_or_path": "a/b", "dataset_name": "x/y", "use_peft": True, "packing": True, "assistant_only_loss": True,
         "truncation_mode": "keep_end", "max_steps": 5, "warmup_ratio": 0.1},
        {"inputs": ["x/y"], "packing": "bfd", "train_on": "assistant", "overlong": "truncate-left", "max_length": 1024},
        {"lora": {"r": 16, "alpha": 32, "dropout": 0.05, "target": "q_proj+v_proj"},
         "max_steps": 5, "warmup_steps": 0.1, "learning_rate": 2e-5},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "data", "train"), EXPECTED, ids=list(TOOLS))
def test_settings_mean_what_they_meant(
    given: dict[str, Any], data: dict[str, Any], train: dict[str, Any], tmp_path: Path
) -> None:
    found = carry_over(_write(tmp_path, given), "set")
    assert {name: found.data.get(name) for name in data} == data
    assert {name: found.train.get(name) for name in train} == train
    assert not {"max_steps", "num_train_epochs"} <= found.train.keys()


_TRL = {"model_name_or_path": "a/b", "dataset_name": "x/y"}
_AXOLOTL = {"base_model": "a/b", "datasets": [{"path": "x/y"}]}
_FACTORY = {"model_name_or_path": "a/b", "stage": "sft", "dataset": "x"}


@pytest.mark.parametrize(
    ("given", "program", "name", "value"),
    [
        # The rank holds wherever in the file it stands, and adapters are made only where they are asked for.
        (_TRL | {"lora_r": 8, "use_peft": True}, "train", "lora",
         {"r": 8, "alpha": 32, "dropout": 0.05, "target": "q_proj+v_proj"}),
        (_TRL | {"lora_r": 8, "lora_alpha": 4, "use_peft": False}, "train", "lora", None),
        (_AXOLOTL | {"lora_r": 32, "adapter": "lora"}, "train", "lora", {"r": 32, "alpha": 16, "target": "q_proj+v_proj"}),
        (_AXOLOTL | {"lora_r": 32}, "train", "lora", None),
        (_FACTORY | {"lora_rank": 64}, "train", "lora", {"r": 64, "alpha": 128, "target": "all-linear"}),
        (_FACTORY | {"lora_rank": 64, "finetuning_type": "full"}, "train", "lora", None),
        (_FACTORY | {"adapter_name_or_path": "c/d", "lora_rank": 64}, "train", "lora", None),
        (_AXOLOTL | {"load_in_4bit": True, "adapter": "lora"}, "train", "quantize", "nf4"),
        (_AXOLOTL, "data", "overlong", "drop"),
        (_AXOLOTL | {"excess_length_strategy": "truncate"}, "data", "overlong", "truncate"),
        (_AXOLOTL | {"datasets": [{"path": "x/y", "type": "completion"}]}, "data", "overlong", "split"),
        (_AXOLOTL | {"datasets": [{"path": "x/y", "type": "chat_template"}]}, "data", "kind", None),
        (_FACTORY | {"mask_history": True}, "data", "overlong", "truncate-left"),
        (_AXOLOTL, "train", "per_device_train_batch_size", 1),
        (_AXOLOTL, "train", "lr_scheduler_type", "cosine"),
        (_TRL | {"packing_strategy": "wrapped", "packing": True}, "data", "packing", "wrapped"),
        (_TRL | {"packing_strategy": "wrapped"}, "data", "packing", "none"),
        (_TRL | {"save_strategy": False}, "train", "save_strategy", "no"),
        (_TRL | {"bf16": False}, "train", "bf16", False),
        (_TRL | {"warmup_ratio": 0.1, "warmup_steps": 0}, "train", "warmup_steps", 0.1),
        (_TRL | {"warmup_steps": 5, "warmup_ratio": 0.1}, "train", "warmup_steps", 5),
        (_TRL | {"hub_model_id": "u/m", "push_to_hub": True}, "train", "push_to_hub", "u/m"),
        (_TRL | {"hub_model_id": "u/m"}, "train", "push_to_hub", None),
        (_TRL | {"push_to_hub": True}, "train", "push_to_hub", None),
    ],
)  # fmt: skip
def test_no_setting_undoes_another_by_its_place(
    given: dict[str, Any], program: str, name: str, value: object, tmp_path: Path
) -> None:
    for order in (given, dict(reversed(given.items()))):
        found = carry_over(_write(tmp_path, order), "set")
        assert getattr(found, program).get(name) == value
        assert {
            re.split(r"[.\[:]", part)[0] for part in (*found.needless, *found.lost)
        } | found.carried >= set(given)


INFO: dict[str, dict[str, Any]] = {
    "here": {"file_name": "here.json", "columns": {"prompt": "q", "response": "a"}},
    "there": {"hf_hub_url": "x/y", "ms_hub_url": "x/y", "formatting": "sharegpt", "ranking": True, "split": "test"},
    "talk": {
        "file_name": "talk.json", "formatting": "sharegpt", "columns": {"messages": "turns", "images": "pics"},
        "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "me", "assistant_tag": "gpt"},
    },
    "gone": {"ms_hub_url": "x/y"}, "made": {"script_url": "m.py"},
}  # fmt: skip


def test_datasets_of_a_dataset_info_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    given = {"model_name_or_path": "a/b", "stage": "sft", "dataset": "here, there, nowhere"}
    found = carry_over(_write(tmp_path, given), "set")
    assert found.data["inputs"] == ["here", "there", "nowhere"]
    assert found.sources == {
        "here": {"path": tmp_path / "data/here.json", "map": {"instruction": "q", "output": "a"}},
        "there": {"path": "x/y", "split": "test"},
    }
    assert {"dataset: nowhere", "dataset: there.ranking"} <= found.lost.keys()
    alone = carry_over(_write(tmp_path, given | {"dataset": "here"}), "set")
    assert (alone.data["map"], alone.sources) == ({"instruction": "q", "output": "a"}, {})
    found = carry_over(_write(tmp_path, given | {"max_samples": 7}), "set")
    assert found.data["cap"] == {"here": "7 rows", "there": "7 rows"}


def test_a_dataset_info_becomes_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    turns = [{"role": "me", "content": "q"}, {"role": "gpt", "content": "a"}]
    Path("data/talk.json").write_text(json.dumps([{"turns": turns}] * 5))
    assert main(["init", "--from", "data/dataset_info.json"]) == 0
    assert yaml.safe_load(Path("datasets.yaml").read_text()) == {
        "here": {"path": "data/here.json", "map": {"instruction": "q", "output": "a"}},
        "there": {"path": "x/y", "split": "test"},
        "talk": {"path": "data/talk.json", "map": {"messages": "turns"}, "map_role": {"me": "user"}},
    }
    said = capsys.readouterr().err
    for name in ("there.ranking", "talk.columns.images", "talk.tags.content_tag", "gone", "made"):
        assert f"not carried over: {name}: " in said
        assert f"# {name}: " in Path("datasets.yaml").read_text()
    flags = ["-t", str(EXAMPLES / "tokenizer"), "-o", "set", "--max-length", "64", "--workers", "1"]
    assert main(["prepare", "talk", *flags]) == 0
    assert open_set("set").manifest.ledger.rows_kept == 5


def test_datasets_of_names_that_no_source_has_become_sources_all_the_same(tmp_path: Path) -> None:
    names = ("a b", "a/b", "_x", "日本", "日本 2", "")
    info = {name: {"file_name": f"{number}.json"} for number, name in enumerate(names)}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert (
        main(["init", "--from", str(tmp_path / "dataset_info.json"), "-f", str(tmp_path / "datasets.yaml")])
        == 0
    )
    found = read_registry(tmp_path / "datasets.yaml")
    assert {name: Path(entry.path[0]).name for name, entry in found.items()} == {
        "a-b": "0.json", "a-b-2": "1.json", "x": "2.json", "data": "3.json", "2": "4.json", "data-2": "5.json",
    }  # fmt: skip


def test_datasets_that_differ_become_sources_and_their_folder_is_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    info = {
        "one": {"file_name": "one.json", "split": "train", "columns": {"prompt": "q"}},
        "two": {"file_name": "two.json", "split": "test", "columns": {"prompt": "ask"}},
    }
    (tmp_path / "mine/dataset_info.json").write_text(json.dumps(info))
    given = {"model_name_or_path": "a/b", "stage": "sft", "dataset_dir": "mine", "dataset": "one,two"}
    found = carry_over(_write(tmp_path, given), "set")
    assert [source["path"] for source in found.sources.values()] == [
        Path("mine/one.json"), Path("mine/two.json"),
    ]  # fmt: skip
    assert [source["split"] for source in found.sources.values()] == ["train", "test"]
    datasets = [
        {"path": "x/y", "field_messages": "chat"},
        {"path": "z/y", "field_messages": "talk", "type": {"field": "q"}, "split": "train[:5%]"},
    ]
    path = _write(tmp_path, {"base_model": "a/b", "datasets": datasets})
    found = carry_over(path, "set")
    assert not {"split", "map"} & found.data.keys()
    assert found.sources == {
        "y": {"path": "x/y", "map": {"messages": "chat"}},
        "y-2": {"path": "z/y", "map": {"messages": "talk"}, "split": "train[:5%]"},
    }
    assert "datasets[2].type" in found.lost
    assert main(["init", "--from", str(path)]) == 0
    assert main(["config", "check", "sft.yaml"]) == 0
    assert yaml.safe_load(Path("sft.yaml").read_text())["registry"] == "sft-datasets.yaml"
    capsys.readouterr()
    assert main(["init", "--from", str(path), "-f", "-"]) == 0
    written = [Path(name).read_text() for name in ("sft-datasets.yaml", "sft.yaml", "sft-train.yaml")]
    assert capsys.readouterr().out == "\n---\n".join(written)
    alike = [{"path": name, "field_messages": "chat", "split": "train"} for name in ("x/y", "x/z")]
    found = carry_over(_write(tmp_path, {"base_model": "a/b", "datasets": alike}), "set")
    assert (found.data["split"], found.data["map"], found.sources) == ("train", {"messages": "chat"}, {})
    (tmp_path / "mine/dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match="dataset_info.json: cannot be read .*correct it"):
        carry_over(_write(tmp_path, given), "set")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "none.yaml"], "none.yaml: No such file"),
        (["--from", "twice.yaml"], "twice.yaml:2: 'base_model' is there twice"),
        (["--from", "odd.yaml"], "names no model.*give the settings file of TRL, axolotl or LLaMA-Factory"),
        (["--from", "trl.yaml", "--max-length", "5"], "--from takes all settings from the file.*leave the others out"),
        (["--from", "trl.yaml", "chats.jsonl"], "--from takes all settings from the file"),
        (["--from", "trl.yaml", "-f", "there.yaml"], "there-train.yaml: exists already"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_refused_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text("a: 1\n")
    Path("twice.yaml").write_text("base_model: a\nbase_model: b\n")
    Path("trl.yaml").write_text("model_name_or_path: a/b\ndataset_name: x/y\n")
    Path("there-train.yaml").touch()
    assert main(["init", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not Path("sft.yaml").exists()


ODD = ["x", 3, -1.5, True, [1], {"a": 1}, [{"a": 1}], [[1]], {1: 2}, float("nan"), float("inf"), "", 0, None]
ODD_ONES: list[tuple[dict[str, Any], str]] = [
    (_TRL | {"use_peft": True, "lora_r": "x"}, r"theirs.yaml:\d: lora_r: found 'x'; expected a whole number above 0\."),
    (_TRL | {"learning_rate": "fast"}, r"theirs.yaml:\d: learning_rate: found 'fast'; expected a number\."),
    (_TRL | {"bf16": "yes please"}, r"theirs.yaml:\d: bf16: found 'yes please'; expected true or false\."),
    (_TRL | {"model_name_or_path": 7}, r"theirs.yaml:\d: model_name_or_path: found 7; expected a text\."),
    (_AXOLOTL | {"datasets": ["x"]}, r"theirs.yaml:\d: datasets: found \['x'\]; expected a list of mappings"),
    (_AXOLOTL | {"datasets": [{"path": 1}]}, r"theirs.yaml:\d: datasets: found .*; expected a text\."),
    (_AXOLOTL | {"special_tokens": "x"}, r"theirs.yaml:\d: special_tokens: found 'x'; expected a mapping\."),
    (_AXOLOTL | {"sequence_len": 1 << 40}, r"theirs.yaml:\d: sequence_len: setting 'max_length': found 1099511627776"),
    (_FACTORY | {"cutoff_len": -1}, r"theirs.yaml:\d: cutoff_len: found -1; expected a whole number above 0\."),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), ODD_ONES)
def test_a_value_of_another_kind_is_named_with_its_place(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        carry_over(_write(tmp_path, given), "set")


@pytest.mark.parametrize("base", [_TRL, _AXOLOTL | {"adapter": "lora"}, _FACTORY])
def test_no_value_is_an_internal_error(base: dict[str, Any], tmp_path: Path) -> None:
    rules = {name for tool in other_tools.TOOLS for name in tool.rules} | other_tools._COMMON.keys()
    refused = 0
    for name, value in itertools.product(sorted(rules), ODD):
        with contextlib.suppress(UsageError):
            carry_over(_write(tmp_path, base | {name: value}), "set")
            refused -= 1
        refused += 1
    assert refused > 100


def test_llama_factory_computes_in_float32_where_its_file_says_nothing(tmp_path: Path) -> None:
    """It casts what is trained to float32, and has no autocast without bf16 or fp16."""
    full = _FACTORY | {"finetuning_type": "full"}
    assert carry_over(_write(tmp_path, full), "set").train["bf16"] is False
    assert carry_over(_write(tmp_path, full | {"bf16": True}), "set").train["bf16"] is True
    found = carry_over(_write(tmp_path, full | {"pure_bf16": True}), "set")
    assert (found.train["bf16"], found.train["dtype"]) == (False, "bfloat16")
    assert "(dtype)" not in found.lost
    found = carry_over(_write(tmp_path, _FACTORY), "set")
    assert found.train["bf16"] is False
    assert "the frozen base" in found.lost["(dtype)"]


def test_what_is_held_out_is_evaluated_where_the_tool_does_so(tmp_path: Path) -> None:
    found = carry_over(_write(tmp_path, _FACTORY | {"val_size": 0.1}), "set")
    assert (found.data["eval"], found.train["eval_strategy"]) == ("10%", "no")
    found = carry_over(_write(tmp_path, _FACTORY | {"val_size": 0.1, "eval_strategy": "steps"}), "set")
    assert found.train["eval_strategy"] == "steps"
    assert "eval_strategy" not in carry_over(_write(tmp_path, _AXOLOTL | {"val_set_size": 0.1}), "set").train
    assert "eval_strategy" not in carry_over(_write(tmp_path, _FACTORY), "set").train


def test_a_dataset_that_only_modelscope_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"x": {"ms_hub_url": "a/b", "formatting": "sharegpt"}})
    )
    found = carry_over(_write(tmp_path, _FACTORY), "set")
    assert found.data["inputs"] == ["x"]
    assert "only ModelScope has it" in found.lost["dataset: x"]


@pytest.mark.parametrize("info", ["here/data", "here/theirs/data", "here/theirs/examples"])
def test_datasets_are_found_from_the_folder_of_the_file_as_from_that_of_the_tool(
    info: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/theirs/examples").mkdir(parents=True)
    (tmp_path / info).mkdir(exist_ok=True)
    (tmp_path / info / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json"}}))
    wanted = [tmp_path / info / "x.json"]
    path = _write(tmp_path / "here/theirs/examples", _FACTORY)
    monkeypatch.chdir(tmp_path / "here")
    found = carry_over(path.relative_to(tmp_path / "here"), "set")
    assert [(tmp_path / "here" / one).resolve() for one in found.data["inputs"]] == wanted
    monkeypatch.chdir(tmp_path)
    assert [Path(one).resolve() for one in carry_over(path, "set").data["inputs"]] == wanted


def test_a_dataset_that_nothing_knows_is_an_input_by_its_name_and_missed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = _FACTORY | {"model_name_or_path": str(EXAMPLES / "tokenizer"), "dataset": "identity,alpaca_en"}
    assert main(["init", "--from", str(_write(tmp_path, given))]) == 0
    assert yaml.safe_load(Path("sft.yaml").read_text())["inputs"] == ["identity", "alpaca_en"]
    assert "not carried over: dataset: identity: no dataset_info.json in data/" in capsys.readouterr().err
    assert main(["prepare", "sft.yaml"]) == 2
    assert "identity" in capsys.readouterr().err
    Path("datasets.yaml").write_text(
        yaml.safe_dump({name: str(EXAMPLES / "instructions.json") for name in ("identity", "alpaca_en")})
    )
    assert main(["prepare", "sft.yaml", "--workers", "1"]) == 0  # the fix: a registry
    online = carry_over(_write(tmp_path, _FACTORY | {"dataset_dir": "ONLINE", "dataset": "a/b,c/d"}), "set")
    assert (online.data["inputs"], online.sources, "(inputs)" in online.lost) == (["a/b", "c/d"], {}, False)


def test_a_template_that_is_not_named_is_named_as_read_otherwise(tmp_path: Path) -> None:
    for given in (_FACTORY, _FACTORY | {"template": None}):
        assert "before each question" in carry_over(_write(tmp_path, given), "set").lost["template"]
    named = carry_over(_write(tmp_path, _FACTORY | {"template": "qwen"}), "set").lost["template"]
    assert "chat_template names another" in named


@pytest.mark.slow
@pytest.mark.filterwarnings(OUR_WARNINGS)
def test_what_is_written_prepares_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sfttrain.cli import main as train

    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model", vocabulary=1024)
    shutil.copytree(EXAMPLES / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    given = {
        "model_name_or_path": "model", "dataset_name": str(EXAMPLES / "completions.jsonl"), "max_steps": 2, "output_dir": "out",
        "per_device_train_batch_size": 2, "use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"],
    }  # fmt: skip
    assert main(["init", "--from", str(_write(tmp_path, given))]) == 0
    advised = (
        capsys.readouterr().err.strip().splitlines()[-1].partition("Look at them, then: ")[2].split(" && ")
    )
    assert advised == ["sftdata prepare sft.yaml", "sfttrain run -c sft-train.yaml"]
    assert main(advised[0].split()[1:]) == 0
    assert train(advised[1].split()[1:]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------- against TRL itself


def _rows(kind: str) -> list[dict[str, Any]]:
    """200 rows, of several lengths, some longer than there is room for."""
    if kind == "prompts":
        return [
            {"prompt": f"Count to {n}:", "completion": " " + " ".join(map(str, range(n)))}
            for n in range(1, 201)
        ]
    return [
        {"messages": [
            {"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": " ".join(map(str, range(n)))},
            {"role": "user", "content": "And back?"}, {"role": "assistant", "content": " ".join(map(str, range(n, 0, -1)))},
        ]}
        for n in range(1, 201)
    ]  # fmt: skip


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("prompts", {"max_length": 128}),
        ("prompts", {"max_length": 96, "completion_only_loss": False}),
        ("chats", {"max_length": 256, "assistant_only_loss": True}),
        ("chats", {"max_length": 256, "assistant_only_loss": True, "truncation_mode": "keep_end"}),
    ],
)
def test_ids_and_labels_are_those_of_trl(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer")
    tokenizer.chat_template = CHATML
    given = {"model_name_or_path": "a/b", "dataset_name": "x/y", **settings}
    found = carry_over(_write(tmp_path, given), str(tmp_path / "set"))
    carried = {
        name: value for name, value in found.data.items() if name not in ("inputs", "tokenizer", "output")
    }
    sftdata.prepare(_rows(kind), tokenizer=tokenizer, output=tmp_path / "set", workers=1, **carried)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), report_to="none", bf16=False, use_cpu=True, **settings
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(_rows(kind)),
        processing_class=tokenizer,
    )
    theirs = []
    for number in range(200):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        kept = batch["attention_mask"][0].bool() if "attention_mask" in batch else slice(None)
        labels = batch["labels"][0][kept].clone()
        labels[:1] = -100  # which nothing predicts
        theirs.append((batch["input_ids"][0][kept].tolist(), labels.tolist()))
    opened = open_set(tmp_path / "set")
    ours = [
        (opened[row].input_ids.tolist(), np.asarray(opened[row].labels).tolist())
        for row in range(len(opened))
    ]
    assert len(ours) == 200
    assert ours == theirs


def _row(tool: str, name: str, folder: Path) -> str:
    """Return what becomes of a file, as a line of the page."""
    given = CONFIGS[tool][name]
    found = carry_over(_write(folder, given), "set")
    lost = {re.sub(r"\[\d+\]|(?<=^dataset): .*", "", part) for part in found.lost if not part.startswith("(")}
    needless = {re.split(r"[.\[:]", part)[0] for part in found.needless} - found.carried
    names = ", ".join(f"`{part}`" for part in sorted(lost)) or "none"
    return f"| {TOOLS[tool]} | `{name}` | {len(given)} | {len(found.carried)} | {len(needless)} | {names} |"


def test_the_page_says_what_becomes_of_each_file(tmp_path: Path) -> None:
    page = (ROOT / "docs/moving-from-trl.md").read_text("utf-8").splitlines()
    assert [row for row in (_row(*one, tmp_path) for one in ALL) if row not in page] == []


def test_a_wrong_file_says_so_from_python(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the settings file of TRL, axolotl or LLaMA-Factory"):
        carry_over(_write(tmp_path, {"model": "a/b"}), "set")
