"""What the user named -> the files, URLs and dataset ids to read, in a fixed order, with what is left out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from sftdata.errors import UsageError, nearest
from sftdata.sources.remote import is_url, objects_below, objects_like
from sftdata.wording import shell_quote

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOCAL_URL = re.compile(r"(?:file|local)://")

DATA_SUFFIXES = (
    *(".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".text"),
    *(".parquet", ".arrow", ".feather"),
)
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2")
REJECTS = "rejects.jsonl"
# Named as data, but not data: what the Hub, datasets, transformers and trainers put beside it.
METADATA = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "config.json"),
        *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *(
            "sftdata-export.json",
            "adapter_config.json",
            "trainer_state.json",
            "package.json",
            "package-lock.json",
        ),
        *("readme.txt", "license.txt", "licence.txt", "notice.txt", "requirements.txt"),
    }
)
_INDEX = ".index.json"  # of the shards of a checkpoint
_OF_A_SET = re.compile(
    r"(.*/)?(?:(?:rejects|dropped|counted|slices)\.jsonl|(?:manifest|plan)\.json|[a-z]+-\d{5,}\.arrow)"
)
_BUILD = re.compile(r"(?:(.*)/)?builds/[0-9a-f]{16}(?:-anew)?(?:/train|/eval)?")
_SHOWN = 8  # names in a note


@dataclass(frozen=True, slots=True)
class Input:
    """One dataset: the files of a folder or a pattern, or all files that were named one by one.

    Attributes:
        name: as the user gave it; the common folder of files named one by one.
        paths: files, URLs, a Hub id or a folder of a saved dataset, in order.
        base: what the names of splits are looked for behind; None for what has its own splits.
        listed: the user named each file.
    """

    name: str
    paths: tuple[str, ...]
    base: str | None = None
    listed: bool = False


def expand_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what to read, and one line for each kind of files that was left out.

    Files keep the order given; globs and folders are sorted by name. Left out are hidden files, and of a
    folder metadata, files not named as data and sets made earlier; of a pattern, the files of such sets.

    Raises:
        UsageError: a file or pattern that matches nothing, or a finished set.
    """
    found, notes = find_inputs(inputs)
    return [path for one in found for path in one.paths], notes


def find_inputs(inputs: Sequence[str]) -> tuple[list[Input], list[str]]:
    """Return the same, dataset by dataset.

    Raises:
        UsageError: as `expand_inputs`.
    """
    notes: list[str] = []
    return [_find(_LOCAL_URL.sub("", name, count=1), notes) for name in inputs], notes


def refuse_doubles(found: Sequence[Input]) -> None:
    """Refuse a file that two inputs stand for, in whatever spelling: its rows would be there twice.

    Raises:
        UsageError: naming it, and both.
    """
    taken: dict[str, str] = {}
    for one in found if len(found) > 1 else ():
        places = {path: path if is_url(path) else os.path.realpath(path) for path in one.paths}
        for path, place in places.items():
            if place in taken:
                raise named_twice(path, taken[place], one.name)
        taken |= dict.fromkeys(places.values(), one.name)


def named_twice(path: str, *names: str) -> UsageError:
    """Return the refusal of an input that is there twice, under these names."""
    spelled = f", as {' and as '.join(names)}" if len({*names}) > 1 else ""
    fix = "name it once; --mix NAME=SHARE with --passes 2 repeats rows."
    return UsageError(f"{path}: named twice{spelled}.", fix)


def joined(found: Sequence[Input]) -> list[Input]:
    """Join the files that were named one by one to one dataset, in the place of the first."""
    listed = [path for one in found if one.listed for path in one.paths]
    if len(listed) < 2:
        return list(found)
    try:
        base = os.path.commonpath([os.path.dirname(path) for path in listed])
    except ValueError:  # absolute and relative paths, or URLs
        base = ""
    whole, seen, kept = Input(base or "the files", tuple(listed), base, listed=True), False, list[Input]()
    for one in found:
        if not one.listed:
            kept.append(one)
        elif not seen:
            kept.append(whole)
            seen = True
    return kept


def is_hub_id(name: str) -> bool:
    """Return True for `owner/name` when that cannot be meant as a path here."""
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(DATA_SUFFIXES + COMPRESSED_SUFFIXES):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def _find(name: str, notes: list[str]) -> Input:
    if is_url(name):
        return _find_remote(name, notes)
    path = Path(name).expanduser()
    if name == "-" or path.is_fifo():
        what = f"{name}: {'standard input' if name == '-' else 'a pipe'}, which can be read but once."
        raise UsageError(what, "write the rows to a file, and name that.")
    if path.is_dir():
        refuse_set(path)
        return _find_in_folder(path, name, notes)
    if path.exists():
        refuse_set(path)
        if path.name == REJECTS and set_in(path.parent):
            notes.append(f"{path}: read as rows, which {set_in(path.parent)} rejected.")
        return Input(name, (str(path),), str(path.parent), listed=True)
    if is_hub_id(name):
        return Input(name, (name,))
    if glob.has_magic(name):
        return _find_matches(path, name, notes)
    raise UsageError(f"{name}: no such file or folder.", _nearest(path))


