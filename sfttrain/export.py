"""The output folder: model, tokenizer, settings, card; written aside, moved, marked last. Hub, and GPTQ."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import yaml

from sftdata.errors import UsageError
from sftdata.output import counted, local_output
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.store import sync_folder, write_atomic
from sfttrain.adapters import READ_WITH
from sfttrain.checkpoint import RUN_NAME, SETTINGS_NAME, Identity
from sfttrain.config import TrainConfig
from sfttrain.process import Say, reason_of, say
from sfttrain.refusals import require_package
from sfttrain.report import closing, write_report
from sfttrain.resume import read_run
from sfttrain.seen import Seen

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sfttrain.trainer import SftTrainer

_PARTIAL = "model.partial"
_PROCESSOR = "processor"  # folder in a set with pictures
_UPLOADED = (
    "README.md", SETTINGS_NAME, "*.safetensors", "*.safetensors.index.json", "config.json",
    "adapter_config.json", "*.py", *READ_WITH,
)  # fmt: skip
# Files that may name local paths.
_NAMING = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
# Settings that the card shows; all are in the file.
_SHOWN = (
    "sets", "mix", "mix_by", "weights", "packing", "attention", "objective", "loss", "kernels", "lora",
    "adapter", "quantize", "dtype", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim",
    "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "bf16", "fp16", "neftune_noise_alpha", "seed",
)  # fmt: skip
_RANKS = (16, 32, 64, 128, 256, 320, 512)  # for which vLLM keeps room
CALIBRATION_ROWS = 256
GROUP_SIZES = (-1, 32, 64, 128)
BITS = (2, 3, 4, 8)


def tokenizer_folder(sets: Sequence[ShardSet], say: Say | None = None) -> Path | None:
    """Return the folder of the tokenizer that a model of these sets needs; say where there is none."""
    folders = [opened.folder / "tokenizer" for opened in sets[:1]]
    if folders and not folders[0].is_dir():
        if say is not None:
            say(f"{sets[0].folder}: no tokenizer folder; the model is written without a tokenizer")
        return None
    return folders[0] if folders else None


def folders_beside(sets: Sequence[ShardSet], evaluation: Iterable[ShardSet], say: Say) -> list[Path]:
    """Return the folders of what a model is read with: its processor, if it sees pictures, and tokenizer."""
    tokenizer = tokenizer_folder(sets, say)
    shown = [one.folder / _PROCESSOR for one in (*sets, *evaluation) if one.manifest.vision is not None]
    return [*shown[:1], *([] if tokenizer is None else [tokenizer])]


def export(
    trainer: SftTrainer, sets: Sequence[ShardSet], settings: Mapping[str, object], run: Identity
) -> None:
    """Write the trained model and everything beside it into the run's folder; every rank calls this."""
    output = Path(str(trainer.args.output_dir))
    partial = output / _PARTIAL
    trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.yaml says the same
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):  # peft saves no stop tokens, and those of the base may be others
        model.generation_config.save_pretrained(partial)
    for folder in trainer.beside:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    (partial / SETTINGS_NAME).write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    if trainer.account is not None:
        trainer.account.write(partial, trainer.state.global_step)
    (partial / "README.md").write_text(_card(trainer, sets, settings), "utf-8")
    for path in sorted(partial.iterdir()):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial.rmdir()
    finished = {"finished": True, "steps": trainer.state.global_step, **run}
    _write_run(output, finished)
    sync_folder(output)


def conclude(config: TrainConfig, args: TrainingArguments) -> None:
    """Write the report, and push to the Hub where asked."""
    if args.should_save:
        report = write_report(config.output)
        for line in closing(config.output):
            say(line)
        say(f"report      {report}")
    say(f"model       {config.output}")
    say(f"next        sfttrain chat {shlex.quote(str(config.output))}")
    if config.push_to_hub and args.should_save:
        _push(config)


def conclude_again(config: TrainConfig, args: TrainingArguments, done: Identity) -> None:
    """Log that a run is finished already, and change nothing; a push that is still due is done."""
    say(
        f"{config.output}: is up to date: "
        f"finished after {counted(cast(int, done['steps']), 'step')} with the same data and the same settings"
    )
    if config.push_to_hub and args.should_save and done.get("pushed") != config.push_to_hub:
        _push(config)


