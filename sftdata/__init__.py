"""Turn SFT data into verified constant-length shards.

>>> import sftdata
>>> manifest = sftdata.prepare("chats.jsonl", tokenizer="tok/", output="shards/")  # doctest: +SKIP
>>> shards = sftdata.open("shards/")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftdata.shardset.manifest import Manifest
    from sftdata.show.shown import ShownSet

__all__ = ["open", "prepare"]


def prepare(inputs: str | Path | Sequence[str | Path], *, tokenizer: str, output: str | Path, **settings: Any) -> Manifest:
    """Build a set of shards; the same function as `sftdata prepare`.

    Args:
        inputs: files, folders, globs, URLs or Hub dataset ids.
        tokenizer: folder or Hub id.
        output: folder of the set.
        settings: any field of `sftdata.config.PrepareConfig`.

    Raises:
        sftdata.errors.SftError: in one line, what stopped it and what to do.
    """
    from sftdata.config import make_config
    from sftdata.run import prepare as run

    return run(make_config(inputs=inputs, tokenizer=str(tokenizer), output=output, **settings))


def open(folder: str | Path) -> ShownSet:
    """Open a finished set for reading; nothing but its manifest is read yet.

    Raises:
        sftdata.errors.SftError: there is no set, or it is damaged.
    """
    from sftdata.show.shown import open_shown

    return open_shown(folder)
