"""What a set and its speed depend on besides data and settings: versions, machine, and variables that change behaviour."""

from __future__ import annotations

import locale
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from sftdata.engine.local import usable_cores
from sftdata.version import __version__

VARIABLES = (
    "HF_HUB_OFFLINE", "NO_COLOR", "OMP_NUM_THREADS", "PYTHONHASHSEED", "RAYON_NUM_THREADS",
    "TOKENIZERS_PARALLELISM", "TZ",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Return plain JSON data to put into a report of a fault; it holds no paths, user names or secrets."""
    return {
        "sftdata": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": {"usable": usable_cores(), "all": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "encoding": {"files": sys.getfilesystemencoding(), "locale": locale.getpreferredencoding(False)},
        "packages": {name: _version(name) for name in sorted(_dependencies())},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _dependencies() -> set[str]:
    """Return the packages that ours asks for, extras included; what is needed to work on it aside."""
    lines = [line for line in requires("sftdata") or [] if "extra == 'dev'" not in line.replace('"', "'")]
    return {found[0] for line in lines if (found := re.match(r"[\w.-]+", line))} - {"sftdata"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
