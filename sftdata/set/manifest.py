"""The manifest: what a set is. A folder with a manifest is a finished set; a folder without is not a set.

`digest` covers what defines the content: settings, tokenizer, template, sources, ledger and shards, but no
path, no worker count, no engine. `checksum` covers the file itself, to the last note.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from sftdata.batches import Int64
from sftdata.choosing import SIDES
from sftdata.errors import ANEW, RESTORE, IntegrityError, SftError, Unit, UsageError
from sftdata.output import counted
from sftdata.set.images import IMAGES, VisionInfo
from sftdata.set.index import INDEX, REST
from sftdata.set.ledger import Ledger
from sftdata.set.local import local_folder, refilled
from sftdata.set.shards import PACKS, ShardInfo
from sftdata.set.shares import Share
from sftdata.set.store import Count, SetFile, Sha256, TokenId, Xxh3, write_atomic
from sftdata.set.stores import MANIFEST_NAME as MANIFEST_NAME

FORMAT_VERSION = 2
"""What is written. Version 1, which is read too, has neither index nor rest, and other first labels."""
PICTURES_VERSION = 3
"""What is written of a set with pictures."""
PARTIAL_SUFFIX = ".partial"
_MAX_BYTES = 256 << 20  # half a million shards; a larger file is no manifest of ours

# Settings that say where things are (their content is hashed) or how work is done: they never change a byte.
_PLACES = ("inputs", "tokenizer", "revision", "chat_template", "prompt_template", "output")
_MANNER = ("workers", "engine", "overwrite", "max_rejects")
_AGAIN = re.compile(r"#\d+\Z")  # of the name of a source that a view goes through again
_OUTSIDE_DIGEST = ("digest", "checksum", "notes", "files", "software", "blank_lines", "bases", "shares")


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer as used.

    Attributes:
        name: folder or Hub id that was asked for; not part of the digest.
        sha256: hash of what defines its ids.
        vocab_size: ids are below this.
        eos_id, pad_id, bos_id: special ids; `pad_id` fills the end of packed rows.
        tokens_added: tokens that the chat template needs and the tokenizer lacked, in order of their ids.
    """

    name: str
    sha256: Sha256
    vocab_size: TokenId
    eos_id: TokenId | None
    pad_id: TokenId | None
    bos_id: TokenId | None
    tokens_added: tuple[str, ...] = ()


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One input file.

    Attributes:
        name: path relative to the input that named it, or `dataset:split`; never absolute.
        bytes: size as stored; None where the source is not a file.
        xxh3: hash of the stored bytes, as in sources/ranges.py, or the fingerprint of a dataset.
        rows: how many ids the source takes; a line that holds no row takes one too.
        first_id: id of its first line or record, so that `line = id - first_id + 1`.
        unit, licence: what is numbered so; as the registry has it. Neither is part of the digest.
    """

    name: str
    bytes: Count | None
    xxh3: str
    rows: Count
    first_id: Count
    unit: Unit = "line"
    licence: str | None = None


def first_passes(sources: Sequence[SourceInfo]) -> list[int]:
    """Return for each source the index of the one that it goes through again, as `a.jsonl#2`, or its own."""
    known = {(source.name, source.xxh3, source.rows): index for index, source in enumerate(sources)}
    firsts = []
    for index, source in enumerate(sources):
        name, first = source.name, index
        while again := _AGAIN.search(name):  # a pass over a further pass, as `a.jsonl#2#2`
            name = name[: again.start()]
            if (name, source.xxh3, source.rows) not in known:
                break
            first = known[name, source.xxh3, source.rows]
        firsts.append(first)
    return firsts


def in_first_pass(sources: Sequence[SourceInfo], ids: Int64) -> Int64:
    """Return the ids of the same documents, int64[N], in the first pass over their sources."""
    passes = zip(sources, first_passes(sources), strict=True)
    moved = np.array([sources[first].first_id - source.first_id for source, first in passes], np.int64)
    if not moved.any():
        return ids
    holding = np.flatnonzero([source.rows > 0 for source in sources])
    firsts = np.array([sources[index].first_id for index in holding.tolist()], np.int64)
    found: Int64 = ids + moved[holding[np.searchsorted(firsts, ids, side="right") - 1]]
    return found


def tell_apart(sets: Sequence[tuple[Path, Sequence[SourceInfo]]]) -> list[list[str]]:
    """Name the sources of several sets; those of the same name get their set's name before it.

    Sets of the same name, as `a/train` and `b/train`, get as many folders before theirs as it takes. A source
    that is gone through again, as `a.jsonl#2`, goes by the name of its first pass, and stays with it.

    Args:
        sets: folder and sources of each; at least one.
    """
    count = Counter(source.name for _, sources in sets for source in sources)
    folders = [folder.resolve().parts for folder, _ in sets]
    for depth in range(1, max(map(len, folders), default=0) + 1):
        names = [
            [
                Path(*parts[-depth:], source.name).as_posix()
                if max(count[source.name], count[sources[first].name]) > 1
                else source.name
                for source, first in zip(sources, first_passes(sources), strict=True)
            ]
            for parts, (_, sources) in zip(folders, sets, strict=True)
        ]
        if len({*chain(*names)}) == sum(map(len, names)):
            break
    return names


class BaseInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A set that a view was made of.

    Attributes:
        path: from the folder of the view.
        digest: of the set.
        rest: hash of its rest files, which its digest does not cover; only where a view by index reads them.
    """

    path: str
    digest: Sha256
    rest: Xxh3 | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything there is to know about a set without opening a shard.

    Attributes:
        format_version: of the folder's layout and the rules of its labels.
        digest: sha256 over all that defines the content.
        checksum: xxh3-128 over this manifest.
        settings: of `prepare`, in full, with defaults resolved.
        chat_template_sha256: hash of the chat template in use, if any.
        sources: in the order of their ids.
        ledger: what became of every row and token, with the histogram of lengths.
        shards: in order.
        files: the other files of the set.
        notes: what was defaulted or guessed, one sentence each.
        software: versions that made the set.
        blank_lines: lines of the sources that hold no row, or one that `--split` leaves out: `rows_in +
            blank_lines` is what the sources hold together. None in sets made before this was counted,
            and where a view goes through a source again.
        bases: the sets that a view was made of; for a view by index those whose files hold its tokens, and
            these alone are part of the digest, but for their paths.
        shares: of a mixture, what was asked and what the set holds; not part of the digest.
        vision: what pictures were read with; None in a set without pictures.
    """

    format_version: Annotated[int, Meta(ge=1)] = FORMAT_VERSION
    digest: str = ""
    checksum: str = ""
    settings: dict[str, Any]
    tokenizer: TokenizerInfo
    chat_template_sha256: Sha256 | None = None
    sources: tuple[SourceInfo, ...]
    ledger: Ledger
    shards: tuple[ShardInfo, ...]
    files: tuple[SetFile, ...] = ()
    notes: tuple[str, ...] = ()
    software: dict[str, str] = {}
    blank_lines: Count | None = None
    bases: tuple[BaseInfo, ...] = ()
    shares: tuple[Share, ...] = ()
    vision: VisionInfo | None = None

    def __repr__(self) -> str:
        ledger = self.ledger
        counts = ((ledger.rows_packed, "row"), (ledger.documents, "document"), (ledger.tokens, "token"))
        held = ", ".join(counted(*count) for count in counts)
        trained = f"{ledger.tokens_trained:,} of them trained"
        return f"<Manifest {self.digest[:12]}: {held}, {trained}, max_length {self.max_length}>"

    @property
    def max_length(self) -> int | None:
        """Tokens per packed row; None where rows keep their own length."""
        return self.ledger.max_length

    @property
    def by_index(self) -> bool:
        """Whether the tokens lie in the files of other sets."""
        return any(shard.name.startswith(PACKS) for shard in self.shards)

    @property
    def pictured(self) -> bool:
        """Whether shards name the pictures of documents."""
        return self.vision is not None

    @property
    def weighted(self) -> bool:
        """Whether shards say what each trained token weighs."""
        return bool(self.settings.get("loss_weights"))

    @property
    def pad_to_multiple_of(self) -> int:
        """Documents begin in their rows at multiples of this; padding fills what is between them."""
        view = self.settings.get("view")
        multiple = view.get("pad_to_multiple_of") if isinstance(view, dict) else None
        return multiple if isinstance(multiple, int) and multiple > 0 else 1

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        plain: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        if self.blank_lines is None:
            del plain["blank_lines"]
        for name in ("bases", "shares", "vision"):
            if not plain[name]:
                del plain[name]
        return plain | {"ledger": self.ledger.to_json()}


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that can change a byte of a set."""
    return {key: value for key, value in settings.items() if key not in _PLACES + _MANNER}


