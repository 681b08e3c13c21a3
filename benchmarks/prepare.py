"""Time preparation: `sftdata prepare`, the same with the oracle engine, a bare reference loop, and TRL, on the same chats.

    python benchmarks/prepare.py [--rounds 3] [--copies 1] [--only ours,again,steady,oracle,loop,trl] [--json]

Every entry is a whole process, run in turn (A B C A B C ...), so that a machine that slows down slows all of them; the ratios are
medians of rounds. `steady` is `ours` on five times the rows, held against five times TRL's preparation alone. Rows: the T0 chats
of SFTDATA_TEST_DATA (end marker stripped) with its Qwen2.5 tokenizer; without that folder, a seeded corpus and the example's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 2048
WORKERS = 2
STEADY = 5
T0 = "datasets/prompt_completion/t0_train.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="how many times the rows are repeated")
    parser.add_argument("--only", default="ours,oracle,loop,again,steady,trl")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows, tokenizer = write_rows(work / "chats.jsonl", options.copies)
        if "steady" in options.only:
            write_rows(work / "steady.jsonl", STEADY * options.copies)
        times = run(options.only.split(","), options.rounds, work, tokenizer, options.workers)
    result = summarize(times, rows)
    print(json.dumps(result, indent=2) if options.json else table(result))


def write_rows(path: Path, copies: int) -> tuple[int, str]:
    """Write the chats; return how many, and the tokenizer to use."""
    data = os.environ.get("SFTDATA_TEST_DATA")
    if data and (Path(data) / T0).exists():
        with gzip.open(Path(data) / T0, "rt", encoding="utf-8") as lines:
            pairs = [
                (row["prompt"], row["completion"].replace("<|endoftext|>", ""))
                for row in map(json.loads, lines)
            ]
        tokenizer = str(Path(data) / "tokenizers/qwen2.5-instruct")
    else:
        rng = random.Random(0)
        words = (ROOT / "examples/text.txt").read_text().split()
        pairs = [
            (" ".join(rng.choices(words, k=200)), " ".join(rng.choices(words, k=30))) for _ in range(50_000)
        ]
        tokenizer = str(ROOT / "examples/tokenizer")
    with path.open("w", encoding="utf-8") as out:
        for _ in range(copies):
            for prompt, answer in pairs:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return copies * len(pairs), tokenizer


def run(names: list[str], rounds: int, work: Path, tokenizer: str, workers: int) -> dict[str, list[float]]:
    rows = str(work / "chats.jsonl")
    ours = [
        sys.executable,
        "-m",
        "sftdata",
        "prepare",
        rows,
        "-t",
        tokenizer,
        "--max-length",
        str(MAX_LENGTH),
        "--workers",
        str(workers),
    ]
    itself = [sys.executable, __file__]
    commands = {
        "ours": [*ours, "-o", str(work / "set")],
        "again": [*ours, "-o", str(work / "set")],
        "steady": [*ours[:4], str(work / "steady.jsonl"), *ours[5:], "-o", str(work / "steady")],
        "oracle": [*ours, "-o", str(work / "oracle"), "--engine", "tokenizers"],
        "loop": [*itself, "LOOP", rows, tokenizer, str(work / "loop")],
        "trl": [*itself, "TRL", rows, tokenizer, str(work / "trl")],
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    subprocess.run(
        [*ours[:4], str(ROOT / "examples/conversations.jsonl"), *ours[5:], "-o", str(work / "warm")],
        check=True,
        capture_output=True,
    )
    for _ in range(rounds):
        for name in names:
            if name != "again":
                for folder in ("set", "steady", "oracle", "loop", "trl"):
                    if folder == {"ours": "set"}.get(name, name):
                        shutil.rmtree(work / folder, ignore_errors=True)
            started = time.perf_counter()
            done = subprocess.run(commands[name], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-2000:]}")
            times[name].append(time.perf_counter() - started)
            print(f"{name} {times[name][-1]:.2f} s {done.stdout.strip()[-60:]}", file=sys.stderr)
            for line in done.stdout.splitlines():
                if line.startswith("preparation "):
                    times.setdefault("trl preparation alone", []).append(float(line.split()[1]))
    return times


def summarize(times: dict[str, list[float]], rows: int) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{name} / ours": round(
            statistics.median(a / b for a, b in zip(values, times["ours"], strict=False)), 2
        )
        for name, values in times.items()
        if name not in ("ours", "steady") and "ours" in times
    }
    if "steady" in times and (alone := times.get("trl preparation alone")):
        ratio = statistics.median(
            STEADY * trl / steady for trl, steady in zip(alone, times["steady"], strict=False)
        )
        ratios["tokens/s, steady / trl preparation alone"] = round(ratio, 2)
    return {
        "rows": rows,
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "ratios": ratios,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['rows']:,} chats, max_length {MAX_LENGTH}"]
    lines += [f"{name:>24} {seconds:8.2f} s" for name, seconds in result["seconds"].items()]
    lines += [f"{name:>24} {ratio:8.2f} x" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------- the others, each in a process of its own


def run_trl(rows: str, tokenizer: str, output: str) -> None:
    """Prepare with TRL's SFTTrainer: a tiny random model, two processes, no cache."""
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    processing = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(
        vocab_size=len(processing),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    data = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=output + "-cache")
    arguments = SFTConfig(
        output_dir=output, max_length=MAX_LENGTH, packing=True, packing_strategy="bfd", assistant_only_loss=True,
        dataset_num_proc=WORKERS, report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer = SFTTrainer(
        model=Qwen2ForCausalLM(config), args=arguments, train_dataset=data, processing_class=processing
    )
    print(f"preparation {time.perf_counter() - started:.2f} s, {len(trainer.train_dataset)} rows")


def run_loop(rows: str, tokenizer: str, output: str) -> None:
    """Read, parse, encode with gigatoken and write as many bytes, on both cores: what the machine can do without any care."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    size = Path(rows).stat().st_size
    edges = [size * part // WORKERS for part in range(WORKERS + 1)]
    Path(output).mkdir()
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        jobs = [
            pool.submit(loop_part, rows, tokenizer, f"{output}/{a}.bin", a, b) for a, b in pairwise(edges)
        ]
        print(sum(job.result() for job in jobs), "tokens")


def loop_part(rows: str, tokenizer: str, output: str, start: int, stop: int) -> int:
    import gigatoken
    import msgspec
    import numpy as np

    backend = gigatoken.Tokenizer.from_json((Path(tokenizer) / "tokenizer.json").read_bytes()).backend
    decode = msgspec.json.Decoder().decode
    tokens = 0
    with open(rows, "rb") as lines, open(output, "wb") as out:
        lines.seek(start)
        if start:
            lines.readline()
        while lines.tell() < stop and (line := lines.readline()):
            messages = decode(line)["messages"]
            ids = backend.encode("".join([message["content"] for message in messages]))
            tokens += len(ids)
            out.write(np.stack([ids, ids]).tobytes())
        os.fsync(out.fileno())
    return tokens


if __name__ == "__main__":
    if sys.argv[1:2] == ["TRL"]:
        run_trl(*sys.argv[2:])
    elif sys.argv[1:2] == ["LOOP"]:
        run_loop(*sys.argv[2:])
    else:
        main()
