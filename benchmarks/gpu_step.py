"""Tokens per second, peak memory, MFU and start on a GPU: sfttrain, TRL 1.16 and hand-written loops, on the same rows.

    make gpu                                                                  the tests that need a GPU, then this
    python benchmarks/gpu_step.py [--minutes 5] [--only TEXT ...] [--variant NAME:key=value,key=value]
    python benchmarks/gpu_step.py --device cpu --shape tiny                   every contender in miniature

Qwen2 shapes with random weights, made on the device; rows as the product packs them, of documents as long as chats and
reasoning traces are, and of whole books. Full fine-tuning computes in bfloat16 under autocast on float32 weights;
adapters lie on a frozen base in bfloat16. Each contender runs in a process forked from one that has imported everything
and not touched the device, so that peak memory is its alone, within a time limit. The most important rows come first;
what the time does not allow is "not run". One JSON line a row goes to $OUT/gpu_step.jsonl as it comes, a table to
$OUT/gpu_step.md and to the terminal.

MFU counts 6 FLOP a trained weight and token, 4 a frozen one and none for attention or for what checkpoints compute again,
against `--tflops` (989, dense bfloat16: H100 and H200). An embedding that is not the head is looked up, not multiplied.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ |= {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a GPU must not touch it before the fork
}  # fmt: skip

VOCABULARY, SKIPPED = 151_936, 3  # steps that warm up
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5B-LoRA": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                  "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B-LoRA": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 512},
}  # fmt: skip
# What the rows hold, tokens of a row, rows of a batch; in miniature a 32nd of the tokens.
DATA = {"4K": ("instructions", 4_096, 4), "16K": ("reasoning", 16_384, 1), "128K": ("books", 131_072, 1)}
STEPS = {"0.5B": 12, "1.5B": 10, "1.5B-LoRA": 4, "7B-LoRA": 7, "tiny": 5}
NOTES = (
    "attention:",
    "compile:",
    "kernels:",
    "activation checkpoints:",
    "packing:",
    "plan:",
)  # kept of what sfttrain says
LORA = {"r": 16, "alpha": 32}


class Done(Exception):
    """The last step is taken: nothing is to be written."""


@dataclass(frozen=True)
class Task:
    """One contender on one shape and one kind of rows.

    Attributes:
        settings: of sfttrain, or arguments of `_trl`.
        seconds: time limit.
    """

    contender: str
    run: Callable[[Task, Any], None]
    settings: dict[str, Any] = field(default_factory=dict)
    shape: str = ""
    data: str = ""
    seconds: float = 90.0
    device: str = "cuda"
    folder: Path = Path()
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.shape} {self.data} {self.contender}"

    @property
    def batch(self) -> int:
        return DATA[self.data][2]

    @property
    def lora(self) -> bool:
        return self.shape.endswith("LoRA")

    @property
    def set(self) -> Path:
        return self.folder / ("tiny" if self.shape == "tiny" else "full") / self.data

    @property
    def row_length(self) -> int:
        return DATA[self.data][1] // (32 if self.shape == "tiny" else 1)


def main() -> int:
    options = _options()
    begun = time.time()
    print("missing: " + (", ".join(_missing()) or "nothing"), flush=True)
    _import_everything()
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu_step_"))
    out.mkdir(exist_ok=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        _write_sets(folder, {options.shape} if options.shape else set(SHAPES) - {"tiny"})
        tasks = list(_tasks(options, folder))
        if options.device == "cuda" and not _gpus():
            print(f"no GPU here: {len(tasks)} rows not run; packages and sets are ready")
            return 3
        table = _Table(out, options)
        for task in tasks:
            table.add(task, _run(task, begun + 60 * options.minutes))
        print(table.write(), flush=True)
    print(f"written to {out}; {time.time() - begun:.0f} s")
    return 1 if table.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="no contender runs beyond them")
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="this one only")
    parser.add_argument("--steps", type=int, default=0, help="of each contender, instead of its own number")
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows whose name holds one of these, in this order"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="SHAPE/ROWS@NAME:KEY=VALUE,...",
        help="sfttrain with these settings",
    )
    return parser.parse_args()


def _missing() -> list[str]:
    wanted = {"trl": "trl", "liger_kernel": "liger-kernel", "datasets": "datasets", "peft": "peft"}
    return [package for module, package in wanted.items() if find_spec(module) is None]


def _import_everything() -> None:
    """Import what every contender needs, once; none of it may start a thread or touch the device."""
    import torch
    import torch._dynamo
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from torch.nn.attention import varlen  # noqa: F401  since torch 2.10

    import sfttrain.training  # noqa: F401
    import tests.train_sets  # noqa: F401

    if "trl" not in _missing():
        import datasets  # noqa: F401
        from trl import SFTConfig, SFTTrainer  # noqa: F401
    if torch.cuda.is_initialized():
        print("an import has touched the GPU: a forked contender may not be able to use it")


def _gpus() -> int:
    """Count them in a process of its own: asking may touch them, and then no contender could be forked."""
    import torch

    child = os.fork()
    if not child:
        os._exit(torch.cuda.device_count())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write_sets(folder: Path, shapes: set[str]) -> None:
    from tests.train_sets import make_mixed_set

    for small in {shape == "tiny" for shape in shapes}:
        for data, (mix, length, batch) in DATA.items():
            scale, vocabulary = (1 / 32, SHAPES["tiny"]["vocab_size"]) if small else (1.0, VOCABULARY)
            place = folder / ("tiny" if small else "full") / data
            rows = batch * (max(STEPS.values()) + 4) if batch * length <= 16_384 else 8
            make_mixed_set(
                place, mix, rows=rows, max_length=int(length * scale), vocabulary=vocabulary, scale=scale
            )


# ---------------------------------------------------------------------------------------------------- tasks


def _tasks(options: argparse.Namespace, folder: Path) -> Iterator[Task]:
    """Yield every row, the most important first."""
    tasks = [*_ranked(options.shape)]
    if options.only:
        names = {task.name for task in tasks}
        tasks = [
            task
            for text in options.only
            for task in tasks
            if task.name == text or (text not in names and text in task.name)
        ]
    for text in reversed(options.variant):
        where, _, variant = text.rpartition("@")
        label, _, pairs = variant.partition(":")
        shape, _, data = (where or f"{options.shape or '0.5B'}/4K").partition("/")
        settings = {
            key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs.split(","))
        }
        tasks.insert(0, Task(f"sfttrain, {label}", _ours, settings, shape, data))
    for task in tasks:
        absent = [package for package in _missing() if package in _needs(task)]
        if not absent:
            steps = options.steps or STEPS[task.shape]
            yield replace(task, device=options.device, folder=folder, steps=steps)


def _ranked(shape: str | None) -> Iterator[Task]:
    checkpoints, varlen = {"activation_checkpointing": True}, {"attention": "varlen"}
    plainly = checkpoints | {"compile": "none", "kernels": "none"}
    ours, ours_lean = Task("sfttrain", _ours), Task("sfttrain, checkpoints", _ours, checkpoints)
    fused = Task("sfttrain, Liger's kernels", _ours, checkpoints | {"kernels": "liger", "compile": "loss"})
    plain = Task("sfttrain, plain", _ours, plainly)
    sdpa, dense = Task("TRL, sdpa", _trl, {"attention": "sdpa"}), Task("TRL, varlen", _trl, varlen)
    liger = Task("TRL, varlen + Liger", _trl, varlen | {"use_liger_kernel": True})
    kept = Task(
        "TRL, varlen + Liger, no checkpoints", _trl, liger.settings | {"gradient_checkpointing": False}
    )
    loop = Task("bare loop, the same parts", _loop, checkpoints)
    compiled = Task("compiled bare loop", _compiled_loop, plainly, seconds=120.0)
    rounds: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[Task, ...]], ...] = (
        (("0.5B", "1.5B"), ("4K", "16K"), (ours_lean, liger)),
        (("7B-LoRA",), ("4K",), (ours_lean, liger)),
        (("0.5B",), ("4K",), (Task("start", _start, seconds=150.0),)),
        (("1.5B-LoRA",), ("128K",), (ours_lean,)),
        (("0.5B",), ("4K",), (ours, kept, loop, compiled, sdpa, dense)),
        (("1.5B",), ("4K",), (ours, kept, loop, compiled, sdpa, dense)),
        (("0.5B", "1.5B"), ("16K",), (dense, ours)),
        (("0.5B", "1.5B"), ("4K",), (fused, plain)),
        (("1.5B-LoRA",), ("128K",), (liger,)),
        (("0.5B", "1.5B"), ("16K",), (fused, sdpa)),
        (("7B-LoRA",), ("4K",), (ours, dense)),
        (("7B-LoRA",), ("16K",), (ours_lean, liger)),
    )
    if shape is None:
        for shapes, data, contenders in rounds:
            for place in ((one, rows) for one in shapes for rows in data):
                yield from (replace(task, shape=place[0], data=place[1]) for task in contenders)
        return
    every = {task.contender: task for _, _, contenders in rounds for task in contenders}
    yield from (replace(task, shape=shape, data=data) for data in DATA for task in every.values())


def _needs(task: Task) -> tuple[str, ...]:
    trl = ("trl", "datasets", "peft") if task.run in (_trl, _start) else ()
    return (*trl, "liger-kernel") if "Liger" in task.contender else trl


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# --------------------------------------------------------------------------------------------------- contenders


def _run(task: Task, deadline: float) -> dict[str, Any]:
    """Run a contender in a forked process; return its figures, or why there are none."""
    left = min(task.seconds, deadline - time.time())
    if left < 5:
        return {"not run": "the time was up"}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    log = task.folder / "log"
    process = context.Process(target=_child, args=(task, theirs, log))
    began = time.time()
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(left) else {"error": f"not done after {left:.0f} s"}
    except EOFError:
        found = {"error": "the process died"}
    with contextlib.suppress(ProcessLookupError):  # and what it started, such as compilers
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    said = log.read_text(errors="replace") if log.exists() else ""
    if "error" in found:
        found["log"] = said[-2_000:]
    found["notes"] = [line for line in said.splitlines() if line.startswith(NOTES) or task.run is _start]
    return found | {"wall": round(time.time() - began, 1)}


def _child(task: Task, pipe: Any, log: Path) -> None:
    os.setpgid(0, 0)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        if task.device == "cpu":  # contenders in miniature: threads would wait for each other
            import torch

            torch.set_num_threads(1)
        watch = _watch(task)
        with contextlib.suppress(Done):
            task.run(task, watch)
        pipe.send(watch.figures())
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    sys.stdout.flush()
    os._exit(0)  # tearing down CUDA and worker pools takes seconds


def _watch(task: Task) -> Any:
    """Return a callback that notes the moment of every step, and ends the run behind the last one."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.moments: list[float] = []
            self.losses: list[float] = []
            self.flops, self.extra = 0, dict[str, Any]()

        def on_step_end(
            self, args: Any = None, state: Any = None, control: Any = None, **kwargs: Any
        ) -> None:
            if task.device == "cuda":
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())
            if control is not None:
                control.should_log = True
            self.flops = self.flops or _flops(kwargs["model"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))
                if len(self.losses) == task.steps:
                    raise Done

        def figures(self) -> dict[str, Any]:
            if not self.moments:
                return self.extra
            gaps = [later - earlier for earlier, later in pairwise(self.moments)][SKIPPED - 1 :]
            tokens = task.row_length * task.batch
            return {
                "tokens_per_second": tokens / statistics.median(gaps), "fastest": tokens / min(gaps),
                "peak": torch.cuda.max_memory_allocated() if task.device == "cuda" else None, "flops": self.flops,
                "losses": [round(loss, 4) for loss in self.losses], **self.extra,
            }  # fmt: skip

    return Watch()


