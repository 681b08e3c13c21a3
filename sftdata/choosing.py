"""Settings that choose among documents, each defined once: `prepare` and `view` both have them."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sftdata.errors import UsageError
from sftdata.output import StoreUrl
from sftdata.settings import NamesOfData

Measure = Literal["rows", "tokens", "trained"]
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)\s*(?:(rows|tokens|trained)(?: tokens)?)?\s*\Z")
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_SHARE = re.compile(r"\d+(?:\.\d+)?%?")
_ROUNDED = 1.0  # percent: shares as 33.3% may come to a little less, or more, than 100%


class Amount(NamedTuple):
    """A number of rows, tokens or trained tokens."""

    number: int
    measure: Measure


def read_amount(text: str) -> Amount:
    """Read an amount.

    Raises:
        ValueError: the text is no amount, or one of nothing.

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
    whole = round(float(number) * _TIMES[times])
    if not whole:
        raise ValueError(f"{text!r} is nothing; expected more, or the source left out")
    return Amount(whole, kinds[measure])


def read_share(text: str) -> float:
    """Read a share as a number from 0 to 1.

    >>> read_share("5%"), read_share("0.25")
    (0.05, 0.25)
    """
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


# -------------------------------------------------------------------------------------- checked values


def as_names(value: object) -> object:
    """Take a single name or path as a list of one."""
    if isinstance(value, str | PathLike):
        return (os.fspath(value),)
    if not isinstance(value, list | tuple):
        return value
    return tuple(os.fspath(one) if isinstance(one, PathLike) else str(one) for one in value)


def _as_text(value: object) -> object:
    """Undo the conversion of `5` and `0.05` by YAML."""
    return str(value) if type(value) in (int, float) else value


def _amounts_as_text(value: object) -> object:
    return {name: str(amount) for name, amount in value.items()} if isinstance(value, dict) else value


def _amounts(value: dict[str, str]) -> dict[str, str]:
    for amount in value.values():
        read_amount(amount)
    return value


def _amount(value: str | None) -> str | None:
    if value is not None:
        read_amount(value)
    return value


def _at_most_all(value: str | None) -> str | None:
    if value is not None and not _SHARE.fullmatch(value):
        raise ValueError("expected a share, as 5% or 0.05")
    if value is not None and read_share(value) > 1:
        raise ValueError("a share is at most 100%, or 1")
    return value


def _leaves_both(value: str | None) -> str | None:
    if value is not None and not 0 < read_share(value) < 1:
        raise ValueError("a share of none or all leaves a side of the split empty")
    return value


def _percent_as_numbers(value: object) -> object:
    """Read shares in percent, of which all or none are."""
    if not isinstance(value, dict):
        return value
    percent = {
        name: float(share[:-1])
        for name, share in value.items()
        if isinstance(share, str) and share.endswith("%") and _SHARE.fullmatch(share)
    }
    if percent and len(percent) < len(value):
        raise ValueError("some shares are in percent, and some are not; write all of them one way")
    if percent and abs(sum(percent.values()) - 100) > _ROUNDED:
        raise ValueError(f"the shares come to {sum(percent.values()):g}%; expected 100%")
    return percent or value


def _shares(value: dict[str, float]) -> dict[str, float]:
    if any(not 0 < share < float("inf") for share in value.values()):
        raise ValueError("a share is a number above 0")
    return value


# ------------------------------------------------------------------------------------------- settings

Share = Annotated[
    str | None,
    BeforeValidator(_as_text, json_schema_input_type=str | float | None),
    AfterValidator(_at_most_all),
]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]

Shares = Annotated[
    dict[str, float],
    NamesOfData,
    BeforeValidator(_percent_as_numbers, json_schema_input_type=dict[str, float | str]),
    AfterValidator(_shares),
]
MixBy = Annotated[Measure, Field(description="What shares count.")]
Like = Annotated[
    str | None,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    Field(description="Finished set whose settings to repeat, the inputs aside; those given beside it win."),
]


class Choosing(BaseModel):
    """Which documents, as `prepare` and `view` choose them."""

    model_config = ConfigDict(defer_build=True)  # a command builds the models that it uses

    dedup: Literal["row", "prompt"] | None = Field(
        None, description="Keep the first document of those that are equal: row, or prompt."
    )
    exclude: Names = Field((), description="Sets whose documents to leave out, as evaluation data.")
    exclude_by: Literal["row", "prompt"] = Field("prompt", description="What is compared by --exclude.")
    cap: Annotated[
        dict[str, str], NamesOfData, BeforeValidator(_amounts_as_text), AfterValidator(_amounts)
    ] = Field(
        default_factory=dict,
        description="Most of a source, or of all that a glob names together: NAME=AMOUNT, as"
        " 'chats.jsonl=500 rows', '*.jsonl=1M tokens' or '*=2M trained'.",
    )
    eval: Annotated[Share, AfterValidator(_leaves_both)] = Field(
        None, description="Share of the prompts for OUT/eval, as 5%; the rest makes OUT/train."
    )
    mix: Shares = Field(
        default_factory=dict,
        description="Shares of the sources: NAME=SHARE, a name or glob each; all in percent, or in proportion"
        " to each other.",
    )
    mix_by: MixBy = "trained"
    passes: float = Field(1, gt=0, le=1000, description="How often --mix may go through a source, at most.")
    total: Annotated[
        str | None,
        BeforeValidator(_as_text, json_schema_input_type=str | int | None),
        AfterValidator(_amount),
    ] = Field(None, description="How much --mix takes, as 4M tokens; default: the most it can.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of every draw: caps, split, mix, order.")


CHOOSING = tuple(Choosing.model_fields)
SIDES = ("train", "eval")


def folders_of(output: Path | StoreUrl, share: str | None) -> tuple[Path | StoreUrl, ...]:
    """Return the folders of the sets that are made at an output; `share` is that of `eval`.

    >>> [str(folder) for folder in folders_of(Path("out"), "5%")]
    ['out/train', 'out/eval']
    """
    return (output,) if share is None else tuple(output / side for side in SIDES)


NEEDS = {"total": "mix", "passes": "mix", "mix_by": "mix", "exclude_by": "exclude"}
"""Settings that act only beside another."""
OF_ORDERS = {"bands": ("length", "trained"), "window": ("windows",)}
"""Settings that act only for some orders of rows."""


def refuse_idle(config: BaseModel, *, shuffled: bool = False) -> None:
    """Refuse settings that act only beside another that is not given.

    Args:
        config: settings, these among them.
        shuffled: rows are shuffled, which draws too.

    Raises:
        UsageError: naming the setting.
    """
    fields = type(config).model_fields
    given = {name: getattr(config, name) for name in fields}
    for name, other in NEEDS.items():
        if given[name] != fields[name].default and not given[other]:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} without --{other}: it has no effect.", f"leave {flag} out.")
    total = None if given["total"] is None else read_amount(given["total"])
    if total is not None and total.measure != given["mix_by"]:
        raise UsageError(
            f"--total {given['total']}: counts {total.measure}; --mix-by is {given['mix_by']}.",
            f"give --total in {given['mix_by']}, or --mix-by {total.measure}.",
        )
    if given["seed"] and not (given["cap"] or given["eval"] or given["mix"] or shuffled):
        raise UsageError("--seed: nothing is drawn; it has no effect.", "leave --seed out.")