def by_name(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return settings with what these hold beside the others, as `vision.max_pixels`."""
    own = {key: value for key, value in settings.items() if key not in names or not isinstance(value, dict)}
    inside = ((name, settings[name]) for name in names if isinstance(settings.get(name), dict))
    return own | {f"{name}.{key}": value for name, held in inside for key, value in held.items()}


def format_version(pictures: bool) -> int:
    """Return the format in which a set is written."""
    return PICTURES_VERSION if pictures else FORMAT_VERSION


class _Version(msgspec.Struct):
    format_version: int


def documents_folder(folder: Path) -> Path:
    """Return where the set of all documents stands while `folder` is made of some of them."""
    return folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}.documents")


def partial_folder(folder: Path) -> Path:
    """Return where a set is built before it becomes `folder`: beside it, so that one rename finishes it."""
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def is_split(folder: Path) -> bool:
    """Say whether a folder holds the sides of a split, or what is left of them, and nothing else."""
    if not folder.is_dir() or not (names := {entry.name for entry in folder.iterdir()}):
        return False
    with suppress(SftError):
        return names.issubset(SIDES) and all(
            read_manifest(folder / name).settings.get("view", {}).get("side") == name for name in names
        )
    return False


def parts_folder(folder: Path) -> Path:
    """Return where a set is built that is made in parts, beside it."""
    return folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}.parts")


def seal(manifest: Manifest) -> Manifest:
    """Fill in the digest and the checksum.

    Raises:
        IntegrityError: the ledger does not balance, or shards and ledger disagree.
    """
    _check_sums(manifest, MANIFEST_NAME)
    manifest = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.structs.replace(manifest, checksum=_checksum(manifest))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal a manifest and write it; do this last, since it is what makes the folder a set.

    Raises:
        IntegrityError: the ledger does not balance, or shards and ledger disagree.
        UsageError: the file cannot be written.
    """
    sealed = seal(manifest)
    write_atomic(folder / MANIFEST_NAME, lambda sink: sink.write(encode_manifest(sealed)))
    return sealed


def encode_manifest(sealed: Manifest) -> bytes:
    """Return the content of the file."""
    return msgspec.json.format(msgspec.json.encode(sealed.to_json(), order="sorted"), indent=2) + b"\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a set and check that it is whole and agrees with itself.

    Raises:
        UsageError: the folder is missing, is not a finished set, or was written in a newer format.
        IntegrityError: the manifest is damaged, was changed, or says impossible things.
    """
    folder = local_folder(folder)
    path = folder / MANIFEST_NAME
    try:
        return decode_manifest(_read_bytes(folder, path), str(path))
    except IntegrityError:
        if (again := refilled(folder)) is None:
            raise
    path = again / MANIFEST_NAME
    return decode_manifest(_read_bytes(again, path), str(path))


def decode_manifest(raw: bytes, path: str) -> Manifest:
    """Return the manifest in the bytes of a file, as `read_manifest` does; `path` is for messages."""
    try:
        version = msgspec.json.decode(raw, type=_Version).format_version
        if not 1 <= version <= PICTURES_VERSION:
            what = f"{path}: format version {version}; this sftdata reads versions 1 to {PICTURES_VERSION}."
            raise UsageError(what, "use a newer sftdata.")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        found = f"{path}: not a manifest as this version writes it: {error}."
        raise IntegrityError(found, ANEW) from None
    _check_seal(manifest, path)
    _check_sums(manifest, path)
    return manifest


def _read_bytes(folder: Path, path: Path) -> bytes:
    if not path.is_file():
        raise _not_a_set(folder)
    if path.stat().st_size > _MAX_BYTES:
        raise IntegrityError(f"{path}: {path.stat().st_size} bytes; a manifest has at most {_MAX_BYTES}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None


def _not_a_set(folder: Path) -> UsageError:
    documents = documents_folder(folder)
    begun = [partial_folder(folder), parts_folder(folder), documents, partial_folder(documents)]
    partial = next(filter(Path.is_dir, [folder] if folder.name.endswith(PARTIAL_SUFFIX) else begun), None)
    if partial is not None:
        found = f"not a finished set; {partial} holds an unfinished run"
        return UsageError(f"{folder}: {found}.", "repeat the command that began it; it goes on there.")
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if inside:
        names = ", ".join(path.name for path in inside[:4]) + ", ..." * (len(inside) > 4)
        return UsageError(f"{folder}: holds sets and is none itself: {names}.", f"name one, as {inside[-1]}.")
    found = f"not a finished set, as it has no {MANIFEST_NAME}" if folder.exists() else "no such folder"
    return UsageError(f"{folder}: {found}.", "name the folder that `sftdata prepare -o` wrote.")


def _digest(manifest: Manifest) -> str:
    content = {name: value for name, value in manifest.to_json().items() if name not in _OUTSIDE_DIGEST}
    content["settings"] = deciding(manifest.settings)
    content["sources"] = [
        {key: value for key, value in source.items() if key not in ("unit", "licence")}
        for source in content["sources"]
    ]
    content["tokenizer"] = {key: value for key, value in content["tokenizer"].items() if key != "name"}
    if manifest.vision is not None:
        del content["vision"]["images"]
    if manifest.by_index:
        content["bases"] = [[base.digest, base.rest] for base in manifest.bases]
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _checksum(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(
        msgspec.json.encode(manifest.to_json() | {"checksum": ""}, order="sorted")
    )


def _check_seal(manifest: Manifest, path: str) -> None:
    for name, found in (("checksum", _checksum(manifest)), ("digest", _digest(manifest))):
        written = getattr(manifest, name)
        if written != found:
            said = f"{name} is {written!r}, the content gives {found}"
            raise IntegrityError(f"{path}: changed after it was written: {said}.", RESTORE)


def _check_sums(manifest: Manifest, where: str) -> None:
    ledger, shards = manifest.ledger, manifest.shards
    ledger.check(where)
    sums = (
        ("rows_packed", ledger.rows_packed, sum(shard.rows for shard in shards)),
        ("documents", ledger.documents, sum(shard.documents for shard in shards)),
        ("tokens_trained", ledger.tokens_trained, sum(shard.tokens_trained for shard in shards)),
        ("tokens", ledger.tokens, sum(shard.tokens for shard in shards)),
    )
    for name, said, summed in sums:
        if said != summed:
            raise IntegrityError(f"{where}: the ledger counts {name} = {said}, its shards hold {summed}.")
    _check_sources(manifest, where)
    _check_shares(manifest, where)
    if manifest.by_index and not (
        manifest.bases and all(shard.name.startswith(PACKS) for shard in manifest.shards)
    ):
        raise IntegrityError(f"{where}: rows by index beside shards, or without a base.", ANEW)
    if manifest.format_version > 1:
        _check_beside(manifest, where)
    names = [file.name for file in (*shards, *manifest.files)]
    if len(set(names)) < len(names):
        name = next(name for name, following in pairwise(sorted(names)) if name == following)
        raise IntegrityError(f"{where}: {name} is listed twice.")


def _check_shares(manifest: Manifest, where: str) -> None:
    """Assert that the shares of a mixture are all of the set."""
    rows = ("rows_kept", manifest.ledger.rows_kept, sum(share.rows for share in manifest.shares))
    tokens = ("tokens", manifest.ledger.tokens, sum(share.tokens for share in manifest.shares))
    for name, said, summed in (rows, tokens) if manifest.shares else ():
        if said != summed:
            raise IntegrityError(f"{where}: the ledger counts {name} = {said}, its shares hold {summed}.")


def _check_beside(manifest: Manifest, where: str) -> None:
    """Assert that each slice has its index, and that tokens which rows do not hold are in the set too."""
    names = {file.name for file in manifest.files}
    rest = [name for name in names if name.startswith(f"{REST}-")]
    listed = [*rest, *(shard.name for shard in manifest.shards)]
    lacking = {f"{INDEX}-{name.partition('-')[2]}" for name in listed} - names
    if lacking:
        index = min(lacking)
        name = max(name for name in listed if name.endswith(index.partition("-")[2]))
        found = f"{where}: {name} is listed without {index}."
        raise IntegrityError(found, ANEW)
    if manifest.ledger.pictures_stored and not any(name.startswith(f"{IMAGES}-") for name in names):
        found = f"{manifest.ledger.pictures_stored} pictures are stored, and no {IMAGES} file is there."
        raise IntegrityError(f"{where}: {found}", ANEW)
    missing = sum(manifest.ledger.tokens_cut.values()) + manifest.ledger.tokens_in_dropped_rows
    if missing and not rest:
        found = f"{missing} tokens were cut or dropped, and no {REST} file is listed that holds them."
        raise IntegrityError(f"{where}: {found}", ANEW)


def _check_sources(manifest: Manifest, where: str) -> None:
    """Assert that the sources share out all ids from 0 on, and hold the rows that came in."""
    ends = list(accumulate((source.rows for source in manifest.sources), initial=0))
    for source, first in zip(manifest.sources, ends, strict=False):
        if source.first_id != first:
            found = (
                f"{source.name} begins with id {source.first_id}, and the sources before it end at {first}"
            )
            raise IntegrityError(f"{where}: {found}.", ANEW)
    read = manifest.ledger.rows_in + (manifest.blank_lines or 0)
    if read > ends[-1] or (manifest.blank_lines is not None and read != ends[-1]):
        said = f"{manifest.ledger.rows_in} rows and {manifest.blank_lines or 0} blank lines"
        found = f"{where}: the sources hold {ends[-1]} rows; the ledger counts {said}."
        raise IntegrityError(found, ANEW)
