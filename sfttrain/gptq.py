"""Quantize a finished model by GPTQ, calibrated on rows of the set it was trained on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from sftdata.errors import UsageError
from sftdata.paths import local_output
from sftdata.shardset.opened import ShardSet, open_set
from sfttrain.packages import require_package
from sfttrain.talk import Say

CALIBRATION_ROWS = 256
GROUP_SIZES = (-1, 32, 64, 128)
BITS = (2, 3, 4, 8)


def quantize(model: Path, calibration: Path, output: Path, bits: int, group_size: int, say: Say) -> None:
    """Write a GPTQ model beside the one it comes from.

    Args:
        calibration: a set; its rows, spread evenly, show GPTQ what the activations look like.
        group_size: weights that share a scale; smaller is more exact and larger on disk, -1 is a whole column.

    Raises:
        UsageError: a setting GPTQ does not know, adapters that are not merged, or GPTQModel is missing.
    """
    local_output(output)
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise UsageError(
            f"gptq: bits={bits}, group_size={group_size}; expected bits of {BITS}, groups of {GROUP_SIZES}."
        )
    if (model / "adapter_config.json").is_file():
        raise UsageError(
            f"{model}: holds adapters; GPTQ takes a whole model.", f"sfttrain merge {model} -o {model}-merged"
        )
    require_package("gptqmodel", "export --gptq")
    package: Any = importlib.import_module(
        "gptqmodel"
    )  # had apart: it is built against the torch of the machine
    rows = calibration_rows(open_set(calibration), CALIBRATION_ROWS)
    say(f"gptq: {bits} bits in groups of {group_size}, calibrated on {len(rows)} documents of {calibration}")
    quantized = package.GPTQModel.load(str(model), package.QuantizeConfig(bits=bits, group_size=group_size))
    quantized.quantize(rows, batch_size=1)
    quantized.save(str(output))
    say(
        f"gptq: {output}; compare its evaluation loss with the original's before using it, and try group_size=32 if it is worse"
    )


def calibration_rows(opened: ShardSet, count: int) -> list[dict[str, Any]]:
    """Return ids and masks of documents spread over a set, each by itself, as GPTQ takes them."""
    rows = []
    for index in np.unique(np.linspace(0, len(opened) - 1, min(count, len(opened))).astype(np.int64)):
        ids = max((document.input_ids for document in opened[int(index)].documents()), key=len).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return rows
