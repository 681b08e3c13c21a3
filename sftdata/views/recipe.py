"""Every setting of a view, in one frozen model: what is chosen, and how it is limited, packed and ordered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sftdata.choosing import Choosing, Like, Names, Share
from sftdata.config import MOST_TOKENS, WINDOW, Output
from sftdata.errors import UsageError

ORDERING = frozenset({"order", "bands", "window", "steps_for", "model", "pad_to_multiple_of"})
"""Settings that neither choose nor cut documents."""


class FilterConfig(BaseModel):
    """The sets of a view, and the documents that are left out one by one."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    sets: Names = Field(min_length=1, description="Folders or URLs of finished sets.")
    output: Output = Field(description="Folder of the view, here or in an object store: s3://, gs://, az://.")
    like: Like = None

    # ---- which documents
    sources: Names = Field(
        (), description="Only these sources, by name or glob, as `sftdata stats` names them."
    )
    without: Names = Field((), description="Leave these sources out, by name or glob.")
    min_tokens: int | None = Field(None, ge=1, description="Leave shorter documents out.")
    max_tokens: int | None = Field(None, ge=1, description="Leave longer documents out.")
    min_trained: Share = Field(
        None, description="Leave documents out with a smaller share of trained tokens, as 5%."
    )
    max_trained: Share = Field(None, description="Leave documents out with a larger share of trained tokens.")
    drop: Path | None = Field(
        None, description="File of documents to leave out: one FILE:LINE or example id a line."
    )


class ViewConfig(Choosing, FilterConfig):
    """Which documents of which sets a view holds, and how they are laid out."""

    # ---- how it is laid out
    max_length: int | None = Field(
        None, gt=0, le=MOST_TOKENS, description="Tokens per packed row; default: as the first set has."
    )
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] | None = Field(
        None, description="What to do with documents longer than max_length; default: as the first set."
    )
    packing: Literal["bfd", "wrapped", "none"] | None = Field(
        None, description="How rows are packed; default: as the first set."
    )
    pack_over: Literal["auto", "slice", "view"] = Field(
        "auto",
        description="Pack slice by slice, as prepare does, or over the whole view, which fills rows better;"
        " auto: by slice where all documents of one set are taken.",
    )
    order: Literal["as-is", "shuffled", "length", "trained", "sources", "windows"] = Field(
        "as-is",
        description="Of the packed rows: shuffled; in bands by length, by the share of trained tokens or by"
        " source, shuffled inside a band; or shuffled in windows of shards, for disks slow at random reads.",
    )
    bands: int = Field(8, ge=1, description="Of --order length and trained.")
    window: int = Field(WINDOW, ge=1, description="Shards of a window of --order windows.")
    steps_for: str | None = Field(
        None,
        description="Steps of equal work: RANKSxROWS, rows of each rank and step (batch x accumulation),"
        " as 8x4.",
    )
    model: Path | None = Field(
        None,
        description="Model, or its config.json, whose work is balanced by --steps-for, or a set made so;"
        " default: a decoder 4,096 wide.",
    )
    epochs: int = Field(
        1,
        ge=1,
        le=1000,
        description="Pack the documents anew, by seed, for each of so many epochs.",
    )
    pad_to_multiple_of: int = Field(
        1,
        ge=1,
        le=MOST_TOKENS,
        description="Pad each document to a multiple, for context and tensor parallelism.",
    )

    write: bool = Field(
        False,
        description="Copy the rows, so that the set stands alone and other readers can read it; without, the"
        " view is an index into the sets it is made of.",
    )
    overwrite: bool = Field(False, description="Replace a finished set made with other settings.")

    @field_validator("steps_for")
    @classmethod
    def _ranks_and_rows(cls, value: str | None) -> str | None:
        if value is not None:
            read_ranks(value)
        return value

    def selection(self) -> dict[str, object]:
        """Return the settings that choose documents, without those at their defaults."""
        laid_out = {"sets", "output", "like", "max_length", "overlong", "packing", "write", "overwrite"}
        return self.model_dump(mode="json", exclude=laid_out, exclude_defaults=True)

    @property
    def selects(self) -> bool:
        """Whether any document may be left out or repeated."""
        others = {"pack_over", "seed", "exclude_by", "mix_by", "passes"}
        return bool(self.selection().keys() - others - ORDERING)

    @property
    def reorders(self) -> bool:
        """Whether rows are put in another order than they are packed in."""
        return self.order != "as-is" or self.steps_for is not None


def read_ranks(text: str) -> tuple[int, int]:
    """Read ranks, and rows of each rank and step.

    Raises:
        ValueError: the text is no such pair.

    >>> read_ranks("8x4")
    (8, 4)
    """
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if found is None:
        raise ValueError(f"{text!r} is not RANKSxROWS, as 8x4: 8 ranks, 4 rows of each in a step")
    return int(found[1]), int(found[2])


def read_drops(path: Path) -> tuple[list[tuple[str, int]], list[int]]:
    """Read a list of documents to leave out: places as (file, line), and example ids.

    Raises:
        UsageError: the file cannot be read, or a line is neither.
    """
    places: list[tuple[str, int]] = []
    ids: list[int] = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--drop {path}: cannot be read: {reason}.", "check the path.") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        name, colon, place = line.rpartition(":")
        if not line or line.startswith("#"):
            continue
        if not place.isdecimal() or (colon and not name):
            what = f"--drop {path}:{number}: found {line!r:.80}; expected FILE:LINE or an example id."
            raise UsageError(what, "write one document a line, as chats.jsonl:17 or 16.")
        places.append((name, int(place))) if colon else ids.append(int(place))
    return places, ids


def drop_line(name: str, row: int, example_id: int) -> str:
    """Return a line of such a list: a place, or the id of a document whose source no line could name.

    >>> drop_line("chats.jsonl", 17, 16), drop_line("# a", 17, 16)
    ('chats.jsonl:17', '16')
    """
    named = f"{name}:{row}"
    plain = named == named.strip() and len(named.splitlines()) == 1 and not named.startswith("#")
    return named if plain else str(example_id)
