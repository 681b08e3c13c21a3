"""Write a view: its rows copied from the bases, or an index of them, slice by slice, the manifest last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sftdata.batches import PackPlan
from sftdata.choosing import SIDES
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.output import Progress, StoreUrl, behind_links
from sftdata.pack import gather
from sftdata.set.build import Build, finished_set, made_otherwise, refuse_foreign, unfinished
from sftdata.set.extents import rest_digest
from sftdata.set.images import IN_THE_SET, PROCESSOR, VisionInfo, hash_sidecars
from sftdata.set.index import Placed
from sftdata.set.index import write_slice as write_files
from sftdata.set.ledger import LISTS, Ledger
from sftdata.set.local import origin, path_from
from sftdata.set.making import Making, ShardResult
from sftdata.set.manifest import (
    MANIFEST_NAME,
    BaseInfo,
    Manifest,
    deciding,
    format_version,
    read_manifest,
    write_manifest,
)
from sftdata.set.shared import StoredBuild, finished_sets
from sftdata.set.slices import SliceRecord
from sftdata.set.store import SetFile
from sftdata.set.stores import Objects, Store
from sftdata.version import __version__
from sftdata.views.bases import vision_of
from sftdata.views.by_index import index_slice
from sftdata.views.lists import lists_of
from sftdata.views.order import ViewSlice
from sftdata.views.pictures import paths_from
from sftdata.views.plan import ViewPlan, plan_views
from sftdata.views.recipe import ViewConfig

OnProgress = Callable[[Progress], object]
Say = Callable[[str], object]
Plans = Callable[[], list[ViewPlan]]


def make_view(
    config: ViewConfig,
    progress: OnProgress | None = None,
    say: Say = lambda _: None,
    *,
    passing: bool = False,
    folder: Path | None = None,
) -> tuple[Manifest, ...]:
    """Make a view, or both sides of a split; return the manifest of each.

    Args:
        config: the settings.
        progress: called after each shard.
        say: told, in one sentence each, what was decided or realised.
        passing: the sets go away when the view is made, so that it does not name them.
        folder: of this process, in which to build it; default: the one that the same command resumes.

    Raises:
        SftError: whatever stops it; what is finished is kept, and the same command goes on from there.
    """
    if isinstance(config.output, Path):
        config = config.model_copy(update={"output": behind_links(config.output)})
    refuse_nested(config)

    def plans() -> list[ViewPlan]:
        return [replace(plan, passing=passing) for plan in plan_views(config)]

    output = config.output
    if not isinstance(output, Path):
        return _store(config, output, plans, progress, say)
    if config.eval is not None:
        return _make_split(config, Build(output, folder), plans, progress, say)
    old = finished_set(output, overwrite=config.overwrite)
    return (_write(plans()[0], Build(output, folder), old, progress, say),)


def refuse_nested(config: ViewConfig) -> None:
    """Refuse an output inside or around a set it is made of: replacing one would delete the other.

    Raises:
        UsageError: naming both.
    """
    if not isinstance(config.output, Path):
        return  # an object store has no folders; see `_refuse_left_behind`
    output = config.output.resolve()
    for folder in (*config.sets, *config.exclude):
        for base in _folders(Path(folder)):
            if output in base.parents or base in output.parents:
                where = "inside" if base in output.parents else "around"
                what = f"{config.output}: lies {where} {base}."
                raise UsageError(what, "choose a folder beside it for -o.")
            if output == base and not config.write:
                raise _replaces_its_tokens(config.output)


def _replaces_its_tokens(output: Path | StoreUrl) -> UsageError:
    what = f"{output}: the view would replace the set that holds its tokens."
    return UsageError(
        what, "choose another -o, or replace it by a set that stands alone: --write --overwrite."
    )


def _folders(folder: Path) -> Iterator[Path]:
    """Yield where a set lies, and, for a view by index, where its tokens do."""
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        yield folder.resolve()
        yield from ((folder / base.path).resolve() for base in manifest.bases if manifest.by_index)


def _make_split(
    config: ViewConfig, build: Build, plans: Plans, progress: OnProgress | None, say: Say
) -> tuple[Manifest, ...]:
    """Make both sides of a split in a folder of their own, which takes its name when both are whole."""
    output = build.output
    if not all((output / side / MANIFEST_NAME).exists() for side in SIDES):
        if finished_set(output, overwrite=config.overwrite) is not None and not config.overwrite:
            raise made_otherwise(output, ["eval"])
    elif not config.overwrite:
        sides = [(plan, output / side) for plan, side in zip(plans(), SIDES, strict=True)]
        return tuple(_write(plan, Build(place), read_manifest(place), progress, say) for plan, place in sides)
    else:
        refuse_foreign(output)
    planned = plans()
    with build.locked() as both:
        if any(entry.name.partition(".")[0] not in SIDES for entry in both.folder.iterdir()):
            if both.kept() and not config.overwrite:
                raise unfinished(both.folder, "an unfinished set, and no split")
            both.clear()
        made = []
        for plan, place in zip(planned, (both.folder / side for side in SIDES), strict=True):
            old = finished_set(place, overwrite=config.overwrite)
            made.append(_write(replace(plan, output=place), Build(place), old, progress, say))
        both.put_in_place()
    return tuple(made)


def _store(
    config: ViewConfig, output: StoreUrl, plans: Plans, progress: OnProgress | None, say: Say
) -> tuple[Manifest, ...]:
    """Make a view, or both sides of a split, in an object store, where one put puts all of it in place."""
    old, planned = finished_sets(output, config.eval, overwrite=config.overwrite), plans()
    changed = ["eval"] if old and len(old) != len(planned) else []
    for plan, manifest in zip(planned, () if changed else old, strict=False):
        changed += _difference(plan, manifest)
    if old and not changed:
        say(f"{output} is up to date: same sets, same settings.")
        return tuple(old)
    _refuse_left_behind(planned[0])
    if changed and not config.overwrite:
        raise made_otherwise(output, sorted({*changed}))
    identity = [_identity(plan) for plan in planned]
    name = hashlib.sha256(msgspec.json.encode(identity, order="sorted")).hexdigest()
    build = StoredBuild(output, name[:16])
    build.join({"view": identity})
    sides = SIDES if config.eval is not None else ("",)
    makings = [Making(Objects(build.place / side)) for side in sides]
    made = [
        _fill(plan, making, making.finished(overwrite=config.overwrite), progress, say)
        for plan, making in zip(planned, makings, strict=True)
    ]
    build.put_in_place(made[0].digest, SIDES if config.eval is not None else ())
    build.end()
    return tuple(made)


def _refuse_left_behind(plan: ViewPlan) -> None:
    """Refuse a view in an object store that would name what is on this machine, or in the set it replaces.

    Raises:
        UsageError: naming it.
    """
    if (folder := _pictures_folder(plan)) is not None:
        what = f"{plan.output}: the view would name pictures in {folder}, of this machine."
        raise UsageError(what, "prepare the sets with --embed-images.")
    for held, _ in () if plan.config.write else plan.store.files.sets:
        if (url := origin(held)) is None:
            what = f"{plan.output}: the view would name the tokens of {held}, of this machine."
            raise UsageError(what, "--write copies them.")
        if f"{url}/".startswith(f"{plan.output}/"):  # also as a side of a split
            raise _replaces_its_tokens(plan.output)


def _write(
    plan: ViewPlan, build: Build, old: Manifest | None, progress: OnProgress | None, say: Say
) -> Manifest:
    """Build a planned view, unless it is there already or only waits to be put in its place."""
    output, overwrite = build.output, plan.config.overwrite
    changed = [] if old is None else _difference(plan, old)
    if old is not None and not changed:
        build.sweep()
        say(f"{output} is up to date: same sets, same settings.")
        return _repointed(plan, output, old)
    if changed and not overwrite:
        raise made_otherwise(output, changed)
    with build.locked():
        sealed = build.sealed()
        if sealed is not None and not _difference(plan, sealed):
            build.put_in_place()
            return sealed
        done = build.start(_identity(plan), overwrite=overwrite)
        with build.refusable():
            sealed = _fill(plan, build, done, progress, say)
        build.put_in_place()
        return sealed


def _fill(
    plan: ViewPlan, build: Making, done: dict[int, ShardResult], progress: OnProgress | None, say: Say
) -> Manifest:
    """Write what is not done, and the manifest."""
    for note in plan.notes:
        say(note)
    if done:
        say(f"Resuming: {len(done)}/{len(plan.slices)} slices complete; settings match.")
    results = _write_slices(plan, build, done, progress)
    _refuse_changed(plan)
    tokenizer = plan.bases[0].folder / "tokenizer"
    return build.complete(_conclude(plan, results, build), tokenizer, _processor(plan))


def _identity(plan: ViewPlan) -> dict[str, object]:
    """Return all that decides the bytes of the view, flat: a resume with another identity is refused."""
    settings = {key: value for key, value in plan.settings.items() if key not in ("inputs", "tokenizer")}
    plain: dict[str, object] = msgspec.json.decode(
        msgspec.json.encode(
            settings
            | {"bases": [base.manifest.digest for base in plan.bases], "by_index": not plan.config.write}
        )
    )
    return plain


_GIVEN_AS = {"bases": "sets", "steps": "steps_for"}
_ABSENT = object()


def _difference(plan: ViewPlan, manifest: Manifest) -> list[str]:
    """Return what a finished set was made with otherwise; empty where it is what the plan would make."""
    wanted, found = map(_flat, (msgspec.json.decode(msgspec.json.encode(plan.settings)), manifest.settings))
    names = wanted.keys() | found.keys()
    changed = {name for name in names if wanted.get(name, _ABSENT) != found.get(name, _ABSENT)}
    asked, bases = ([(base.digest, base.rest) for base in own] for own in (_bases(plan), manifest.bases))
    if manifest.by_index == plan.config.write:
        changed.add("write")
    elif not bases:  # prepared: sources and settings, which have the digests of bases if any, say all of it
        changed |= {"sources"} if plan.sources != manifest.sources else set()
    elif asked != bases:
        changed.add("bases")
    plain = {name.removeprefix("view.") for name in changed}
    return sorted(_GIVEN_AS.get(name, name) for name in plain)


def _flat(settings: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings that decide, with those of a view, which may have the same names, beside them."""
    own = {name: value for name, value in deciding(settings).items() if name != "view"}
    return own | {f"view.{name}": value for name, value in settings.get("view", {}).items()}


