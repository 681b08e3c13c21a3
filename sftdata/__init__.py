"""Turn SFT data into verified constant-length shards.

>>> import sftdata
>>> manifest = sftdata.prepare("chats.jsonl", tokenizer="tok/", output="shards/")  # doctest: +SKIP
>>> shards = sftdata.open("shards/")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftdata.shardset.manifest import Manifest
    from sftdata.show.shown import ShownSet
    from sftdata.streaming import Stream

__all__ = ["batched", "open", "prepare", "stream"]

Formatter = str | Callable[[Any], Any] | None


def prepare(
    inputs: str | Path | Sequence[str | Path],
    *,
    tokenizer: str,
    output: str | Path,
    formatter: Formatter = None,
    **settings: Any,
) -> Manifest:
    """Build a set of shards; the same function as `sftdata prepare`.

    Args:
        inputs: files, folders, globs, URLs or Hub dataset ids.
        tokenizer: folder or Hub id.
        output: folder of the set.
        formatter: a function from a row to a training row, or its name as `module:function`. One that cannot be imported by
            name, such as a lambda or a cell of a notebook, is called in this process only.
        settings: any field of `sftdata.config.PrepareConfig`.

    Raises:
        sftdata.errors.SftError: in one line, what stopped it and what to do.
    """
    from sftdata.config import make_config
    from sftdata.launch import start_workers
    from sftdata.read.formatter import name_formatter

    name, alone = name_formatter(formatter)
    settings |= {"workers": 1} if alone else {}
    config = make_config(inputs=inputs, tokenizer=tokenizer, output=output, formatter=name, **settings)
    with start_workers(config) as workers:
        from sftdata.run import prepare as run

        return run(config, workers)


def stream(
    rows: Iterable[Any], *, tokenizer: str, formatter: Formatter = None, infinite: bool = False, shuffle: bool = False,
    seed: int = 0, **settings: Any,
) -> Stream:  # fmt: skip
    """Return constant-length rows made from an iterable of rows as it is read; nothing is written.

    Args:
        rows: dicts or strings; a `datasets` dataset, streaming or not, will do.
        tokenizer: folder or Hub id.
        formatter: as for `prepare`.
        infinite: begin again at the end of the input, for ever.
        shuffle: mix the rows inside each buffer, anew in each pass.
        seed: of the shuffling.
        settings: `buffer_rows`, rows read at a time, and any field of `sftdata.config.PrepareConfig` that says how rows are
            read, rendered and masked, and `max_length`.

    Raises:
        sftdata.errors.SftError: in one line, what stopped it and what to do.
    """
    from sftdata.config import make_config
    from sftdata.read.formatter import name_formatter
    from sftdata.streaming import BUFFER_ROWS, Stream, refuse_unstreamed

    refuse_unstreamed(settings)
    name, _ = name_formatter(formatter)
    buffer_rows = settings.pop("buffer_rows", BUFFER_ROWS)
    config = make_config(inputs="stream", tokenizer=tokenizer, output=".", formatter=name, **settings)
    return Stream(rows, config, buffer_rows=buffer_rows, infinite=infinite, shuffle=shuffle, seed=seed)


def batched(formatter: Callable[[dict[str, list[Any]]], Any]) -> Callable[[dict[str, list[Any]]], Any]:
    """Mark a formatter that takes a dict of columns and returns a list, one example for each row.

    >>> @batched
    ... def questions(columns):
    ...     return [{"prompt": q, "completion": a} for q, a in zip(columns["q"], columns["a"])]
    """
    formatter.takes_columns = True  # type: ignore[attr-defined]
    return formatter


def open(folder: str | Path) -> ShownSet:
    """Open a finished set for reading; nothing but its manifest is read yet.

    Raises:
        sftdata.errors.SftError: there is no set, or it is damaged.
    """
    from sftdata.show.shown import open_shown

    return open_shown(folder)
