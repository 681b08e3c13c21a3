"""What a page is asked for: the recipe of a view, and what a recipe cannot say, as the query of a URL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlencode

import yaml

from sftdata.errors import UsageError, did_you_mean
from sftdata.set.local import origin
from sftdata.settings import check_settings
from sftdata.views.recipe import ViewConfig

OF_RECIPE = ("sources", "without", "min_tokens", "max_tokens", "min_trained", "max_trained")
OF_PAGE = ("state", "finding", "text", "page", "after", "part")
SEVERAL = ("sources", "without")
STATES = {"rows": "in the rows", "cut": "cut", "dropped": "dropped"}
_SHARE = 0.0001  # percent below an edge: closer to it comes no share of a document of a million tokens
_NEW = "NEW"  # folder of a view that is yet to be made


@dataclass(frozen=True)
class Query:
    """Filters and place, as they stand in a URL.

    Attributes:
        values: of the fields that are given, as text.
        recipe: those that a view has too, checked.
    """

    values: Mapping[str, tuple[str, ...]]
    recipe: ViewConfig = field(compare=False)

    @classmethod
    def read(cls, folder: Path, text: str) -> Query:
        """Read the query of a URL; empty fields, which forms send, count as not given.

        Raises:
            UsageError: an unknown field, one given twice, or a value outside its range.
        """
        values = parse_qs(text)
        for name, given in values.items():
            if name not in OF_RECIPE + OF_PAGE:
                raise UsageError(f"{name}: no such filter.", did_you_mean(name, OF_RECIPE + OF_PAGE))
            if len(given) > 1 and name not in SEVERAL:
                raise UsageError(f"{name}: given {len(given)} times.", "give it once.")
        query = cls({name: tuple(given) for name, given in values.items()}, _recipe(folder, values))
        if query.state not in ("", *STATES):
            raise UsageError(f"state: found {query.state!r}.", f"one of {', '.join(STATES)}.")
        for name in ("page", "after", "part"):
            query.number(name)
        return query

    def text(self, name: str) -> str:
        """Return the value of a field that is given once at most; "" if it is not."""
        return self.values.get(name, ("",))[0]

    @property
    def state(self) -> str:
        """Key of `STATES`, or "" for all documents."""
        return self.text("state")

    def number(self, name: str) -> int:
        """Return the value of a field that is a number, 0 if it is not given.

        Raises:
            UsageError: it is none.
        """
        text = self.text(name) or "0"
        if not text.isdecimal() or len(text) > 15:
            raise UsageError(f"{name}: found {text!r:.40}; expected a number.", "follow a link of the page.")
        return int(text)

    def link(self, **changes: object) -> str:
        """Return the query of a page with other filters; None takes a filter away, and the place goes."""
        values: dict[str, object] = {
            name: given for name, given in self.values.items() if name not in ("page", "after", "part")
        }
        values |= changes
        kept = {name: values[name] for name in OF_RECIPE + OF_PAGE if values.get(name) not in (None, "", ())}
        return f"?{urlencode(kept, doseq=True)}"

    def to_page(self, number: int) -> str:
        """Return the query of a page of the list, counted from 1."""
        return self.link(page=number if number > 1 else None)

    def within(self, low: int, parts: int) -> str:
        """Return the query for documents with `low` to `low + 1` of so many parts trained."""
        above = None if low + 1 == parts else f"{100 * (low + 1) / parts - _SHARE:.6g}%"
        return self.link(min_trained=f"{100 * low / parts:.6g}%" if low else None, max_trained=above)

    # ---------------------------------------------------------------------------------------- as a recipe

    def unsaid(self) -> list[str]:
        """Return the filters that are given and that a recipe cannot say."""
        return [name for name in ("state", "finding", "text") if self.text(name)]

    def as_yaml(self) -> str:
        """Return the selection as a file for `sftdata view`.

        Raises:
            UsageError: a recipe cannot say it.
        """
        if unsaid := self.unsaid():
            raise UsageError(
                f"{', '.join(unsaid)}: no recipe of a view can say this.",
                "save the documents as a list for --drop, or take the filter away.",
            )
        given = self.recipe.model_dump(mode="json", include=set(OF_RECIPE), exclude_defaults=True)
        text = yaml.safe_dump({"sets": list(self.recipe.sets), **given}, sort_keys=False, allow_unicode=True)
        return f"# A view of what was selected. Make it: sftdata view THIS_FILE -o {_NEW}\n{text}"


def _recipe(folder: Path, values: Mapping[str, list[str]]) -> ViewConfig:
    given: dict[str, object] = {
        name: values[name] if name in SEVERAL else values[name][0] for name in OF_RECIPE if name in values
    }
    place = origin(folder) or str(folder.resolve())
    return check_settings(ViewConfig, "sftdata", {"sets": [place], "output": _NEW, **given})