def _repointed(plan: ViewPlan, output: Path, manifest: Manifest) -> Manifest:
    """Let a view by index name its bases, and any view its pictures, where they are now."""
    bases = _bases(plan) if manifest.by_index else manifest.bases
    vision = manifest.vision
    if vision is not None:
        vision = msgspec.structs.replace(vision, images=_images_from(plan))
    if (manifest.bases, manifest.vision) == (bases, vision):
        return manifest
    return write_manifest(output, msgspec.structs.replace(manifest, bases=bases, vision=vision))


def _refuse_changed(plan: ViewPlan) -> None:
    """Refuse to finish where another set has taken the place of a base meanwhile."""
    named = [(base.folder, base.manifest) for base in plan.bases]
    for folder, manifest in (*named, *plan.store.files.sets):
        try:
            found = read_manifest(folder).digest
        except SftError as error:
            what = f"{folder}: gone while it was in use: {error.message}"
            raise IntegrityError(what, "restore the set, then run again.") from None
        if found != manifest.digest:
            raise IntegrityError(
                f"{folder}: replaced while it was in use: opened as {manifest.digest[:12]},"
                f" now {found[:12]}.",
                "run the same command again, with --overwrite to discard what was begun.",
            )


# ------------------------------------------------------------------------------------------ one shard


