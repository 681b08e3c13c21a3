"""Every setting of a view, in one frozen model: what is chosen, and how it is limited, packed and ordered."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sftdata.choosing import (
    Cap,
    Dedup,
    Eval,
    Exclude,
    ExcludeBy,
    Mix,
    MixBy,
    Names,
    Passes,
    Seed,
    Share,
    Total,
)
from sftdata.config import MOST_TOKENS
from sftdata.errors import UsageError
from sftdata.output import local_output


class ViewConfig(BaseModel):
    """Which documents of which sets a view holds, and how they are laid out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: Names = Field(min_length=1, description="Folders of finished sets.")
    output: Path = Field(description="Folder of the view.")

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
    dedup: Dedup = None
    exclude: Exclude = ()
    exclude_by: ExcludeBy = "prompt"
    cap: Cap = Field(default_factory=dict)

    # ---- split and mix
    eval: Eval = None
    mix: Mix = Field(default_factory=dict)
    mix_by: MixBy = "trained"
    passes: Passes = 1
    total: Total = None
    seed: Seed = 0

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
    order: Literal["as-is", "shuffled"] = Field("as-is", description="Of the packed rows.")

    write: bool = Field(
        False,
        description="Copy the rows, so that the set stands alone and other readers can read it; without, the"
        " view is an index into the sets it is made of.",
    )
    overwrite: bool = Field(False, description="Replace a finished set made with other settings.")

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, value: Path) -> Path:
        return local_output(value)

    def selection(self) -> dict[str, object]:
        """Return the settings that choose documents, without those at their defaults."""
        laid_out = {"sets", "output", "max_length", "overlong", "packing", "write", "overwrite"}
        return self.model_dump(mode="json", exclude=laid_out, exclude_defaults=True)

    @property
    def selects(self) -> bool:
        """Whether any document may be left out or repeated."""
        return bool(
            self.selection().keys() - {"pack_over", "order", "seed", "exclude_by", "mix_by", "passes"}
        )


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
            raise UsageError(
                f"--drop {path}:{number}: found {line!r:.80}; expected FILE:LINE or an example id.",
                "write one document a line, as chats.jsonl:17 or 16.",
            )
        places.append((name, int(place))) if colon else ids.append(int(place))
    return places, ids
