"""Packages that only some settings need: looked for before the run begins, named with the command that installs them."""

from __future__ import annotations

from importlib.util import find_spec

from sftdata.errors import UsageError

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "comet_ml": "comet_ml"}


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
    """Refuse a tracker that is unknown to us and not installed, or known and not installed.

    Raises:
        UsageError: the tracker cannot be used.
    """
    if name not in ("none", "all"):
        require_package(TRACKERS.get(name, name), f"report_to={name}")
