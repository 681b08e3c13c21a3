"""A set that several processes build at once, on any machines, where none of them owns the place.

In an object store:

    SET/manifest.json           says which build is the set; written last, create-only or compare-and-swap
    SET/builds/PLAN/            the files of a set as in a folder, its own manifest.json among them
    SET/builds/PLAN/plan.json, slices/    while it is built, as in `DIR.partial`

A build without `plan.json` that is not the set has been replaced, and is removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import msgspec

from sftdata.choosing import SIDES, folders_of
from sftdata.errors import IntegrityError, UsageError
from sftdata.output import StoreUrl
from sftdata.set.build import Build, finished_set, made_otherwise, refuse_foreign
from sftdata.set.local import listed_files
from sftdata.set.making import PLAN, SLICES, Making, ShardResult, names_of
from sftdata.set.manifest import MANIFEST_NAME, Manifest, decode_manifest, parts_folder
from sftdata.set.store import HashingSink, explained, link_file, remove
from sftdata.set.stores import Found, Objects, Pointer, followed, put_bytes, set_at, sides_of

BUILDS, MARKS = "builds", "marks"
_OURS = re.compile(rf"[0-9a-f]{{16}}(-anew)?|{MARKS}")  # other entries of that folder are others'


class SharedBuild(Build):
    """The slices of one plan, which names the folder: it is never cleared, and nothing in it is locked.

    Args:
        target: the set.
        name: of the plan.

    Attributes:
        place: what tasks take for the output.
    """

    def __init__(self, target: Path, name: str) -> None:
        super().__init__(parts_folder(target) / name)
        self.target, self.place = target, self.output

    def begun(self) -> bool:
        """Say whether others have begun."""
        return self.folder.is_dir()

    def join(self, plan: Mapping[str, object], *, anew: bool = False) -> None:
        """Begin, or go on with others.

        Args:
            plan: all that decides the bytes of the set, for whoever looks.
            anew: as for `StoredBuild`; a finished set is in another folder in any case.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        put_bytes(self.store, PLAN, msgspec.json.encode(plan, order="sorted"))

    def others(self) -> list[bytes]:
        """Return the plans that others have begun there."""
        paths = sorted(self.folder.parent.glob(f"*/{PLAN}"))
        return [path.read_bytes() for path in paths if path.parent != self.folder]

    def gather(self, results: Sequence[ShardResult]) -> Build:
        """Return a build in a folder of its own, with links to what these tasks made."""
        own = Build(self.target, self.output.with_name(f"{self.output.name}.{os.urandom(4).hex()}"))
        with explained(own.folder):
            (own.folder / SLICES).mkdir(parents=True)
            for name in chain.from_iterable(map(names_of, results)):
                link_file(self.folder / name, own.folder / name)
        return own

    def end(self) -> None:
        """Remove everything once the set stands; others that still write there fail, and find the set.

        That is all that parts have made, of whatever plan, since the set stands. A folder loses its name
        first, at once: one that finishes can never put half of it in place.
        """
        for left in self.output.parent.glob("*"):
            with suppress(OSError):  # another removes it
                gone = left.with_name(f"{self.output.name}.{os.urandom(4).hex()}")
                os.rename(left, gone)
                remove(gone)
        with suppress(OSError):  # others still write there
            self.output.parent.rmdir()


