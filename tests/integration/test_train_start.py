"""What a run does before its first step: what is wrong is said before torch is there, and nothing is done twice."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftdata.errors import IntegrityError
from sftdata.set.opened import open_set
from sfttrain import refusals, run
from sfttrain.arguments import training_fields
from sfttrain.config import read_settings
from tests.train_runs import OUR_WARNINGS, ROOT, tiny_llama, train_in_process
from tests.train_sets import make_set
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
QUICK = {"max_steps": 1, "save_strategy": "no", "logging_steps": 1}
_TELLING = """
import sys
from sfttrain.cli import main
code = main(sys.argv[1:])
if "torch" in sys.modules:
    print("torch was imported", file=sys.stderr)
sys.exit(code)
"""


def _start(folder: Path, *arguments: str, program: str | None = None, **environment: str) -> Any:
    command = [
        sys.executable,
        *(["-m", "sfttrain"] if program is None else ["-c", program]),
        "run",
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sets and models, good and bad."""
    folder = tmp_path_factory.mktemp("place")
    make_set(folder / "set", rows=4, shards=1)
    make_set(folder / "other", rows=4, shards=1, tokenizer="1")
    make_set(folder / "wide", rows=4, shards=1, vocabulary=4_000)
    make_set(folder / "nothing-trained", rows=4, shards=1, trained=0.0)
    tiny_llama(folder / "llama")
    shutil.copytree(folder / "llama", folder / "pickled")
    (folder / "pickled/model.safetensors").rename(folder / "pickled/pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "-m", "llama", "-o", "out"], "nowhere: "),
        (["set", "-m", "./gone", "-o", "out"], "./gone: no such folder"),
        (["set", "-m", "pickled", "-o", "out"], "only pytorch_model.bin, a pickle"),
        (["set", "-m", "llama", "-o", "set"], "holds a set"),
        (["set", "-m", "llama", "-o", "llama"], "is the folder of the model"),
        (["set", "other", "-m", "llama", "-o", "out"], "whose ids are others"),
        (["wide", "-m", "llama", "-o", "out"], "the model has embeddings for 128"),
        (["nothing-trained", "-m", "llama", "-o", "out"], "holds no trained token"),
        (["set", "-m", "llama", "-o", "out", "--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (
            ["set", "-m", "llama", "-o", "out", "--set", "learning_rate=fast"],
            "expected a number; found 'fast'",
        ),
        (["set", "-m", "llama", "-o", "out", "--set", "packing=no"], "packing"),
        (["set", "-m", "llama", "-o", "out", "--config", "none.yaml"], "none.yaml"),
        (["set", "-m", "llama", "-o", "out", "--adapter", "gone"], "gone"),
    ],
)
def test_what_can_be_known_without_torch_is_refused_without_it(
    place: Path, arguments: list[str], words: str
) -> None:
    done = _start(place, *arguments, program=_TELLING)
    assert done.returncode in (2, 3, 4), done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (place / "out").exists()


def test_what_only_torch_can_tell_is_said_with_it(place: Path) -> None:
    done = _start(
        place, "set", "-m", "llama", "-o", "out", "--set", "lr_scheduler_type=cosin", program=_TELLING
    )
    assert "torch was imported" in done.stderr


def test_fields_read_from_the_source_are_those_of_the_class() -> None:
    import dataclasses

    from transformers import TrainingArguments

    known = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments) if field.init}
    found = training_fields()
    assert set(known) <= set(found)
    for name, kind in known.items():
        for part in ("dict", "bool", "int", "float", "str"):
            assert (part in kind) == (part in found[name]), name


# ------------------------------------------------------------------------------------------------ verification


