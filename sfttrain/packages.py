"""Packages that only some settings need: looked for before the run begins, named with the command that installs them."""

from __future__ import annotations

from importlib.util import find_spec

from sftdata.errors import UsageError, did_you_mean

_TRAINER = ("torch", "transformers", "accelerate", "peft", "safetensors")
TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
}


def require_trainer() -> None:
    """Refuse to train without the packages of the extra `train`.

    Raises:
        UsageError: naming the extra.
    """
    for package in _TRAINER:
        require_package(package, "sfttrain", "train")


def require_package(package: str, setting: str, extra: str = "") -> None:
    """Refuse a setting whose package is missing.

    Args:
        package: its name, as imported.
        setting: what needs it, as the user wrote it.
        extra: of this project, that brings it along.

    Raises:
        UsageError: the package is not installed.
    """
    if find_spec(package) is None:
        source = f"'sftdata[{extra}]'" if extra else package
        raise UsageError(f"{setting} needs the package {package}.", f"pip install {source}")


def require_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not installed.

    Raises:
        UsageError: the tracker cannot be used.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        choices = f"choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
        fix = did_you_mean(name, INTEGRATION_TO_CALLBACK, choices)
        raise UsageError(f"report_to={name}: there is no such tracker.", fix)
    if name in TRACKERS:  # of the others, transformers knows what they need
        require_package(TRACKERS[name], f"report_to={name}")
