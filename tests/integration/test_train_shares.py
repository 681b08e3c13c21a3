"""Sets by shares, legs on other data, and the account of what was seen: told, kept over kills and ranks, and exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from sftdata.cli import main as sftdata_main
from sftdata.errors import UsageError
from sftdata.set.opened import open_set
from sfttrain.cli import main
from sfttrain.seen import read_account
from sfttrain.trainer import SftTrainer
from tests.train_runs import OUR_WARNINGS, ROOT, Fleet, tiny_llama, train_in_process
from tests.train_sets import make_set
from tests.view_sets import prepare, view, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
CONFIG = ROOT / "examples/tiny-model/config.json"
STEPS = {"save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
Document = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of two sources whose rows all differ, and views of them."""
    folder = tmp_path_factory.mktemp("sets")
    for name in "ab":
        rows = [
            [{"role": "user", "content": f"{name} {number}: look"}, {"role": "assistant", "content": "on " * (number % 9 + 1)}]
            for number in range(60)
        ]  # fmt: skip
        write_lines(folder / f"{name}.jsonl", [{"messages": row} for row in rows])
        prepare(folder / name, [folder / f"{name}.jsonl"], max_length=128)
    view(
        folder / "mixed",
        folder / "a",
        folder / "b",
        mix={"a.jsonl": 3, "b.jsonl": 1},
        passes=2,
        max_length=96,
        write=False,
    )
    view(folder / "cut", folder / "b", packing="none", max_length=40, write=False)
    return folder


