"""A set made in parts: processes that share a folder, on any machines, each make some of its slices.

    SET.partial.parts/
      PLAN.partial/     what a `Build` has while it is built, of one plan, which names it
      PLAN.ab12cd34/    the set of one that finishes: links to those files, and the rest; renamed to SET

Nothing here is locked, since a lock on a shared folder may hold on one machine only. A slice is a pure
function of the plan, its files are written under names of their own and then renamed, and its record comes
last: two processes that make the same slice write the same bytes. Whoever finds all records finishes. If
several do, each has a folder of its own, and the first to rename it has made the set; the others find it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from sftdata.config import PrepareConfig
from sftdata.errors import InputChangedError, SftError, UsageError
from sftdata.marking import marked
from sftdata.output import Progress, StoreUrl, behind_links, counted
from sftdata.pipeline import keep_unchanged, scanned
from sftdata.plan import Plan, software
from sftdata.run import build_set, conclude, differences, planned, run_tasks
from sftdata.set.build import Build, made_otherwise, refuse_foreign, sweep_choice, unfinished
from sftdata.set.making import ShardResult
from sftdata.set.manifest import Manifest, format_version, parts_folder
from sftdata.set.shared import BUILDS, MARKS, SharedBuild, StoredBuild, finished_at, shared_build
from sftdata.set.stores import store_at
from sftdata.sources.planning import Scanned
from sftdata.tasks import Tasks
from sftdata.workers import Workers

OnProgress = Callable[[Progress], object]
OnNote = Callable[[str], object]

COUNT = "SFTDATA_PARTS"
"""The variable that says how many parts there are, where the scheduler does not."""


class Part(NamedTuple):
    """One of several parts of a run.

    Attributes:
        number: from 1.
        of: how many there are.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def tasks(self, plan: Plan) -> Tasks:
        """Return its tasks, an equal share in bytes: neighbours, as a compressed file is read forward."""
        sizes = plan.tasks.sizes
        parts = (np.cumsum(sizes) - sizes) * self.of // max(int(sizes.sum()), 1)
        mine = np.flatnonzero(np.minimum(parts, self.of - 1) == self.number - 1)
        return plan.tasks.pick(mine)


class _Array(NamedTuple):
    """How a scheduler numbers the jobs of an array: names of variables, or a number where it has none."""

    number: str
    of: str
    first: str | int = 0
    step: str | int = 1


