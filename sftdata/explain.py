"""What each code means: the paragraphs of codes.md, one for every fault, reason, finding and counter."""

from __future__ import annotations

from importlib import resources

from sftdata.errors import UsageError, did_you_mean


def explain(code: str) -> str:
    """Return the paragraph of a code, with the kind of thing it is.

    >>> print(explain("empty-row"))
    empty-row (rejected rows): Prompt and completion are both empty. Remove the row.

    Raises:
        UsageError: there is no such code.
    """
    codes = read_codes()
    name = code.strip().partition(":")[0]  # a counter of a column goes by `column_unused:NAME`
    known = {entry.replace("_", "-"): entry for entry in codes}  # the summary writes counters with spaces
    found = known.get(name.lower().replace("_", "-").replace(" ", "-"))
    if found is None:
        fix = did_you_mean(name, codes, "`sftdata explain` lists them all.")
        raise UsageError(f"{code}: no such code.", fix)
    section, paragraph = codes[found]
    return f"{found} ({section[0].lower()}{section[1:]}): {paragraph}"


def read_codes() -> dict[str, tuple[str, str]]:
    """Return code -> (section, paragraph), in the order of the file."""
    codes: dict[str, tuple[str, str]] = {}
    text = resources.files("sftdata").joinpath("codes.md").read_text("utf-8")
    for section in f"\n{text}".split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for entry in body.split("\n### ")[1:]:
            code, _, paragraph = entry.partition("\n")
            codes[code] = (title, " ".join(paragraph.split()))
    return codes