def _find_in_folder(folder: Path, name: str, notes: list[str]) -> Input:
    left_out = LeftOut()
    paths = tuple(data_files(folder, left_out))
    notes.extend(left_out.notes(str(folder)))
    if not paths:
        known = " ".join(DATA_SUFFIXES + COMPRESSED_SUFFIXES)
        raise UsageError(
            f"{folder}: no data file here; expected names that end in {known}.", "name the files themselves."
        )
    return Input(name, paths, None if is_saved_dataset(folder) else str(folder))


def _find_matches(pattern: Path, name: str, notes: list[str]) -> Input:
    matches = [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True))]
    if not matches:
        raise UsageError(
            f"{name}: no file matches.", "check the pattern; quote it so that the shell leaves it alone."
        )
    base = Path(*_before_magic(pattern))
    left_out, paths, known = LeftOut(), list[str](), dict[Path, str]()
    for match in matches:
        if around := set_around(match, base, known):
            left_out.add(match, f"of {around}")
        elif is_metadata(match):
            left_out.add(match, "metadata")
        elif match.is_dir():
            paths.extend(data_files(match, left_out))
        else:
            paths.append(str(match))
    notes.extend(left_out.notes(str(base)))
    if not paths:
        raise UsageError(
            f"{name}: matches no data; {' '.join(left_out.notes(str(base)))}", "name the files themselves."
        )
    return Input(name, tuple(dict.fromkeys(paths)), str(base))


def _before_magic(pattern: Path) -> list[str]:
    parts: list[str] = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _find_remote(url: str, notes: list[str]) -> Input:
    """Return the objects that a URL names: one, those that a pattern matches, or the data of a folder.

    Raises:
        UsageError: nothing is there, or the store cannot list it.
    """
    web = url.startswith(("http://", "https://"))
    if web and ("*" in url or url.endswith("/")):
        raise UsageError(f"{url}: files behind a web address cannot be listed.", "name each file.")
    if "*" in url:
        found = objects_like(url)
        if not found:
            raise UsageError(f"{url}: no file matches.", "check the bucket and the pattern.")
        base = url.partition("*")[0].rpartition("/")[0]
        matched = {name[len(base) + 1 :]: itself for name, itself in found.items()}
        named = {name for name, itself in matched.items() if itself}
        if not (paths := tuple(_data_in(base, [*matched], notes, named))):
            raise UsageError(f"{url}: matches no data; {' '.join(notes)}", "name the files themselves.")
        return Input(url, paths, base)
    names = None if web or plain_name(url).endswith(DATA_SUFFIXES) else objects_below(url)
    if names is None:
        return Input(url, (url,), url.rpartition("/")[0], listed=True)
    base = url.rstrip("/")
    paths = tuple(_data_in(base, names, notes))
    if not paths:
        known = " ".join(DATA_SUFFIXES + COMPRESSED_SUFFIXES)
        raise UsageError(
            f"{url}: no data file here; expected names that end in {known}.", "name the files themselves."
        )
    return Input(url, paths, base)


def _data_in(
    base: str, names: Sequence[str], notes: list[str], named: Collection[str] | None = None
) -> list[str]:
    """Return the URLs of the data among the objects below one; the rest goes to the notes.

    Args:
        named: those of a pattern, so that any name is one of data; None where all names are there.

    Raises:
        UsageError: what lies there is a finished set.
    """
    left_out, found = LeftOut(), list[str]()
    there = {*names}
    for folder in (
        {one[1] or "" for one in map(_OF_A_SET.fullmatch, names) if one} if named is not None else ()
    ):
        there.update(folder + name for name in objects_below(f"{base}/{folder}") or ())
    sets = _sets_among(there)
    if "" in sets:
        raise UsageError(f"{base}: {sets['']}, not rows.", "name the files that it is made from.")
    for name in names:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if around := next((sets[str(folder)] for folder in path.parents if str(folder) in sets), ""):
            left_out.add(path, f"of {around}")
        elif reason := "hidden" if hidden else _no_data(path, named=name in (named or ())):
            left_out.add(path, reason)
        else:
            found.append(f"{base}/{name}")
    notes.extend(left_out.notes(base))
    return found


def _sets_among(names: Collection[str]) -> dict[str, str]:
    """Return the folders of sets among objects, and of each what `set_in` says.

    Where a set is built in an object store, its files lie in one of `builds`, and its manifest names that.
    """
    sets = dict[str, str]()
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        start = f"{folder}/".lstrip("/")
        if {start + "manifest.json", start + REJECTS} <= {*names}:
            sets[folder] = "a finished set"
        elif start + "plan.json" in names and any(name.startswith(f"{start}slices/") for name in names):
            sets[folder] = "an unfinished set"
        if folder in sets and (build := _BUILD.fullmatch(folder)):
            around = build[1] or ""
            whole = f"{around}/manifest.json".lstrip("/") in names
            sets[around] = "a finished set" if whole else "an unfinished set"
    return sets


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"the nearest folder that exists is {folder}."
    near = nearest(path.name, (entry.name for entry in folder.iterdir()))
    return (
        f"did you mean {folder / near}?" if near else "check the path; a Hub dataset is written owner/name."
    )


