"""Write docs/features.md: what the trainer does, a line a row, with the tests that prove it.

A test says which row it proves: `@pytest.mark.feature("LoRA")`. A row without a test here that needs no GPU is not written.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "features.md"

ROWS = {
    "model": "A path or Hub id, an object, `model_init_kwargs`, or a config for fresh weights; defaults applied are"
    " logged.",
    "LoRA": "`--lora r=16,alpha=32,dropout=0.05,target=all-linear,bias=none,rslora=true,dora=true,modules_to_save=...`,"
    " `parameters=...` for experts; the weights that get adapters, and those that do not, are logged. Tokens"
    " that the set added, or that the base never learnt, are trained automatically: single rows for a few, whole"
    " tables for many.",
    "continue an adapter": "`--adapter DIR`, or a PeftModel object; an adapter of another base is refused.",
    "pictures": "Sets with pictures: pixels are made in the loader's workers and held against the set, packed = alone is"
    " proven with pictures, towers are frozen by `--freeze`; see [pictures.md](pictures.md#train).",
    "8-bit, 4-bit base": "`--quantize nf4` or `int8` by bitsandbytes, `torchao-int8` by torchao, or a quantized object; under"
    " LoRA, one device per process. torchao's 4 bits are not offered: transformers trains on its 8-bit weights only; its"
    " test runs where it is installed.",
    "chat format": "Embeddings grow for added tokens (`resize_to_multiple_of`), each new row the mean; eos, pad, bos follow.",
    "attention": "flash_attention_4, 3 and 2, torch varlen, flex, sdpa, eager; `sdpa:flash`, `efficient`, `math` or `cudnn`"
    " forces a kernel. The choice is proven; a table shows why each was or was not chosen.",
    "NEFTune": "`--neftune-alpha 5`: noise during training only; the embedding itself is unchanged.",
    "Liger": "`--liger` or `kernels=liger`, on a GPU: Liger's norms, rotary factors and activations, with our loss; proven on"
    " a tiny model of the same architecture first, and put on this model only.",
    "compiled layers": "`compile=layers` or `loss`; `auto` on a GPU in runs of 50 steps and more: the repeated layer and the"
    " loss, each compiled once for any documents, in at most three minutes, kept where loss and gradient of the first batch"
    " stay the same.",
    "Unsloth": "A FastLanguageModel object is trained on shards like any other model object, on a GPU.",
    "memory": "`activation_checkpointing` (by default where a step without does not fit the GPU; those of compiled layers keep"
    " what attention gave where that fits), offloading, `optim=adamw_bnb_8bit`, DDP, FSDP2, ZeRO-3 by accelerate.",
    "evaluation": "Sets by name, packed or not, `compute_metrics`, `preprocess_logits_for_metrics`, loss per source.",
    "losses": "`objective=nll` or `dft`, `label_smoothing_factor`; `--loss-weights` of `prepare` keeps weights of messages: the"
    " weighted sum over the sum of the weights. On supervised positions, a chunk of logits at a time.",
    "losses of documents": "`--log-documents`: the loss of each document of each step, whole over kills and ranks; `sftdata"
    " blame RUN` names the worst by file and line, and those behind a jump of the loss.",
    "custom data": "Any dataset, stream or list of rows with `input_ids` and labels, `completion_mask` or `assistant_masks`.",
    "mixtures": "`--mix chats=70% --mix code=30%`, by trained tokens, tokens or rows, met at every step; `--passes` bounds"
    " repeats; `sfttrain plan` says what each set gives. Or passes over each set (`weights`).",
    "legs": "`--new-leg` goes on with other sets, weights or shares. `seen.json` and `seen.arrow` say exactly what was seen,"
    " by set, source and line, over kills, ranks and legs.",
    "formatting function": "`sftdata.prepare(formatter=...)`: function, `module:function`, `@sftdata.by_columns`; it"
    " overrides detection.",
    "rows as Python objects": "`sftdata.prepare(rows, tokenizer=tok, ...)`: a dataset of `datasets` (read where it lies), one"
    " with splits, a streamed one, a frame, an Arrow table, an iterable of dicts; a tokenizer as it is now.",
    "constant-length stream": "`sftdata.stream(...)`: bounded buffers, `infinite`, `shuffle`, end tokens, no lost tails.",
    "iterative training": "`sfttrain.IterativeTrainer(model).step(...)`: ids or texts, causal and sequence-to-sequence models.",
    "several GPUs": "torchrun or accelerate launch; ranks prepare no data, and a changed number of ranks sees the same batches."
    " `sequence_parallel=N`: N processes hold each row together, with documents apart, with FSDP2 and adapters too.",
    "export: merge": "`sfttrain merge DIR -o OUT`: adapters into their base, reloaded, logits compared, tied heads tied.",
    "export: GPTQ": "`sfttrain export DIR -o OUT --set SHARDS --gptq bits=4,group_size=128`, with GPTQModel, on a GPU.",
    "export: GGUF": "`sfttrain export DIR -o OUT --gguf f16`: by llama.cpp's converter from PyPI, read back and compared;"
    " where it is installed, a test holds that llama.cpp answers with the ids of the model.",
    "export: Ollama": "A Modelfile beside the GGUF: the chat template in Ollama's language, where it is proven to say the same,"
    " and the stop tokens.",
    "export: Hub": "`--push-to-hub user/model`: checked before the run, pushed after it.",
    "settings of other tools": "`sftdata init --from FILE`: a settings file of TRL, axolotl or LLaMA-Factory (with its"
    " `dataset_info.json`) becomes one for each program; every setting is carried over, or named with the reason.",
    "evaluating a model": "`sfttrain eval MODEL SET`: the loss by source, as an evaluation during a run has it, and the documents"
    " that the model finds hardest by file and line; adapters and merged models.",
    "named sources": "`datasets.yaml`: sources by name, each with its path, format, mapping and licence; used as inputs, in"
    " `--mix` and `--cap`, and in views.",
    "answers along the way": "`--sample FILE`: each evaluation, and the end, answers a few held rows in log and report, beside"
    " what was meant; the run stays the same, bit for bit.",
    "chat": "`sfttrain chat DIR`: answers as they come, with the chat template and stop tokens of the set; adapters and"
    " merged models; prompts, piped lines, or a terminal.",
    "trackers": "`--report-to tensorboard,wandb,mlflow,trackio`; none by default.",
    "wrong combinations": "One line with the fix, before anything is read.",
    "mistakes": "Forty mistakes of a first day: each is one line, and who does what it says gets what was meant.",
    "recipes": "`examples/recipes/*.yaml`, each of them run.",
}


class Proof(NamedTuple):
    """A test, and what it needs that is not here: "GPU", "network", or nothing."""

    place: str
    name: str
    needs: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page as the tests say it."""
    proofs: dict[str, list[Proof]] = {row: [] for row in ROWS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row, proof in read_proofs(path):
            proofs[row].append(proof)
    lines = [
        "# What the trainer does",
        "",
        "Generated by `docs/make_features.py` from the tests that prove each line.",
        "",
    ]
    lines += ["| | what works | proven by |", "|---|---|---|"]
    lines += [f"| {row} | {text} | {_cell(proofs[row])} |" for row, text in ROWS.items()]
    return "\n".join([*lines, ""])


def read_proofs(path: Path) -> list[tuple[str, Proof]]:
    """Return (row, test) for every mark in a file.

    Raises:
        KeyError: a mark names no row.
    """
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        marks = [
            mark
            for mark in getattr(node, "decorator_list", [])
            if ast.unparse(mark).startswith("pytest.mark.")
        ]
        rows = [mark.args[0].value for mark in marks if ast.unparse(mark).startswith("pytest.mark.feature(")]
        names = [ast.unparse(mark).removeprefix("pytest.mark.").partition("(")[0] for mark in marks]
        needs = "GPU" if "gpu" in names else "network" if "network" in names else ""
        for row in rows:
            if row not in ROWS:
                raise KeyError(f"{path}: {row!r} is no row of docs/make_features.py")
            found.append((row, Proof(str(path.relative_to(ROOT)), node.name, needs)))
    return found


def _cell(proofs: list[Proof]) -> str:
    if not proofs:
        return "no test"
    named = [
        f"[{_words(proof.name)}](../{proof.place})"
        + (f" ({proof.needs}: not run here)" if proof.needs else "")
        for proof in proofs
    ]
    return "; ".join(named)


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())
