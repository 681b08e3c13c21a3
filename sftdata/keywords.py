"""Settings as keywords of the public functions: their types, for type checkers, and which of them were given.

What is returned depends on `eval`, so that these functions are overloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    from concurrent.futures import Executor

AnyRegistry = str | Path | Mapping[str, Any] | None
_Told = TypeVar("_Told", bound=Callable[..., object])
TOLD = "told"  # no setting; the keywords that were given


def telling(function: _Told) -> _Told:
    """Tell a function which keywords were given, as `told` in its `unknown`: the others may be repeated."""

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> object:
        return function(*arguments, **keywords, **{TOLD: tuple(keywords)})

    return cast(_Told, call)


class ChoosingSettings(TypedDict, total=False):
    """Settings of both that choose among documents, but `eval`."""

    dedup: Literal["row", "prompt"] | None
    exclude: Sequence[str | Path]
    exclude_by: Literal["row", "prompt"]
    cap: Mapping[str, str]
    mix: Mapping[str, float | str]
    mix_by: Literal["rows", "tokens", "trained"]
    passes: float
    total: str | None
    seed: int


class RowsSettings(TypedDict, total=False):
    """Settings of `sftdata.prepare` that say how rows become those of a set."""

    like: str | Path | None
    split: str | None
    subset: str | None
    format: str | None
    map: Mapping[str, str]
    map_role: Mapping[str, str]
    kind: Literal["auto", "conversation", "completion", "text"]
    prompt_template: str | None
    registry: AnyRegistry
    max_line_bytes: int
    revision: str | None
    chat_template: str | None
    template_kwargs: Mapping[str, object]
    date: str
    train_on: Literal["auto", "assistant", "last-assistant", "completion", "all"]
    response_template: str | Sequence[int] | None
    instruction_template: str | Sequence[int] | None
    mask_mode: Literal["default", "trl-0.7.10"]
    loss_weights: bool
    boundary: Literal["split", "merge"]
    eos_token: str | None
    trust_control_tokens: bool
    processor: Path | None
    max_pixels: int | None
    min_pixels: int | None
    images: Path | None
    embed_images: bool
    check_pixels: bool
    max_length: int | None
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"]
    packing: Literal["bfd", "wrapped", "none"]
    max_rejects: str | int
    slice_bytes: int


class PrepareSettings(RowsSettings, ChoosingSettings, total=False):
    """Settings of `sftdata.prepare` but `eval`."""

    workers: int | Executor | None
    engine: Literal["auto", "gigatoken", "tokenizers"]
    overwrite: bool


class FilterSettings(TypedDict, total=False):
    """Settings of `sftdata.view` that leave documents out one by one."""

    like: str | Path | None
    sources: Sequence[str]
    without: Sequence[str]
    min_tokens: int | None
    max_tokens: int | None
    min_trained: str | None
    max_trained: str | None
    drop: Path | None


class ViewSettings(FilterSettings, ChoosingSettings, total=False):
    """Settings of `sftdata.view` but `eval`."""

    max_length: int | None
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] | None
    packing: Literal["bfd", "wrapped", "none"] | None
    pack_over: Literal["auto", "slice", "view"]
    order: Literal["as-is", "shuffled", "length", "trained", "sources", "windows"]
    bands: int
    window: int
    steps_for: str | None
    model: Path | None
    epochs: int
    pad_to_multiple_of: int
    write: bool
    overwrite: bool