def _push(config: TrainConfig) -> None:
    repository = str(config.push_to_hub)
    say(f"pushed: {push(config.output, repository)}")
    _write_run(config.output, {**read_run(config.output), "pushed": repository})


def _write_run(output: Path, content: Identity) -> None:
    text = msgspec.json.format(msgspec.json.encode(content), indent=2)
    write_atomic(output / RUN_NAME, lambda sink: sink.write(text))


def _card(trainer: SftTrainer, sets: Sequence[ShardSet], settings: Mapping[str, object]) -> str:
    """Write the model's card: names, never paths of this machine."""
    base = cast(str | None, settings.get("model"))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapted = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    sees = _PROCESSOR in [folder.name for folder in trainer.beside]
    front = {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
    }
    if base and not is_place(base):
        front["base_model"] = base
    lines = [
        "---",
        yaml.safe_dump(front).strip(),
        "---",
        "",
        f"# {Path(str(trainer.args.output_dir)).resolve().name}",
        "",
    ]
    kind = "Low-rank adapters for" if adapted else "Fine-tuned from"
    shape = named(str(settings.get("init_from_config")))
    lines += [f"{kind} `{named(base)}`." if base else f"Trained from scratch by `{shape}`.", ""]
    lines += [] if trainer.account is None else _seen_table(trainer.account.at(trainer.state.global_step))
    lines += [
        "",
        f"{counted(trainer.state.global_step, 'step')}, {trainer.state.num_input_tokens_seen:,} tokens seen.",
    ]
    if history:
        first, last = history[0], history[-1]
        lines.append(
            f"Loss {first['loss']:.4f} (step {first['step']}) to {last['loss']:.4f} (step {last['step']})."
        )
    lines += [*_licences(sets), "", *_served(trainer, settings, adapted), "", f"Settings: `{SETTINGS_NAME}`."]
    training = cast(Mapping[str, object], settings.get("training", {}))
    used = {name: value for name, value in {**settings, **training}.items() if name in _SHOWN and value}
    return "\n".join(
        [*lines, "", "```yaml", yaml.safe_dump(without_places(used), sort_keys=False).rstrip(), "```", ""]
    )


def _licences(sets: Sequence[ShardSet]) -> Iterator[str]:
    """Yield the licences of the data, with the sources that have them."""
    found: dict[str, list[str]] = {}
    for source in (source for opened in sets for source in opened.manifest.sources if source.licence):
        found.setdefault(str(source.licence), []).append(f"`{source.name}`")
    if found:
        each = [f"{licence} ({', '.join(names)})" for licence, names in found.items()]
        yield ""
        yield f"Licences of the data: {'; '.join(each)}."


def _served(trainer: SftTrainer, settings: Mapping[str, object], adapted: bool) -> Iterator[str]:
    """Yield how vLLM serves the model, from the folder that it lies in."""
    name = shlex.quote(Path(str(trainer.args.output_dir)).resolve().name)
    place = str(settings.get("push_to_hub") or f"./{name}")
    command = f"vllm serve {place}"
    if adapted:
        rank = max(
            adapter.r for adapter in trainer.accelerator.unwrap_model(trainer.model).peft_config.values()
        )
        base = named(str(settings.get("model")))
        room = next((room for room in _RANKS if room >= rank), rank)
        command = f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {name}={place}"
    yield f"With vLLM, from the folder beside it: `{command}`"


def _seen_table(seen: Seen) -> Iterator[str]:
    """Yield what was taken of each set, leg by leg, as a table."""
    yield "| set | steps | asked | taken | rows | tokens | trained tokens | passes | digest |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for leg in seen.legs:
        for part in leg.sets:
            steps = f"{leg.first_step + 1:,} to {leg.first_step + leg.steps:,}"
            asked = "" if part.asked is None else f"{part.asked:.3%}"
            amounts = f"{part.rows:,} | {part.tokens:,} | {part.trained:,} | {part.passes:.2f}"
            yield f"| {part.name} | {steps} | {asked} | {part.share:.3%} | {amounts} | `{part.digest}` |"


