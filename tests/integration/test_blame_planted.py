"""Bad rows planted in a real set are what `sftdata blame` names first, after a model of 300,000 weights has read them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.blame.named import LoggedRun
from tests.train_runs import Fleet, tiny_llama

pytestmark = pytest.mark.slow
PLANTED = 100
TOKENIZER = Path(__file__).parents[2] / "examples" / "tokenizer"
ASCII = "".join(map(chr, range(33, 127)))
RUN = {
    "per_device_train_batch_size": 4, "num_train_epochs": 4, "learning_rate": 5e-3, "warmup_steps": 10,
    "lr_scheduler_type": "cosine", "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A set of 2,385 word problems, and what is bad in it: the kind by line."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(0)
    lines = (shared_data / "datasets/prompt_completion/gsm8k_train.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["question"]) + len(row["answer"]) < 400]
    kinds = _bad_answers(shared_data / "datasets/instruction", rng)
    bad = dict(zip(rng.sample(range(1, len(rows) + 1), PLANTED), list(kinds) * PLANTED, strict=False))
    for line, kind in bad.items():
        rows[line - 1]["answer"] = kinds[kind]()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sftdata.prepare(path, tokenizer=TOKENIZER, output=folder / "set", max_length=512, workers=1)
    return folder, bad


def _bad_answers(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Return what makes an answer of each kind."""
    prose = [row["output"] for row in json.loads((folder / "alpaca_5000.json").read_text())]
    prose = [text for text in prose if 40 <= len(text) <= 240 and text.isascii()]
    words = sorted({word for text in prose for word in text.split()})
    chinese = [row["output"] for row in json.loads((folder / "lf_alpaca_zh_demo.json").read_text())]
    chinese = [text for text in chinese if 15 < len(text) < 80]

    def noise() -> str:
        return " ".join("".join(rng.choices(ASCII, k=rng.randint(2, 8))) for _ in range(rng.randint(6, 20)))

    return {
        "random characters": noise,
        "random words": lambda: " ".join(rng.sample(words, rng.randint(8, 30))),
        "mojibake": lambda: rng.choice(chinese).encode().decode("latin-1"),
        "another language": lambda: rng.choice(chinese),
        "the answer to another task": lambda: rng.choice(prose),
    }


def test_planted_rows_are_named_first(planted: tuple[Path, dict[int, str]]) -> None:
    folder, bad = planted
    shape = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "initializer_range": 0.08,
        "max_position_embeddings": 1024,
    }
    model = tiny_llama(folder / "model", vocabulary=1024, tied=True, **shape)
    overrides = [part for key, value in RUN.items() for part in ("--set", f"{key}={value}")]
    arguments = [
        "run",
        str(folder / "set"),
        "--model",
        str(model),
        "-o",
        str(folder / "out"),
        "--log-documents",
        *overrides,
    ]
    assert Fleet().finish(arguments, 1, folder / "log") == [0], (folder / "log").read_text()
    run = LoggedRun(folder / "out")
    ranked = [document.line for document in run.worst(len(run.ranking))]
    first = [line for line in ranked[:PLANTED] if line in bad]
    last = {
        kind: max(ranked.index(line) for line in bad if bad[line] == kind) + 1
        for kind in sorted({*bad.values()})
    }
    print(f"{len(first)} of {PLANTED} first, of {len(ranked)}; the last of each kind at place {last}")
    mojibake = last.pop("mojibake")  # bytes that follow each other in few ways, which the model learns
    assert max(last.values()) <= PLANTED
    assert mojibake <= 2 * PLANTED
    assert len(first) >= 90
