"""What is trained, as one value: the text of each token with the label that is stored for it.

Everything here comes from ids and labels; nothing is rendered or masked a second time. terminal.py and
pages/view.html.jinja show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32, Int64
from sftdata.pages import macro, render
from sftdata.show.roles import find_turns
from sftdata.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest tokens that are whole characters, all trained or none.

    Attributes:
        text: as the data has it, not escaped for any face.
        ids: token ids.
        trained: their labels are their ids.
        special: an added token, such as `<|im_end|>`, and not text that spells one.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class DocumentView:
    """A stretch of one example.

    Attributes:
        origin: file and line, or row; empty where unknown.
        example_id: the input row, -1 where it has no number yet.
        start: position of its first token in the packed row.
        pieces: in order.
    """

    origin: str
    example_id: int
    start: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def tokens_trained(self) -> int:
        """Tokens with a label."""
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)

    def turns(self) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """Yield who speaks, and the pieces of that turn."""
        for turn in find_turns(self.pieces):
            yield turn.role, self.pieces[turn.start : turn.stop]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        ids = [token_id for piece in self.pieces for token_id in piece.ids]
        labels = [
            token_id if piece.trained else IGNORE_INDEX for piece in self.pieces for token_id in piece.ids
        ]
        pieces = [asdict(piece) | {"role": role} for role, turn in self.turns() for piece in turn]
        place = {"origin": self.origin, "example_id": self.example_id, "start": self.start}
        return place | {"input_ids": ids, "labels": labels, "pieces": pieces}


@dataclass(frozen=True, slots=True)
class View:
    """One or more documents to look at.

    Attributes:
        title: what they are, as `row 7 of shards`.
        documents: in the order of the packed row.
        padding: tokens of padding after them.
    """

    title: str
    documents: tuple[DocumentView, ...]
    padding: int = 0

    def _repr_html_(self) -> str:
        return str(macro("documents.html.jinja", "cell")(self))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        documents = [document.to_json() for document in self.documents]
        return {"title": self.title, "documents": documents, "padding": self.padding}


def view_page(view: View, *, ids: bool = False) -> str:
    """Return a view as one self-contained page; hovering over a token shows its id.

    Args:
        ids: write the token ids beside each piece as well.
    """
    return render("view.html.jinja", name=view.title or "examples", view=view, ids=ids)


def view_row(
    row: tuple[Int32, Int32, Int32, Int64],
    vocabulary: Vocabulary,
    place: Callable[[int], str],
    title: str = "",
) -> View:
    """Lay the text over a packed row.

    Args:
        row: input_ids and labels, int32[T]; seq_lengths, int32[S]; example ids, int64[S], -1 for padding.
        vocabulary: of the tokenizer that made the ids.
        place: gives the place of an example id, in words.
    """
    input_ids, labels, seq_lengths, example_ids = row
    documents, start, padding = [], 0, 0
    for length, example_id in zip(seq_lengths.tolist(), example_ids.tolist(), strict=True):
        stop = start + length
        if example_id < 0:
            padding += length
        else:
            pieces = tuple(_pieces(input_ids[start:stop], labels[start:stop], vocabulary))
            documents.append(DocumentView(place(example_id), example_id, start, pieces))
        start = stop
    return View(title, tuple(documents), padding)


def view_example(input_ids: Int32, labels: Int32, vocabulary: Vocabulary, origin: str = "") -> DocumentView:
    """Lay the text over one example that is in no shard yet."""
    return DocumentView(origin, -1, 0, tuple(_pieces(input_ids, labels, vocabulary)))


def _pieces(input_ids: Int32, labels: Int32, vocabulary: Vocabulary) -> Iterator[Piece]:
    """Cut a document where labels change, then at whole characters."""
    trained = labels != IGNORE_INDEX
    edges = (
        np.flatnonzero(np.diff(trained, prepend=~trained[:1], append=~trained[-1:])).tolist()
        if len(trained)
        else []
    )
    for start, stop in pairwise(edges):
        yield from _stretch(input_ids[start:stop].tolist(), bool(trained[start]), vocabulary)


def _stretch(ids: Sequence[int], trained: bool, vocabulary: Vocabulary) -> Iterator[Piece]:
    first, held = 0, b""
    for index, token_id in enumerate(ids):
        special = vocabulary.is_visible_token(token_id)
        if special and held:
            yield Piece(held.decode(errors="backslashreplace"), tuple(ids[first:index]), trained, False)
            first, held = index, b""
        held += vocabulary.bytes_of(token_id)
        # Bytes that cannot become a character, however many follow, are spelled out rather than held forever.
        if not _is_open(held):
            yield Piece(
                held.decode(errors="backslashreplace"), tuple(ids[first : index + 1]), trained, special
            )
            first, held = index + 1, b""
    if first < len(ids):
        yield Piece(held.decode(errors="backslashreplace"), tuple(ids[first:]), trained, False)


def _is_open(raw: bytes) -> bool:
    """Say whether bytes end inside a character that more bytes would complete."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
