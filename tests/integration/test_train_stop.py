"""Signals, locks and logs of a run: it stops where it can go on, alone in its folder, and says how it began and ended."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import sfttrain
from sftdata.errors import IntegrityError, UsageError
from sftdata.output import StoppedError
from sfttrain import checkpoint
from sfttrain.checkpoint import take
from sfttrain.process import listening
from tests.train_runs import OUR_WARNINGS, ROOT, train_in_process

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
SHORT = {"max_steps": 5, "save_strategy": "no", "learning_rate": 0.01}


class _Kill(TrainerCallback):
    """Send this process a signal while a step is taken."""

    def __init__(self, number: int, step: int) -> None:
        self._number, self._step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["SIGTERM", "SIGHUP"]
)
def test_a_signal_ends_the_step_and_saves_it_and_the_same_command_goes_on(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    train_in_process(shards, model, tmp_path / "whole", SHORT)
    capsys.readouterr()
    with pytest.raises(StoppedError) as stopped:
        _train(shards, model, tmp_path / "out", callbacks=[_Kill(number, 3)])
    assert stopped.value.exit_code == code
    assert "stopped after step 3: checkpoint-3 is complete" in capsys.readouterr().err
    newest = checkpoint.newest_complete(tmp_path / "out")
    assert newest is not None
    assert newest[1].step == 3
    assert not (tmp_path / "out" / "run.json").exists()
    train_in_process(shards, model, tmp_path / "out", SHORT)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_in_the_last_step_lets_the_run_end(shards: Path, model: Path, tmp_path: Path) -> None:
    _train(shards, model, tmp_path / "out", callbacks=[_Kill(signal.SIGTERM, 5)])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_before_the_first_step_and_when_sent_twice_a_signal_stops_at_once() -> None:
    with pytest.raises(StoppedError), listening():
        os.kill(os.getpid(), signal.SIGTERM)
    with listening() as request:
        request.stepping = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.number == signal.SIGHUP
        with pytest.raises(StoppedError):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "import sfttrain\n"
        "from tests.integration.test_train_stop import _Kill\n"
        "from sftdata.output import StoppedError\n"
        "callbacks = [_Kill(signal.SIGTERM, 2)] if os.environ['RANK'] == '1' else []\n"
        "try:\n"
        "    settings = {'max_steps': 9, 'save_strategy': 'no', 'callbacks': callbacks}\n"
        "    sfttrain.train(sys.argv[1], model=sys.argv[2], output=sys.argv[3], **settings)\n"
        "except StoppedError as stop:\n"
        "    os.write(1, f'stopped {stop.exit_code}\\n'.encode())  # one write: ranks share a pipe\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += [str(shards), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("stopped 143") == 2, done.stderr
    newest = checkpoint.newest_complete(tmp_path / "out")
    assert newest is not None
    assert newest[1].step == 3  # the ranks agree one step after the signal came


def test_a_folder_is_written_by_one_run_at_a_time(shards: Path, model: Path, tmp_path: Path) -> None:
    with (
        take(tmp_path / "out"),
        pytest.raises(UsageError, match="another `sfttrain run` is writing here. Fix: wait for it"),
    ):
        train_in_process(shards, model, tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()  # nothing was written, so nothing is left


def test_a_forked_reader_does_not_hold_the_folder_beyond_its_run(tmp_path: Path) -> None:
    (hold, release), (ready, started) = os.pipe(), os.pipe()
    with take(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(release)
            os.write(started, b"1")
            os.read(hold, 1)  # until the parent has looked
            os._exit(0)
        os.read(ready, 1)
    with take(tmp_path):
        pass
    os.close(release)
    os.waitpid(child, 0)
    for descriptor in (hold, ready, started):
        os.close(descriptor)


def test_the_other_ranks_share_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with take(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with take(tmp_path):
            pass


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused_in_one_line_and_not_run(
    shards: Path, model: Path, tmp_path: Path, name: str
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    with pytest.raises(StoppedError):
        _train(shards, model, tmp_path / "out", callbacks=[_Kill(signal.SIGTERM, 3)])
    folder = tmp_path / "out" / "checkpoint-3"
    sealed = checkpoint.read_seal(folder)
    assert sealed is not None
    (folder / name).write_bytes(pickle.dumps(Trap(), protocol=2))
    checkpoint.seal(folder, 3, sealed.run)
    with pytest.raises(
        IntegrityError,
        match=r"checkpoint-3: holds a pickle that is more than tensors.*Fix: remove the folder",
    ):
        train_in_process(shards, model, tmp_path / "out", SHORT)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("training", [{}, {"logging_steps": 4}, {"logging_strategy": "epoch"}])
def test_the_first_and_the_last_step_are_logged_and_said(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], training: dict[str, Any]
) -> None:
    train_in_process(shards, model, tmp_path / "out", {**SHORT, **training})
    lines = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert {1, 5} <= set(steps)
    assert len(steps) == len(set(steps))
    said = capsys.readouterr().err
    assert "step 1/5, loss" in said
    assert "step 5/5, loss" in said


def test_a_resume_says_nothing_of_weights_that_are_tied(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.train_runs import tiny_llama

    tied = tiny_llama(tmp_path / "tied", tied=True)
    with pytest.raises(StoppedError):
        _train(shards, tied, tmp_path / "out", callbacks=[_Kill(signal.SIGTERM, 3)])
    train_in_process(shards, tied, tmp_path / "out", SHORT)
    assert "missing keys" not in capsys.readouterr().err


def _train(shards: Path, model: Path, output: Path, callbacks: list[Any]) -> None:
    sfttrain.train(shards, model=model, output=output, callbacks=callbacks, **SHORT)


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
