"""What came, went or changed between two sets, document by document.

Documents count by what the rows of a set hold of them: `came`, `went` and what changed add up, in documents,
tokens and trained tokens, to the difference of the two ledgers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from os import PathLike

import msgspec
import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, TokenBatch
from sftdata.errors import place
from sftdata.pages import macro
from sftdata.set.local import path_of
from sftdata.set.manifest import Manifest, by_name, deciding
from sftdata.show.choice import spell
from sftdata.show.pairs import KINDS, MEANING, MOVED, SAME, Compared, Kind, compare
from sftdata.show.pictures import ShownPicture
from sftdata.show.sides import Side, open_sides, source_keys
from sftdata.show.stats import Part
from sftdata.show.view import Piece, view_example

_SHOWN = 40  # tokens of a document
_BEFORE, _PROMPT = 6, 20  # of these, before the first that differs; before the answer where none differs


@dataclass(frozen=True, slots=True)
class Both:
    """A number in the first set, and in the second."""

    a: int
    b: int

    @property
    def gain(self) -> int:
        """How much more the second has."""
        return self.b - self.a


@dataclass(frozen=True, slots=True)
class Version:
    """A document as one of the sets has it.

    Attributes:
        place: file and line, or row.
        example_id: of the set.
        length: of the whole document, in tokens.
        tokens, trained: in the rows of the set.
        skipped: tokens before those that are shown.
        pieces: some of its tokens, around the first that differs.
        cut: whether it goes on behind them.
    """

    place: str
    example_id: int
    length: int
    tokens: int
    trained: int
    skipped: int
    pieces: tuple[Piece, ...]
    cut: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A document in both sets; None in the one that lacks it.

    Attributes:
        why: what the list of rejected or dropped rows of that one says of its place; empty where nothing.
    """

    a: Version | None
    b: Version | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Documents that differ in one way.

    Attributes:
        kind: of `MEANING`.
        documents: how many.
        tokens, trained: theirs, in the rows of each set.
        copies: of those that came or went, documents of which the other set has an equal one, fewer times.
        beside: of these, documents that the other set holds beside its rows, whole: dropped.
        examples: the first few.
    """

    kind: Kind
    documents: int
    tokens: Both
    trained: Both
    copies: int
    beside: int
    examples: tuple[Example, ...]

    @property
    def meaning(self) -> str:
        """The kind in words."""
        return MEANING[self.kind]

    @property
    def sign(self) -> str:
        """How it is drawn: `came`, `went` or `changed`."""
        return self.kind if self.kind in ("came", "went") else "changed"


@dataclass(frozen=True, slots=True)
class SourceChange:
    """What differs in one source, by its name.

    Attributes:
        documents, tokens, trained: in the rows of each set.
        changes: documents by kind, where any.
        other_bytes: whether the file, or dataset, is not the same on both sides.
    """

    name: str
    documents: Both
    tokens: Both
    trained: Both
    changes: dict[Kind, int]
    other_bytes: bool


@dataclass(frozen=True, slots=True, repr=False)
class Diff:
    """How two sets differ.

    Attributes:
        folders, digests: of both.
        documents, tokens, trained: in the rows of each.
        same: documents that are equal, at the same place and cut alike.
        moved: documents that are equal and cut alike, at another place.
        changes: of all kinds, in the order of `MEANING`; those that are not found have no documents.
        settings: those that are not the same, tokenizer and chat template included; None where one has none.
        sources: in the order of the first set, then of the second.
        notes: how the sets were compared, where not by their ids and labels.
    """

    folders: tuple[str, str]
    digests: tuple[str, str]
    documents: Both
    tokens: Both
    trained: Both
    same: int
    moved: int
    changes: tuple[Change, ...]
    settings: dict[str, tuple[object, object]]
    sources: tuple[SourceChange, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs: no document, no place, no setting, no source."""
        documents = self.moved + sum(change.documents for change in self.changes)
        return not (documents or self.settings or any(source.other_bytes for source in self.sources))

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        plain: dict[str, object] = {"equal": self.equal} | msgspec.to_builtins(self)
        return plain | {"changes": {change.kind: _change_json(change) for change in self.changes}}

    def parts(self) -> tuple[Part, ...]:
        """Return the documents of both sets by what became of them, empty parts left out."""
        parts = [Part("same", "same", self.same), Part("same, at another place", "context", self.moved)]
        parts += [Part(change.meaning, change.sign, change.documents) for change in self.changes]
        return tuple(part for part in parts if part.count)

    def __repr__(self) -> str:
        found = "; ".join(f"{part.count:,} {part.name}" for part in self.parts())
        more = f"; settings differ: {len(self.settings)}" if self.settings else ""
        return f"<Diff of {self.folders[0]!r} and {self.folders[1]!r}: {found}{more}>"

    def _repr_html_(self) -> str:
        settings = {name: tuple(map(spell, values)) for name, values in self.settings.items()}
        return str(macro("charts.html.jinja", "difference")(self, self.parts(), settings))


