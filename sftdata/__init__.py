"""Turn SFT data into verified constant-length shards.

>>> import sftdata
>>> manifest = sftdata.prepare("chats.jsonl", tokenizer="tok/", output="shards/")  # doctest: +SKIP
>>> shards = sftdata.open("shards/")  # doctest: +SKIP

What `__all__` names is the public interface; docs/versioning.md says what may change in it, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.output import Progress
from sftdata.version import __version__

if TYPE_CHECKING:
    from typing import Unpack

    from sftdata.batches import Completion, Conversation, Text, Tokens
    from sftdata.config import PrepareConfig, PrepareSettings, RowSettings
    from sftdata.run import Preview
    from sftdata.set.manifest import Manifest
    from sftdata.set.verify import VerifyReport
    from sftdata.show.audit import Finding
    from sftdata.show.view import ShownSet
    from sftdata.streaming import Stream

__all__ = [
    "Completion",
    "Conversation",
    "DataError",
    "IntegrityError",
    "Progress",
    "SftError",
    "Text",
    "Tokens",
    "UsageError",
    "__version__",
    "audit",
    "by_columns",
    "open",
    "prepare",
    "preview",
    "stream",
    "verify",
]

Inputs = str | Path | Sequence[str | Path]
Formatter = str | Callable[[Any], object] | None
_Function = TypeVar("_Function", bound=Callable[[Any], object])


def prepare(
    inputs: Inputs,
    *,
    tokenizer: str | Path,
    output: str | Path,
    formatter: Formatter = None,
    on_note: Callable[[str], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    **settings: Unpack[PrepareSettings],
) -> Manifest:
    """Build a set of shards; the same function as `sftdata prepare`.

    Args:
        inputs: files, folders, globs, URLs or Hub dataset ids.
        tokenizer: folder or Hub id.
        output: folder of the set.
        formatter: a function from a row to a training row, or its name as `module:function`. One that cannot
            be imported by name, such as a lambda or a cell of a notebook, is called in this process only.
        on_note: called with each decision that was made for you, in one sentence. Default: the logger
            `sftdata`, level INFO.
        on_progress: called after each shard task that is done.
        settings: any setting of `sftdata prepare --help`, by its name there.

    Returns:
        The manifest of the set: its digest, sources, settings and the ledger of rows and tokens.

    Raises:
        SftError: in one line, what stopped it and how to fix it; what is finished is kept, and the same call
            resumes.
    """
    from sftdata.workers import start_workers

    config, alone = _config(inputs, tokenizer, output, formatter, **settings)
    if alone:
        config = config.model_copy(update={"workers": 1})
    with start_workers(config) as workers:
        from sftdata.run import prepare as run

        return run(config, workers, on_progress, on_note or _log)


def preview(
    inputs: Inputs,
    *,
    tokenizer: str | Path,
    number: int = 3,
    formatter: Formatter = None,
    **settings: Unpack[PrepareSettings],
) -> Preview:
    """Prepare a sample of the rows and return what it shows, as `sftdata preview`; nothing is written.

    Args:
        inputs, tokenizer, formatter, settings: as for `prepare`.
        number: examples to keep.

    Returns:
        The first examples with ids and labels, the ledger of the sample, estimates for the whole
        (`projected`) and notes.

    Raises:
        SftError: what would stop `prepare` from starting, or there are no rows.
    """
    from sftdata.run import preview as run

    return run(_config(inputs, tokenizer, ".", formatter, **settings)[0], number)


def stream(
    rows: Iterable[Any],
    *,
    tokenizer: str | Path,
    formatter: Formatter = None,
    buffer_rows: int = 1024,
    infinite: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    **settings: Unpack[RowSettings],
) -> Stream:
    """Return constant-length rows made from an iterable of rows as it is read; nothing is written.

    Args:
        rows: dicts or strings; a `datasets` dataset, streaming or not, will do.
        tokenizer: folder or Hub id.
        formatter: as for `prepare`.
        buffer_rows: rows read, and shuffled, at a time.
        infinite: begin again at the end of the input, for ever.
        shuffle: mix the rows inside each buffer, anew in each pass.
        seed: of the shuffling.
        settings: those of `prepare` that say how rows are read, rendered and masked, and `max_length`.

    Returns:
        An iterable of dicts: int32[max_length] `input_ids` and `labels`, int32[S] `seq_lengths`.

    Raises:
        SftError: in one line, what stopped it and how to fix it.
    """
    from sftdata.streaming import Stream, refuse_unstreamed

    refuse_unstreamed(settings)
    config, _ = _config("stream", tokenizer, ".", formatter, **settings)
    return Stream(rows, config, buffer_rows=buffer_rows, infinite=infinite, shuffle=shuffle, seed=seed)


def open(folder: str | Path) -> ShownSet:
    """Open a finished set for reading; nothing but its manifest is read yet.

    Returns:
        A sequence of packed rows, each with `input_ids`, `labels` and `seq_lengths`; a notebook shows their
        masked text.

    Raises:
        SftError: there is no set, or it is damaged.
    """
    from sftdata.show.view import open_shown

    return open_shown(folder)


def verify(folder: str | Path, *, sha256: bool = False) -> VerifyReport:
    """Check every byte of a set against its manifest and count its ledger again, as `sftdata verify`.

    Args:
        folder: a finished set.
        sha256: compare sha256 as well as xxh3-128: proof against forgery, several times slower.

    Returns:
        What was read and, in `problems`, what is wrong, one line each; `ok` says whether nothing is.

    Raises:
        SftError: there is no set, or its manifest is damaged, so that there is nothing to compare with.
    """
    from sftdata.set.verify import verify as run

    return run(folder, sha256=sha256)


def audit(folder: str | Path, *, against: str | Path | None = None, every: bool = False) -> list[Finding]:
    """Look for unintended supervision in a set; the same as `sftdata audit`.

    Args:
        folder: a finished set.
        against: an evaluation set that should share no prompts with it.
        every: name every place of a finding instead of the first three.

    Returns:
        Findings, defects first, each with its `code`, `severity`, count, places and fix.

    Raises:
        SftError: a folder is no finished set, a set is damaged, or the two have different tokenizers.
    """
    from sftdata.show.audit import audit as run

    return run(folder, against, every=every)


def by_columns(formatter: _Function) -> _Function:
    """Mark a formatter that takes a dict of columns and returns a list, one example for each row.

    It is called with one row at a time, so that a bad row costs no other.

    >>> @by_columns
    ... def questions(columns):
    ...     return [{"prompt": q, "completion": a} for q, a in zip(columns["q"], columns["a"])]
    """
    formatter.takes_columns = True  # type: ignore[attr-defined]
    return formatter


def _config(
    inputs: Inputs, tokenizer: str | Path, output: str | Path, formatter: Formatter, **settings: object
) -> tuple[PrepareConfig, bool]:
    """Return checked settings, and whether only this process can call the formatter."""
    from sftdata.config import make_config
    from sftdata.formats.formatter import name_formatter

    name, alone = name_formatter(formatter)
    return make_config(inputs=inputs, tokenizer=tokenizer, output=output, formatter=name, **settings), alone


def _log(note: str) -> None:
    import logging

    logging.getLogger("sftdata").info(note)


if not TYPE_CHECKING:  # hidden, so that a type checker still refuses unknown names

    def __getattr__(name: str) -> object:
        if name in ("Completion", "Conversation", "Text", "Tokens"):
            from sftdata import batches

            return getattr(batches, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