class StoredBuild(Making):
    """The same in an object store: whoever finishes writes into it too, as all write the same bytes.

    Args:
        target: the set.
        name: of the plan.

    Attributes:
        place: what tasks take for the output.
    """

    def __init__(self, target: StoreUrl, name: str) -> None:
        self.target, self.place = target, target / BUILDS / name
        self._root = Objects(target)
        self._before: Found | None = None
        super().__init__(Objects(self.place))

    def begun(self) -> bool:
        """Return True: each run begins as if others had."""
        return True

    def join(self, plan: Mapping[str, object], *, anew: bool = False) -> None:
        """Begin, or go on with others.

        Args:
            plan: all that decides the bytes of the set, for whoever looks.
            anew: other files come of it by now, as pictures have changed: a set in this place stays as it is.

        Raises:
            UsageError: the store would let two writers put the set in place.
        """
        text, self._before = msgspec.json.encode(plan, order="sorted"), self._root.find(MANIFEST_NAME)
        if anew and self._before is not None and followed(self.target, self._before.data) == self.place:
            self.place = StoreUrl(f"{self.place}-anew")
        self.store = here = Objects(self.place)
        alike = here.create(PLAN, text) and here.create(PLAN, text)
        if alike or (self._before and here.swap(PLAN, text, {"e_tag": '"none"', "version": "0"})):
            what = f"{self.target}: the store replaces an object where it was asked not to"
            fix = "choose a store with conditional puts (If-None-Match, If-Match), or a local folder."
            raise UsageError(f"{what}; a set in it could be half of two.", fix)

    def others(self) -> list[bytes]:
        """Return the plans that others have begun there."""
        builds = Objects(self.target / BUILDS)
        names = sorted(filter(_OURS.fullmatch, builds.entries()))
        found = [builds.find(f"{name}/{PLAN}") for name in names if self.target / BUILDS / name != self.place]
        return [one.data for one in found if one is not None]

    def gather(self, results: Sequence[ShardResult]) -> StoredBuild:
        """Return this build: what it lacks are files that are the same, whoever writes them."""
        return self

    def finish(self, manifest: Manifest, tokenizer: Path, others: Mapping[str, Path] = {}) -> Manifest:
        """Write what the slices add up to, as `complete` does, and make this build the set.

        Raises:
            UsageError: another set was put there meanwhile.
        """
        sealed = self.complete(manifest, tokenizer, others)
        self.put_in_place(sealed.digest)
        return sealed

    def put_in_place(self, digest: str, sides: Sequence[str] = ()) -> None:
        """Make this build the set, or both sides of a split.

        Raises:
            UsageError: another set was put there meanwhile.
        """
        folder = self.place.removeprefix(f"{self.target}/")
        pointer = Pointer(digest=digest, folder=folder, sides=tuple(sides))
        text, before = msgspec.json.encode(pointer, order="sorted"), self._before
        if before is None:
            made = self._root.create(MANIFEST_NAME, text)
        else:
            made = self._root.swap(MANIFEST_NAME, text, before.version)
        if not made and ((now := self._root.find(MANIFEST_NAME)) is None or now.data != text):
            raise made_otherwise(self.target, ["made meanwhile: its settings"])
        if before is not None:
            self._root.tidy(listed_files(before.data))  # of a set that was pushed there

    def end(self) -> None:
        """Remove what the set needs no more, this build unless it is the set, and builds that it replaced."""
        sizes, now = self._root.sizes(BUILDS), self._root.find(MANIFEST_NAME)
        found = self.target if now is None else followed(self.target, now.data)
        live, here = (place.removeprefix(f"{self.target}/") for place in (found, self.place))
        found_there = {name.split("/")[1] for name in sizes}
        builds = {f"{BUILDS}/{name}" for name in found_there if _OURS.fullmatch(name)}
        own = (here, f"{here}-anew")
        left = {name for name in builds if f"{name}/{PLAN}" not in sizes or name in own} - {live}
        left |= {f"{live}/{PLAN}", *(f"{live}/{side}{SLICES}" for side in ("", "train/", "eval/"))}
        self._root.tidy(name for name in sizes if any(f"{name}/".startswith(f"{one}/") for one in left))


def shared_build(target: Path | StoreUrl, name: str) -> SharedBuild | StoredBuild:
    """Return where the slices of a plan are made by several processes."""
    return SharedBuild(target, name) if isinstance(target, Path) else StoredBuild(target, name)


# -------------------------------------------------------------------------------- a set in an object store


def finished_sets(target: Path | StoreUrl, share: str | None, *, overwrite: bool = False) -> list[Manifest]:
    """Return what stands at an output: a set, both sides of a split, or nothing; `share` is that of `eval`.

    Raises:
        UsageError, IntegrityError: as `finished_at`; or a set in a store would hide a side.
    """
    places = folders_of(target, share)
    for place in places if share is not None and not isinstance(target, Path) else ():
        if Objects(str(place)).find(MANIFEST_NAME) is not None:
            what = f"{place}: a set of its own, which would hide that side of the split."
            raise UsageError(what, "remove it, or choose another -o.")
    if isinstance(target, Path):
        split = all((target / side / MANIFEST_NAME).exists() for side in SIDES)
    else:
        split = (there := Objects(target).find(MANIFEST_NAME)) is not None and bool(sides_of(there.data))
    if overwrite and split:
        refuse_foreign(target)  # beside the sides
    found = [finished_at(place, overwrite=overwrite) for place in (places if split else (target,))]
    return [manifest for manifest in found if manifest is not None]


def finished_at(target: Path | StoreUrl, *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest of a finished set; None where there is none, or none that must be kept.

    Its files are looked at, and read with `overwrite`: a damaged set is not taken for the one asked for.

    Raises:
        UsageError, IntegrityError: the place holds other things or a damaged set.
    """
    if isinstance(target, Path):
        return finished_set(target, overwrite=overwrite)
    root = Objects(target)
    if (there := root.find(MANIFEST_NAME)) is not None and sides_of(there.data):
        if overwrite:
            return None
        raise made_otherwise(target, ["eval"])
    if (home := set_at(root)) is None:
        if root.entries() - {BUILDS}:
            what = f"{target}: holds objects, but is no set; nothing was touched."
            raise UsageError(what, "choose an empty or new place for -o.")
        return None
    try:
        (raw,) = home.get([MANIFEST_NAME])
        manifest = decode_manifest(raw, f"{home}/{MANIFEST_NAME}")
        _check_files(home, manifest, read=overwrite)
    except IntegrityError as error:
        if overwrite and home.url != root.url:
            return None
        fix = "replace the set with --overwrite, or choose another -o."
        if home.url == root.url:
            fix = "remove what is there, or choose another -o."
        raise IntegrityError(error.message, fix) from None
    return manifest


def _check_files(home: Objects, manifest: Manifest, *, read: bool) -> None:
    sizes = home.sizes()
    for file in (*manifest.shards, *manifest.files):
        if sizes.get(file.name) != file.bytes:
            found = f"{sizes[file.name]} bytes" if file.name in sizes else "missing"
            raise IntegrityError(f"{home}/{file.name}: {found}; the manifest says {file.bytes} bytes.")
        sink = HashingSink(len)
        if read:
            home.copy(file.name, sink)
            if sink.digest().xxh3 != file.xxh3:
                raise IntegrityError(f"{home}/{file.name}: other bytes than the manifest says.")
