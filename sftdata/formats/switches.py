"""What a message says about its own training: switches and weights of every spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sftdata.errors import RowError

WEIGHTS = ("weight", "loss_weight", "loss_scale")
ON = ("train", "training", "trainable", "loss", "loss_mask", "output_with_loss")  # true: trained
OFF = ("masked",)  # true: not trained
UNCLEAR = {
    "mask": ("it may mean either", 'call it "train" or "masked", by what true means'),
    "train_detail": (
        "a part of a message cannot be trained",
        'split the message, and switch its parts with "train"',
    ),
    "training_detail": (
        "a part of a message cannot be trained",
        'split the message, and switch its parts with "train"',
    ),
}
SWITCHES = frozenset({*WEIGHTS, *ON, *OFF, *UNCLEAR})


def read_switch(message: Mapping[str, Any], where: str, weighted: bool) -> bool | float | None:
    """Return a message's own switch; several must all be on. With `weighted`, the product of weights that are no switches.

    Raises:
        RowError: a value that is no switch, or a mask of which it is not known what it leaves out.
    """
    present = [(key, message[key]) for key in message if key in SWITCHES and message[key] is not None]
    if not present:
        return None
    for key, value in present:
        if key in UNCLEAR and value != []:
            why, fix = UNCLEAR[key]
            raise RowError("unclear-switch", f"{where}.{key} is {value!r}; {why}.", fix)
    values = [(key, value) for key, value in present if key not in UNCLEAR]
    strange = [(key, value) for key, value in values if value not in (0, 1)]
    for key, value in strange:
        if not weighted or key not in WEIGHTS or not _is_weight(value):
            wanted = (
                "a number from 0 that float32 can hold"
                if weighted and key in WEIGHTS
                else "0 or 1, true or false"
            )
            fix = "fix the weight." if weighted else "round the weight, or keep it with --loss-weights."
            fix = fix if key in WEIGHTS else "write it as true or false."
            raise RowError("fractional-weight", f"{where}.{key} is {value!r}; expected {wanted}.", fix)
    on = all(not value if key in OFF else value for key, value in values)
    if not strange or not on:
        return on if values else None
    weight = math.prod(float(value) for _, value in strange)
    if not _is_weight(weight):
        raise RowError(
            "fractional-weight", f"{where}: its weights multiply to {weight!r}.", "fix the weights."
        )
    return weight


def _is_weight(value: Any) -> bool:
    """Say whether float32 holds a number as one above 0 and finite."""
    return isinstance(value, int | float) and _SMALLEST <= value <= _LARGEST


_SMALLEST, _LARGEST = 2.0**-126, 3.4e38  # of the normal numbers of float32