def _write_slices(
    plan: ViewPlan, build: Making, done: dict[int, ShardResult], progress: OnProgress | None
) -> list[ShardResult]:
    """Write what is not done; return all results in order."""
    todo = [part for part in plan.slices if part.index not in done]
    results, tokens = dict(done), 0
    for number, part in enumerate(todo, start=1):
        lists = lists_of(plan) if part is plan.slices[0] else dict.fromkeys(LISTS, b"")
        result = (write_slice if plan.config.write else index_slice)(plan, part, build.store)
        results[part.index] = build.commit(result, lists)
        tokens += result.ledger.tokens
        if progress:
            progress(Progress(number, len(todo), tokens, 0))
    return [results[part.index] for part in plan.slices]


def write_slice(plan: ViewPlan, part: ViewSlice, folder: Path | Store) -> ShardResult:
    """Gather the documents of one slice, and write its rows and what they do not hold."""
    which, rest = part.packs.example, plan.rest.take(part.rest)
    kept = plan.kept.take(which)
    ids, first, number = np.unique(np.concatenate([kept.id, rest.id]), return_index=True, return_inverse=True)
    documents = plan.choice.documents.whole(np.concatenate([kept.document, rest.document])[first])
    packs = PackPlan(
        part.packs.offsets, number[: len(kept)], kept.start + part.packs.start, kept.start + part.packs.stop
    )
    others = PackPlan(np.arange(len(rest) + 1), number[len(kept) :], rest.start, rest.stop)
    own, pictures = plan.choice.documents.pictures, None
    if own is not None:
        pictures, _ = own.of_slice(np.concatenate([kept.document, rest.document])[first], ids)
    placed = Placed(documents, ids, packs, others, rest.reason.tolist(), pictures)
    tokenizer, weighted = plan.bases[0].manifest.tokenizer, bool(plan.settings["loss_weights"])
    rows = gather(
        documents, ids, packs, plan.row_length, tokenizer.pad_id or 0, weighted=weighted,
        multiple=plan.config.pad_to_multiple_of,
    )  # fmt: skip
    ledger = Ledger()
    if part is plan.slices[0]:
        ledger.merge(plan.ledger)
    ledger.count_packed(rows, plan.row_length, {source.name: source.first_id for source in plan.sources})
    ledger.count_stored(() if pictures is None else pictures.stored)
    shards, files = write_files(folder, part.index, placed, rows, plan.row_length, tokenizer.bos_id)
    return ShardResult(index=part.index, shards=shards, files=files, ledger=ledger)


