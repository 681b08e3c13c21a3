"""A set on the Hub: pushed there by commits, gone on with where that stopped, and read from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftdata
from tests.fake_hub import Hub, fake_hub
from tests.torture.runs import TOKENIZER, write_chats
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_sync")]
URL = "hf://datasets/user/name"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "a.jsonl", 1500)
    sftdata.prepare(
        folder / "a.jsonl", tokenizer=TOKENIZER, output=folder / "set", max_length=64, max_rejects="50%",
        slice_bytes=100_000, engine="tokenizers", workers=1,
    )  # fmt: skip
    return folder / "set"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def run(
    hub: Hub, cache: Path, *arguments: str, token: str = "hf_may_write", **more: str
) -> tuple[int, str, str]:
    """Run a command that takes the server for the Hub, which huggingface_hub decides when it is imported."""
    settings = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "SFTDATA_CACHE": str(cache),
        "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sftdata", *arguments], env=os.environ | settings | more, text=True, capture_output=True,
        timeout=HANGS,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_push_that_was_broken_off_goes_on_and_the_set_is_read_from_the_hub(
    hub: Hub, chats: Path, tmp_path: Path
) -> None:
    hub.stop_at = 1  # after the shards
    code, _, said = run(hub, tmp_path, "push", str(chats), URL)
    assert code == 1, said
    assert "hf://datasets/user/name: cannot be written" in said
    assert "Fix: run the same command again; what is sent is kept." in said
    assert hub.files
    assert all(name.endswith(".arrow") for name in hub.files)
    hub.stop_at, uploads = -1, hub.uploads
    code, out, said = run(hub, tmp_path, "push", str(chats), URL, "--json")
    assert code == 0, said
    assert hub.uploads == uploads, "what was there was sent again"
    assert hub.commits[-1][-1] == "manifest.json"
    assert hub.files == {name: (chats / name).read_bytes() for name in names(chats)}
    assert json.loads(out)["sent"] == len([name for name in names(chats) if not name.endswith(".arrow")])
    code, out, said = run(hub, tmp_path, "push", str(chats), URL, "--json")
    assert (code, json.loads(out)["sent"], len(hub.commits)) == (0, 0, 2), said
    for arguments in (["verify", URL, "--json"], ["stats", URL], ["inspect", URL, "--row", "-1"]):
        code, out, said = run(hub, tmp_path, *arguments)
        assert code == 0, said
        assert arguments[0] != "verify" or json.loads(out)["digest"] == sftdata.open(chats).manifest.digest


def test_another_set_and_no_right_to_write_are_one_line(hub: Hub, chats: Path, tmp_path: Path) -> None:
    code, _, said = run(hub, tmp_path, "push", str(chats), URL, token="hf_may_read")
    assert code == 2
    assert "access is denied" in said
    assert "Fix: hf auth login, or set HF_TOKEN" in said
    assert said.count("\n") == 1
    hub.files["manifest.json"] = b"{}"
    code, _, said = run(hub, tmp_path, "push", str(chats), URL)
    assert code == 2
    assert said == f"{URL}: another set is there. Fix: choose another URL, or remove what is there.\n"
    code, _, said = run(hub, tmp_path, "push", str(chats), "hf://models/user/name")
    assert (code, "names no dataset of the Hub" in said) == (2, True)


@pytest.fixture
def stored(hub: Hub, chats: Path) -> Hub:
    """The set, as it lies in a folder of the dataset, and its rows in another."""
    hub.files |= {f"sets/one/{name}": (chats / name).read_bytes() for name in names(chats)}
    hub.files["rows/a.jsonl"] = (chats.parent / "a.jsonl").read_bytes()
    return hub


def test_rows_of_a_dataset_make_the_set_of_the_file(stored: Hub, chats: Path, tmp_path: Path) -> None:
    """Some requests are refused for now."""
    settings = ["-t", TOKENIZER, "--max-length", "64", "--max-rejects", "50%", "--set", "slice_bytes=100000"]
    settings += ["--engine", "tokenizers", "--workers", "1", "-o", str(tmp_path / "set")]
    stored.busy = lambda number: number == 3
    code, _, said = run(stored, tmp_path, "prepare", f"{URL}/rows", *settings)
    assert code == 0, said
    assert sftdata.open(tmp_path / "set").manifest.digest == sftdata.open(chats).manifest.digest


def test_other_bytes_on_the_hub_are_found_without_reading(stored: Hub, tmp_path: Path) -> None:
    code, out, said = run(stored, tmp_path, "verify", f"{URL}/sets/one", "--quick")
    assert (code, ", tokens by the hashes that the store keeps;" in out) == (0, True), said
    name = "sets/one/shard-00001.arrow"
    stored.files[name] = stored.files[name][:-1] + b"?"
    code, out, said = run(stored, tmp_path, "verify", f"{URL}/sets/one", "--quick")
    assert (code, f"{URL}/{name}: other bytes, whose hash is " in out) == (4, True), said


def test_what_is_not_on_the_hub_or_not_ours_is_one_line(stored: Hub, tmp_path: Path) -> None:
    for place, more in ((f"{URL}/none", "no such set"), ("hf://datasets/user/none", "not there")):
        code, _, said = run(stored, tmp_path, "stats", place)
        assert (code, said.count("\n"), more in said) == (2, 1, True), said
    stored.private = True
    for place in (f"{URL}/sets/one", f"{URL}/rows/a.jsonl"):
        command = "stats" if "sets" in place else "detect"
        code, _, said = run(stored, tmp_path, command, place, token="hf_of_another")
        assert (code, said.count("\n"), "access is denied" in said) == (2, 1, True), said
        assert "Fix: check the rights of HF_TOKEN." in said


@pytest.mark.parametrize(
    ("state", "code", "found", "fix"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set.", "unset it, and push again."),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "cannot be reached (ConnectError: ",
            "connect this machine to the network, then run the same command again.",
        ),
    ],
)  # fmt: skip
def test_a_push_without_a_network_says_so(
    state: dict[str, str], code: int, found: str, fix: str, hub: Hub, chats: Path, tmp_path: Path
) -> None:
    ended, out, said = run(hub, tmp_path, "push", str(chats), URL, **state)
    assert (ended, out) == (code, "")
    assert said.startswith(f"{URL}: {found}")
    assert said.endswith(f" Fix: {fix}\n")
    assert said.count("\n") == 1
