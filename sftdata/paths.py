"""Names of files and folders: which may be written to, and how one is written down."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sftdata.errors import UsageError

_SCHEME = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]+:/"
)  # two letters at least, and one slash: Path makes one of two

_FOLDERS = re.compile(r"(?<![\w/:.~-])/(?:[^\s/:]+/)+")


def local_output(path: str | Path, flag: str = "-o") -> Path:
    """Return an output as a path of this machine.

    Args:
        path: what was asked for.
        flag: that named it.

    Raises:
        UsageError: it is an address of an object store or a server, or no text.

    >>> local_output("sets/chats").name
    'chats'
    """
    text = os.fspath(path)
    if found := _SCHEME.match(text):
        scheme = found[0].removesuffix(":/")
        copy = (
            "leave out `file://`."
            if scheme == "file"
            else f"choose a local folder, and copy it to {scheme} afterwards."
        )
        raise UsageError(
            f"{flag} {text}: is the URL of {scheme}; outputs are written to local paths only.", copy
        )
    if written(text) != text:
        raise UsageError(f"{flag} {written(text)}: the name is not UTF-8.", "choose another name.")
    return Path(path)


def written(name: str) -> str:
    r"""Return a name as it is written down: bytes that are not UTF-8, which Python holds as surrogates, as escapes.

    >>> written("sur\udcff.jsonl")
    'sur\\xff.jsonl'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def without_folders(text: str) -> str:
    """Return text in which absolute paths are cut to their last part, so that it tells nothing of the machine.

    >>> without_folders("/data/mine/a.jsonl: text; s3://bucket/b.jsonl and c/d stay.")
    'a.jsonl: text; s3://bucket/b.jsonl and c/d stay.'
    """
    return _FOLDERS.sub("", written(text))


def behind_links(output: Path) -> Path:
    """Return the folder that an output stands for: itself, or what a link in its place points to.

    Raises:
        UsageError: the link points to nothing, or in a circle.
    """
    if not output.is_symlink():
        return output
    try:
        return output.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise the latter for a circle
        if isinstance(error, FileNotFoundError):
            target = os.path.realpath(output)
            raise UsageError(
                f"{output}: a link to {target}, which is not there.", f"mkdir -p {target}, or another -o."
            ) from None
        raise UsageError(
            f"{output}: a link that leads in a circle.", "remove the link, or choose another -o."
        ) from None
