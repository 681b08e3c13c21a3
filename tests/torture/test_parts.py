"""A set made in parts is the set made at once: any number, any order, each killed, any one last, several at the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Collection
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sftdata import parts
from sftdata.cli import main
from sftdata.config import make_config
from sftdata.errors import InputChangedError, UsageError
from sftdata.marking import in_order
from sftdata.parts import COUNT, Part, prepare, read_part
from sftdata.plan import make_plan
from sftdata.run import conclude
from sftdata.set.manifest import partial_folder, parts_folder, read_manifest
from sftdata.set.verify import verify
from sftdata.sources.marks import Marks
from sftdata.sources.ranges import Sizes, Stretch, scan
from sftdata.workers import Workers
from tests.killed import killed_at
from tests.torture.runs import TOKENIZER, content, settings, write_chats
from tests.waiting import HANGS

pytestmark = pytest.mark.usefixtures("no_sync")
NAMES = ("replace", "rename", "unlink", "rmdir", "link", "mkdir")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "in.jsonl", 120)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the set made at once."""
    output = tmp_path_factory.mktemp("whole") / "set"
    prepare(make_config(**settings(data, output)), Workers(1))
    return content(output)


def run(data: Path, output: Path, part: str | None, **more: object) -> bool:
    """Make a part; say whether it finished the set."""
    config = make_config(**settings(data, output, **more))
    return prepare(config, Workers(1), part=None if part is None else read_part(part)) is not None


def is_whole(output: Path, whole: dict[str, bytes]) -> bool:
    """Hold a set against the one made at once, and look for what was left behind."""
    assert content(output) == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return verify(output).ok


