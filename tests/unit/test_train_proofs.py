"""A proof is kept by what it depends on, found again by the same only, and never trusted where it is damaged."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from sfttrain import proofs
from sfttrain.proofs import Proof, cache_folder, remembered

PROOF = Proof(3e-6, 0.0, 1e-8, padded=2e-7, rounding=1.25, unreached=("vision.tower",))
ABOUT = {"attention": "sdpa", "compute": torch.bfloat16, "rows": 2}


class _Prover:
    """Prove, and count how often."""

    def __init__(self, proof: Any = PROOF) -> None:
        self.proof, self.calls = proof, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.proof


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(proofs.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "proofs"


def _ask(
    prover: _Prover, *, again: bool = False, about: Any = ABOUT, kind: Any = Proof, **fields: Any
) -> Any:
    return remembered(Qwen2Config(hidden_size=64, **fields), about, kind, prover, again)


def test_the_same_is_proven_once() -> None:
    prover = _Prover()
    assert _ask(prover) == (PROOF, False)
    assert _ask(prover) == (PROOF, True)
    assert _ask(prover, name_or_path="elsewhere") == (PROOF, True)  # the same config under another name
    assert prover.calls == 1
    assert _ask(prover, again=True) == (PROOF, False)
    assert prover.calls == 2


def test_a_number_is_a_proof_too() -> None:
    prover = _Prover(1.5)
    assert [_ask(prover, kind=float) for _ in range(2)] == [(1.5, False), (1.5, True)]


def test_whatever_a_proof_depends_on_makes_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prover, version = _Prover(), importlib.metadata.version
    _ask(prover)
    _ask(prover, num_attention_heads=4)
    for name, value in {"attention": "eager", "compute": torch.float32, "rows": 1}.items():
        _ask(prover, about={**ABOUT, name: value})
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else version(name))
        _ask(prover)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        _ask(prover)
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "_source", lambda: "edited")
        _ask(prover)
    assert prover.calls == 8
    _ask(prover)
    assert prover.calls == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "not text", "a folder", "another kind"])
def test_a_damaged_proof_is_none(folder: Path, damage: str) -> None:
    prover = _Prover()
    _ask(prover)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "another kind":
        path.write_bytes(proofs._digest(b"[1]").encode() + b"\n[1]")
    else:
        path.write_bytes(
            {
                "empty": b"", "cut": content[:-4], "flipped": content.replace(b"1.25", b"9.25"), "not text": b"\xff\x00" * 9,
            }[damage]
        )  # fmt: skip
    assert _ask(prover) == (PROOF, False)
    if damage != "a folder":
        assert _ask(prover) == (PROOF, True)  # written anew


def test_a_cache_that_cannot_be_written_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(proofs.FOLDER, str(tmp_path / "file"))
    prover = _Prover()
    assert [_ask(prover).before for _ in range(2)] == [False, False]
    monkeypatch.setenv(proofs.FOLDER, "")
    assert [_ask(prover).before for _ in range(2)] == [False, False]
    assert prover.calls == 4


def test_the_cache_is_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(proofs.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sfttrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sfttrain"


def test_nothing_is_kept_of_code_that_transformers_does_not_have(folder: Path) -> None:
    class Foreign(Qwen2Config):
        pass

    prover = _Prover()
    for _ in range(2):
        assert remembered(Foreign(), ABOUT, Proof, prover, False) == (PROOF, False)
    assert not folder.exists()


def test_what_cannot_be_proven_is_tried_again() -> None:
    def fails() -> Proof:
        raise RuntimeError("no such kernel")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such kernel"):
            remembered(Qwen2Config(), ABOUT, Proof, fails, False)


def test_a_failed_proof_is_kept_as_it_is() -> None:
    leaks = dataclasses.replace(PROOF, leak=0.5)
    prover = _Prover(leaks)
    _ask(prover)
    assert _ask(prover) == (leaks, True)
    assert not _ask(prover).proof.isolated
