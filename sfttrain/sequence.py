"""Rows that one device cannot hold: several ranks hold each row together, a slice of its tokens each.

    row ── slice of each rank ── layers ──────────────────────────────── loss of the slice ── sum over ranks
                                   │ attention                      │
                                [H, T/n] ── all to all ── [H/n, T] ─┘

While it attends, a rank has some of the heads over the whole row and the lengths of all its documents, so
documents stay apart as they do on one device. The rest of a layer must take each token by itself. That is
proven on the user's architecture at tiny size: a slice of a row, given attention's answers from the whole
row, must put out what the whole row does.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional
from transformers import AttentionInterface

from sftdata.batches import IGNORE_INDEX
from sftdata.errors import UsageError
from sfttrain.attention import (
    ASKED,
    STAND_IN,
    VARLEN,
    Choice,
    drops_out,
    stand_in_forward,
    unsupported_reason,
    varlen_forward,
)
from sfttrain.config import TrainConfig
from sfttrain.data import Batch, Collator, Row
from sfttrain.forward import text_config
from sfttrain.path import Plan, choose_path
from sfttrain.process import Say, reason_of
from sfttrain.proofs import DIFFERENCE, Remembered, Surroundings, remembered
from sfttrain.tiny import VOCABULARY, fixed_seed, full_float32, smallest_that_runs, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

SHARED = "sequence_parallel"  # the name of the attention for transformers
_TRIED = "sequence_parallel_trial"
_SLICED = ("input_ids", "position_ids", "seq_idx")
# These are shifted: the last token of a slice predicts the first of the next one.
_SHIFTED: dict[str, float] = {"labels": IGNORE_INDEX, "loss_weights": 0, "source": 0}
_OTHERS = {
    "cp": "accelerate drops the mask of attention, so the documents of a row would read each other",
    "sp": "DeepSpeed takes the loss from full logits of its own batches, not from ours",
    "tp": "the ranks of a group would get different rows",
}
_ON_LOGITS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")


def refuse_unshared(config: TrainConfig, args: TrainingArguments, objects: Mapping[str, object]) -> None:
    """Refuse other ways to take a row apart, and settings that sliced rows cannot have.

    Args:
        objects: what transformers' Trainer takes as objects.

    Raises:
        UsageError: naming the setting, and the way that works.
    """
    _refuse_others(args)
    width = config.sequence_parallel
    if width == 1:
        return
    asked = f"sequence_parallel={width}"
    if args.world_size % width:
        found = f"{asked}: the number of processes is {args.world_size}, no multiple of {width}"
        raise UsageError(f"{found}.", f"torchrun --nproc-per-node {width} -m sfttrain run ...")
    if config.attention not in ("auto", VARLEN):
        what = f"{asked}: attention={config.attention} takes no sliced rows."
        raise UsageError(what, "set attention=auto.")
    for name in _ON_LOGITS:
        if objects.get(name) is not None:
            raise UsageError(f"{asked}: {name} wants the logits of whole rows.", "leave one of them out.")
    if args.neftune_noise_alpha:
        found = f"{asked}: neftune_noise_alpha scales its noise by the length of whole rows"
        raise UsageError(f"{found}.", "leave one of them out.")
    if not args.average_tokens_across_devices:
        found = f"{asked}: average_tokens_across_devices=false would weigh the slices of a row differently"
        raise UsageError(f"{found}.", "leave one of them out.")


def _refuse_others(args: TrainingArguments) -> None:
    given = getattr(args, "parallelism_config", None)
    by_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
    for kind, reason in _OTHERS.items():
        size = getattr(given, f"{kind}_size", None)
        if size is None and by_launcher:
            size = int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1"))
        if size is not None and size > 1:
            fix = f"leave it out of the launch, and set sequence_parallel={size}."
            raise UsageError(f"parallelism_config: {kind}_size={size}: {reason}.", fix)


def share_rows(config: TrainConfig, model_config: PreTrainedConfig, where: Surroundings, say: Say) -> Plan:
    """Choose the path of rows that ranks hold together, and prove it.

    Raises:
        UsageError: this model cannot be trained on slices of rows.
    """
    width, text = config.sequence_parallel, text_config(model_config)
    if where.device == "cuda":
        name, inner = VARLEN, varlen_forward
        _require(width, unsupported_reason(name, model_config, where.device, where.compute))
    else:
        name, inner = STAND_IN, stand_in_forward
        _require(width, "attention on slices of a row has no dropout" if drops_out(model_config) else "")
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    _require(width, f"{heads} heads are no multiple of {width}" if heads % width or not heads else "")
    plan = choose_path(config, model_config, Choice(name, ASKED, ""), where, say)
    _require(width, "it needs our loss, which is not this model's" if plan.loss is None else "")
    _require(width, "its rotary factors follow the length of each document" if plan.restart else "")
    _require(width, "its loss has terms that are means over whole rows" if plan.terms else "")
    difference, before = _proof(config, model_config, plan.boundaries, where)
    mixes = f"tokens of its layers meet outside of attention (outputs move by {difference:.1e})"
    _require(width, mixes if difference > DIFFERENCE else "")
    when = "before (prove_again=true proves anew), " if before else ""
    found = f"slices = whole rows within {difference:.1e}"
    say(f"sequence parallel: {width} ranks hold each row; proven {when}on a tiny {text.model_type}: {found}")
    AttentionInterface.register(SHARED, partial(attend, inner, group_of(width)))
    return replace(plan, attention=SHARED)


def _proof(
    config: TrainConfig, model_config: PreTrainedConfig, boundaries: bool, where: Surroundings
) -> Remembered[float]:
    try:
        return remembered(
            model_config,
            {"attention": SHARED, "boundaries": boundaries, "reach": where.reach},
            float,
            lambda: difference_of_slices(model_config, boundaries, where, config.trust_remote_code),
            config.prove_again,
        )
    except Exception as error:  # whatever a foreign model raises: what cannot be shown is not relied on
        asked, reason = f"sequence_parallel={config.sequence_parallel}", reason_of(error)
        found = f"{asked}: slices of rows could not be tried ({reason})"
        raise UsageError(f"{found}.", "leave it out.") from error


def _require(width: int, reason: str) -> None:
    if reason:
        raise UsageError(f"sequence_parallel={width}: {reason}.", "leave it out.")


@cache
def group_of(width: int) -> distributed.ProcessGroup:
    """Return the ranks that hold their rows together with this one: `width` that follow each other."""
    return cast(distributed.ProcessGroup, distributed.new_subgroups(group_size=width)[0])


class Sliced:
    """Turn rows into this rank's slice of a batch.

    Args:
        collate: lays rows end to end.
        part, parts: which slice, of how many.
    """

    def __init__(self, collate: Collator, part: int, parts: int) -> None:
        self._collate, self._part, self._parts = collate, part, parts

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return int64[1, T / parts] ids and positions; labels, weights and sources are one longer.

        Lengths of documents stay those of the whole batch, which is padded to a multiple of the parts.
        """
        real = [row for row in rows if not row.fills] or list(rows[:1])
        missing = -sum(len(row.input_ids) for row in real) % self._parts
        if missing:
            real[-1] = _lengthened(real[-1], missing)
        batch = self._collate(real)
        width = cast(Tensor, batch["input_ids"]).shape[1] // self._parts
        first = self._part * width
        for name in _SLICED:
            if name in batch:
                batch[name] = cast(Tensor, batch[name])[:, first : first + width]
        for name, beyond in _SHIFTED.items():
            if name in batch:
                longer = functional.pad(cast(Tensor, batch[name]), (0, 1), value=beyond)
                batch[name] = longer[:, first : first + width + 1]
        return batch


