"""Settings as keywords of the public functions, for type checkers: what is returned depends on `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict


class ViewSettings(TypedDict, total=False):
    """Settings of `sftdata.view` but `eval`."""

    sources: Sequence[str]
    without: Sequence[str]
    min_tokens: int | None
    max_tokens: int | None
    min_trained: str | None
    max_trained: str | None
    drop: Path | None
    dedup: Literal["row", "prompt"] | None
    exclude: Sequence[str | Path]
    exclude_by: Literal["row", "prompt"]
    cap: Mapping[str, str]
    mix: Mapping[str, float | str]
    mix_by: Literal["rows", "tokens", "trained"]
    passes: float
    total: str | None
    seed: int
    max_length: int | None
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] | None
    packing: Literal["bfd", "wrapped", "none"] | None
    pack_over: Literal["auto", "slice", "view"]
    order: Literal["as-is", "shuffled", "length", "trained", "sources", "windows"]
    bands: int
    window: int
    steps_for: str | None
    model: Path | None
    pad_to_multiple_of: int
    write: bool
    overwrite: bool