@pytest.mark.feature("mixtures")
def test_shares_are_told_before_the_run_in_its_card_its_report_and_its_folder(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(sets / "a"), str(sets / "b"), "--init-from-config", str(CONFIG), "-o", str(tmp_path / "out")]
    given += [
        "--mix",
        "a=75%",
        "--mix",
        "b=25%",
        "--max-steps",
        "30",
        "--set",
        "gradient_accumulation_steps=2",
    ]
    assert main(["plan", *given]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    assert main(["run", *given]) == 0
    said = capsys.readouterr().err
    told_again = plan[: next(number for number, line in enumerate(plan) if line.startswith("time: "))]
    assert all(line in said for line in told_again)
    assert plan[0].startswith("data: 30 steps of 2 rows; an epoch is ")
    seen = json.loads((tmp_path / "out/seen.json").read_text())
    (leg,) = seen["legs"]
    rows, shares = (sum(part[name] for part in leg["sets"]) for name in ("rows", "share"))
    assert (rows, seen["steps"]) == (60, 30)
    assert shares == pytest.approx(1)
    card, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    for part in leg["sets"]:
        assert abs(part["share"] - part["asked"]) < 0.02
        taken = f"{part['rows']:,} rows, {part['tokens']:,} tokens, {part['trained']:,} trained, {part['passes']:.2f} passes."
        told = f"{part['name']}: {part['asked']:.3%} asked, {part['share']:.3%} taken: {taken}"
        assert told in plan
        assert (
            f"| {part['name']} | 1 to 30 | {part['asked']:.3%} | {part['share']:.3%} | {part['rows']:,} |"
            in card
        )
        assert f'<td class="n">{part["share"]:.3%}</td>' in page
    assert "<h2>Data</h2>" in page


def test_a_share_that_rows_are_too_coarse_for_is_met_by_a_view(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sets)
    coarse = "a b --init-from-config {} -o {} --mix a=70 --mix b=30 --max-steps 3".format(
        CONFIG, tmp_path / "out"
    )
    assert main(["plan", *coarse.split()]) == 0
    assert "`sftdata view --mix` makes a set that meets them by documents" in capsys.readouterr().out
    made = f"view a b -o {tmp_path / 'made'} --mix a.jsonl=70 --mix b.jsonl=30"
    assert sftdata_main(made.split()) == 0
    shares = re.findall(r"% asked, ([\d.]+)% of trained taken", capsys.readouterr().err)
    assert [float(share) for share in shares] == pytest.approx([70, 30], abs=0.5)
    assert main(["run", str(tmp_path / "made"), *coarse.split()[2:6], "--max-steps", "1"]) == 0
    said = capsys.readouterr().err
    assert all(f"{note}: 1 step of 1 row; " in said for note in ("data", "plan"))


@pytest.mark.feature("mixtures")
def test_a_bound_on_passes_is_held_and_its_advice_works(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sets)
    base = f"plan a b --init-from-config {CONFIG} -o {tmp_path / 'out'} --mix a=90 --mix b=10"
    for length, alone in (("--max-steps 40", ""), ("--epochs 4", " without epochs")):
        assert main(f"{base} {length} --passes 2.5".split()) == 2
        said = capsys.readouterr().err
        refused = r"a: \d+ steps go through it ([\d.]+) times; --passes allows 2.5. Fix: "
        found = re.search(rf"{refused}--passes ([\d.]+), or --max-steps (\d+)(.*)\.\n", said)
        assert found is not None, said
        assert found[4] == alone
        assert main(f"{base} {length} --passes {found[2]}".split()) == 0
        assert main(f"{base} --max-steps {found[3]} --passes 2.5".split()) == 0
        assert main(f"{base} --max-steps {int(found[3]) + 1} --passes 2.5".split()) == 2
        capsys.readouterr()


# ------------------------------------------------------------------------------------ the account, exactly


class KilledError(Exception):
    """Where a run is broken off."""


class Recorder(TrainerCallback):
    """Keep every document that a step was trained on, from its batches; break off after a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, list[Document]] = {}
        self.die_after = 10_000
        compute_loss, recorder = SftTrainer.compute_loss, self

        def record(trainer: SftTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            recorder.take(trainer.state.global_step, inputs)
            return compute_loss(trainer, model, inputs, *rest, **more)

        monkeypatch.setattr(SftTrainer, "compute_loss", record)

    def take(self, step: int, inputs: dict[str, Any]) -> None:
        ids, labels, places = (
            inputs[name].flatten().tolist() for name in ("input_ids", "labels", "position_ids")
        )
        starts = [index for index, place in enumerate(places) if place == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            if any(label != -100 for label in labels[start:stop]):
                self.steps.setdefault(step, []).append((tuple(ids[start:stop]), tuple(labels[start:stop])))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.die_after:
            raise KilledError


def _places(*folders: Path) -> dict[Document, tuple[str, str, int]]:
    """Return source and line of each document, by its ids and labels."""
    found = {}
    for opened in map(open_set, folders):
        for row in opened:
            for document in row.documents():
                name, line = opened.origin(document.example_id)
                source = next(part for part in opened.manifest.sources if part.name == name)
                key = tuple(document.input_ids.tolist()), tuple(document.labels.tolist())
                place = name.partition("#")[0], source.xxh3, line
                assert found.setdefault(key, place) == place
    return found


def _account(folder: Path) -> tuple[Counter[tuple[str, str, int]], dict[tuple[str, str], tuple[int, int]]]:
    seen, lines = read_account(folder)
    shown = Counter(
        {
            (*key, line + 1): int(part.times[line])
            for key, part in lines.items()
            for line in np.flatnonzero(part.times).tolist()
        }
    )
    return shown, {(part.name, part.xxh3): (part.tokens, part.trained) for part in seen.sources}


@pytest.mark.feature("legs")
def test_the_account_holds_what_the_batches_held_over_kills_and_legs(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = _places(sets / "a", sets / "b", sets / "mixed", sets / "cut")
    recorder = Recorder(monkeypatch)
    legs: list[tuple[list[Path], int, dict[str, Any]]] = [
        ([sets / "a", sets / "b"], 9, {"mix": {"a": 1, "b": 2}}),
        ([sets / "a", sets / "b"], 15, {"mix": {"a": 3, "b": 1}, "mix_by": "tokens"}),
        ([sets / "mixed"], 21, {}),
        ([sets / "cut", sets / "a"], 27, {"weights": (0.5, 1.0)}),
    ]
    for number, (folders, stop, settings) in enumerate(legs):
        for die_after in (stop - 3, 10_000):  # steps between the last checkpoint and that are taken again
            recorder.die_after = die_after
            try:
                _train(folders, tmp_path / "out", stop, recorder, number > 0, settings)
            except KilledError:
                assert die_after < stop
        shown = Counter(places[document] for step in range(stop) for document in recorder.steps[step])
        sums: dict[tuple[str, str], list[int]] = {}
        for step in range(stop):
            for ids, labels in recorder.steps[step]:
                own = sums.setdefault(places[ids, labels][:2], [0, 0])
                own[0] += len(ids)
                own[1] += sum(label != -100 for label in labels[1:])
        assert _account(tmp_path / "out") == (
            shown,
            {key: (tokens, trained) for key, (tokens, trained) in sums.items()},
        )
        assert _account(tmp_path / "out" / f"checkpoint-{stop}")[0] == shown
    seen = read_account(tmp_path / "out")[0]
    assert [(leg.first_step, leg.steps) for leg in seen.legs] == [(0, 9), (9, 6), (15, 6), (21, 6)]
    assert "| cut | 22 to 27 |" in (tmp_path / "out/README.md").read_text()


def _train(
    folders: list[Path], output: Path, stop: int, recorder: Recorder, new_leg: bool, settings: dict[str, Any]
) -> None:
    from sfttrain.config import read_settings
    from sfttrain.run import train

    own = {
        "sets": tuple(folders),
        "output": output,
        "init_from_config": CONFIG,
        "new_leg": new_leg,
        **settings,
    }
    train(read_settings(None, [], {**own, "training": {**STEPS, "max_steps": stop}}), callbacks=[recorder])


# ------------------------------------------------------------------------------------------ kills and ranks


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


def _arguments(folder: Path, output: Path, leg: int, ranks: int) -> list[str]:
    data = (
        ["one", "two", "--mix", "one=2", "--mix", "two=1"],
        ["two", "three", "--mix", "two=1", "--mix", "three=1", "--new-leg"],
    )
    names = [str(folder / part) if part in ("one", "two", "three") else part for part in data[leg]]
    settings = {
        "max_steps": (10, 20)[leg],
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 4 // ranks,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["run", *names, "--model", str(folder / "model"), "-o", str(output), *overrides]


@pytest.mark.feature("legs")
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_and_ranks_change_neither_the_weights_nor_the_account(
    tmp_path: Path, fleet: Fleet, ranks: int
) -> None:
    for number, name in enumerate(("one", "two", "three")):
        make_set(tmp_path / name, rows=17 + 9 * number, seed=number)
    tiny_llama(tmp_path / "model", dropout=0.1)
    unbroken, broken, log = tmp_path / "unbroken", tmp_path / "broken", tmp_path / "log"
    for leg in range(2):
        assert fleet.finish(_arguments(tmp_path, unbroken, leg, ranks), ranks, log) == [0] * ranks, (
            log.read_text()
        )
    for leg in range(2):
        for steps in (3, 6):
            _kill(fleet.start(_arguments(tmp_path, broken, leg, ranks), ranks, log), broken, 10 * leg + steps)
        assert fleet.finish(_arguments(tmp_path, broken, leg, ranks), ranks, log) == [0] * ranks, (
            log.read_text()
        )
    for name in ("model.safetensors", "seen.json", "seen.arrow"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    if ranks > 1:
        alone = tmp_path / "alone"
        for leg in range(2):
            assert fleet.finish(_arguments(tmp_path, alone, leg, 1), 1, log) == [0], log.read_text()
        for name in ("seen.json", "seen.arrow"):
            assert (alone / name).read_bytes() == (unbroken / name).read_bytes()


def _kill(processes: list[Any], output: Path, steps: int) -> None:
    """Kill all ranks once so many steps are logged."""
    while any(process.is_alive() for process in processes) and _logged(output) < steps:
        time.sleep(0.002)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def _logged(output: Path) -> int:
    path = output / "train_log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# ------------------------------------------------------------------------------ what a leg may change


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two sets by share, beside its model and other sets."""
    folder = tmp_path_factory.mktemp("legs")
    for number, name in enumerate(("one", "two", "three")):
        make_set(folder / name, rows=12, seed=number)
    make_set(folder / "foreign", rows=12, tokenizer="1")
    tiny_llama(folder / "model")
    _leg(folder, folder / "done", ["one", "two"], {}, {"mix": {"one": 2, "two": 1}}, steps=2)
    return folder / "done"


def _leg(
    folder: Path,
    output: Path,
    names: list[str],
    training: dict[str, Any],
    own: dict[str, Any],
    steps: int = 4,
) -> Any:
    training = {"max_steps": steps, "save_steps": 1, "gradient_accumulation_steps": 2, **training}
    return train_in_process([folder / name for name in names], folder / "model", output, training, **own)


ACTS: list[tuple[list[str], dict[str, Any], str]] = [
    (["one", "two"], {"mix": {"one": 1, "two": 1}}, "mix was"),
    (["one", "two"], {"mix": {"one": 2, "two": 1}, "mix_by": "rows"}, "mix_by was 'trained', is 'rows'"),
    (["one", "two"], {}, "mix was"),
    (["one", "two"], {"weights": (2.0, 1.0)}, "weights was"),
    (["three"], {}, "sets was"),
    (["two", "one"], {"mix": {"one": 2, "two": 1}}, "sets was"),
    (["one", "two", "three"], {"mix": {"one": 1, "two": 1, "three": 1}}, "sets was"),
]  # fmt: skip


@pytest.mark.feature("legs")
@pytest.mark.parametrize(("names", "own", "said"), ACTS)
def test_other_data_needs_a_new_leg_and_acts_in_it(
    done: Path,
    tmp_path: Path,
    names: list[str],
    own: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(done, tmp_path / "out")
    with pytest.raises(UsageError) as refused:
        _leg(done.parent, folder, names, {}, own)
    assert said in refused.value.message
    assert "--new-leg and a higher max_steps train it on with these sets" in refused.value.fix
    (folder / "run.json").unlink()
    changed = "cannot resume, since the run changed.*new_leg=True to go on with these sets from here"
    with pytest.raises(UsageError, match=changed) as refused:
        _leg(done.parent, folder, names, {}, own)
    assert said in refused.value.message
    assert not (folder / "run.json").exists()
    capsys.readouterr()
    _leg(done.parent, folder, names, {}, {**own, "new_leg": True})
    assert re.search(rf"new leg from step 2 on: .*{re.escape(said)}", capsys.readouterr().err)
    first, second = read_account(folder)[0].legs
    assert (first.steps, second.first_step, second.steps) == (2, 2, 2)
    assert [part.name for part in second.sets] == names
    assert sum(part.rows for part in second.sets) == 4
    _leg(done.parent, folder, names, {}, own)  # it is that run now
    assert "is up to date" in capsys.readouterr().err
    with pytest.raises(UsageError, match="mix|sets|weights"):
        _leg(done.parent, folder, ["one", "two"], {}, {"mix": {"one": 2, "two": 1}})


STAYS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 0.5}, {}, "learning_rate"),
    ({"gradient_accumulation_steps": 1}, {}, "global_batch"),
    ({"data_seed": 7}, {}, "data_seed"),
    ({"train_sampling_strategy": "sequential"}, {}, "train_sampling_strategy"),
    ({}, {"objective": "dft"}, "objective"),
    ({}, {"lora": {"r": 2}}, "lora.r"),
]  # fmt: skip