def _lengthened(row: Row, more: int) -> Row:
    """Append tokens that train nothing, as a document of padding."""
    behind = (0, more)
    return Row(
        np.pad(row.input_ids, behind),
        np.pad(row.labels, behind, constant_values=IGNORE_INDEX),
        np.append(row.seq_lengths, np.int32(more)),
        None if row.source is None else np.pad(row.source, behind),
        None if row.loss_weights is None else np.pad(row.loss_weights, behind),
        None if row.places is None else np.vstack([row.places, [0, 0, -1, 0]]),
    )


class _Exchange(torch.autograd.Function):
    """Give each rank of a group its part of one dimension, and take the whole of another."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: distributed.ProcessGroup, give: int, take: int) -> Tensor:
        ctx.group, ctx.give, ctx.take = group, give, take
        parts = torch.stack(states.chunk(group.size(), give))
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), take)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradient, ctx.group, ctx.take, ctx.give), None, None, None


exchange = cast("Callable[[Tensor, distributed.ProcessGroup, int, int], Tensor]", _Exchange.apply)


def attend(
    inner: Callable[..., tuple[Tensor, None]], group: distributed.ProcessGroup, module: torch.nn.Module,
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend over whole rows with this rank's share of the heads.

    Args:
        inner: attends inside each document of a flattened row.
        query: float[1, H, T / n, D].
        key, value: float[1, H_kv, T / n, D]; fewer heads than ranks are repeated.
        options: what `inner` takes; lengths of the documents are those of the whole row.

    Returns:
        float[1, T / n, H, D] and no weights.
    """
    ranks, heads = group.size(), key.shape[1]
    copies = math.lcm(heads, ranks) // heads
    key, value = (states.repeat_interleave(copies, 1) for states in (key, value))
    if options.get("s_aux") is not None:
        options["s_aux"] = options["s_aux"].chunk(ranks)[group.rank()]
    whole = [exchange(states, group, 1, 2) for states in (query, key, value)]
    output, _ = inner(module, *whole, None, **options)
    return exchange(output, group, 1, 2), None


