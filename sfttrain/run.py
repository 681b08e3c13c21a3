"""One training run, from a checked configuration to a model on disk: read me first.

Without torch: names of settings -> places -> take the output -> open the sets, compare vocabularies, begin
to verify. In training.py: choose attention -> prove packing and loss -> load the model -> resume or begin ->
train -> export.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sfttrain.arguments import checked_training
from sfttrain.checkpoint import refuse_places, take
from sfttrain.config import TrainConfig
from sfttrain.process import listening
from sfttrain.refusals import Reading, open_sets, require_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfttrain.trainer import SftTrainer


def train(
    config: TrainConfig, *, model: PreTrainedModel | None = None, data: object = None, **extras: object
) -> SftTrainer | None:
    """Run a configuration to its end, resuming what an earlier, broken run left.

    Args:
        config: what to train on what, and how.
        model: a model object, adapters on it or not; else the one that the configuration names is loaded.
        data: a dataset of rows with token ids, instead of sets; see `data.py`.
        extras: more arguments for transformers' Trainer: `callbacks`, `compute_metrics`, `processing_class`,
            ...

    Returns:
        The trainer; None where the output already holds this run, finished: nothing is touched then.

    Raises:
        SftError: what is wrong, and the fix; before the first step where it can be known then.
    """
    require_trainer()
    checked_training(config.training)
    refuse_places(config, given=model is not None)
    with listening() as request, take(config.output):
        sets, evaluation = open_sets(config)
        reading = Reading([*sets, *evaluation.values()])
        start_ahead(config)
        from sfttrain.training import train_on  # imports torch and transformers, which takes seconds

        return train_on(config, sets, evaluation, reading, model, data, extras, request)


def start_ahead(config: TrainConfig) -> threading.Thread:
    """Let the disk and the GPU's driver begin beside the imports, which keep one core busy for seconds.

    What fails here fails again, and is reported, where it is needed.
    """
    thread = threading.Thread(target=_start_ahead, args=(config,), daemon=True)
    thread.start()
    return thread


def _start_ahead(config: TrainConfig) -> None:
    with suppress(OSError):
        for path in Path(config.model or "").glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    if config.training.get("use_cpu"):
        return
    with suppress(OSError, AttributeError, ValueError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # PyTorch takes the same one
