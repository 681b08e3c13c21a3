"""Datasets saved to disk and datasets of the Hub, by the package `datasets`, which is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftdata.errors import UsageError, need
from sftdata.sources.chunks import Source
from sftdata.sources.splits import several_splits, wrong_split

if TYPE_CHECKING:
    from datasets import Dataset

MEDIA = ("Image", "Audio", "Video", "Pdf")


def load_dataset(source: Source) -> Dataset:
    """Load a saved or Hub dataset, media columns left undecoded.

    Raises:
        UsageError: no such dataset or split, several splits and none is chosen, or `datasets` is not installed.
    """
    datasets = need("datasets", "hub", f"{source.path} is a dataset")
    try:
        if source.container == "saved":
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # the Hub client, datasets and the builders each have their own exceptions
        what = f"{source.path}: cannot be loaded as a dataset ({type(error).__name__}: {str(error)[:300]})."
        raise UsageError(what, "check the name, --split and --subset, or the connection.") from None
    chosen = _choose(loaded, source, datasets)
    for name, feature in chosen.features.items():
        if type(feature).__name__ in MEDIA:
            chosen = chosen.cast_column(name, type(feature)(decode=False))
    return chosen.with_format("arrow")


def _choose(loaded: Any, source: Source, datasets: Any) -> Any:
    """Return the rows that `split` names, as `datasets` cuts them."""
    if source.container == "hub" and not isinstance(loaded, dict):
        return loaded
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    if source.split is None:
        if len(splits) > 1:
            raise several_splits(source.path, splits)
        return next(iter(splits.values()))
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise wrong_split(source.path, source.split, splits, error) from None
    rows = [splits[part.splitname].select(range(part.from_, max(part.from_, part.to))) for part in parts]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
