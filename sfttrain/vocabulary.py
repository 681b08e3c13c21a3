"""Tokens that sets use and their model does not know: missing or untrained embeddings, stop tokens."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from sftdata.batches import IGNORE_INDEX
from sftdata.set.local import origin
from sftdata.set.opened import ShardSet
from sftdata.set.rows import PackedRow
from sftdata.vocabulary import read_added_tokens
from sfttrain.process import Say
from sfttrain.refusals import missing_embeddings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_SAMPLE_ROWS = 256
_NEVER_TRAINED = 1e-3  # of the usual norm of a row
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


def embedding_table(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings, float[V, D]."""
    return cast(Tensor, model.get_input_embeddings().weight)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model has embeddings for."""
    return len(embedding_table(model))


def resize_embeddings(model: PreTrainedModel, sets: Sequence[ShardSet], multiple: int, say: Say) -> list[int]:
    """Give every token of the sets an embedding; return the ids whose embeddings were never trained.

    Args:
        multiple: round a grown number of rows up to a multiple of this.

    Raises:
        UsageError: a set was made with another model's tokenizer.
    """
    before = embedding_rows(model)
    needed = missing_embeddings(sets, before)
    untrained = untrained_embeddings(model, sets)
    if not needed:
        return untrained
    rows = -(-needed // multiple) * multiple
    say(
        f"embeddings: grown from {before:,} to {rows:,} rows for tokens that the set added, "
        "each the mean of the others"
    )
    grow_embeddings(model, rows)
    return sorted({*untrained, *range(before, needed)})


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Add embedding rows, the same on every machine: each is the mean of the rows there were."""
    before = embedding_rows(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    weights = [embedding_table(model)]
    head = cast(nn.Linear | None, model.get_output_embeddings())
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    with torch.no_grad():
        for weight in weights:
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
        if head is not None and getattr(head, "bias", None) is not None:
            head.bias[before:] = head.bias[:before].float().mean().to(head.bias.dtype)


def untrained_embeddings(model: PreTrainedModel, sets: Sequence[ShardSet]) -> list[int]:
    """Return control tokens the sets use whose rows were never trained: near zero, or equal to another.

    A base model often reserves such rows (Llama 3's headers, for one); under frozen embeddings they would
    stay noise. A model without its weights, as a plan has it, is taken to need none.
    """
    used = sorted({token for opened in sets for token in _control_tokens(opened)})
    weight = embedding_table(model).detach()
    used = [token for token in used if token < len(weight)]
    if not used or weight.is_meta or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return []
    rows = weight[used].float()
    small = (
        rows.norm(dim=1)
        < _NEVER_TRAINED * weight[:: max(1, len(weight) // 1024)].float().norm(dim=1).median()
    )
    return [
        token
        for token, row, tiny in zip(used, rows, small.tolist(), strict=True)
        if tiny or _repeated(weight, row)
    ]


def align_special_tokens(model: PreTrainedModel, sets: Sequence[ShardSet]) -> None:
    """Let the model's config name the end, padding and begin tokens of the tokenizer it was trained with."""
    if not sets:
        return
    tokenizer = sets[0].manifest.tokenizer
    for config in (model.config, getattr(model, "generation_config", None)):
        for name, token in (("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id), ("bos", tokenizer.bos_id)):
            if config is not None and token is not None:
                setattr(config, f"{name}_token_id", token)


def stop_tokens(sets: Sequence[ShardSet]) -> list[int]:
    """Return the ids that end an answer in these sets: EOS, and special tokens on which trained spans end."""
    found: set[int] = set()
    for opened in sets:
        eos, ends = opened.manifest.tokenizer.eos_id, _span_ends(opened)
        special = read_added_tokens(opened.folder / "tokenizer")
        found |= {eos} if eos is not None else set()
        # Without a tokenizer at hand a token must end nearly every span to count as one made for that.
        share = 0.05 if special else 0.9
        total = ends.total()
        found |= {
            token
            for token, count in ends.items()
            if count >= share * total and (not special or token in special)
        }
    return sorted(found)


def _span_ends(opened: ShardSet) -> Counter[int]:
    """Count the last tokens of trained spans."""
    counts: Counter[int] = Counter()
    for row in _sample(opened):
        trained = row.labels != IGNORE_INDEX
        last = trained & ~np.append(trained[1:], False)
        counts.update(row.labels[last].tolist())
    return counts


def _control_tokens(opened: ShardSet) -> set[int]:
    """Return the added tokens that occur in a sample of a set."""
    known = np.array(sorted(read_added_tokens(opened.folder / "tokenizer")), np.int32)
    found: set[int] = set()
    for row in _sample(opened):
        # The model never attends to padding, so its embedding needs no training.
        real = np.repeat(row.examples >= 0, row.seq_lengths)
        found |= set(np.intersect1d(row.input_ids[real], known).tolist())
    return found


def _sample(opened: ShardSet) -> Iterator[PackedRow]:
    """Rows spread over a set; of one behind a URL over its first shard, which is soon there."""
    count = len(opened) if origin(opened.folder) is None else opened.manifest.shards[0].rows
    for index in np.unique(np.linspace(0, count - 1, min(count, _SAMPLE_ROWS)).astype(np.int64)):
        yield opened[int(index)]


def _repeated(weight: Tensor, row: Tensor) -> bool:
    """Say whether a row occurs in the table more than once."""
    alike = (weight[:, 0].float() == row[0]).nonzero()[:, 0]
    return int((weight[alike].float() == row).all(1).sum()) > 1


def ready_generation(model: PreTrainedModel, sets: Sequence[ShardSet], say: Say) -> None:
    """Give the generation config the sets' stop tokens, and fix what would make saving the model fail."""
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
                f"generation_config: do_sample is set to true, "
                f"without which transformers saves no model ({wrong})"
            )
            return
    kept = {name: getattr(generation, name) for name in _TOKENS}
    model.generation_config = type(generation)(**kept)
    say(
        f"generation_config: all but its token ids is left out, "
        f"since transformers saves no model with it ({wrong})"
    )


def _wrong(generation: GenerationConfig) -> str:
    """Return why transformers would not save it; "" where it would."""
    # transformers saves a config unchecked that is as it was loaded.
    changed = getattr(generation, "_original_object_hash", None) != hash(generation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generation.validate(strict=changed)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).strip().splitlines()]
        return next((line for line in lines if line.startswith("`")), lines[0])
    return ""


def _set_stop_tokens(generation: GenerationConfig, sets: Sequence[ShardSet]) -> None:
    before = generation.eos_token_id
    known = [] if before is None else before if isinstance(before, list) else [before]
    stops = stop_tokens(sets)
    if stops:
        # The set's stops come first; the model's are kept, unless their ids mean something else in the set.
        keep = [token for token in known if token < sets[0].manifest.tokenizer.vocab_size]
        merged = list(dict.fromkeys([*stops, *keep]))
        generation.eos_token_id = merged if len(merged) > 1 else merged[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = sets[0].manifest.tokenizer.pad_id
