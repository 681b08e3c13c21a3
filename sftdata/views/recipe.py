"""Every setting of a view, in one frozen model: what is chosen, and how it is limited, packed and ordered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sftdata.config import MOST_TOKENS
from sftdata.errors import UsageError
from sftdata.output import local_output

Measure = Literal["rows", "tokens", "trained"]
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)\s*(?:(rows|tokens|trained)(?: tokens)?)?\s*\Z")
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_SHARE = re.compile(r"\d+(?:\.\d+)?%?")


class Amount(NamedTuple):
    """A number of rows, tokens or trained tokens."""

    number: int
    measure: Measure


class ViewConfig(BaseModel):
    """Which documents of which sets a view holds, and how they are laid out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: tuple[str, ...] = Field(min_length=1, description="Folders of finished sets.")
    output: Path = Field(description="Folder of the view.")

    # ---- which documents
    sources: tuple[str, ...] = Field(
        (), description="Only these sources, by name or glob, as `sftdata stats` names them."
    )
    without: tuple[str, ...] = Field((), description="Leave these sources out, by name or glob.")
    min_tokens: int | None = Field(None, ge=1, description="Leave shorter documents out.")
    max_tokens: int | None = Field(None, ge=1, description="Leave longer documents out.")
    min_trained: str | None = Field(
        None, description="Leave documents out with a smaller share of trained tokens, as 5%."
    )
    max_trained: str | None = Field(
        None, description="Leave documents out with a larger share of trained tokens."
    )
    drop: Path | None = Field(
        None, description="File of documents to leave out: one FILE:LINE or example id a line."
    )
    dedup: Literal["row", "prompt"] | None = Field(
        None, description="Keep the first document of those that are equal: row, or prompt."
    )
    exclude: tuple[str, ...] = Field((), description="Sets whose documents to leave out, as evaluation data.")
    exclude_by: Literal["row", "prompt"] = Field("prompt", description="What --exclude compares.")
    cap: dict[str, str] = Field(
        default_factory=dict,
        description="Most of a source: NAME=AMOUNT, as 'chats.jsonl=500 rows', '*.jsonl=1M tokens' or"
        " '*=2M trained'.",
    )

    # ---- split and mix
    eval: str | None = Field(None, description="Share of the prompts for OUT/eval; the rest makes OUT/train.")
    mix: dict[str, float] = Field(
        default_factory=dict, description="Shares of the sources: NAME=SHARE, a name or glob each."
    )
    mix_by: Measure = Field("trained", description="What shares count.")
    passes: float = Field(1, gt=0, le=1000, description="How often --mix may go through a source, at most.")
    total: str | None = Field(
        None, description="How much --mix takes, as 4M tokens; default: the most it can."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of every draw: caps, split, mix, order.")

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

    overwrite: bool = Field(False, description="Replace a finished set made with other settings.")

    @field_validator("sets", "sources", "without", "exclude", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        if isinstance(value, str | Path):
            return (str(value),)
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("cap", mode="before")
    @classmethod
    def _amounts_as_text(cls, value: object) -> object:
        return {name: str(amount) for name, amount in value.items()} if isinstance(value, dict) else value

    @field_validator("cap")
    @classmethod
    def _amounts(cls, value: dict[str, str]) -> dict[str, str]:
        for amount in value.values():
            read_amount(amount)
        return value

    @field_validator("total", "eval", "min_trained", "max_trained", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if type(value) in (int, float) else value

    @field_validator("total")
    @classmethod
    def _amount(cls, value: str | None) -> str | None:
        if value is not None:
            read_amount(value)
        return value

    @field_validator("eval", "min_trained", "max_trained")
    @classmethod
    def _at_most_all(cls, value: str | None) -> str | None:
        if value is not None and not _SHARE.fullmatch(value):
            raise ValueError("expected a share, as 5% or 0.05")
        if value is not None and read_share(value) > 1:
            raise ValueError("a share is at most 100%, or 1")
        return value

    @field_validator("mix")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share < float("inf") for share in value.values()):
            raise ValueError("a share is a number above 0")
        return value

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, value: Path) -> Path:
        return local_output(value)

    def selection(self) -> dict[str, object]:
        """Return the settings that choose documents, without those at their defaults."""
        laid_out = {"sets", "output", "max_length", "overlong", "packing", "overwrite"}
        return self.model_dump(mode="json", exclude=laid_out, exclude_defaults=True)

    @property
    def selects(self) -> bool:
        """Whether any document may be left out or repeated."""
        return bool(
            self.selection().keys() - {"pack_over", "order", "seed", "exclude_by", "mix_by", "passes"}
        )


def read_amount(text: str) -> Amount:
    """Read an amount.

    Raises:
        ValueError: the text is no amount.

    >>> read_amount("1.5M tokens"), read_amount("500 rows"), read_amount("2k trained").measure
    (Amount(number=1500000, measure='tokens'), Amount(number=500, measure='rows'), 'trained')
    """
    found = _AMOUNT.match(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no amount; expected one as '500 rows', '1M tokens' or '2M trained'")
    number, times, measure = found.groups()
    kinds: dict[str | None, Measure] = {
        None: "tokens",
        "rows": "rows",
        "tokens": "tokens",
        "trained": "trained",
    }
    return Amount(round(float(number) * _TIMES[times]), kinds[measure])


def read_share(text: str) -> float:
    """Read a share as a number from 0 to 1.

    >>> read_share("5%"), read_share("0.25")
    (0.05, 0.25)
    """
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


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