def push(folder: Path, repository: str) -> str:
    """Upload a finished model: what inference reads, card and settings, without local paths.

    Logs, reports and checkpoints stay here; so does what else the folder holds.

    Returns:
        Its address.

    Raises:
        UsageError: the Hub refuses; the model stays where it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    files = [CommitOperationAdd(name, content) for name, content in uploads(folder).items()]
    try:
        address = api.create_repo(repository, exist_ok=True, private=True)
        api.create_commit(repository, files, commit_message="Upload a model trained by sfttrain")
    except (HfHubHTTPError, OSError) as error:
        what = f"{folder}: is finished; pushing it failed: {reason_of(error)}"
        raise UsageError(what, "run the same command again.") from None
    return str(address)


def uploads(folder: Path) -> dict[str, Path | bytes]:
    """Return what is uploaded of a run's folder, by name: files as they are, or texts without local paths."""
    files: dict[str, Path | bytes] = {}
    for path in sorted({path for pattern in _UPLOADED for path in folder.glob(pattern) if path.is_file()}):
        files[path.name] = path
        if path.name == SETTINGS_NAME:
            plain = yaml.safe_load(path.read_text("utf-8"))
            files[path.name] = yaml.safe_dump(without_places(plain), sort_keys=False).encode()
        elif path.name in _NAMING:
            content = json.loads(path.read_text("utf-8"))
            plain = without_places(content)
            if plain != content:
                files[path.name] = (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def without_places(content: object) -> object:
    """Return settings with the last part of each local path in its place."""
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    return named(content) if isinstance(content, str) and is_place(content) else content


def is_place(text: str) -> bool:
    """Say whether a text is a local path; `name/model` is on the Hub unless such a folder exists."""
    return text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(text).exists())


def named(text: str) -> str:
    """Return what a path is called, without where it lies; the name of a model on the Hub is left whole."""
    return Path(text).resolve().name if is_place(text) else text


def quantize(model: Path, calibration: Path, output: Path, bits: int, group_size: int, say: Say) -> None:
    """Write a GPTQ model beside the one it comes from.

    Args:
        calibration: a set; its rows, spread evenly, show GPTQ what the activations look like.
        group_size: weights that share a scale; smaller is more exact and larger on disk, -1 is a whole
            column.

    Raises:
        UsageError: a setting GPTQ does not know, adapters that are not merged, or GPTQModel is missing.
    """
    local_output(output)
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise UsageError(
            f"gptq: bits={bits}, group_size={group_size}; expected bits of {BITS}, groups of {GROUP_SIZES}."
        )
    if (model / "adapter_config.json").is_file():
        what = f"{model}: holds adapters; GPTQ takes a whole model."
        raise UsageError(what, f"sfttrain merge {model} -o {model}-merged")
    require_package("gptqmodel", "export --gptq")
    # No extra of ours installs it: it is built against the machine's torch.
    package: Any = importlib.import_module("gptqmodel")
    rows = calibration_rows(open_set(calibration), CALIBRATION_ROWS)
    documents = counted(len(rows), "document")
    say(f"gptq: {bits} bits in groups of {group_size}, calibrated on {documents} of {calibration}")
    quantized = package.GPTQModel.load(str(model), package.QuantizeConfig(bits=bits, group_size=group_size))
    quantized.quantize(rows, batch_size=1)
    quantized.save(str(output))
    say(
        f"gptq: {output}; compare its evaluation loss with the original's before using it, "
        "and try group_size=32 if it is worse"
    )


def calibration_rows(opened: ShardSet, count: int) -> list[dict[str, list[int]]]:
    """Return ids and masks of documents spread over a set, each by itself, as GPTQ takes them.

    Raises:
        UsageError: the set has pictures, without which its documents would go on.
    """
    if opened.manifest.vision is not None:
        what = f"{opened.folder}: a set with pictures, which GPTQ is not shown."
        raise UsageError(what, "use a set of text alone.")
    rows = []
    for index in np.unique(np.linspace(0, len(opened) - 1, min(count, len(opened))).astype(np.int64)):
        ids = max((document.input_ids for document in opened[int(index)].documents()), key=len).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return rows