# ------------------------------------------------------------------------------------------ the whole


def _conclude(plan: ViewPlan, results: list[ShardResult], build: Making) -> Manifest:
    """Merge what was counted, and say what the set is."""
    ledger = Ledger()
    for result in results:
        ledger.merge(result.ledger)
    ledger.check("view")
    if not ledger.tokens_trained:
        what = f"{plan.output}: no token of its rows is trained; max_length is {plan.config.max_length}."
        raise DataError(what, "a larger --max-length.")
    build.write_lists([_record(plan, result) for result in results], results)
    first = plan.bases[0].manifest
    blank = [base.manifest.blank_lines for base in plan.bases]
    whole = ledger.documents_repeated == 0 and None not in blank
    notes = dict.fromkeys(note for base in plan.bases for note in base.manifest.notes)
    files = tuple(file for result in results for file in result.files)
    vision = _vision(plan, files)
    return Manifest(
        format_version=format_version(vision is not None),
        settings=plan.settings,
        tokenizer=first.tokenizer,
        chat_template_sha256=first.chat_template_sha256,
        sources=plan.sources,
        ledger=ledger,
        shards=tuple(shard for result in results for shard in result.shards),
        files=files,
        vision=vision,
        notes=tuple(notes),
        shares=plan.choice.shares,
        blank_lines=sum(count or 0 for count in blank) if whole else None,
        software={"sftdata": __version__, "pyarrow": version("pyarrow")},
        bases=_bases(plan),
    )


def _vision(plan: ViewPlan, files: Sequence[SetFile]) -> VisionInfo | None:
    """Return what the manifest says of pictures; None where no base has any."""
    vision = vision_of([base.manifest for base in plan.bases])
    if vision is None:
        return None
    return msgspec.structs.replace(vision, images=_images_from(plan), sidecars=hash_sidecars(files))


def _images_from(plan: ViewPlan) -> str:
    """Return the folder of pictures from that of the view; "." where none is named by path."""
    folder = _pictures_folder(plan)
    if folder is None or not isinstance(plan.output, Path):
        return IN_THE_SET
    return os.path.relpath(folder, plan.output.resolve())


def _pictures_folder(plan: ViewPlan) -> str | None:
    return paths_from([(base.folder, base.manifest) for base in plan.bases])[0]


def _processor(plan: ViewPlan) -> dict[str, Path]:
    """Return the files of the processor, by their names in the set."""
    base = next((base for base in plan.bases if base.manifest.pictured), None)
    files = [] if base is None else [file.name for file in base.manifest.files]
    return {name: base.folder / name for name in files if base and name.startswith(f"{PROCESSOR}/")}


def _bases(plan: ViewPlan) -> tuple[BaseInfo, ...]:
    """Name the sets that a view is made of; of a view by index those that hold its tokens."""
    if plan.passing:
        return ()
    if plan.config.write:
        return tuple(
            BaseInfo(path=path_from(plan.output, base.folder), digest=base.manifest.digest)
            for base in plan.bases
        )
    output = plan.output.resolve() if isinstance(plan.output, Path) else plan.output
    return tuple(
        BaseInfo(
            path=path_from(output, folder),
            digest=manifest.digest,
            rest=rest_digest(manifest),
        )
        for folder, manifest in plan.store.files.sets
    )


def _record(plan: ViewPlan, result: ShardResult) -> SliceRecord:
    """Return what became of a slice; what it was made from are the bases that the manifest names."""
    identity = msgspec.json.encode(_identity(plan), order="sorted")
    return SliceRecord(
        number=result.index,
        made_with=hashlib.sha256(identity).hexdigest(),
        sources=(),
        files=tuple(file.name for file in (*result.shards, *result.files)),
        ledger=result.ledger.to_json(),
    )