def of_whole_rows(losses: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Return the token losses of all slices in the order of the row, float32[N], from those of this slice."""
    own = torch.tensor([len(losses)], device=losses.device)
    counts = [torch.empty_like(own) for _ in range(group.size())]
    distributed.all_gather(counts, own, group=group)
    most = int(torch.cat(counts).max())
    parts = [losses.new_empty(most) for _ in counts]
    distributed.all_gather(parts, functional.pad(losses.detach(), (0, most - len(losses))), group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def difference_of_slices(
    config: PreTrainedConfig, boundaries: bool, where: Surroundings, trusted: bool = False
) -> float:
    """Return how far logits of slices are from those of the whole row, in parts of their spread.

    Attention's answers for a slice are cut out of those for the whole row, so whatever else lets tokens
    see each other shows.
    """
    answers: list[Tensor] = []
    here = slice(None)

    def answer(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
        if here == slice(None):
            answers.append(stand_in_forward(*inputs, **options)[0])
            return answers[-1], None
        return answers.pop(0)[:, here], None

    AttentionInterface.register(_TRIED, answer)
    with fixed_seed(), full_float32(), torch.no_grad():
        model = tiny_model(smallest_that_runs(config, trusted, where.reach), _TRIED, trusted)
        row, collate = _random_row(), Collator(True, boundaries)
        whole = _logits(model, collate([row]))
        recorded, moved = list(answers), 0.0
        for part in range(2):
            answers[:] = recorded
            logits_of = Sliced(collate, part, 2)([row])
            width = cast(Tensor, logits_of["input_ids"]).shape[1]
            here = slice(part * width, (part + 1) * width)
            moved = max(moved, float((_logits(model, logits_of) - whole[:, here]).abs().max()))
    return moved / float(whole.std())


def _random_row() -> Row:
    """Return documents of which the second one lies in both halves of the row."""
    lengths = np.array([11, 7, 14], np.int32)
    ids = torch.randint(3, VOCABULARY, (int(lengths.sum()),)).numpy().astype(np.int32)
    return Row(ids, ids, lengths)


def _logits(model: Any, batch: Batch) -> Tensor:
    return cast(Tensor, model(**{name: part for name, part in batch.items() if name != "labels"}).logits)
