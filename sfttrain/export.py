"""The output folder: model, tokenizer of the set, stop tokens, settings, card. Written aside, moved into place, marked last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sftdata.shardset.atomic import sync_folder, write_atomic
from sftdata.shardset.opened import ShardSet
from sfttrain.config import TrainConfig
from sfttrain.hub import is_place, named, push
from sfttrain.output import RUN_NAME, SETTINGS_NAME
from sfttrain.report import write_report
from sfttrain.resume import read_run
from sfttrain.talk import Say, say

_PARTIAL = "model.partial"


def tokenizer_folder(sets: Sequence[ShardSet], say: Say | None = None) -> Path | None:
    """Return the folder of the tokenizer that a model of these sets needs; say where there is none."""
    folders = [opened.folder / "tokenizer" for opened in sets[:1]]
    if folders and not folders[0].is_dir():
        if say is not None:
            say(f"{sets[0].folder}: no tokenizer folder; the model is written without a tokenizer")
        return None
    return folders[0] if folders else None


def export(trainer: Any, sets: Sequence[ShardSet], settings: dict[str, Any], run: dict[str, Any]) -> None:
    """Write the trained model and everything beside it into the run's folder; every rank calls this."""
    output = Path(trainer.args.output_dir)
    partial = output / _PARTIAL
    trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.yaml says the same
    tokenizer = tokenizer_folder(sets)
    if tokenizer is not None:
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    (partial / SETTINGS_NAME).write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
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


def conclude(config: TrainConfig, args: Any) -> None:
    """Write the report, and push what the Hub shall have."""
    if args.should_save:
        say(f"report: {write_report(config.output)}")
    say(f"model: {config.output}")
    if config.push_to_hub and args.should_save:
        _push(config)


def conclude_again(config: TrainConfig, args: Any, done: dict[str, Any]) -> None:
    """Say that a run is finished, and touch nothing; a push that is still due is made up for."""
    say(
        f"{config.output}: is up to date: finished after {done['steps']:,} steps with the same data and the same settings"
    )
    if config.push_to_hub and args.should_save and done.get("pushed") != config.push_to_hub:
        _push(config)


def _push(config: TrainConfig) -> None:
    repository = str(config.push_to_hub)
    say(f"pushed: {push(config.output, repository)}")
    _write_run(config.output, {**read_run(config.output), "pushed": repository})


def _write_run(output: Path, content: dict[str, Any]) -> None:
    text = msgspec.json.format(msgspec.json.encode(content), indent=2)
    write_atomic(output / RUN_NAME, lambda sink: sink.write(text))


def _card(trainer: Any, sets: Sequence[ShardSet], settings: dict[str, Any]) -> str:
    """Write the model's card: names, never paths of this machine."""
    base = settings.get("model")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapted = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    front = {"library_name": "peft" if adapted else "transformers", "pipeline_tag": "text-generation"}
    if base and not is_place(base):
        front["base_model"] = base
    lines = [
        "---",
        yaml.safe_dump(front).strip(),
        "---",
        "",
        f"# {Path(trainer.args.output_dir).resolve().name}",
        "",
    ]
    kind = "Low-rank adapters for" if adapted else "Fine-tuned from"
    shape = named(str(settings.get("init_from_config")))
    lines += [f"{kind} `{named(base)}`." if base else f"Trained from scratch by `{shape}`.", ""]
    lines += ["| set | rows | trained tokens | digest |", "|---|---|---|---|"]
    for opened in sets:
        manifest, name = opened.manifest, opened.folder.resolve().name
        lines.append(
            f"| {name} | {len(opened):,} | {manifest.ledger.tokens_trained:,} | `{manifest.digest}` |"
        )
    lines += [
        "",
        f"{trainer.state.global_step:,} steps, {trainer.state.num_input_tokens_seen:,} tokens seen.",
    ]
    if history:
        first, last = history[0], history[-1]
        lines.append(
            f"Loss {first['loss']:.4f} (step {first['step']}) to {last['loss']:.4f} (step {last['step']})."
        )
    return "\n".join([*lines, "", f"Settings: `{SETTINGS_NAME}`.", ""])
