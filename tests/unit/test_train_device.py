"""A GPU that cannot be used as asked is one line with the way that works; stand-ins tell what PyTorch would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftdata.errors import UsageError
from sfttrain import device
from sfttrain.device import check_device, out_of_memory, refuse_too_large

# As PyTorch words them.
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and"
    " installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
HIDDEN = "No CUDA GPUs are available"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for a GPU: change what PyTorch says of it."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57\n")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def change(
        *, capability: tuple[int, int] = (9, 0), bf16: bool = True, error: str = "", gigabytes: int = 80
    ) -> None:
        def init() -> None:
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: not error)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_100", "compute_120"])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 10**9 // 2, gigabytes * 10**9))

    change()
    return change


def _check(settings: dict[str, object] | None = None, dtype: str = "auto") -> list[str]:
    said: list[str] = []
    check_device(settings or {}, dtype, said.append)
    return said


def _refused(*given: Any) -> str:
    with pytest.raises(UsageError) as caught:
        _check(*given)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_gpu_that_works_is_not_mentioned(gpu: Any) -> None:
    assert not _check()
    assert not _check({"bf16": True}, "bfloat16")


def test_a_driver_that_is_too_old_is_refused_instead_of_training_on_the_cpu(gpu: Any) -> None:
    gpu(error=OLD_DRIVER)
    text = _refused()
    assert "cannot use the GPU: The NVIDIA driver on your system is too old (found version 11040)." in text
    assert "Fix: update it, or install a PyTorch for an older CUDA" in text
    assert "use_cpu=True" in text
    assert not _check({"use_cpu": True})


def test_gpus_that_are_hidden_are_no_error(gpu: Any) -> None:
    gpu(error=HIDDEN)
    assert not _check()


def test_a_pytorch_without_cuda_beside_a_driver_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (said,) = _check()
    assert "built without CUDA" in said


def test_a_machine_without_a_gpu_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not _check()


def test_a_gpu_that_this_pytorch_has_no_kernels_for_is_refused(gpu: Any) -> None:
    gpu(capability=(7, 0))
    assert "Tesla (compute capability 7.0): this PyTorch has kernels for 7.5 and newer." in _refused()
    gpu(capability=(7, 5))
    assert not _check()


def test_a_gpu_without_bfloat16_is_refused_it_and_said_to_compute_in_float32(gpu: Any) -> None:
    gpu(capability=(7, 5), bf16=False)
    assert "bf16=True: Tesla does not compute in bfloat16. Fix: set fp16=True" in _refused({"bf16": True})
    assert 'dtype="bfloat16": Tesla does not compute in bfloat16. Fix: set dtype="float32"' in _refused(
        {}, "bfloat16"
    )
    assert _check() == ["compute: float32, since Tesla does not compute in bfloat16; fp16=true is faster"]
    assert not _check({"fp16": True})


@pytest.mark.parametrize(
    ("optimizer", "trained", "gigabytes", "fits"),
    [
        ("adamw_torch_fused", True, 16, True), ("adamw_torch_fused", True, 15, False), ("adamw_torch_fused", False, 5, True),
        ("sgd", True, 9, True), ("sgd", True, 7, False), ("adamw_bnb_8bit", True, 5, True), ("adamw_bnb_8bit", True, 3, False),
    ],
)  # fmt: skip
def test_a_model_that_cannot_fit_is_refused_before_it_is_moved(
    gpu: Any, optimizer: str, trained: bool, gigabytes: int, fits: bool
) -> None:
    gpu(gigabytes=gigabytes)
    with torch.device("meta"):
        model = torch.nn.Linear(1_000_000, 1_000, bias=False).requires_grad_(trained)  # 4 GB
    args: Any = SimpleNamespace(device=torch.device("cuda"), fsdp="", deepspeed=None, optim=optimizer)
    if fits:
        refuse_too_large(model, args)
        return
    with pytest.raises(
        UsageError, match="The model does not fit: weights, gradients and optimizer state take"
    ) as caught:
        refuse_too_large(model, args)
    assert 'lora="r=16"' in str(caught.value)
    for spread in ({"fsdp": "full_shard"}, {"deepspeed": "zero3.json"}, {"device": torch.device("cpu")}):
        refuse_too_large(model, SimpleNamespace(**vars(args) | spread))  # type: ignore[arg-type]


def test_what_a_launcher_shards_is_not_judged(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(gigabytes=1)
    with torch.device("meta"):
        model = torch.nn.Linear(1_000_000, 1_000, bias=False)
    args: Any = SimpleNamespace(device=torch.device("cuda"), fsdp="", deepspeed=None, optim="adamw_torch")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_too_large(model, args)


def test_out_of_memory_is_one_line_wherever_it_happens() -> None:
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8 GiB.\nMore."
    )
    host = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
    )
    assert str(out_of_memory(full, 0)).startswith(
        'The model does not fit: CUDA out of memory. Fix: lora="r=16"'
    )
    assert str(out_of_memory(full, 3)).startswith(
        "Step 3 does not fit: CUDA out of memory. Fix: set activation_checkpointing=True"
    )
    assert "can't allocate memory" in str(out_of_memory(host, 1))
    assert out_of_memory(RuntimeError("size mismatch"), 1) is None
