"""The flattened path end to end without a GPU, and every way down from it after a failed proof."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdata.errors import UsageError
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.varlen_signatures import SIGNATURES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
QUICK = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
}
SIXTEEN = {**QUICK, "bf16": True}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as wide as the kernel takes them."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "wide", hidden_size=64, intermediate_size=96)


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let kernels of flattened rows run here."""
    monkeypatch.setattr("sfttrain.attention.FLATTENED_DEVICES", {"cpu"})
    return monkeypatch


@pytest.mark.feature("attention")
@pytest.mark.parametrize("release", list(SIGNATURES))
def test_the_default_of_a_gpu_trains_with_each_signature_of_varlen(
    shards: Path,
    wide: Path,
    tmp_path: Path,
    kernels: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    release: str,
) -> None:
    calls: list[str] = []

    def count(*inputs: Any, **options: Any) -> torch.Tensor:
        calls.append(release)
        return SIGNATURES[release](*inputs, **options)

    count.__signature__ = inspect.signature(SIGNATURES[release])
    kernels.setattr("torch.nn.attention.varlen.varlen_attn", count)
    found = train_in_process(shards, wide, tmp_path / "varlen", SIXTEEN)
    said = capsys.readouterr().err
    assert "attention: varlen (the fastest usable on cpu)" in said
    assert "packing: proven on a tiny llama" in said
    assert found.data_collator.flatten
    assert calls
    eager = train_in_process(shards, wide, tmp_path / "eager", SIXTEEN, attention="eager")
    assert _losses(found) == pytest.approx(_losses(eager), rel=5e-3)


def _broken(*inputs: Any, **options: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel here")


def _leaking(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attend over the whole row, as if it were one document."""
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    return SIGNATURES["2.12"](
        query,
        key,
        value,
        whole,
        whole,
        len(query),
        len(query),
        scale=scale,
        window_size=window_size,
        enable_gqa=enable_gqa,
    )


@pytest.mark.parametrize(
    ("kernel", "reason"), [(_broken, "no such kernel here"), (_leaking, "rounds .* times as much")]
)
def test_after_a_failed_proof_the_next_attention_packs(
    shards: Path,
    wide: Path,
    tmp_path: Path,
    kernels: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: Any,
    reason: str,
) -> None:
    kernels.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    trainer = train_in_process(shards, wide, tmp_path / "out", SIXTEEN)
    said = capsys.readouterr().err
    assert re.search(f"attention: sdpa instead of varlen .*{reason}", said)
    assert "packed = alone" in said
    assert trainer.model.config._attn_implementation == "sdpa"
    assert not trainer.data_collator.flatten
    assert len(_losses(trainer)) == 2


@pytest.fixture
def broken_package(tmp_path: Path, kernels: pytest.MonkeyPatch) -> str:
    """A FlashAttention 2 that is installed, and built for another PyTorch."""
    reason = "flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E"
    (tmp_path / "site/flash_attn").mkdir(parents=True)
    (tmp_path / "site/flash_attn/__init__.py").write_text(f"raise ImportError({reason!r})\n")
    (tmp_path / "site/flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "site/flash_attn-2.8.3.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
    )
    kernels.syspath_prepend(tmp_path / "site")
    kernels.setattr("torch.nn.attention.varlen.varlen_attn", SIGNATURES["2.13"])
    return reason


def test_a_kernel_package_that_does_not_import_is_left_out_by_name(
    shards: Path, wide: Path, tmp_path: Path, broken_package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train_in_process(shards, wide, tmp_path / "out", SIXTEEN)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "instead of" in line]
    assert line.startswith("attention: varlen instead of flash_attention_2 (")
    assert trainer.model.config._attn_implementation == "varlen"
    assert trainer.data_collator.flatten
    with pytest.raises(
        UsageError, match='attention="flash_attention_2": .*Fix: set attention="auto"'
    ) as caught:
        train_in_process(shards, wide, tmp_path / "asked", SIXTEEN, attention="flash_attention_2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", ["auto", "require"])
def test_an_attention_that_was_asked_for_is_refused_where_its_proof_fails(
    shards: Path, wide: Path, tmp_path: Path, kernels: pytest.MonkeyPatch, packing: str
) -> None:
    kernels.setattr("torch.nn.attention.varlen.varlen_attn", _broken)
    with pytest.raises(UsageError, match='no such kernel here.*Fix: set attention="auto"'):
        train_in_process(shards, wide, tmp_path / "out", SIXTEEN, attention="varlen", packing=packing)


def _unprovable(*_: Any) -> Any:
    raise RuntimeError("cannot be made small")


def test_without_any_proof_documents_are_trained_one_by_one(
    shards: Path, wide: Path, tmp_path: Path, kernels: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.setattr("sfttrain.path.prove", _unprovable)
    trainer = train_in_process(shards, wide, tmp_path / "out", SIXTEEN)
    said = capsys.readouterr().err
    assert (
        "packing: could not be tried on this architecture (cannot be made small); every document is trained in a row"
        in said
    )
    assert not trainer.data_collator.flatten
    assert trainer.model.config._attn_implementation != "varlen"
    assert not trainer.fused


@pytest.mark.parametrize(
    "asked",
    [{"objective": "dft"}, {"loss": "chunked"}, {"loss": "torch"}, {"packing": "require"}],
    ids=lambda one: str(*one.items()),
)
def test_what_only_a_proof_allows_is_refused_without_one(
    shards: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
) -> None:
    monkeypatch.setattr("sfttrain.path.prove", _unprovable)
    ((name, value),) = asked.items()
    with pytest.raises(UsageError, match=f'{name}="{value}".*cannot be made small.*Fix: set {name}='):
        train_in_process(shards, wide, tmp_path / "out", QUICK, **asked)
