"""Proofs of earlier runs, by what they were made of: a model is proven once for the same versions and device.

A file of the user's cache holds one proof. Its name is a hash of the model's config, of the versions of the
packages and of this one's source, of the device and of what was asked. A damaged file is no proof, and a
folder that cannot be written keeps none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import msgspec
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = "SFTTRAIN_CACHE"  # environment variable: where proofs are kept; empty: none are
# Whatever computes a step. Their releases change kernels and modelling code.
_PACKAGES = (
    "torch", "transformers", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4",
    "kernels", "causal-conv1d", "mamba-ssm", "flash-linear-attention",
)  # fmt: skip
_NAMES = ("_name_or_path", "name_or_path", "transformers_version")  # fields of a config that compute nothing

T = TypeVar("T")


class Remembered(NamedTuple, Generic[T]):
    """A proof, and whether an earlier run made it."""

    proof: T
    before: bool


def remembered(
    config: PreTrainedConfig, about: Mapping[str, object], kind: type[T], prove: Callable[[], T], again: bool
) -> Remembered[T]:
    """Return the proof that an earlier run made of the same, or make it and keep it.

    Args:
        config: of the model; code that transformers does not have can change, so nothing of it is kept.
        about: what else the proof depends on, as plain values.
        kind: of the proof: a number, or a dataclass of plain values.
        prove: makes it.
        again: make it in any case.

    Raises:
        Exception: whatever `prove` raises; that is not kept.
    """
    folder = cache_folder()
    if folder is None or not type(config).__module__.startswith("transformers."):
        return Remembered(prove(), False)
    path = folder / "proofs" / f"{_name(config, about)}.json"
    if not again:
        with suppress(OSError, ValueError, msgspec.MsgspecError):
            return Remembered(_read(path, kind), True)
    proof = prove()
    with suppress(OSError):
        _keep(path, msgspec.json.encode(proof))
    return Remembered(proof, False)


def cache_folder() -> Path | None:
    """Return the folder for what may be kept between runs, None for none."""
    given = os.environ.get(FOLDER)
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sfttrain"


def _keep(path: Path, content: bytes) -> None:
    """Write a proof whole or not at all, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(_digest(content).encode() + b"\n" + content)
    os.replace(file.name, path)


def _read(path: Path, kind: type[T]) -> T:
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != _digest(content).encode():
        raise ValueError(f"{path}: damaged")
    return msgspec.json.decode(content, type=kind)


def _name(config: PreTrainedConfig, about: Mapping[str, object]) -> str:
    fields = {key: value for key, value in config.to_dict().items() if key not in _NAMES}
    whole = [type(config).__qualname__, fields, dict(about), _machine(), _source()]
    return _digest(json.dumps(whole, sort_keys=True, default=str).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _machine() -> list[object]:
    """Return what computes: packages, and the device."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device: list[object] = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        device += [torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda]
    return [versions, device]


@cache
def _source() -> str:
    """Return the digest of this package's own code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(b"".join(file.read_bytes() for file in files))
