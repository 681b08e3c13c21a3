"""Settings from files, `--set` and flags: what is wrong is named with its place; other tools' names are answered with ours."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from sftdata import settings
from sftdata.cli import main
from sftdata.cli.flags import load_config
from sftdata.config import PrepareConfig, make_config
from sftdata.errors import UsageError
from sftdata.settings import assign, read_settings_file
from sftdata.views.recipe import ViewConfig
from sfttrain.arguments import training_fields
from sfttrain.config import TrainConfig, read_settings

GOOD = "inputs: [rows.jsonl]\ntokenizer: tok\noutput: out\n"


def refusal(tmp_path: Path, text: str, *sets: str) -> str:
    """Return what a settings file is refused with, the folder taken out."""
    path = tmp_path / "sft.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_config([str(path)], None, list(sets), {})
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(f"{tmp_path}/", "")


# ------------------------------------------------------------------------------------------------- places


def test_an_unknown_key_is_named_with_file_and_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, f"{GOOD}\n# a remark\nmax_lenght: 64\n")
    assert said == "sft.yaml:6: unknown setting 'max_lenght'. Fix: did you mean 'max_length'?"


def test_a_wrong_value_is_named_with_file_and_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, f"{GOOD}packing: bdf\n")
    assert said.startswith("sft.yaml:4: setting 'packing': found 'bdf';")
    assert said.endswith("Fix: did you mean 'bfd'?")


def test_a_value_from_set_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    said = refusal(tmp_path, f"{GOOD}packing: bfd\n", "packing=bdf")
    assert said.startswith("packing: found 'bdf';")  # in a shell: --set packing


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("max_length: 128\nmax_length: 64\n", "lines 4 and 5"),
        ("max_length: 128\nmax-length: 64\n", "lines 4 and 5"),
        ("map:\n  question: a\n  answer: b\n  question: c\n", "lines 5 and 7"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path, text: str, lines: str) -> None:
    said = refusal(tmp_path, GOOD + text)
    assert "is there twice" in said
    assert lines in said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [1\nb: 2\n", "sft.yaml:2: not YAML"),
        ("a: !!python/object/apply:os.system [id]\n", "sft.yaml:1: not YAML"),
        ("- a\n- b\n", "found a list; expected settings"),
        ("", "found nothing; expected settings"),
        ("x: " + "[" * 1000 + "]" * 1000, "nested too deep"),
        ("x: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deep"),
    ],
    ids=["cut", "tag", "list", "empty", "deep list", "deep mapping"],
)
def test_a_file_that_holds_no_settings_is_one_line(tmp_path: Path, text: str, word: str) -> None:
    assert word in refusal(tmp_path, text)


def test_an_alias_bomb_takes_no_time(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert "unknown setting 'a0'" in refusal(tmp_path, bomb)


# ------------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("inputs.0=x", "inputs is a list"),
        ("tokenizer.x=1", "tokenizer is a string"),
        ("x=[", "not YAML"),
        ("x=!!python/object/apply:os.system [id]", "not YAML"),
        ("x=" + "[" * 1000, "nested too deep"),
        ("x", "expected KEY=VALUE"),
        ("=x", "expected KEY=VALUE"),
        ("a..b=x", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_set_is_one_line(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        assign({"inputs": ["a"], "tokenizer": "tok"}, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_set_reaches_inside() -> None:
    settings: dict[str, object] = {"map": {"a": "b"}}
    for text in ("map.c=d", "template-kwargs.think=false", "max_length=64"):
        assign(settings, text)
    assert settings == {"map": {"a": "b", "c": "d"}, "template_kwargs": {"think": False}, "max_length": 64}


def test_a_file_keeps_its_values_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("x: 1\n\nmax-length: 2\nm: {y: 3}\n", encoding="utf-8")
    values, places = read_settings_file(path)
    assert (
        values
        == {"x": 1, "max_length": 2, "m": {"y": 3}}
        == yaml.safe_load(path.read_text().replace("max-", "max_"))
    )
    assert {key: place.rpartition(":")[2] for key, place in places.items()} == {
        "x": "1",
        "max_length": "3",
        "m": "4",
    }


# ------------------------------------------------------------------------------------------------- values

HUGE = 99999999999999999999
NUMBERS = ["max_line_bytes", "max_pixels", "min_pixels", "max_length", "slice_bytes", "seed", "workers"]


def test_every_number_is_tried() -> None:
    fields = PrepareConfig.model_fields.items()
    assert [
        name for name, field in fields if "int" in str(field.annotation) and "template" not in name
    ] == NUMBERS


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [HUGE, 2**63, 0, -1])
def test_a_number_that_cannot_be_meant_is_refused(name: str, value: int) -> None:
    if (name, value) == ("seed", 0):  # the default
        return
    with pytest.raises(UsageError, match=f"Setting '{name}'"):
        make_config(inputs="a", tokenizer="t", output="o", **{name: value})


@pytest.mark.parametrize("value", ["200%", "100.5%", "-1", "x", "1%%", True])
def test_a_share_of_rejects_is_at_most_all(value: object) -> None:
    with pytest.raises(UsageError, match="max_rejects"):
        make_config(inputs="a", tokenizer="t", output="o", max_rejects=value)


@pytest.mark.parametrize("value", ["100%", "0", "0.5%", "200"])
def test_a_share_or_a_count_of_rejects_is_taken(value: str) -> None:
    assert make_config(inputs="a", tokenizer="t", output="o", max_rejects=value).max_rejects == value


def test_values_that_yaml_does_not_keep_as_text_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(f"{GOOD}max_rejects: 5\ndate: 2025-03-04\n", encoding="utf-8")
    config = load_config([str(path)], None, [], {})
    assert (config.max_rejects, config.date) == ("5", "2025-03-04")


@pytest.mark.parametrize("value", ["2025-13-01", "2025-02-30", "0000-01-01"])
def test_a_date_that_no_calendar_has_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="Setting 'date'"):
        make_config(inputs="a", tokenizer="t", output="o", date=value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2k", "found '2k'; expected a whole number. Fix: write it in digits, as 2000 or 2048."),
        (0, "found 0; expected a number above 0. Fix: correct it: Tokens per packed row;"),
        (2.5, "found 2.5; expected a whole number. Fix: correct it: "),
        (1 << 31, "found 2147483648; expected 2,147,483,647 or less. Fix: correct it: "),
        ([], "found []; expected a whole number. Fix: correct it: "),
    ],
)
def test_a_wrong_number_is_said_in_words_however_it_is_given(
    tmp_path: Path, value: object, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(inputs="a", tokenizer="t", output="o", max_length=value)
    assert str(caught.value).startswith(f"Setting 'max_length': {said}")
    assert said in refusal(tmp_path, f"{GOOD}max_length: {json.dumps(value)}\n")
    assert said in refusal(tmp_path, GOOD, f"max_length={json.dumps(value)}")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("adapter", 3, "found 3; expected a path. Fix: "),
        ("lora", 3, "found 3; expected names and values, as NAME: VALUE. Fix: "),
        ("lora", {"rank": 8}, "found 8; no such setting. Fix: "),
        ("model_init_kwargs", 3, "found 3; expected names and values, as NAME: VALUE. Fix: "),
        ("model_init_kwargs", ["a"], "found ['a']; expected names and values, as NAME: VALUE. Fix: "),
        ("new_leg", "2k", "found '2k'; expected true or false. Fix: correct it: "),
        ("window", math.inf, "found inf; expected a finite number. Fix: correct it: "),
    ],
)
def test_a_value_of_another_kind_is_said_in_words(key: str, value: object, said: str) -> None:
    model = None if key == "adapter" else "m"
    with pytest.raises(UsageError) as caught:
        read_settings(None, [], {"sets": "set", "output": "out", "model": model, key: value})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preview", "x", "--max-length", "2k"], "--max-length: found '2k'; expected a whole number. Fix: write it in"),
        (["preview", "x", "-t", "y", "--max-length=0"], "--max-length: found 0; expected a number above 0. Fix: "),
        (["preview", "x", "-n", "0"], "-n: found '0'; expected at least 1. Fix: "),
        (["preview", "x", "-nmany"], "-n: found 'many'; expected a whole number. Fix: "),
        (["preview", "x", "--packing", "tight"], "--packing: found 'tight'; expected one of 'bfd', 'wrapped', 'none'. Fix: "),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_said_with_what_was_found(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("given", "said", "then"),
    [
        ({}, 'no model is named. Fix: model="FOLDER" or a Hub id, or init_from_config="FILE".', {"model": "m"}),
        ({"model": "m", "quantize": "nf4"}, 'so it needs lora. Fix: add lora="r=16".', {"lora": "r=16"}),
        ({"model": "m", "init_from_config": "c"}, "both name a model. Fix: leave one of them out.", {"init_from_config": None}),
        ({"model": "m", "weights": [1, 2]}, "2 weights for 1 set. Fix: give one for each.", {"weights": [1]}),
        ({"model": "m", "weights": [0]}, "the weight 0 is not above 0. Fix: leave its set out instead.", {"weights": []}),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_without_is_named_with_the_flag_that_gives_it(
    given: dict[str, object], said: str, then: dict[str, object]
) -> None:
    given = {"sets": "set", "output": "out"} | given
    with pytest.raises(UsageError) as caught:
        read_settings(None, [], given)
    assert str(caught.value).endswith(said)
    read_settings(None, [], given | then)


# ------------------------------------------------------------------------------------------------- other tools


def test_every_answer_names_a_setting_that_there_is() -> None:
    trainer = {*TrainConfig.model_fields, *training_fields()}
    for name, answer in settings.ANSWERS.items():
        known = set(PrepareConfig.model_fields) if answer.program == "sftdata" else trainer
        assert answer.setting is None or answer.setting in known, name
        assert answer.setting or answer.remark, name


def test_no_setting_of_ours_is_taken_for_another_tools() -> None:
    for name, answer in settings.ANSWERS.items():
        assert name not in PrepareConfig.model_fields or name == answer.setting


def test_the_trainer_knows_every_setting_of_the_data_side() -> None:
    trainer = {*TrainConfig.model_fields, *training_fields()}
    for name in set(PrepareConfig.model_fields) - trainer:
        assert "sftdata prepare" in (settings.answer(name, "sfttrain") or ""), name


WANTED = """
packing_strategy max_seq_length assistant_only_loss completion_only_loss dataset_text_field pad_token dataset_num_proc
chat_template_path padding_free formatting_func truncation_mode sequence_len sample_packing pad_to_sequence_len
train_on_inputs roles_to_train train_on_eos excess_length_strategy cutoff_len mask_history train_on_prompt template
neat_packing preprocessing_num_workers model_name_or_path loss_scale truncation_strategy packing_length learning_rate
num_train_epochs per_device_train_batch_size lora_r attn_implementation gradient_checkpointing val_set_size val_size
split_dataset_ratio interleave_probs max_samples dataset_exact_deduplication
"""


@pytest.mark.parametrize("name", WANTED.split())
def test_another_tools_setting_is_answered_with_ours(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"text": "a"}))
    fixes = []
    for more in (["--set", f"{name}=1"], [f"--{name.replace('_', '-')}", "1"], [f"--{name}", "1"]):
        assert main(["prepare", "rows.jsonl", "-t", "tok", "-o", "out", *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        fixes.append(said.partition("Fix: ")[2])
    assert fixes[1] == fixes[2]
    assert not any(word in fixes[0] for word in ("did you mean", "known settings", "--help"))
    answer = settings.ANSWERS[name]
    if answer.setting is None:
        assert answer.remark in fixes[0]
    else:
        flag = settings.flag_of(answer.setting, answer.program)
        assert flag in fixes[1]
        assert fixes[0] == fixes[1].replace(f"here it is {flag}", f"here it is {answer.setting}")
        assert ("sfttrain run" in fixes[0]) == (answer.program == "sfttrain")


@pytest.mark.parametrize("model", [PrepareConfig, ViewConfig])
def test_a_text_of_a_form_is_shown_by_examples(model: type[BaseModel]) -> None:
    """What is expected of such a setting is never said as a regular expression."""
    for name, schema in model.model_json_schema()["properties"].items():
        if "pattern" in schema:
            assert schema["examples"], name
            assert all(re.fullmatch(schema["pattern"], example) for example in schema["examples"])