def _flops(model: Any) -> int:
    """FLOP a token of a step: forward, gradient of what comes before, gradient of the weight."""
    table = model.get_input_embeddings().weight
    looked_up = table is not model.get_output_embeddings().weight
    weights = (weight for weight in model.parameters() if weight is not table or not looked_up)
    return sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)


def _model(task: Task, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from sfttrain.attention import register_attention

    register_attention()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if task.lora and task.device == "cuda" else torch.float32
    with torch.device(task.device):
        return AutoModelForCausalLM.from_config(
            _config(task.shape), attn_implementation=attention, dtype=dtype
        )


def _config(shape: str) -> Any:
    from transformers import Qwen2Config

    given = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32_768,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return Qwen2Config(**given | SHAPES[shape])


def _settings(task: Task) -> dict[str, Any]:
    """Return what both trainers are given: one step after the other, on the same rows, and nothing written."""
    return {
        "max_steps": 1_000, "per_device_train_batch_size": task.batch, "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "bf16": task.device == "cuda",
        "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential", "use_cpu": task.device == "cpu",
    }  # fmt: skip


def _fastest(task: Task) -> str:
    import torch

    from sfttrain.attention import choose_attention

    dtype = torch.bfloat16 if task.device == "cuda" else torch.float32
    return choose_attention("auto", _config(task.shape), task.device, dtype).name


def _ours(task: Task, watch: Any) -> None:
    """`sfttrain.train`, preflight and all."""
    import sfttrain

    more = {"lora": LORA} if task.lora else {}
    output, model = (
        task.folder / f"ours-{os.getpid()}",
        _model(task, task.settings.get("attention") or _fastest(task)),
    )
    given = {**_settings(task), **more, **task.settings}
    sfttrain.train(task.set, model=model, output=output, callbacks=[watch], **given)


def _trl(task: Task, watch: Any) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sftdata.set.opened import open_set
    from sfttrain.attention import STAND_IN, register_attention

    register_attention()
    given = {"gradient_checkpointing": True} | _settings(task) | task.settings
    attention = given.pop("attention")
    if task.device == "cpu" and attention == "varlen":
        attention = STAND_IN
    arguments = SFTConfig(
        output_dir=str(task.folder / f"trl-{os.getpid()}"), padding_free=True, max_length=None, packing=False,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **given,
    )  # fmt: skip
    rows = Dataset(open_set(task.set).arrow().select(["input_ids", "labels", "seq_lengths"]))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")
    adapters = None
    if task.lora:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = SFTTrainer(
        _model(task, attention), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapters,
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()


def _loop(task: Task, watch: Any) -> None:
    """A hand-written loop with what sfttrain trains with: model, kernels, compiled parts, loss, optimizer."""
    _take_over(task, watch, compiled=False)


def _compiled_loop(task: Task, watch: Any) -> None:
    """A hand-written loop whose layers are compiled by PyTorch, as its users would do it."""
    _take_over(task, watch, compiled=True)


def _take_over(task: Task, watch: Any, compiled: bool) -> None:
    from torch import nn
    from transformers import TrainerCallback

    class Loop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            for layer in model.get_decoder().layers if compiled else ():
                layer.compile(dynamic=True)
            model.train()
            for batch in kwargs["train_dataloader"]:
                held = {key: one.to(task.device) if hasattr(one, "to") else one for key, one in batch.items()}
                loss = model(
                    **held, skip_logits=True
                ).loss  # under accelerate's autocast, which is in its forward
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                watch.on_step_end(model=model)
                watch.losses.append(float(loss.detach()))
                if len(watch.losses) == task.steps:
                    raise Done

    _ours(task, Loop())


# -------------------------------------------------------------------------------------------------------- start


def _start(task: Task, watch: Any) -> None:
    """Seconds from the start of a process to the end of its first step: TRL's script, and sfttrain's command twice."""
    from benchmarks.train_step import seconds_to_first_step

    model, cache = task.folder / f"model-{task.shape}", task.folder / "cache"
    if not model.exists():
        _model(task, "sdpa").to("cpu").save_pretrained(model)
    shutil.rmtree(cache, ignore_errors=True)
    given = {
        "settings": _settings(task),
        "set": task.set,
        "model": model,
        "folder": task.folder,
        "cache": cache,
    }
    begun = {"TRL": "trl", "sfttrain": "sfttrain", "sfttrain, proven before": "sfttrain"}
    watch.extra = {"start": {name: seconds_to_first_step(which, **given) for name, which in begun.items()}}


# -------------------------------------------------------------------------------------------------------- table


class _Table:
    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self._out, self._peak, self._rows, self.failed = out, options.tflops * 1e12, [], 0
        versions = ", ".join(
            f"{name} {_version(name)}" for name in ("torch", "transformers", "trl", "liger-kernel")
        )
        self._head = f"{time.strftime('%Y-%m-%d %H:%M')}, {_card(options.device)}, {versions}"
        print(self._head, flush=True)

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Keep a row: a JSON line, and a line on the terminal."""
        self.failed += "error" in found
        if "tokens_per_second" in found:
            found["mfu"] = found["flops"] * found["tokens_per_second"] / self._peak
        row = {
            "contender": task.contender,
            "shape": task.shape,
            "data": task.data,
            "batch": task.batch,
            **found,
        }
        self._rows.append(row)
        with (self._out / "gpu_step.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        notes = [
            note
            for note in row.get("notes", ())
            if note.startswith(("compile:", "kernels:", "activation checkpoints:"))
        ]
        print(" | ".join([*_cells(row), *notes, row.get("log", "")]), flush=True)

    def write(self) -> str:
        """Write the table, and return it."""
        names = ("shape", "rows", "contender", "tokens/s", "peak GiB", "MFU", "loss, first and last", "s")
        lines = [self._head, "", _line(names), _line(["---"] * len(names))]
        order = {shape: index for index, shape in enumerate(SHAPES)}
        rows = sorted(self._rows, key=lambda row: (order[row["shape"]], list(DATA).index(row["data"])))
        lines.extend(_line(_cells(row)) for row in rows)
        text = "\n".join([*lines, "", *self._ratios(), ""])
        (self._out / "gpu_step.md").write_text(text)
        return text

    def _ratios(self) -> Iterator[str]:
        """Say what sfttrain is to the fastest and the leanest of TRL, on each kind of rows."""
        for shape, data in dict.fromkeys((row["shape"], row["data"]) for row in self._rows):
            here = [
                row for row in self._rows if (row["shape"], row["data"]) == (shape, data) and "peak" in row
            ]
            theirs = [row for row in here if row["contender"].startswith("TRL")]
            for row in here if theirs else ():
                if row["contender"].startswith("TRL"):
                    continue
                speed = row["tokens_per_second"] / max(one["tokens_per_second"] for one in theirs)
                memory = row["peak"] / min(one["peak"] for one in theirs) if row["peak"] else None
                text = f"- {shape}, {data}: {row['contender']}: {speed:.2f} times the tokens a second of the fastest TRL"
                yield f"{text}, {memory:.2f} times the memory of the leanest" if memory else text


def _cells(row: dict[str, Any]) -> list[str]:
    place = [row["shape"], f"{row['data']} x {row['batch']}", row["contender"]]
    wall = f"{row.get('wall', 0):.0f}"
    if "start" in row:
        return [
            *place,
            "; ".join(f"{name}: {seconds} s" for name, seconds in row["start"].items()),
            "",
            "",
            "",
            wall,
        ]
    if "tokens_per_second" not in row:
        return [*place, f"failed: {row['error']}" if "error" in row else "not run", "", "", "", wall]
    peak = f"{row['peak'] / 2**30:.1f}" if row["peak"] else "-"
    losses = f"{row['losses'][0]:.3f}, {row['losses'][-1]:.3f}"
    return [*place, f"{row['tokens_per_second']:,.0f}", peak, f"{row['mfu']:.1%}", losses, wall]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _card(device: str) -> str:
    if device == "cpu":
        return "CPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found.splitlines()[0] if found else "a GPU"


if __name__ == "__main__":
    sys.exit(main())