# ---------------------------------------------------------------------- what in a folder is data


def plain_name(path: str) -> str:
    """Return a path or URL in lower case, without the suffix of its compression or the query of a URL."""
    name = (re.split(r"[?#]", path)[0] if "://" in path else path).lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)


def is_metadata(path: PurePath) -> bool:
    """Return True for a file that is named as data and says something about data or a model instead."""
    name = path.name.lower()
    return name in METADATA or name.endswith(_INDEX)


def is_saved_dataset(folder: Path) -> bool:
    """Return True for a folder written by `Dataset.save_to_disk`, of one split or several."""
    one_split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one_split or (folder / "dataset_dict.json").is_file()


def set_in(folder: Path) -> str:
    """Return what a folder is that `prepare` wrote, "a finished set" or "an unfinished set"; else nothing."""
    if (folder / "manifest.json").is_file() and (
        (folder / REJECTS).is_file() or any(folder.glob("shard-*.arrow"))
    ):
        return "a finished set"
    return "an unfinished set" if (folder / "plan.json").is_file() and (folder / "slices").is_dir() else ""


def set_around(path: Path, within: Path, known: dict[Path, str]) -> str:
    """Return what set a file or folder at or below `within` belongs to; nothing where there is none.

    Args:
        known: what was found out about folders so far.
    """
    for folder in (path, *path.parents):
        if folder not in known:
            known[folder] = set_in(folder)
        if known[folder] or folder == within:
            return known[folder]
    return ""


def refuse_set(path: Path) -> None:
    """Refuse a set, or a file of one; only its rejects are rows.

    Raises:
        UsageError: naming the set.
    """
    folder = path if path.is_dir() else path.parent
    found = set_in(folder)
    if found and path.name != REJECTS:
        what = f"{path}: " + (f"{found}, not rows." if path == folder else f"a file of {found}, not rows.")
        raise UsageError(
            what, "name the files that it is made from; what `prepare` has made is there to be trained on."
        )


class LeftOut:
    """What is left out of a folder or a pattern, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, list[PurePath]] = {}

    def add(self, path: PurePath, reason: str) -> None:
        """Leave a path out."""
        self._found.setdefault(reason, []).append(path)

    def notes(self, within: str) -> Iterator[str]:
        """Yield one line for each reason."""
        for reason, paths in self._found.items():
            if len(paths) == 1:
                yield f"{paths[0]}: left out ({reason})."
                continue
            names = [
                str(path.relative_to(within)) if path.is_relative_to(within) else str(path) for path in paths
            ]
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            yield f"{within}: left out ({reason}): {', '.join(names[:_SHOWN])}{more}."


def data_files(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the data files of a folder and of those inside it, by name; a saved dataset is one of them.

    Args:
        left_out: takes everything else.
    """
    if is_saved_dataset(folder):
        yield str(folder)
        return
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        reason = _beside(path)
        if reason:
            left_out.add(path, reason)
        elif path.is_dir():
            yield from data_files(path, left_out)
        else:
            yield str(path)


def _beside(path: Path) -> str:
    """Return why an entry of a folder is not data; nothing where it is."""
    if path.name.startswith("."):
        return "hidden"
    return set_in(path) if path.is_dir() else _no_data(path)


def _no_data(path: PurePath, *, named: bool = False) -> str:
    """Return why a file is not data, by its name; nothing where it is, or where it was `named`."""
    if is_metadata(path):
        return "metadata"
    if not named and not plain_name(path.name).endswith(DATA_SUFFIXES):
        return "not named as data; name a file itself to read it"
    return ""


# -------------------------------------------------------------------------- errors about splits


def several_splits(name: str, splits: Collection[str], *, mixed: bool = False) -> UsageError:
    """Return the error that asks for one of several splits; `mixed` where some files are of none."""
    beside = " beside files of no split" if mixed else ""
    first = next((split for split in splits if split.startswith("train")), next(iter(splits)))
    fix = f"choose with --split, as --split {shell_quote(first)}" + (
        f" or --split {shell_quote('+'.join(splits))}" if len(splits) > 1 else ""
    )
    named = f"the splits {', '.join(splits)}" if len(splits) > 1 else f"the split {', '.join(splits)}"
    return UsageError(
        f"{name}: holds {named}{beside}.", f"{fix}{', or name the files themselves' if mixed else ''}."
    )


def wrong_split(name: str, spec: str, splits: Collection[str], why: object) -> UsageError:
    """Return the error of a `--split` that names nothing here."""
    first = sorted(splits)[0]
    what = f"{name}: --split {shell_quote(spec)}: {str(why).rstrip('.')}; found {', '.join(sorted(splits))}."
    return UsageError(what, f"as --split {shell_quote(first)}, or a part of it: --split '{first}[:95%]'.")
