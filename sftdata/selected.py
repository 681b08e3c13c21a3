"""Build a set of some of its documents: all are prepared beside the output, then chosen from as a view.

    OUT.partial.documents    the set of all documents, as `prepare` makes it, until what was chosen stands;
                             in an object store OUT/builds/PLAN, which never becomes the set
    OUT                      the view of it; with `eval` the two sets OUT/train and OUT/eval

Each is a build of its own, which the same command resumes. Where only the choice changes, because it left
nothing, say, the documents stay and are not tokenized again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from sftdata.choosing import SIDES, folders_of
from sftdata.config import PrepareConfig
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.output import Progress, StoreUrl, behind_links
from sftdata.parts import Part, Run, end, make, make_documents, scanning
from sftdata.pipeline import load_engine
from sftdata.plan import MOVING, Plan, inputs_of, make_plan
from sftdata.run import note_padding, other_pictures
from sftdata.set.build import Build, finished_set, made_otherwise, refuse_foreign, unfinished
from sftdata.set.manifest import Manifest, documents_folder, parts_folder, read_manifest
from sftdata.set.shared import BUILDS, finished_sets
from sftdata.settings import check_settings
from sftdata.sources.planning import Scanned
from sftdata.views.plan import named_selection
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import named, read_excluded, shared_out
from sftdata.views.write import make_view, refuse_nested
from sftdata.workers import Workers

OnProgress = Callable[[Progress], object]
OnNote = Callable[[str], object]


def prepare(
    config: PrepareConfig,
    workers: Workers,
    progress: OnProgress | None = None,
    note: OnNote = lambda _: None,
    part: Part | None = None,
) -> tuple[Manifest, ...]:
    """Build a set, or both sides of a split; return the manifest of each, of none where parts are missing.

    Args:
        config: the settings, some of which choose.
        workers: of `launch.start_workers`.
        progress: called after each task, and after each shard of what is chosen.
        note: called with each decision made for the user, in one sentence.
        part: make its slices of all documents alone; whoever finds all of them chooses.

    Raises:
        SftError: whatever stops the run; finished tasks are kept, and the same command continues.
    """
    output = config.output
    if isinstance(output, Path):
        config = config.model_copy(update={"output": behind_links(output)})
        output = documents_folder(behind_links(output))
    with scanning(output, part, workers) as scan:
        return _prepare(config, Run(workers, progress, note), part, scan)


def _prepare(config: PrepareConfig, run: Run, part: Part | None, scan: Scanned) -> tuple[Manifest, ...]:
    note = run.note
    view = _recipe(config)
    refuse_nested(view)
    old = _finished(config)
    plan = make_plan(
        config,
        lambda tokenizer: run.workers.begin(load_engine, (tokenizer, config.engine)),
        note,
        scan,
    )
    _refuse_unknown(plan, view)
    for sentence in plan.notes:
        note(sentence)
    changed = _difference(plan, view, old) if old else []
    if old and not changed:
        _sweep(plan, config.output)
        note(f"{config.output} is up to date: same data, same settings.")
        return tuple(old)
    if old and not config.overwrite:
        named = {name for manifest in old for name in manifest.settings.get("inputs", ())}
        if not MOVING.issuperset(changed) or not named.issubset(inputs_of(config)):
            raise made_otherwise(config.output, changed)
        refuse_foreign(config.output)
        view = view.model_copy(update={"overwrite": True})  # only the inputs have changed
        note(
            f"{config.output}: the inputs changed; all documents are prepared anew, as it holds those chosen"
            " alone. A set of all documents reuses what is the same; make views of it."
        )
    _refuse_begun(config)
    note_padding(plan, note)
    try:
        made = _choose(config, plan, view, run, part) or _standing(config, plan, view)
    except (SftError, OSError):  # what it was reading may be gone, as another has finished
        if not (made := _standing(config, plan, view)):
            raise
    if made:
        _sweep(plan, config.output)
    return made


def _choose(
    config: PrepareConfig, plan: Plan, view: ViewConfig, run: Run, part: Part | None
) -> tuple[Manifest, ...]:
    """Prepare all documents, then make the view of them; none where parts of them are missing."""
    prepared, written = _as_one(run.progress or (lambda now: None))
    making = run._replace(progress=prepared)
    if not isinstance(config.output, Path):
        documents = make_documents(config, plan, making, part)
        if documents is None:
            return ()
        return make_view(view.model_copy(update={"sets": (documents,)}), written, run.note, passing=True)
    folder = documents_folder(config.output)
    old = finished_set(folder, overwrite=config.overwrite)
    beside = config.model_copy(update={"output": folder})
    if make(beside, plan.at(folder), old, making, part) is None:
        return ()
    own = None  # where it was made in parts, others may choose at the same time
    if (parts := parts_folder(folder)).is_dir():
        own = parts / f"view.{os.urandom(4).hex()}"
    try:
        return make_view(view, written, run.note, passing=True, folder=own)
    except (DataError, IntegrityError, UsageError):
        if own is None:
            _put_back(config.output)
        raise


def _as_one(progress: OnProgress) -> tuple[OnProgress, OnProgress]:
    """Return what to call after each task, and after each shard of what is chosen: as in one run."""
    tokens = Progress(0, 0, 0, 0)

    def prepared(now: Progress) -> None:
        nonlocal tokens
        tokens = now
        progress(now)

    def written(now: Progress) -> None:
        progress(now._replace(tokens=tokens.tokens + now.tokens, rejected=tokens.rejected))

    return prepared, written


def _standing(config: PrepareConfig, plan: Plan, view: ViewConfig) -> tuple[Manifest, ...]:
    """Return what another has finished meanwhile, of the same plan and choice."""
    with suppress(SftError):
        found = _finished(config)
        return tuple(found) if found and not _difference(plan, view, found) else ()
    return ()


def _recipe(config: PrepareConfig) -> ViewConfig:
    """Return the view of the set of all documents that holds what was chosen."""
    output = config.output
    documents = documents_folder(output) if isinstance(output, Path) else output / BUILDS  # not known yet
    where = {"sets": (str(documents),), "output": output, "overwrite": config.overwrite}
    return check_settings(ViewConfig, "sftdata", where | {"write": True} | config.chosen())


def _refuse_begun(config: PrepareConfig) -> None:
    """Refuse, before anything is tokenized, to discard an unfinished set of all documents.

    Raises:
        UsageError: naming it.
    """
    if not isinstance(config.output, Path):
        return  # where builds of other plans stay as they are
    build = Build(config.output)
    if config.overwrite or not (begun := build.kept()):
        return
    if "view" not in begun:
        raise unfinished(build.folder, "an unfinished set of all documents")
    if config.eval is not None:
        raise unfinished(build.folder, "an unfinished set, and no split")


def _refuse_unknown(plan: Plan, view: ViewConfig) -> None:
    """Refuse, before anything is tokenized, what the view would refuse for its names.

    Raises:
        UsageError: a source, or a set to exclude, is not there or of another tokenizer.
        IntegrityError: a set to exclude is damaged.
    """
    names = list(plan.job.sources)
    for pattern in view.cap:
        named(pattern, names, setting="cap")
    if view.mix:
        shared_out(list(view.mix), names)
    if view.exclude:
        tokenizer, vision = plan.job.tokenizer, plan.job.vision
        processor = None if vision is None else vision.processor.sha256
        read_excluded(view, tokenizer.sha256, tokenizer.chat_template_sha256, processor)


# --------------------------------------------------------------------------------------- what is there


def _finished(config: PrepareConfig) -> list[Manifest]:
    """Return what stands at the output: a set, both sides of a split, or nothing."""
    return finished_sets(config.output, config.eval, overwrite=config.overwrite)


def _difference(plan: Plan, view: ViewConfig, old: list[Manifest]) -> list[str]:
    """Return the settings that finished sets were made with otherwise; empty where they are those asked for.

    The set that they were chosen from is known by what it was made with: its digest follows from that.
    """
    sides = SIDES if view.eval is not None else ("",)
    if len(old) != len(sides):
        return ["eval"]
    changed = set()
    for side, manifest in zip(sides, old, strict=True):
        wanted = msgspec.to_builtins(named_selection(view, side, by_slice=False))
        found = {**manifest.settings.get("view", {})}
        found.pop("bases", None)
        changed |= {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
        changed |= {*plan.difference(manifest)} - {"view"}
    folders = folders_of(view.output, view.eval)
    if not changed and any(other_pictures(plan, *one) for one in zip(folders, old, strict=True)):
        return ["pictures"]
    return sorted(changed)


def _sweep(plan: Plan, output: Path | StoreUrl) -> None:
    """Remove the documents that finished sets were chosen from; those of another run stay.

    They are put aside first: stopped halfway, they are swept up the next time.
    """
    if not isinstance(output, Path):
        end(output, plan)
        return
    documents = Build(documents_folder(output))
    with suppress(SftError):
        if not plan.difference(read_manifest(documents.output)):
            documents.put_away()
    documents.sweep()
    Build(output).sweep()
    end(documents.output, plan)


def _put_back(output: Path) -> None:
    """Let the documents of a choice be unfinished again, so that other settings may discard them."""
    with suppress(SftError), Build(output).locked():  # nobody reads them
        Build(documents_folder(output)).put_back()
