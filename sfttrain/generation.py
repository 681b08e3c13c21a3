"""What the model is told of generating: the stop tokens of its sets, in a form that transformers saves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from sftdata.shardset.opened import ShardSet
from sfttrain.talk import Say
from sfttrain.vocabulary import stop_tokens

_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


def ready_generation(model: Any, sets: Sequence[ShardSet], say: Say) -> None:
    """Give the generation config the sets' stop tokens, and fix what would make every save of the model fail."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    if sets:
        _set_stop_tokens(generation, sets)
    wrong = _wrong(generation)
    if not wrong:
        return
    if not generation.do_sample:
        generation.do_sample = True  # values for sampling are there, so sampling was meant
        if not _wrong(generation):
            say(
                f"generation_config: do_sample is set to true, without which transformers saves no model ({wrong})"
            )
            return
    kept = {name: getattr(generation, name) for name in _TOKENS}
    model.generation_config = type(generation)(**kept)
    say(
        f"generation_config: all but its token ids is left out, since transformers saves no model with it ({wrong})"
    )


def _wrong(generation: Any) -> str:
    """Return why transformers would not save it; "" where it would."""
    changed = getattr(generation, "_original_object_hash", None) != hash(
        generation
    )  # what was only loaded is saved as it is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generation.validate(strict=changed)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).strip().splitlines()]
        return next((line for line in lines if line.startswith("`")), lines[0])
    return ""


def _set_stop_tokens(generation: Any, sets: Sequence[ShardSet]) -> None:
    before = generation.eos_token_id
    own = [] if before is None else before if isinstance(before, list) else [before]
    stops = stop_tokens(sets)
    if stops:
        # The set's own stops come first; those the model knew stay, unless its ids mean something else in this set.
        keep = [token for token in own if token < sets[0].manifest.tokenizer.vocab_size]
        merged = list(dict.fromkeys([*stops, *keep]))
        generation.eos_token_id = merged if len(merged) > 1 else merged[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = sets[0].manifest.tokenizer.pad_id
