"""Turn SFT data into verified constant-length shards.

>>> import sftdata
>>> manifest = sftdata.prepare("chats.jsonl", tokenizer="tok/", output="shards/")  # doctest: +SKIP
>>> shards = sftdata.open("shards/")  # doctest: +SKIP

What `__all__` names is the public interface; docs/versioning.md says what may change in it, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, cast, overload

from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.keywords import TOLD, telling
from sftdata.output import Progress
from sftdata.version import __version__
from sftdata.wording import keywords_of, know, worded

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from os import PathLike
    from typing import Unpack

    from pydantic import BaseModel

    from sftdata.batches import Completion, Conversation, Text, Tokens
    from sftdata.config import PrepareConfig
    from sftdata.formats.formatter import by_columns
    from sftdata.keywords import AnyRegistry, PrepareSettings, ViewSettings
    from sftdata.objects import AnyTokenizer, Inputs
    from sftdata.run import Preview
    from sftdata.set.export import Exported, Target
    from sftdata.set.manifest import Manifest
    from sftdata.set.push import push
    from sftdata.set.verify import VerifyReport
    from sftdata.show.diff import Diff
    from sftdata.show.findings import Finding
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
    "diff",
    "export",
    "open",
    "prepare",
    "preview",
    "push",
    "stream",
    "verify",
    "view",
]

Formatter = str | Callable[[Any], object] | None


@overload
def prepare(
    inputs: Inputs, *, tokenizer: AnyTokenizer | None = None, output: str | Path, formatter: Formatter = None,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    eval: None = None, **settings: Unpack[PrepareSettings],
) -> Manifest: ...  # fmt: skip
@overload
def prepare(
    inputs: Inputs, *, tokenizer: AnyTokenizer | None = None, output: str | Path, formatter: Formatter = None,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    eval: str | float, **settings: Unpack[PrepareSettings],
) -> tuple[Manifest, Manifest]: ...  # fmt: skip
@telling
def prepare(
    inputs: Inputs, *,
    tokenizer: AnyTokenizer | None = None, output: str | Path, formatter: Formatter = None,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    # ---- what is read
    like: str | Path | None = None, split: str | None = None, subset: str | None = None,
    format: str | None = None, map: Mapping[str, str] = {}, map_role: Mapping[str, str] = {},
    kind: Literal["auto", "conversation", "completion", "text"] = "auto",
    prompt_template: str | None = None, registry: AnyRegistry = None, max_line_bytes: int = 64 << 20,
    # ---- what is rendered and trained
    revision: str | None = None, chat_template: str | None = None,
    template_kwargs: Mapping[str, object] = {}, date: str = "2025-01-01",
    train_on: Literal["auto", "assistant", "last-assistant", "completion", "all"] = "auto",
    response_template: str | Sequence[int] | None = None,
    instruction_template: str | Sequence[int] | None = None,
    mask_mode: Literal["default", "trl-0.7.10"] = "default", loss_weights: bool = False,
    boundary: Literal["split", "merge"] = "split", eos_token: str | None = None,
    trust_control_tokens: bool = False, processor: Path | None = None, max_pixels: int | None = None,
    min_pixels: int | None = None, images: Path | None = None, embed_images: bool = False,
    check_pixels: bool = False,
    # ---- how it is cut, packed and stored
    max_length: int | None = None,
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] = "truncate",
    packing: Literal["bfd", "wrapped", "none"] = "bfd", max_rejects: str | int = "1%",
    slice_bytes: int = 8 << 20,
    # ---- which of the documents the set holds
    dedup: Literal["row", "prompt"] | None = None,
    exclude: Sequence[str | Path] = (), exclude_by: Literal["row", "prompt"] = "prompt",
    cap: Mapping[str, str] = {}, eval: str | float | None = None, mix: Mapping[str, float | str] = {},
    mix_by: Literal["rows", "tokens", "trained"] = "trained", passes: float = 1, total: str | None = None,
    seed: int = 0,
    # ---- how the work is done; never changes a byte of the set
    workers: int | Executor | None = None, engine: Literal["auto", "gigatoken", "tokenizers"] = "auto",
    overwrite: bool = False, **unknown: Never,
) -> Manifest | tuple[Manifest, Manifest]:  # fmt: skip
    """Build a set of shards; the same function as `sftdata prepare`.

    Args:
        inputs: files, folders, globs, URLs or Hub dataset ids; or rows, hashed as files are: a dataset of
            `datasets`, also with splits, a frame of pandas or polars, an Arrow table, an iterable of dicts.
        tokenizer: folder, Hub id, or a tokenizer of transformers as it is now.
        output: folder of the set, also as `s3://bucket/set`; with `eval`, of two: `train` and `eval`.
        formatter: a function from a row to a training row, or its name as `module:function`. One that cannot
            be imported by name, such as a lambda or a cell of a notebook, is called in this process only.
        on_note: called with each decision made for you, in a sentence; default: logger `sftdata`, level INFO.
        on_progress: called after each finished shard task.

    The others are the settings of `sftdata prepare --help`; `workers` may be an executor, such as Dask's.

    Returns:
        The manifest: digest, sources, settings and ledger; with `eval` those of two sets, training first.

    Raises:
        SftError: one line with problem and fix; what is finished is kept, and the same call resumes.
    """
    from sftdata.objects import named, shown

    with named(locals()) as given:
        tell = on_note or _log
        return _prepare(_config(**given), workers, on_progress, lambda note: tell(worded(shown(note))))


@telling
def preview(
    inputs: Inputs, *,
    tokenizer: AnyTokenizer | None = None, number: int = 3, formatter: Formatter = None,
    # ---- what is read
    like: str | Path | None = None, split: str | None = None, subset: str | None = None,
    format: str | None = None, map: Mapping[str, str] = {}, map_role: Mapping[str, str] = {},
    kind: Literal["auto", "conversation", "completion", "text"] = "auto",
    prompt_template: str | None = None, registry: AnyRegistry = None, max_line_bytes: int = 64 << 20,
    # ---- what is rendered and trained
    revision: str | None = None, chat_template: str | None = None,
    template_kwargs: Mapping[str, object] = {}, date: str = "2025-01-01",
    train_on: Literal["auto", "assistant", "last-assistant", "completion", "all"] = "auto",
    response_template: str | Sequence[int] | None = None,
    instruction_template: str | Sequence[int] | None = None,
    mask_mode: Literal["default", "trl-0.7.10"] = "default", loss_weights: bool = False,
    boundary: Literal["split", "merge"] = "split", eos_token: str | None = None,
    trust_control_tokens: bool = False, processor: Path | None = None, max_pixels: int | None = None,
    min_pixels: int | None = None, images: Path | None = None, embed_images: bool = False,
    check_pixels: bool = False,
    # ---- how it is cut, packed and stored
    max_length: int | None = None,
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] = "truncate",
    packing: Literal["bfd", "wrapped", "none"] = "bfd", max_rejects: str | int = "1%",
    slice_bytes: int = 8 << 20,
    # ---- how the work is done; never changes a byte of the set
    workers: int | None = None, engine: Literal["auto", "gigatoken", "tokenizers"] = "auto",
    overwrite: bool = False, **unknown: Never,
) -> Preview:  # fmt: skip
    """Prepare a sample of the rows and return the results, as `sftdata preview`; nothing is written.

    Args:
        inputs, tokenizer, formatter: as for `prepare`, and the settings too.
        number: examples to keep.

    Returns:
        The first examples with ids and labels, the ledger of the sample, estimates for the whole
        (`projected`) and notes.

    Raises:
        SftError: an error that would stop `prepare` before it starts, or there are no rows.
    """
    given: dict[str, Any] = locals()
    from sftdata.choosing import CHOOSING
    from sftdata.objects import named, shown_preview
    from sftdata.run import preview as run

    for name in filter(CHOOSING.__contains__, unknown):
        raise UsageError(
            f"{name}: chooses among the documents of a set; a preview samples all rows.", "leave it out."
        )
    with named(given | {"output": "."}) as settings:
        return shown_preview(run(_config(**settings), number))


def stream(
    rows: Iterable[Any], *,
    tokenizer: AnyTokenizer, formatter: Formatter = None,
    buffer_rows: int = 1024, infinite: bool = False, shuffle: bool = False, seed: int = 0,
    # ---- how a row is read
    format: str | None = None, map: Mapping[str, str] = {}, map_role: Mapping[str, str] = {},
    kind: Literal["auto", "conversation", "completion", "text"] = "auto",
    prompt_template: str | None = None,
    # ---- what is rendered and trained
    revision: str | None = None, chat_template: str | None = None,
    template_kwargs: Mapping[str, object] = {}, date: str = "2025-01-01",
    train_on: Literal["auto", "assistant", "last-assistant", "completion", "all"] = "auto",
    response_template: str | Sequence[int] | None = None,
    instruction_template: str | Sequence[int] | None = None,
    mask_mode: Literal["default", "trl-0.7.10"] = "default", loss_weights: bool = False,
    boundary: Literal["split", "merge"] = "split", eos_token: str | None = None,
    trust_control_tokens: bool = False,
    # ---- how it is cut
    max_length: int | None = None,
    engine: Literal["auto", "gigatoken", "tokenizers"] = "auto", **unknown: Never,
) -> Stream:  # fmt: skip
    """Return constant-length rows made from an iterable of rows as it is read; nothing is written.

    Args:
        rows: dicts or strings; a `datasets` dataset, streaming or not, will do.
        tokenizer, formatter: as for `prepare`.
        buffer_rows: number of rows that are read, and shuffled, at a time.
        infinite: start over at the end of the input, forever.
        shuffle: shuffle the rows inside each buffer, differently in each pass.
        seed: of the shuffling.

    The other arguments are those settings of `prepare` that say how rows are read, rendered, masked and cut.

    Returns:
        An iterable of dicts: int32[max_length] `input_ids` and `labels`, int32[S] `seq_lengths`.

    Raises:
        SftError: one line with the problem and its fix.
    """
    from sftdata.objects import tokenizer_folder
    from sftdata.streaming import Stream, refuse_unstreamed

    refuse_unstreamed(unknown)
    given = {name: value for name, value in locals().items() if name != "seed"}  # not that of `prepare`
    given |= {"inputs": "stream", "output": ".", "tokenizer": tokenizer_folder(tokenizer)}
    config = _config(**given)
    return Stream(rows, config, buffer_rows=buffer_rows, infinite=infinite, shuffle=shuffle, seed=seed)


@overload
def view(
    sets: str | PathLike[str] | Sequence[str | PathLike[str]], *, output: str | Path,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    eval: None = None, **settings: Unpack[ViewSettings],
) -> Manifest: ...  # fmt: skip
@overload
def view(
    sets: str | PathLike[str] | Sequence[str | PathLike[str]], *, output: str | Path,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    eval: str | float, **settings: Unpack[ViewSettings],
) -> tuple[Manifest, Manifest]: ...  # fmt: skip
@telling
def view(
    sets: str | PathLike[str] | Sequence[str | PathLike[str]], *, output: str | Path,
    on_note: Callable[[str], object] | None = None, on_progress: Callable[[Progress], object] | None = None,
    like: str | Path | None = None,
    # ---- which documents
    sources: Sequence[str] = (), without: Sequence[str] = (),
    min_tokens: int | None = None, max_tokens: int | None = None,
    min_trained: str | None = None, max_trained: str | None = None, drop: Path | None = None,
    dedup: Literal["row", "prompt"] | None = None,
    exclude: Sequence[str | Path] = (), exclude_by: Literal["row", "prompt"] = "prompt",
    cap: Mapping[str, str] = {},
    # ---- split and mix
    eval: str | float | None = None, mix: Mapping[str, float | str] = {},
    mix_by: Literal["rows", "tokens", "trained"] = "trained", passes: float = 1, total: str | None = None,
    seed: int = 0,
    # ---- how it is laid out
    max_length: int | None = None,
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] | None = None,
    packing: Literal["bfd", "wrapped", "none"] | None = None,
    pack_over: Literal["auto", "slice", "view"] = "auto",
    order: Literal["as-is", "shuffled", "length", "trained", "sources", "windows"] = "as-is",
    bands: int = 8, window: int = 64,
    steps_for: str | None = None, model: Path | None = None, epochs: int = 1,
    pad_to_multiple_of: int = 1, write: bool = False, overwrite: bool = False, **unknown: Never,
) -> Manifest | tuple[Manifest, Manifest]:  # fmt: skip
    """Make a set of documents of finished sets, without a tokenizer; the same function as `sftdata view`.

    Args:
        sets: folders of finished sets, or opened ones, made with one tokenizer.
        output: folder of the new set; with `eval`, of two: `train` and `eval`.
        on_note: called with each decision, in one sentence. Default: the logger `sftdata`, level INFO.
        on_progress: called after each shard.

    The other arguments are the settings of `sftdata view --help`.

    Returns:
        The manifest of the set; with `eval` a tuple of two, that of the training set first.

    Raises:
        SftError: one line with problem and fix; what is finished is kept, and the same call resumes.
    """
    from sftdata.settings import check_settings
    from sftdata.views.recipe import ViewConfig
    from sftdata.views.write import make_view

    config = check_settings(ViewConfig, "sftdata", _settings(ViewConfig, locals(), unknown))
    made = make_view(config, on_progress, lambda note: (on_note or _log)(worded(note)))
    return made[0] if config.eval is None else (made[0], made[1])


def open(folder: str | PathLike[str]) -> ShownSet:
    """Open a finished set, or its URL, for reading; nothing but its manifest is read yet.

    Returns:
        Packed rows, each with `input_ids`, `labels` and `seq_lengths`; a notebook shows their masked text.

    Raises:
        SftError: there is no set, or it is damaged.
    """
    from sftdata.show.view import open_shown

    return open_shown(folder)


def verify(folder: str | PathLike[str], *, sha256: bool = False, quick: bool = False) -> VerifyReport:
    """Check every byte of a set against its manifest and count its ledger again, as `sftdata verify`.

    Args:
        folder: a finished set.
        sha256: compare sha256 as well as xxh3-128: proof against forgery, several times slower.
        quick: read no tokens: look only at the size of the files that hold them.

    Returns:
        What was read and, in `problems`, one line each; `ok` if there are none.

    Raises:
        SftError: there is no set, or its manifest is damaged, so that there is nothing to compare with.
    """
    from sftdata.set.verify import verify as run

    report = run(folder, sha256=sha256, quick=quick)
    report.problems = list(map(worded, report.problems))
    return report


def diff(a: str | PathLike[str], b: str | PathLike[str], *, limit: int = 3) -> Diff:
    """Show what came, went or changed from one set to another, as `sftdata diff`: documents, tokens, labels.

    Args:
        a, b: finished sets.
        limit: documents to keep of each kind, with their text.

    Returns:
        Counts, by kind and source, and settings that differ; `equal` if nothing does. A notebook shows them.

    Raises:
        SftError: a folder is no finished set, a set is damaged, or one of format version 1 has lost tokens.
    """
    from sftdata.show.diff import diff as run

    return run(a, b, limit)


def export(folder: str | PathLike[str], *, to: Target, output: str | Path) -> Exported:
    """Write a set as other trainers read tokenized rows, as `sftdata export`.

    Args:
        folder: a finished set, or a view.
        to: who reads it, as "datasets" or "verl": see `sftdata export --help`.
        output: folder to be made.

    Returns:
        What was written, and what the format or its reader leaves out; sftdata-export.json says the same.

    Raises:
        SftError: there is no set, it holds what the format cannot carry, or the output exists.
    """
    from sftdata.output import local_output
    from sftdata.set.export import export as run

    return run(folder, local_output(output), to)


def audit(
    folder: str | PathLike[str], *, against: str | PathLike[str] | None = None, every: bool = False,
    tokenizer: str | None = None, split: str | None = None, map: Mapping[str, str] = {},
) -> list[Finding]:  # fmt: skip
    """Look for unintended supervision in a set; the same as `sftdata audit`.

    Args:
        folder: a finished set; with `tokenizer`, the one that made them, token rows of another tool.
        against: an evaluation set that should share no prompts with it.
        every: name every place of a finding instead of the first three.
        split, map: of token rows, as for `prepare`.

    Returns:
        Findings, defects first, each with its `code`, `severity`, count, places and fix.

    Raises:
        SftError: a folder is no finished set, a set is damaged, or the two have different tokenizers.
    """
    from sftdata.show.audit import audit as run

    findings = run(folder, against, every=every, tokenizer=tokenizer, split=split, columns=map)
    return [replace(one, fix=worded(one.fix)) for one in findings]


def _prepare(
    config: PrepareConfig, workers: int | Executor | None,
    progress: Callable[[Progress], object] | None, note: Callable[[str], object],
) -> Manifest | tuple[Manifest, Manifest]:  # fmt: skip
    from sftdata.workers import start_workers

    with start_workers(config, workers) as pool:
        if config.chooses:
            from sftdata.selected import prepare as choose

            made = choose(config, pool, progress, note)
            return made[0] if config.eval is None else (made[0], made[1])
        from sftdata.parts import prepare as run

        return cast("Manifest", run(config, pool, progress, note))  # whole, as no part was asked for


def _config(*, formatter: Formatter, unknown: dict[str, object], **given: object) -> PrepareConfig:
    """Return the settings among these arguments; a formatter that only this process knows has it alone."""
    from sftdata.config import PrepareConfig, make_config
    from sftdata.formats.formatter import name_formatter

    name, alone = name_formatter(formatter)
    if name is not None:
        given["formatter"] = name
    config = make_config(**_settings(PrepareConfig, given, unknown))
    return config.model_copy(update={"workers": 1}) if alone else config


def _settings(
    model: type[BaseModel], given: Mapping[str, object], unknown: Mapping[str, object]
) -> dict[str, object]:
    """Return the settings among arguments; those left out are as in the set that `like` names, if any."""
    told = {"inputs", "sets", "output", *cast(Iterable[str], unknown.get(TOLD, given))}
    settings = {name: value for name, value in given.items() if name in model.model_fields}
    if "inputs" in settings and TOLD in unknown:
        from sftdata.as_view import refuse_sets

        refuse_sets({name: value for name, value in settings.items() if name in told})
    if settings.get("like") is not None:
        from sftdata.like import settings_like

        settings = {name: value for name, value in settings.items() if name in told}
        settings = settings_like(Path(str(settings["like"])), model.model_fields, settings) | settings
    if settings.get("tokenizer", "") is None:
        del settings["tokenizer"]
    return settings | {name: value for name, value in unknown.items() if name != TOLD}


def _log(note: str) -> None:
    import_module("logging").getLogger("sftdata").info(note)


know(lambda: (keywords_of(one) for one in (prepare, preview, stream, view, audit, diff, export, verify)))


def __dir__() -> list[str]:
    return __all__  # with what is loaded later: for the completion of notebooks


if not TYPE_CHECKING:  # hidden, so that a type checker still refuses unknown names

    def __getattr__(name: str) -> object:
        where = {"by_columns": "formats.formatter", "push": "set.push"}
        where |= dict.fromkeys(("Completion", "Conversation", "Text", "Tokens"), "batches")
        if name in where:
            return getattr(import_module(f"sftdata.{where[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