@pytest.mark.parametrize(("training", "own", "name"), STAYS, ids=[name for *_, name in STAYS])
def test_what_decides_on_the_weights_is_refused_of_a_new_leg_by_name(
    done: Path, tmp_path: Path, training: dict[str, Any], own: dict[str, Any], name: str
) -> None:
    folder = shutil.copytree(done, tmp_path / "out")
    for finished in (True, False):
        with pytest.raises(UsageError, match=f"{re.escape(name)}.* was ") as refused:
            _leg(done.parent, folder, ["three"], training, {**own, "new_leg": True})
        assert "--new-leg" not in refused.value.fix
        if finished:
            (folder / "run.json").unlink()


def test_a_new_leg_has_the_tokenizer_of_the_run(done: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(done, tmp_path / "out")
    with pytest.raises(UsageError, match="tokenizer was") as refused:
        _leg(done.parent, folder, ["foreign"], {}, {"new_leg": True})
    assert "--new-leg" not in refused.value.fix


def test_a_leg_without_an_account_before_it_is_refused(done: Path, tmp_path: Path) -> None:
    from sfttrain import checkpoint

    folder = shutil.copytree(done, tmp_path / "out")
    for path in folder.glob("checkpoint-*"):
        sealed = checkpoint.read_seal(path)
        assert sealed is not None
        for name in ("seen.json", "seen.arrow"):
            (path / name).unlink()
        checkpoint.seal(
            path, sealed.step, {name: value for name, value in sealed.run.items() if name != "first_step"}
        )
    with pytest.raises(UsageError, match="holds no account of what was seen, which a new leg would continue"):
        _leg(done.parent, folder, ["three"], {}, {"new_leg": True})
    _leg(done.parent, folder, ["one", "two"], {}, {"mix": {"one": 2, "two": 1}})
    (leg,) = read_account(folder)[0].legs
    assert (leg.first_step, leg.steps) == (0, 4)


def test_starting_over_begins_the_account_anew(done: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(done, tmp_path / "out")
    _leg(done.parent, folder, ["three"], {}, {"overwrite": True}, steps=1)
    seen = read_account(folder)[0]
    assert [part.name for leg in seen.legs for part in leg.sets] == ["three"]
    assert seen.steps == 1
