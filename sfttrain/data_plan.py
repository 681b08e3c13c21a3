"""What a run takes of each set: planned before its first step, by passes or by shares, and said aloud."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sftdata.errors import UsageError
from sftdata.set.opened import ShardSet
from sfttrain.ahead import windows_of
from sfttrain.config import TrainConfig
from sfttrain.contents import Contents
from sfttrain.process import counted, share_of_rows
from sfttrain.schedule import Mixture, Order, Passes, Schedule, Window
from sfttrain.seen import Account
from sfttrain.stored import stored_schedule

if TYPE_CHECKING:
    from transformers import TrainingArguments

CLOSE = 0.001
"""How near realised shares are to those asked for, where sets are large enough for their rows."""
_HAIR = 0.005  # of a pass, by which an epoch may go further: it ends with a whole step


def make_order(
    config: TrainConfig,
    sets: Sequence[ShardSet],
    sizes: Sequence[int],
    contents: Sequence[Contents],
    args: TrainingArguments,
) -> Order:
    """Return the batches of this rank.

    Args:
        config: the run.
        sets: none where rows are given that are no set's.
        sizes: rows of each set.
        contents: of the sets; needed for shares alone.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    shuffle = args.train_sampling_strategy != "sequential"
    stored, note = stored_schedule(config, [opened.manifest for opened in sets], sizes, args)
    windows = windows_of(config, sets, sizes) if shuffle and sets and stored is None else ()
    if shares := config.set_shares():
        amounts = [part.amounts(config.mix_by) for part in contents]
        schedule: Schedule = Mixture(amounts, shares, seed=seed, shuffle=shuffle, windows=windows)
    else:
        weights = config.set_weights or (1.0,)
        schedule = stored or Passes(sizes, weights, seed=seed, shuffle=shuffle, windows=windows)
    rank, ranks = share_of_rows(args)
    return Order(
        schedule,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=rank,
        ranks=ranks,
        note=note or _windows_note(windows),
    )


def _windows_note(windows: Sequence[Window | None]) -> str:
    """Say that rows are not shuffled over the whole."""
    shown = [window.shards for window in windows if window is not None and window.shards < len(window.edges)]
    return f"order: shuffled in a window of {max(shown):,} shards that moves through the set" if shown else ""


def total_steps(args: TrainingArguments, order: Order) -> int:
    """Return the steps of the whole run, those before this leg included."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return -int(-args.num_train_epochs * order.steps_per_epoch // 1)


def planned(config: TrainConfig, account: Account, order: Order, steps: int) -> Iterator[str]:
    """Yield what a run takes of each set up to its last step, a line each.

    Raises:
        UsageError: it goes through a set more often than `passes` allows.
    """
    _refuse_passes(config, account, steps)
    leg = account.leg(steps)
    epoch = f"an epoch is {counted(order.steps_per_epoch, 'step')}"
    yield f"data: {counted(leg.steps, 'step')} of {counted(order.global_batch, 'row')}; {epoch}"
    if order.note:
        yield order.note
    yield from map(str, leg.sets)
    worst = max((abs(part.share - part.asked) for part in leg.sets if part.asked is not None), default=0)
    if worst > CLOSE:
        yield (
            f"the shares are met to {worst:.2%} only, since whole rows are taken, and these are long or few;"
            " `sftdata view --mix` makes a set that meets them by documents"
        )


def account_of(
    config: TrainConfig, sets: Sequence[ShardSet], contents: Sequence[Contents], order: Order
) -> Account:
    """Return the account of a leg on these sets."""
    return Account(sets, contents, order, measure=config.mix_by, shares=config.set_shares())


def _refuse_passes(config: TrainConfig, account: Account, steps: int) -> None:
    if config.passes is None or max(account.passes(steps)) <= (most := config.passes + _HAIR):
        return
    passes, folder = max(zip(account.passes(steps), config.sets, strict=True), key=lambda pair: pair[0])
    enough, beyond = account.first_step, steps
    while beyond - enough > 1:
        middle = (enough + beyond) // 2
        enough, beyond = (middle, beyond) if max(account.passes(middle)) <= most else (enough, middle)
    alone = " without epochs" if config.training.get("num_train_epochs") else ""
    shorter = f", or --max-steps {enough}{alone}" if enough > account.first_step else ""
    raise UsageError(
        f"{folder}: {steps:,} steps go through it {passes:.2f} times; --passes allows {config.passes:g}.",
        f"--passes {math.ceil(passes * 100) / 100:.10g}{shorter}.",
    )