def _change_json(change: Change) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(change)
    examples = [
        {"a": _version_json(each.a), "b": _version_json(each.b), "why": each.why} for each in change.examples
    ]
    return plain | {"meaning": change.meaning, "examples": examples}


def _version_json(version: Version | None) -> dict[str, object] | None:
    """Return a version with its text in stretches that are trained or not."""
    if version is None:
        return None
    plain: dict[str, object] = msgspec.to_builtins(version)
    stretches = groupby(version.pieces, key=lambda piece: piece.trained)
    pieces = [{"text": "".join(p.text for p in own), "trained": trained} for trained, own in stretches]
    return plain | {"pieces": pieces}


def diff(a: str | PathLike[str], b: str | PathLike[str], limit: int = 3) -> Diff:
    """Compare two sets; texts are read only of documents that changed, and of the examples.

    Args:
        limit: examples of each kind.

    Raises:
        UsageError: a folder is no finished set, or one of format version 1 that has lost tokens.
        IntegrityError: a set is damaged.
    """
    left, right = open_sides(a, b)
    found = compare(left, right)
    return Diff(
        folders=(path_of(a), path_of(b)),
        digests=(left.manifest.digest, right.manifest.digest),
        documents=_sum(left.held, right.held),
        tokens=_sum(left.tokens, right.tokens),
        trained=_sum(left.trained, right.trained),
        same=int((found.kind == SAME).sum()),
        moved=int((found.kind == MOVED).sum()),
        changes=tuple(_changes(found, limit)),
        settings=dict(_settings(left.manifest, right.manifest)),
        sources=tuple(_sources(found)),
        notes=tuple(_notes(left, right)),
    )


# ----------------------------------------------------------------------------------------------- counting


def _changes(found: Compared, limit: int) -> Iterator[Change]:
    shown = np.concatenate([np.flatnonzero(found.kind == number)[:limit] for number in range(len(KINDS))])
    for side, of in ((found.left, found.a[shown]), (found.right, found.b[shown])):
        side.find(of[of >= 0])
    for number, kind in enumerate(KINDS):
        which = np.flatnonzero(found.kind == number)
        a, b = found.a[which], found.b[which]
        yield Change(
            kind,
            len(which),
            tokens=_sum(found.left.tokens[a[a >= 0]], found.right.tokens[b[b >= 0]]),
            trained=_sum(found.left.trained[a[a >= 0]], found.right.trained[b[b >= 0]]),
            copies=int(found.copy[which].sum()),
            beside=int(found.beside[which].sum()),
            examples=tuple(_example(found, index) for index in which[:limit].tolist()),
        )


def _sum(a: Int64 | Bool, b: Int64 | Bool) -> Both:
    return Both(int(a.sum()), int(b.sum()))


def _sources(found: Compared) -> Iterator[SourceChange]:
    """Yield what differs in each source; what changed counts where the second set has it."""
    sides = found.left, found.right
    keys = [source_keys(side.sources) for side in sides]
    names = list(dict.fromkeys(chain(*keys)))
    of = {name: number for number, name in enumerate(names)}
    numbers = [np.array([of[key] for key in own])[side.source] for own, side in zip(keys, sides, strict=True)]
    known = [
        {key: source.xxh3 for key, source in zip(own, side.sources, strict=True)}
        for own, side in zip(keys, sides, strict=True)
    ]
    where = np.where(found.b >= 0, numbers[1][found.b], numbers[0][found.a])
    counted = [np.bincount(where[found.kind == number], minlength=len(names)) for number in range(len(KINDS))]
    sums = {
        name: [
            np.bincount(number, getattr(side, name), len(names)).astype(np.int64)
            for side, number in zip(sides, numbers, strict=True)
        ]
        for name in ("held", "tokens", "trained")
    }
    for index, name in enumerate(names):
        both = {key: Both(*(int(column[index]) for column in columns)) for key, columns in sums.items()}
        changes = {
            kind: int(count[index]) for kind, count in zip(KINDS, counted, strict=True) if count[index]
        }
        same = known[0].get(name) == known[1].get(name)
        yield SourceChange(name[0], both["held"], both["tokens"], both["trained"], changes, not same)


# Said by the hashes of tokenizer, template and sources.
_TOLD = ("tokenizer_sha256", "chat_template_text", "sources")
_TOKENIZER = ("sha256", "vocab_size", "eos_id", "pad_id", "bos_id", "tokens_added")


def _settings(a: Manifest, b: Manifest) -> Iterator[tuple[str, tuple[object, object]]]:
    """Yield what of all that decides the content is not the same."""
    for name, (one, other) in {
        "format version": (a.format_version, b.format_version),
        **{
            f"tokenizer {name}": (getattr(a.tokenizer, name), getattr(b.tokenizer, name))
            for name in _TOKENIZER
        },
        "chat template": (a.chat_template_sha256, b.chat_template_sha256),
        **_beside(*(by_name(deciding(one.settings), "view", "vision") for one in (a, b))),
    }.items():
        if one != other and name not in _TOLD:
            yield name, (one, other)


