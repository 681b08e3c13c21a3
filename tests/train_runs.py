"""Runs of the trainer for its tests: tiny models, in this process or in others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.waiting import HANGS

_TAKEN: set[int] = set()  # by runs of this process
ROOT = Path(__file__).parents[1]
OUR_WARNINGS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft still asks by the old name
)


def tiny_llama(
    folder: Path, *, vocabulary: int = 128, dropout: float = 0.0, tied: bool = False, **more: Any
) -> Path:
    """Write a Llama of 30,000 weights; `more` are fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": dropout, "tie_word_embeddings": tied,
        "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(**(shape | more))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_in_process(
    sets: Path | list[Path], model: Path | None, output: Path, training: dict[str, Any], **settings: Any
) -> Any:
    """Train here and return the trainer."""
    from sfttrain.config import read_settings
    from sfttrain.run import train

    folders = tuple(sets) if isinstance(sets, list) else (sets,)
    named = {"model": str(model)} if model else {}
    return train(
        read_settings(
            None, [], {"sets": folders, "output": output, "training": training, **named, **settings}
        )
    )


def start(arguments: list[str], ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start `sfttrain` in its own session, on one or more gloo ranks."""
    command = [sys.executable, "-m", "sfttrain", *arguments]
    if ranks > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-port",
            str(_free_port()),
        ]
        command = [sys.executable, *launcher, "-m", "sfttrain", *arguments]
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    return subprocess.Popen(
        command,
        env=settings,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(arguments: list[str], ranks: int = 1, **environment: str) -> tuple[int, str, str]:
    """Run `sfttrain` to its end; return exit code, standard output and standard error."""
    process = start(arguments, ranks, **environment)
    stdout, stderr = process.communicate(timeout=HANGS)
    return process.returncode, stdout, stderr


def _free_port() -> int:
    """Return a port below those that systems hand out, and of its own to each process of tests.

    Nothing else takes it before the run does, which is some seconds later.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    for port in range(20_000 + os.getpid() % 1000 * 8 + process, 32_000, 8):
        if port not in _TAKEN:
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                _TAKEN.add(port)
                return port
    raise RuntimeError("no free port")


class Fleet:
    """Runs of `sfttrain` forked from a server that has imported everything: a start costs a second, not eight."""

    def __init__(self) -> None:
        import multiprocessing

        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["sfttrain.training", "sfttrain.cli", "transformers.trainer", "peft", "accelerate"]
        )

    def start(
        self, arguments: list[str], ranks: int, log: Path, before: Callable[[int, str], None] | None = None
    ) -> list[Any]:
        """Start one process a rank; their standard error goes to `log`. `before` is called with rank and log."""
        port = _free_port()
        processes = [
            self._context.Process(target=_rank_main, args=(arguments, rank, ranks, port, str(log), before))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        return processes

    def finish(
        self, arguments: list[str], ranks: int, log: Path, before: Callable[[int, str], None] | None = None
    ) -> list[int]:
        """Run to the end; return the exit codes."""
        processes = self.start(arguments, ranks, log, before)
        for process in processes:
            process.join(HANGS)
        return [process.exitcode for process in processes]


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip  # what accelerate launch makes of examples/accelerate/fsdp2.yaml


def as_fsdp2(rank: int, log: str) -> None:
    """Set up a rank as accelerate launch does."""
    os.environ.update(FSDP2)


def count_sums(rank: int, log: str) -> None:
    """Add a byte to a file beside the log whenever gradients are summed over ranks, by DDP or FSDP2."""
    from torch import distributed
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    def count() -> None:
        with Path(f"{log}.sums{rank}").open("ab") as file:
            file.write(b".")

    def hook(group, bucket):  # DDP looks at annotations, and these are text
        count()
        return allreduce_hook(group, bucket)

    def make(self: Any, *arguments: Any, **options: Any) -> None:
        own_make(self, *arguments, **options)
        self.register_comm_hook(None, hook)

    def scatter(*arguments: Any, **options: Any) -> Any:
        count()
        return own_scatter(*arguments, **options)

    own_make, own_scatter = DistributedDataParallel.__init__, distributed.reduce_scatter_tensor
    DistributedDataParallel.__init__ = make  # type: ignore[method-assign]
    distributed.reduce_scatter_tensor = scatter


def count_sums_of_parts(rank: int, log: str) -> None:
    """Do both."""
    as_fsdp2(rank, log)
    count_sums(rank, log)


def _rank_main(
    arguments: list[str],
    rank: int,
    ranks: int,
    port: int,
    log: str,
    before: Callable[[int, str], None] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    torch.set_num_threads(1)
    from sfttrain.cli import main

    if before is not None:
        before(rank, log)
    code = main(arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(code)
