"""What `sftdata diff` must say of two lists of documents, one document after the other: slow, and without any hash."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from tests.token_sets import Layout, Sources

Place = tuple[str, int]


@dataclass(eq=False)
class Known:
    """A document of a set.

    Attributes:
        pieces: stretches of it that are in rows, as (first token, last token + 1).
    """

    place: Place
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    pieces: list[tuple[int, int]] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first label."""
        return self.ids[: self.trained.index(True) if True in self.trained else len(self.ids)]

    @property
    def answers(self) -> list[int]:
        """The labelled ids."""
        return [token for token, flag in zip(self.ids, self.trained, strict=True) if flag]


def documents_of(sources: Sources, layout: Layout, slices: int) -> list[Known]:
    """Return the documents of a set that `write_tokens` would write, in the order of their lines."""
    known = [
        Known((name, line), *row)
        for name, rows in sources.items()
        for line, row in enumerate(rows, start=1)
        if row
    ]
    if layout.packing != "wrapped":
        for document in known:
            document.pieces = _cut(document, layout)
        return known
    size, more = divmod(len(known), slices)
    first = 0
    for number in range(slices):  # each is a stream of its own
        part = known[first : first + size + (number < more)]
        first += len(part)
        _wrap([document for document in part if any(document.trained[1:])], layout.max_length)
    return known


def _cut(document: Known, layout: Layout) -> list[tuple[int, int]]:
    length, limit = len(document.ids), layout.max_length
    if length <= limit:
        pieces = [(0, length)]
    elif layout.overlong == "truncate":
        pieces = [(0, limit)]
    elif layout.overlong == "truncate-left":
        pieces = [(length - limit, length)]
    elif layout.overlong == "split":
        pieces = [(start, min(start + limit, length)) for start in range(0, length, limit)]
    else:
        pieces = []
    return [(start, stop) for start, stop in pieces if any(document.trained[start + 1 : stop])]


def _wrap(documents: list[Known], limit: int) -> None:
    used = 0
    for document in documents:
        start = 0
        while start < len(document.ids):
            stop = min(start + limit - used, len(document.ids))
            document.pieces.append((start, stop))
            used = (used + stop - start) % limit
            start = stop


def compare(a: list[Known], b: list[Known]) -> dict[str, list[tuple[Place | None, Place | None]]]:
    """Return the places of the documents of each kind, in both sets; `copies` and `beside` are listed again."""
    found: dict[str, list[tuple[Place | None, Place | None]]] = {}

    def say(kind: str, one: Known | None, other: Known | None) -> None:
        found.setdefault(kind, []).append((one and one.place, other and other.place))

    pairs = _pair(a, b)
    for one, other in pairs:
        equal = (one.ids, one.trained) == (other.ids, other.trained)
        if one.pieces and other.pieces:
            say(_kind(one, other), one, other)
        elif one.pieces or other.pieces:
            held = "went" if one.pieces else "came"
            sides = (one, None) if one.pieces else (None, other)
            say(held, *sides)
            if equal:
                say(f"{held} beside", *sides)
    paired = {id(document) for pair in pairs for document in pair}
    for name, own, others in (("went", a, b), ("came", b, a)):
        for document in own:
            if document.pieces and id(document) not in paired:
                sides = (document, None) if name == "went" else (None, document)
                say(name, *sides)
                alike = [
                    other
                    for other in others
                    if other.pieces and (other.ids, other.trained) == (document.ids, document.trained)
                ]
                if alike:
                    say(f"{name} copies", *sides)
    return found


def _kind(one: Known, other: Known) -> str:
    if one.ids == other.ids and one.trained == other.trained:
        if one.pieces != other.pieces:
            return "cut"
        return "same" if one.place == other.place else "moved"
    if one.ids == other.ids:
        return "labels"
    if one.prompt and one.prompt == other.prompt:
        return "answer"
    return "prompt" if one.answers and one.answers == other.answers else "text"


def _pair(a: list[Known], b: list[Known]) -> list[tuple[Known, Known]]:
    """Pair documents: equal ones, then by prompt, then by ids, then by place; at the same place first."""
    keys: list[Callable[[Known], Hashable]] = [
        lambda one: (one.ids, one.trained),
        lambda one: one.prompt or id(one),
        lambda one: one.ids,
    ]
    pairs: list[tuple[Known, Known]] = []
    left, right = list(a), list(b)

    def match(fits: Callable[[Known, Known], bool]) -> None:
        for one in list(left):
            other = next((other for other in right if fits(one, other)), None)
            if other is not None:
                pairs.append((one, other))
                left.remove(one)
                right.remove(other)

    for key in keys:
        match(lambda one, other: key(one) == key(other) and one.place == other.place)  # noqa: B023
        match(lambda one, other: key(one) == key(other))  # noqa: B023
    match(lambda one, other: one.place == other.place)
    return pairs
