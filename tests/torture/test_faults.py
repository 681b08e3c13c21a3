"""A disk that fails at any operation: one line that names the path and the way out, and a resume to the same bytes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib
import io
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.frame import run_app
from sftdata.set.build import Build
from sftdata.set.ledger import LISTS
from sftdata.set.manifest import read_manifest
from sftdata.set.slices import SLICES_NAME
from tests.torture.conftest import Unbroken
from tests.torture.faults import Fault, Tap
from tests.torture.runs import TOKENIZER, Command, content, look, prepare, write_chats

pytestmark = pytest.mark.slow


def operations(small: Unbroken, place: Path) -> int:
    with Tap(str(place), record=True).installed() as tap:
        prepare(small.data, place / "counted" / "set")
    shutil.rmtree(place / "counted")
    return tap.count


def refusal(data: Path, output: Path) -> SftError | None:
    try:
        prepare(data, output)
    except SftError as error:
        return error
    return None


def sweep(small: Unbroken, place: Path, action: str, step: int = 1) -> int:
    """Let the n-th operation fail, for every n; return how many runs failed."""
    failed = 0
    for nth in range(1, operations(small, place) + 1, step):
        output = place / str(nth) / "set"
        with Tap(str(place), Fault(action, nth)).installed() as tap:
            error = refusal(small.data, output)
        if error is not None:
            failed += 1
            assert error.exit_code == (2 if action == "EACCES" else 1)
            assert str(output.parent) in str(error)
            assert f"({action})" in str(error)
            assert " Fix: " in str(error)
            assert look(output) in (None, small.digest)
        assert tap.fired
        prepare(small.data, output)
        assert content(output) == small.files, f"{action} at operation {nth}"
        assert sorted(os.listdir(output.parent)) == ["set"]
        shutil.rmtree(output.parent)
    return failed


@pytest.mark.parametrize(("action", "step"), [("ENOSPC", 4), ("EIO", 11), ("EACCES", 11)])
def test_a_disk_that_fails_is_one_line_and_the_next_run_goes_on(
    small: Unbroken, place: Path, action: str, step: int
) -> None:
    assert sweep(small, place, action, step) > 60 // step


@pytest.mark.torture
@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "EACCES"])
def test_a_disk_may_fail_at_every_operation(small: Unbroken, place: Path, action: str) -> None:
    assert sweep(small, place, action) > 60


def test_a_full_disk_is_one_line_of_the_command_and_exit_code_1(small: Unbroken, place: Path) -> None:
    code, said = Command(
        small.data, place / "set", 1, Fault("ENOSPC", name="fsync", path="*.arrow.*.tmp")
    ).finish()
    assert code == 1
    line = said.splitlines()[-1]
    assert line.startswith(
        f"{place}/set.partial/shard-00000.arrow: cannot be written: No space left on device (ENOSPC)."
    )
    assert "free some space, then run the same command again" in line
    assert "Traceback" not in said


def test_a_folder_that_may_not_be_written_is_one_line_and_exit_code_2(small: Unbroken, place: Path) -> None:
    code, said = Command(small.data, place / "no" / "set", 1, Fault("EROFS", name="mkdir")).finish()
    assert code == 2
    assert said.splitlines()[-1].startswith(
        f"{place}/no/set.partial: cannot be written: Read-only file system (EROFS). Fix: choose"
    )


def test_a_killed_worker_is_one_line_and_the_next_run_goes_on(small: Unbroken, place: Path) -> None:
    output = place / "set"
    data = write_chats(place / "chats.jsonl", 400)
    code, said = Command(data, output, 2, Fault("kill", name="replace", path="*/shard-00001.arrow")).finish()
    assert code == 1
    line = said.splitlines()[-1]
    assert line.startswith("A worker process was killed")
    assert "--workers 1" in line
    assert "Traceback" not in said
    assert look(output) is None
    assert Command(data, output, 2).finish()[0] == 0
    assert Command(data, place / "whole" / "set", 1).finish()[0] == 0
    assert content(output) == content(place / "whole" / "set")


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_an_input_that_cannot_be_read_is_one_line(
    small: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    data = place / "chats.jsonl"
    data.write_bytes(
        small.data.read_bytes() if compression == "none" else gzip.compress(small.data.read_bytes())
    )

    class Broken(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(
        "sftdata.sources.streams.open", lambda path, mode: Broken(io.FileIO(path)), raising=False
    )
    with pytest.raises(
        SftError, match=rf"{data}: cannot be read: Input/output error. Fix: check the disk"
    ) as caught:
        prepare(data, place / "set")
    assert caught.value.exit_code == 1


def test_an_error_that_no_stage_foresaw_is_one_line(
    small: Unbroken, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.jsonl")

    assert run_app(app, "sftdata", []) == 1
    assert capsys.readouterr().err.startswith("a.jsonl: Too many open files. Fix: ")


def test_a_tokenizer_with_a_folder_inside_is_copied_whole(small: Unbroken, place: Path) -> None:
    tokenizer = place / "tokenizer"
    (tokenizer / "additional_chat_templates").mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    manifest = prepare(small.data, place / "set")
    held = msgspec.structs.replace(manifest.tokenizer, sha256=hashlib.sha256(b"{}").hexdigest())
    beside = tuple(file for file in manifest.files if file.name.endswith(".arrow"))
    manifest = msgspec.structs.replace(manifest, tokenizer=held, files=beside)
    with Build(place / "other").locked() as build:
        for name in (*LISTS, SLICES_NAME):
            build._write(name, lambda sink: sink.write(b""))
        for file in (*manifest.shards, *beside):
            (build.folder / file.name).write_bytes((place / "set" / file.name).read_bytes())
        build.finish(manifest, tokenizer)
    names = [file.name for file in read_manifest(place / "other").files]
    assert names[-2:] == ["tokenizer/additional_chat_templates/tool_use.jinja", "tokenizer/tokenizer.json"]
    assert look(place / "other") == read_manifest(place / "other").digest


@pytest.mark.parametrize(
    "before", ["sftdata.pipeline.load_stages", "sftdata.run.conclude"], ids=["slices", "finish"]
)
def test_a_tokenizer_that_is_removed_in_mid_run_is_one_line_and_the_next_run_goes_on(
    small: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    entry = resolve_tokenizer(TOKENIZER).folder.parent
    shutil.copytree(entry, place / "cache" / "tokenizers" / entry.name)
    module, name = before.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def after_loss(*arguments: object) -> object:
        shutil.rmtree(place / "cache", ignore_errors=True)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(place / "cache"))
        patch.setattr("sftdata.pipeline._loaded", None)
        patch.setattr(before, after_loss)
        with pytest.raises(SftError, match=rf"{place}/cache/.* Fix: run the same command again") as caught:
            prepare(small.data, place / "set")
    assert caught.value.exit_code == 1
    assert not (place / "set").exists()
    prepare(small.data, place / "set")
    assert content(place / "set") == small.files


def test_of_two_runs_on_one_folder_the_second_refuses_and_the_first_is_not_disturbed(
    small: Unbroken, place: Path
) -> None:
    with (
        Build(place / "set").locked(),
        pytest.raises(UsageError, match="another command is building this set"),
    ):
        prepare(small.data, place / "set")
    prepare(small.data, place / "set")
    assert content(place / "set") == small.files


def test_a_folder_that_was_renamed_before_it_could_be_locked_is_not_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(place / "set")
    real = os.open

    def open_late(path: Path, *rest: int) -> int:
        descriptor = real(path, *rest)
        build.folder.rename(place / "set")  # its builder finishes just now
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(UsageError, match="another"), build.locked():
        pass
    assert os.listdir(place) == ["set"]


def test_a_finished_set_outlives_a_failed_overwrite(small: Unbroken, place: Path) -> None:
    output = place / "set"
    prepare(small.data, output)
    with (
        Tap(str(place), Fault("ENOSPC", name="fsync", path="*manifest.json.*.tmp")).installed(),
        pytest.raises(SftError),
    ):
        prepare(small.data, output, max_length=32, overwrite=True)
    assert content(output) == small.files
    prepare(small.data, output, max_length=32, overwrite=True)
    assert read_manifest(output).max_length == 32
    assert os.listdir(place) == ["set"]


DAMAGE = {
    "empty": b"",
    "cut": b'{"format_version": 1, "checksum"',
    "changed": b'{"format_version": 1, "shards": []}',
    "noise": b"\xff\0",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_manifest_is_named_and_overwritten_on_demand_alone(
    small: Unbroken, place: Path, kind: str
) -> None:
    output = place / "set"
    prepare(small.data, output)
    (output / "manifest.json").write_bytes(DAMAGE[kind])
    found = content(output)
    code, said = Command(small.data, output, 1).finish()
    assert code == 4
    assert said.splitlines()[-1].startswith(f"{output}/manifest.json: not a manifest")
    assert said.splitlines()[-1].endswith("Fix: replace the set with --overwrite, or choose another -o.")
    assert content(output) == found
    prepare(small.data, output, overwrite=True)
    assert content(output) == small.files
    assert os.listdir(place) == ["set"]


@pytest.mark.parametrize("name", ["plan.json", "slices/00001.json"])
def test_a_damaged_record_of_an_unfinished_run_is_named_and_overwritten_on_demand_alone(
    small: Unbroken, place: Path, name: str
) -> None:
    with (
        Tap(str(place), Fault("EIO", name="fsync", path="*manifest.json.*.tmp")).installed(),
        pytest.raises(SftError),
    ):
        prepare(small.data, place / "set")
    (place / "set.partial" / name).write_bytes(b'{"index": ')
    with pytest.raises(
        IntegrityError, match=rf"{place}/set.partial/{name}: damaged: .* Fix: start anew with overwrite=True."
    ):
        prepare(small.data, place / "set")
    prepare(small.data, place / "set", overwrite=True)
    assert content(place / "set") == small.files


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_set_is_replaced_where_folders_cannot_be_swapped(
    small: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(number, os.strerror(number))

    prepare(small.data, place / "set", max_length=32)
    monkeypatch.setattr("sftdata.set.build.swap_folders", refuse)
    with (
        Tap(str(place), Fault("EIO", name="rename", path=f"{place}/set")).installed(),
        pytest.raises(SftError),
    ):
        prepare(small.data, place / "set", overwrite=True)
    assert look(place / "set") is None  # between the two renames; the finished set waits
    prepare(small.data, place / "set")
    assert content(place / "set") == small.files
    assert os.listdir(place) == ["set"]