def _beside(a: dict[str, object], b: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (a.get(name), b.get(name)) for name in a | b}


def _notes(left: Side, right: Side) -> Iterator[str]:
    a, b = left.manifest, right.manifest
    if left.letters is not None:
        yield (
            f"two tokenizers, {a.tokenizer.name} and {b.tokenizer.name}: compared by place and text,"
            " control tokens and white space aside"
        )
    elif a.weighted != b.weighted:
        yield f"only {(left if a.weighted else right).folder} has weights: those of the other count as 1"
    if old := (a.format_version == 1) + (b.format_version == 1):
        which = "one is" if old == 1 else "both are"
        yield f"{which} of format version 1: labels of first tokens, which train nothing, are left aside"


# ----------------------------------------------------------------------------------------------- examples


def _example(found: Compared, number: int) -> Example:
    """Read a document on the sides that hold it."""
    sides = (found.left, int(found.a[number])), (found.right, int(found.b[number]))
    which = [(side, index) for side, index in sides if index >= 0]
    batches = [side.read(np.array([index])) for side, index in which]
    starts = _shown_from(which, batches)
    versions = iter(
        _version(side, index, batch, start)
        for (side, index), batch, start in zip(which, batches, starts, strict=True)
    )
    a, b = (next(versions) if index >= 0 else None for _, index in sides)
    lacking = found.right if b is None else found.left
    return Example(a, b, "" if a and b else lacking.lost.get(which[0][0].origin(which[0][1]), ""))


def _version(side: Side, index: int, batch: TokenBatch, differs: int) -> Version:
    shown = _window(batch.input_ids, differs, side.image_id)
    ids, trained = batch.input_ids[shown], batch.trained[shown]
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    pictures = _from(side.shown_pictures(index), int((batch.input_ids[: shown.start] == side.image_id).sum()))
    return Version(
        place=place(*side.origin(index), side.sources[int(side.source[index])].unit),
        example_id=int(side.ids[index]),
        length=int(side.lengths[index]),
        tokens=int(side.tokens[index]),
        trained=int(side.trained[index]),
        skipped=shown.start,
        pieces=view_example(ids, labels, side.vocabulary, pictures=pictures, image_id=side.image_id).pieces,
        cut=shown.stop < len(batch.input_ids),
    )


def _window(input_ids: Int32, differs: int, image_id: int) -> slice:
    """Return which tokens are shown, around the first that differs; each run of a picture counts as one."""
    image = input_ids == image_id
    begins = np.append(np.flatnonzero(~(image & np.append(False, image[:-1]))), len(image))
    first = max(int(np.searchsorted(begins, differs, side="right")) - 1 - _BEFORE, 0)
    start, stop = (int(begins[min(at, len(begins) - 1)]) for at in (first, first + _SHOWN))
    return slice(start, stop)


def _from(pictures: Sequence[ShownPicture], skipped: int) -> list[ShownPicture]:
    """Return what is left of pictures behind so many image tokens."""
    left = []
    for picture in pictures:
        if skipped < picture.tokens:
            left.append(replace(picture, tokens=picture.tokens - skipped))
        skipped = max(skipped - picture.tokens, 0)
    return left


def _shown_from(which: list[tuple[Side, int]], batches: list[TokenBatch]) -> Iterable[int]:
    """Return the token at which each document is shown: where it differs, or near its first answer."""
    if len(which) == 1:
        first_answer = int(np.argmax(batches[0].trained)) if batches[0].trained.any() else 0
        return [max(first_answer - _PROMPT, 0) + _BEFORE]
    letters = [side.letters for side, _ in which]
    one, other = (
        batch if own is None else own.spell(batch) for own, batch in zip(letters, batches, strict=True)
    )
    size = min(len(one.input_ids), len(other.input_ids))
    differs = one.input_ids[:size] != other.input_ids[:size]
    differs |= (one.trained[:size] != other.trained[:size]) | (one.weights()[:size] != other.weights()[:size])
    differs |= _other_pictures(which, one.input_ids[:size])
    longer = len(one.input_ids) != len(other.input_ids)
    first = int(np.argmax(differs)) if differs.any() else size * longer
    return [
        first if own is None else own.token_at(batch.input_ids, first)
        for own, batch in zip(letters, batches, strict=True)
    ]


def _other_pictures(which: list[tuple[Side, int]], input_ids: Int32) -> Bool:
    """bool[T]: tokens of a document that stand for another picture on each side."""
    (a, first), (b, second) = which
    mine, theirs = a.shown_pictures(first), b.shown_pictures(second)
    names = [np.repeat([one.sha256 for one in own], [one.tokens for one in own]) for own in (mine, theirs)]
    places, size = np.flatnonzero(input_ids == a.image_id), min(map(len, names))
    found = np.zeros(len(input_ids), np.bool_)
    found[places[:size]] = (names[0][:size] != names[1][:size])[: len(places)]
    return found
