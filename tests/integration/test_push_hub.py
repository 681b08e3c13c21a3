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


def run(hub: Hub, cache: Path, *arguments: str, token: str = "hf_may_write") -> tuple[int, str, str]:
    """Run a command that takes the server for the Hub, which huggingface_hub decides when it is imported."""
    settings = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "SFTDATA_CACHE": str(cache),
        "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sftdata", *arguments], env=os.environ | settings, text=True, capture_output=True,
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