@pytest.mark.parametrize("parts", [1, 2, 7, pytest.param(64, marks=pytest.mark.slow)])
def test_parts_in_any_order_make_the_set(
    data: Path, whole: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    order = random.Random(parts).sample(range(1, parts + 1), parts)
    finished = [run(data, tmp_path / "set", f"{number}/{parts}") for number in order]
    assert finished[-1]
    assert is_whole(tmp_path / "set", whole)
    # More parts than slices: those without any may come after the end, or find all done before.
    assert parts == 64 or finished == [False] * (parts - 1) + [True]


@pytest.mark.parametrize("parts", [1, 2, 7, pytest.param(64, marks=pytest.mark.slow)])
def test_each_part_killed_at_random_and_any_one_last(
    data: Path, whole: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    rng = random.Random(parts)
    output = tmp_path / "set"
    for number in rng.sample(range(1, parts + 1), parts):
        killed_at(partial(run, data, output, f"{number}/{parts}"), rng.randint(1, 30), NAMES)
    for number in rng.sample(range(1, parts + 1), parts):
        run(data, output, f"{number}/{parts}")
    assert is_whole(output, whole)


@pytest.mark.torture
def test_killed_at_every_change_of_a_name(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The first part is done; the second is killed at each change that it makes, then made again, or the whole is."""
    number = 0
    while True:
        number += 1
        output = tmp_path / str(number) / "set"
        output.parent.mkdir()
        run(data, output, "1/2")
        code = killed_at(partial(run, data, output, "2/2"), number, NAMES)
        finished = run(data, output, "2/2" if number % 2 else None)
        assert finished
        assert is_whole(output, whole)
        if code != -signal.SIGKILL:
            break
    assert number > 20


@pytest.mark.parametrize("last", [None, "1/3"])
def test_the_plain_command_finishes_what_parts_began(
    data: Path, whole: dict[str, bytes], tmp_path: Path, last: str | None
) -> None:
    output = tmp_path / "set"
    assert not run(data, output, "2/3")
    records = {path: path.stat().st_mtime_ns for path in parts_folder(output).rglob("*.json")}
    assert len(records) > 2
    assert not run(data, output, "3/3")
    assert all(
        path.stat().st_mtime_ns == when for path, when in records.items() if path.parent.name == "slices"
    )
    assert run(data, output, last)
    assert is_whole(output, whole)


def _race(data: Path, output: Path, part: str | None, ready: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    run(data, output, part)


@pytest.mark.parametrize("rounds", [1, pytest.param(16, marks=pytest.mark.torture)])
def test_racing_parts_make_one_set(data: Path, whole: dict[str, bytes], tmp_path: Path, rounds: int) -> None:
    """Each part twice at once, and the plain command beside them: as where attempts are repeated on other machines."""
    fork = multiprocessing.get_context("fork")
    for number in range(rounds):
        output = tmp_path / str(number) / "set"
        output.parent.mkdir()
        run(data, output, "2/4")
        ready = fork.Barrier(7)
        crew = [
            fork.Process(target=_race, args=(data, output, part, ready))
            for part in ("1/4", "1/4", "3/4", "3/4", "4/4", "4/4", None)
        ]
        for one in crew:
            one.start()
        for one in crew:
            one.join(HANGS)
        assert [one.exitcode for one in crew] == [0] * len(crew)
        for left in ("1/4", None):  # of an attempt that began as the set was finished
            run(data, output, left)
        assert is_whole(output, whole)


def test_a_part_that_comes_late_finds_the_set(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "set"
    assert run(data, output, "1/1")
    before = (output / "manifest.json").stat().st_ino
    assert run(data, output, "1/1")
    assert run(data, output, None)
    assert (output / "manifest.json").stat().st_ino == before
    assert is_whole(output, whole)


def test_parts_of_other_settings_or_data_do_not_mix(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "set"
    assert not run(data, output, "1/2", packing="none")
    assert not run(data, output, "1/2")
    assert run(data, output, "2/2")
    assert content(output) == whole
    notes: list[str] = []
    config = make_config(**settings(data, tmp_path / "other"))
    run(data, config.output, "1/2", packing="none")
    prepare(config, Workers(1), note=notes.append, part=Part(2, 2))
    assert (
        notes[-1] == f"{config.output}: parts made otherwise (packing differ) lie there; they are not used."
    )
    prepare(config, Workers(1), note=notes.append, part=Part(1, 2))
    assert content(config.output) == whole
    config = make_config(**settings(data, tmp_path / "alone"))
    run(data, config.output, "1/2", packing="none")
    prepare(config, Workers(1), note=notes.append)
    assert any("parts made with other data, settings or versions" in note for note in notes)
    assert content(config.output) == whole


def test_grown_inputs_replace_the_set_and_other_settings_do_not(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "in.jsonl", 60)
    output = tmp_path / "out" / "set"
    output.parent.mkdir()
    assert run(data, output, "1/1")
    with pytest.raises(UsageError, match="made otherwise"):
        run(data, output, "1/1", packing="none")
    first = read_manifest(output).digest
    write_chats(data, 90)
    assert not run(data, output, "1/2")
    assert read_manifest(output).digest == first
    assert run(data, output, "2/2")
    prepare(make_config(**settings(data, tmp_path / "whole")), Workers(1))
    assert is_whole(output, content(tmp_path / "whole"))


@pytest.fixture
def ranges(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[Stretch]:
    """Let parts share the scan of small ranges; return those that were scanned, as they are."""
    scanned = list[Stretch]()

    def noted(sizes: Sizes, stretch: Stretch) -> Marks:
        scanned.append(stretch)
        return scan(sizes, stretch)

    monkeypatch.setattr("sftdata.marking.WORTH_RANGES", 0)
    monkeypatch.setattr("sftdata.marking.scan", noted)
    monkeypatch.setattr("sftdata.inputs.Sizes", partial(Sizes, range=64 << 10))
    return scanned


@pytest.fixture(scope="module")
def large(data: Path) -> Path:
    path = data.with_name("large.jsonl")
    path.write_bytes(data.read_bytes() * (1 + (300 << 10) // data.stat().st_size))
    return path


def test_parts_scan_each_range_once(large: Path, tmp_path: Path, ranges: list[Stretch]) -> None:
    settings = {"slice_bytes": 50_000}
    assert not run(large, tmp_path / "set", "2/3", **settings)
    assert len(set(ranges)) == len(ranges) == -(-large.stat().st_size // (64 << 10))
    ranges.clear()
    marks = sorted((parts_folder(tmp_path / "set") / "marks").iterdir())
    marks[0].write_bytes(marks[0].read_bytes()[:-1])  # damaged
    marks[1].unlink()
    run(large, tmp_path / "set", "1/3", **settings)
    assert run(large, tmp_path / "set", None, **settings)
    assert len(ranges) == 2
    run(large, tmp_path / "plain" / "set", None, **settings)
    assert content(tmp_path / "set") == content(tmp_path / "plain" / "set")


def test_a_part_gives_others_the_time_of_its_share(
    large: Path, tmp_path: Path, ranges: list[Stretch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes with each range that is scanned, and others take as long."""
    slept = list[float]()
    clock = SimpleNamespace(monotonic=lambda: len(ranges) + sum(slept), sleep=slept.append)
    monkeypatch.setattr("sftdata.marking.time", clock)
    assert not run(large, tmp_path / "alone", "1/3", slice_bytes=50_000)
    count = len(ranges)
    assert sum(slept) == len(in_order(np.full(count, 64 << 10), 0, 3)[0])
    ranges.clear()
    clock.sleep = lambda _: run(large, tmp_path / "set", "2/2", slice_bytes=50_000)
    assert run(large, tmp_path / "set", "1/2", slice_bytes=50_000)
    assert len(set(ranges)) == len(ranges) == count


def scans(of: int, running: Collection[int], slow: Collection[int] = ()) -> float:
    """Return how often each of 100 ranges is scanned by parts that run at once; others never start."""
    lengths, done, total = np.full(100, 64 << 20), set[int](), 0
    orders = {number: chain(*map(np.ndarray.tolist, in_order(lengths, number, of))) for number in running}
    for step in range(3 * len(lengths)):
        found = {
            number: next((index for index in order if index not in done), -1)
            for number, order in orders.items()
            if number not in slow or step % 3 == 0
        }
        done |= {*found.values()} - {-1}
        total += sum(index >= 0 for index in found.values())
    assert len(done) == len(lengths)
    return total / len(lengths)


def test_parts_at_once_scan_their_shares_and_help_others() -> None:
    for of in (1, 2, 7):
        assert scans(of, range(of), slow=[0]) <= 1.1
    assert scans(4, range(4)) == 1
    assert scans(64, range(8)) <= 1.3  # each scanned them all while they helped in one order
    for number in range(7):
        own, others = in_order(np.arange(100), number, 7)
        assert sorted([*own, *others]) == [*range(100)]


def test_marks_of_what_a_file_held_before_are_thrown_away(
    large: Path, tmp_path: Path, ranges: list[Stretch]
) -> None:
    rows, settings = tmp_path / "in" / "rows.jsonl", {"slice_bytes": 50_000}
    rows.parent.mkdir()
    rows.write_bytes(large.read_bytes())
    before = rows.stat()
    run(rows, tmp_path / "set", "1/2", **settings)
    kept, newline, last = rows.read_bytes().rstrip().rpartition(b"\n")
    rows.write_bytes(kept + newline + last.replace(b" ", b"_") + b"\n")
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputChangedError, match="changed while it was read"):
        run(rows, tmp_path / "set", "2/2", **settings)
    run(rows, tmp_path / "set", "1/2", **settings)
    assert run(rows, tmp_path / "set", "2/2", **settings)
    assert verify(tmp_path / "set").ok


def test_parts_of_other_settings_go_once_the_set_stands(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "set", "1/2", max_length=32)
    assert parts_folder(tmp_path / "set").is_dir()
    assert run(data, tmp_path / "set", None)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_refusals(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    config = make_config(**settings(data, output))
    partial_folder(output).mkdir()
    (partial_folder(output) / "plan.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="an unfinished set that is not made in parts"):
        prepare(config, Workers(1), part=Part(1, 2))


def test_one_that_loses_its_folder_as_it_finishes_puts_no_half_set_in_place(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another has finished, and removes all folders of the parts, between the lists and the tokenizer of this one."""
    assert not run(data, tmp_path / "set", "1/2")
    others: list[bool] = []

    def meanwhile(*given: Any) -> Any:
        made = conclude(*given)
        if not others:
            others.append(False)
            others[0] = run(data, tmp_path / "set", None)
        return made

    monkeypatch.setattr(parts, "conclude", meanwhile)
    assert run(data, tmp_path / "set", "2/2")
    assert others == [True]
    assert is_whole(tmp_path / "set", whole)


def test_too_many_rejects_are_told_by_whoever_finishes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, base = (
        tmp_path / "set",
        [
            "prepare",
            str(data),
            "-t",
            TOKENIZER,
            "--max-length",
            "64",
            "--set",
            "slice_bytes=2000",
            "--workers",
            "1",
        ],
    )
    assert main([*base, "-o", str(output), "--part", "1/2"]) == 0
    assert main([*base, "-o", str(output), "--part", "2/2"]) == 3
    assert "--max-rejects allows 1%" in capsys.readouterr().err
    assert main([*base, "-o", str(output), "--part", "2/2", "--max-rejects", "50%"]) == 0
    assert verify(output).ok
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_shares_are_equal_and_all_of_the_set(data: Path, tmp_path: Path) -> None:
    plan = make_plan(make_config(**settings(data, tmp_path / "set")))
    for of in (1, 2, 3, 7, 64):
        shares = [Part(number, of).tasks(plan) for number in range(1, of + 1)]
        assert [task for share in shares for task in share] == list(plan.tasks)
        sizes = dict(zip((task.index for task in plan.tasks), plan.tasks.sizes.tolist(), strict=True))
        largest = max(sum(sizes[task.index] for task in share) for share in shares)
        assert largest <= plan.size / of + max(sizes.values())


def slurm(number: int, count: int, first: int, step: int) -> dict[str, str]:
    array = {"ID": number, "COUNT": count, "MIN": first, "STEP": step}
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()} | job


ENVIRONMENTS = [
    (slurm(9, count=4, first=3, step=2), "4/4"),
    ({"JOB_COMPLETION_INDEX": "0", COUNT: "7"}, "1/7"),
    ({"AWS_BATCH_JOB_ARRAY_INDEX": "6", "AWS_BATCH_JOB_ARRAY_SIZE": "7"}, "7/7"),
    ({"CLOUD_RUN_TASK_INDEX": "1", "CLOUD_RUN_TASK_COUNT": "2"}, "2/2"),
    ({"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"}, "2/2"),
    ({"PBS_ARRAY_INDEX": "1", COUNT: "2"}, "2/2"),
    ({"LSB_JOBINDEX": "2", "LSB_JOBINDEX_END": "2"}, "2/2"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, "2/3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "part"), ENVIRONMENTS, ids=[next(iter(names)) for names, _ in ENVIRONMENTS]
)
def test_auto_reads_what_schedulers_say(environment: dict[str, str], part: str) -> None:
    assert str(read_part("auto", environment)) == part


@pytest.mark.parametrize(("text", "environment", "said"), [
    ("0/8", {}, "parts are numbered 1/8 to 8/8"),
    ("9/8", {}, "parts are numbered 1/8 to 8/8"),
    ("1/0", {}, "expected i/n or auto"),
    ("half", {}, "expected i/n or auto"),
    ("auto", {}, "none of SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX, .* is set"),
    ("auto", {"JOB_COMPLETION_INDEX": "0"}, rf"{COUNT} is ''.*export {COUNT}=N"),
    ("auto", {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x'"),
    ("auto", slurm(9, count=3, first=0, step=1), "parts are numbered 1/3 to 3/3"),
    ("auto", slurm(3, count=3, first=0, step=2), "array with gaps"),
])  # fmt: skip
def test_what_is_no_part_is_refused(text: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_part(text, environment)