def _damage(folder: Path) -> None:
    path = next(folder.glob("shard-*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_set_takes_no_step_though_it_is_read_beside_the_rest(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sfttrain.training

    shutil.copytree(place / "set", tmp_path / "set")
    _damage(tmp_path / "set")
    loaded, own, make = [], refusals.verify_sets, sfttrain.training.make_model

    def late(opened: Any) -> None:
        while not loaded:  # the model is loaded while the set is read
            pass
        own(opened)

    def make_model(*given: Any) -> Any:
        loaded.append(True)
        return make(*given)

    monkeypatch.setattr(refusals, "verify_sets", late)
    monkeypatch.setattr(sfttrain.training, "make_model", make_model)
    monkeypatch.setattr(
        sfttrain.training.SftTrainer, "train", lambda *_, **__: pytest.fail("it was trained on")
    )
    with pytest.raises(IntegrityError, match="set"):
        train_in_process(tmp_path / "set", place / "llama", tmp_path / "out", QUICK)


def test_a_finished_run_on_a_set_damaged_since_is_not_called_up_to_date(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "set", tmp_path / "set")
    train_in_process(tmp_path / "set", place / "llama", tmp_path / "out", QUICK)
    _damage(tmp_path / "set")
    with pytest.raises(IntegrityError):
        train_in_process(tmp_path / "set", place / "llama", tmp_path / "out", QUICK)


def test_reading_hands_its_error_on_once_it_is_known(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "set", tmp_path / "set")
    _damage(tmp_path / "set")
    reading = refusals.Reading([open_set(tmp_path / "set")])
    for ask in (reading.finish, reading.check, reading.finish):
        with pytest.raises(IntegrityError):
            ask()
    refusals.Reading([open_set(place / "set")]).finish()


# ------------------------------------------------------------------------------------------------ beside imports


class _Driver:
    """Stands in for the driver's library; its functions return 0 for success."""

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.calls = works, list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls.append((name, *(one for one in given if isinstance(one, int))))
            return 0 if self.works else 100

        return call


@pytest.mark.parametrize("works", [True, False])
def test_the_driver_starts_beside_the_imports(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    driver, given = (
        _Driver(works=works),
        {"sets": (place / "set",), "model": str(place / "llama"), "output": tmp_path},
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.setenv("LOCAL_RANK", "3")
    run.start_ahead(read_settings(None, [], given)).join()
    names = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert [name for name, *_ in driver.calls] == names[: 3 if works else 1]
    assert not works or driver.calls[1] == ("cuDeviceGet", 3)
    driver.calls.clear()
    run.start_ahead(read_settings(None, ["use_cpu=true"], given)).join()
    assert not driver.calls


def test_a_machine_without_a_driver_or_a_local_model_has_nothing_to_start(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    for model in ("someone/on-the-hub", str(place / "llama")):
        run.start_ahead(
            read_settings(None, [], {"sets": (place / "set",), "model": model, "output": tmp_path})
        ).join()


# ------------------------------------------------------------------------------------------------------ proofs


def test_the_second_start_relies_on_the_proof_of_the_first_and_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sfttrain.path

    monkeypatch.setenv("SFTTRAIN_CACHE", str(tmp_path / "cache"))
    first = train_in_process(place / "set", place / "llama", tmp_path / "first", QUICK)
    assert "packing: proven on a tiny llama: packed = alone" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sfttrain.path, "prove", lambda *_: pytest.fail("it was proven again"))
        second = train_in_process(place / "set", place / "llama", tmp_path / "second", QUICK)
    assert "packing: proven before (prove_again=True proves anew), on a tiny llama" in capsys.readouterr().err
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert one.equal(other)
    train_in_process(place / "set", place / "llama", tmp_path / "third", QUICK, prove_again=True)
    assert "packing: proven on a tiny llama: packed = alone" in capsys.readouterr().err
    # Proving again is no other run.
    train_in_process(place / "set", place / "llama", tmp_path / "first", QUICK, prove_again=True)
    assert "is up to date" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- noise

_OURS = re.compile(
    r"(attention|packing|lora|model|memory|data|plan|report|step|loss|speed|next|compile|kernels)\b"
    r"|(frozen|checkpoints|evaluation|devices)\b"
    r"|set: (no tokenizer folder|[\d,]+ rows?, )"
)


@pytest.mark.parametrize("more", [[], ["--lora", "r=4"], ["--set", "activation_checkpointing=true"]])
def test_no_line_on_the_terminal_is_a_librarys(place: Path, tmp_path: Path, more: list[str]) -> None:
    settings = [part for key, value in QUICK.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = _start(place, "set", "-m", "llama", "-o", str(tmp_path / "out"), *settings, *more)
    assert not done.returncode, done.stderr
    assert not done.stdout
    foreign = [line for line in done.stderr.splitlines() if not _OURS.match(line)]
    assert not foreign