SCHEDULERS = (
    _Array("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
    _Array("JOB_COMPLETION_INDEX", COUNT),  # Kubernetes
    _Array("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    _Array("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    _Array("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),  # Google Cloud
    _Array("PBS_ARRAY_INDEX", COUNT),
    _Array("LSB_JOBINDEX", "LSB_JOBINDEX_END", 1),
    _Array("SLURM_PROCID", "SLURM_NTASKS"),  # srun, where there is no array
)


class Run(NamedTuple):
    """What a run works with, and whom it tells; see `prepare`."""

    workers: Workers
    progress: OnProgress | None
    note: OnNote


def read_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Return the part that `--part` names: `i/n`, or `auto` for what a scheduler says in the environment.

    Raises:
        UsageError: there is no such part, or no scheduler says which.
    """
    if text == "auto":
        return _scheduled(environment)
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not found:
        raise UsageError(
            f"--part {text}: expected i/n or auto.", "as --part 1/8, which is the first of eight."
        )
    return _checked(f"--part {text}", Part(int(found[1]), int(found[2])))


def _scheduled(environment: Mapping[str, str]) -> Part:
    array = next((array for array in SCHEDULERS if array.number in environment), None)
    if array is None:
        names = ", ".join(array.number for array in SCHEDULERS)
        raise UsageError(f"--part auto: none of {names} is set.", "name the part, as --part 1/8.")

    def value(name: str | int) -> int:
        text = environment.get(name, "") if isinstance(name, str) else str(name)
        if not text.isdigit():
            what = f"--part auto: {array.number} is set, and {name} is {text!r}; expected a number."
            raise UsageError(what, f"export {name}=N, the number of parts, or name the part, as --part 1/8.")
        return int(text)

    index, left = divmod(value(array.number) - value(array.first), max(value(array.step), 1))
    where = f"--part auto: {array.number}={environment[array.number]}, {array.of}={environment.get(array.of)}"
    if left:
        raise UsageError(f"{where}: no part of an array with gaps.", "number the jobs without gaps, as 0-7.")
    return _checked(where, Part(index + 1, value(array.of)))


def _checked(where: str, part: Part) -> Part:
    if 1 <= part.number <= part.of:
        return part
    raise UsageError(f"{where}: parts are numbered 1/{part.of} to {part.of}/{part.of}.", "number them so.")


# ------------------------------------------------------------------------------------------------ the run


def prepare(
    config: PrepareConfig,
    workers: Workers,
    progress: OnProgress | None = None,
    note: OnNote = lambda _: None,
    part: Part | None = None,
) -> Manifest | None:
    """Build a set: plan, prepare every unfinished slice, write the manifest, move the set to its place.

    Args:
        config: the settings.
        workers: of `start_workers`.
        progress: called after each slice.
        note: called with each decision made for the user, in one sentence.
        part: make its slices alone; without one, finish what parts have begun, or make all.

    Returns:
        The manifest, or None where other parts have slices to make.

    Raises:
        SftError: whatever stops the run; finished slices are kept, and the same command continues.
    """
    with scanning(config.output, part, workers) as scan:
        config, old, plan = planned(config, workers, note, scan)
        output = config.output
        made = make(config, plan, old, Run(workers, progress, note), part)
        if made is not None:
            if isinstance(output, Path):
                sweep_choice(output, discard=config.overwrite)
            end(output, plan)
        return made


@contextmanager
def scanning(output: Path | StoreUrl, part: Part | None, workers: Workers) -> Iterator[Scanned]:
    """Give those who scan the inputs: parts share that, and leave what they found beside their slices."""
    builds = parts_folder(behind_links(output)) if isinstance(output, Path) else output / BUILDS
    marks, scan = builds / MARKS, Scanned(partial(scanned, workers))
    if part is not None or store_at(marks).sizes():
        share = (0, 1) if part is None else (part.number - 1, part.of)
        scan = Scanned(partial(marked, marks, share, workers), whole=part is None)
    try:
        yield scan
    except InputChangedError:  # they may be of what was there before
        store_at(marks).remove(store_at(marks).sizes())
        raise


def make(
    config: PrepareConfig, plan: Plan, old: Manifest | None, run: Run, part: Part | None
) -> Manifest | None:
    """Make the slices of a part, and the set where none is missing; what others left on the way to it stays.

    Args:
        old: what stands at the output.
    """
    if part is None and not _begun(config.output, plan, run.note):
        return build_set(config, plan, old, run.workers, run.progress, run.note)
    return _build(config, plan, old, run, part)


def end(output: Path | StoreUrl, plan: Plan) -> None:
    """Remove what was made of a plan on the way to the set that stands now."""
    builds = [_shared(output, one) for one in (plan, plan.by_reference())]
    for build in {build.place: build for build in builds}.values():
        build.end()


def make_documents(config: PrepareConfig, plan: Plan, run: Run, part: Part | None) -> StoreUrl | None:
    """Make the set of all documents in the builds of an object store, for another to be chosen from it.

    Returns:
        Where it is; None where other parts have slices to make.
    """
    if (made := _prepare_slices(config, plan, run, part, anew=True)) is None:
        return None
    assert isinstance(made.build, StoredBuild)
    made.build.complete(conclude(made.plan, made.results, made.build), *made.given)
    return made.build.place


def _begun(output: Path | StoreUrl, plan: Plan, note: OnNote) -> bool:
    """Say whether parts of this plan were made; note where there are others."""
    if _shared(output, plan).begun():
        return True
    if isinstance(output, Path) and (folder := parts_folder(output)).is_dir():
        note(f"{folder}: parts made with other data, settings or versions; nothing of them is used.")
    return False


def _shared(output: Path | StoreUrl, plan: Plan) -> SharedBuild | StoredBuild:
    """Return where the slices of a plan are made in parts: its name is all that decides their bytes."""
    content = plan.begun() | {
        "format_version": format_version(plan.job.vision is not None),
        "software": software(),
        "engine": plan.job.engine,
    }
    digest = hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()
    return shared_build(output, digest[:16])


def _build(
    config: PrepareConfig,
    plan: Plan,
    old: Manifest | None,
    run: Run,
    part: Part | None,
) -> Manifest | None:
    """Make the slices of a part, and the set where no other slice is missing, unless it exists."""
    output = config.output
    changed = differences(plan, output, old)
    if changed and not config.overwrite and old is not None and not plan.continues(old):
        raise made_otherwise(output, changed)
    if isinstance(output, Path) and Build(output).kept() and not config.overwrite:
        raise unfinished(Build(output).folder, "an unfinished set that is not made in parts")
    if old is not None and not changed:
        run.note(f"{output} is up to date: same data, same settings.")
        return old
    if old is not None:
        refuse_foreign(output)
    try:
        made = _prepare_slices(config, plan, run, part, anew=bool(changed))
        if (standing := _standing(output, plan)) is not None or made is None:
            return standing
        own = made.build.gather(made.results)
        return own.finish(conclude(made.plan, made.results, own), *made.given)
    except (SftError, OSError):  # what it was writing may be gone, as the set is finished
        if (standing := _standing(output, plan)) is None:
            raise
        return standing


class _Made(NamedTuple):
    """All slices of a plan, and where they are."""

    plan: Plan
    build: SharedBuild | StoredBuild
    results: list[ShardResult]

    @property
    def given(self) -> tuple[Path, dict[str, Path]]:
        """The folder of the tokenizer, and the processor's files by their names in the set."""
        job = self.plan.job
        return job.tokenizer.folder, {} if job.vision is None else job.vision.files()


def _prepare_slices(
    config: PrepareConfig, plan: Plan, run: Run, part: Part | None, *, anew: bool
) -> _Made | None:
    """Make the slices of a part; return all, unless some of other parts are missing."""
    shared = _shared(config.output, plan)
    shared.join(plan.begun(), anew=anew)
    here = plan.at(shared.place)
    mine = plan.tasks if part is None else part.tasks(plan)
    before = shared.finished(mine.numbers.tolist(), overwrite=config.overwrite)
    before = keep_unchanged(plan.job, shared, before)
    run.note(f"Engine: {plan.job.engine}, {plan.engine_reason}.")
    if part is not None:
        run.note(f"Part {part}: {len(mine)} of {counted(len(plan.tasks), 'slice')}, {len(before)} complete.")
    elif before:
        run.note(f"Resuming: {len(before)}/{len(mine)} slices complete; settings match.")
    _, exact = run_tasks(replace(here, tasks=mine), before, None, run.workers, run.progress)
    missing = len(plan.tasks.without(shared.recorded()))
    if exact and missing:
        more = "the last part, or the command without --part, finishes the set"
        who = "All slices" if part is None else f"Part {part}"
        run.note(f"{who}: complete; {counted(missing, 'slice')} of other parts are missing: {more}.")
        if otherwise := _begun_otherwise(shared, plan):
            run.note(
                f"{config.output}: parts made otherwise ({otherwise} differ) lie there; they are not used."
            )
        return None
    if exact:  # of this part; the others' samples are in their records
        results, exact = run_tasks(here, shared.finished(), None, run.workers, None)
    if not exact:
        run.note(
            f"{plan.job.engine} gives other ids than tokenizers on this data; starting over with tokenizers."
        )
        return _prepare_slices(config, plan.by_reference(), run, None, anew=anew)
    return _Made(plan, shared, results)


def _begun_otherwise(shared: SharedBuild | StoredBuild, plan: Plan) -> str:
    """Return the settings of parts of other plans that differ; nothing where there are none."""
    mine, changed = msgspec.json.decode(msgspec.json.encode(plan.begun())), set[str]()
    others = [found for found in map(msgspec.json.decode, shared.others()) if "view" not in found]
    for found in others:
        changed |= {key for key in mine.keys() | found.keys() if mine.get(key) != found.get(key)}
    return ", ".join(sorted(changed)) or ("versions" if others else "")


def _standing(output: Path | StoreUrl, plan: Plan) -> Manifest | None:
    """Return the manifest of the set that another has finished meanwhile."""
    with suppress(SftError):
        found = finished_at(output)
        return found if found is not None and not differences(plan, output, found) else None
    return None
