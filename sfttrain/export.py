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
from sfttrain.output import RUN_NAME
from sfttrain.talk import Say
from sfttrain.vocabulary import stop_tokens

SETTINGS_NAME = "settings.yaml"
_PARTIAL = "model.partial"


def export(trainer: Any, sets: Sequence[ShardSet], settings: dict[str, Any], run: dict[str, Any], say: Say) -> None:
    """Write the trained model and everything beside it into the run's folder; every rank calls this."""
    output = Path(trainer.args.output_dir)
    partial = output / _PARTIAL
    _set_stop_tokens(trainer.accelerator.unwrap_model(trainer.model), sets)
    trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.yaml says the same
    for opened in sets[:1]:
        tokenizer = opened.folder / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        else:
            say(f"{opened.folder}: no tokenizer folder; the model is written without a tokenizer")
    (partial / SETTINGS_NAME).write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    (partial / "README.md").write_text(_card(trainer, sets, settings), "utf-8")
    for path in sorted(partial.iterdir()):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial.rmdir()
    finished = {"finished": True, "steps": trainer.state.global_step, **run}
    text = msgspec.json.format(msgspec.json.encode(finished), indent=2)
    write_atomic(output / RUN_NAME, lambda sink: sink.write(text))
    sync_folder(output)


def _set_stop_tokens(model: Any, sets: Sequence[ShardSet]) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is None or not sets:
        return
    before = generation.eos_token_id
    own = [] if before is None else before if isinstance(before, list) else [before]
    stops = stop_tokens(sets)
    if stops:
        # The set's own stops come first; those the model knew stay, unless its ids mean something else in this set.
        keep = [token for token in own if token < sets[0].manifest.tokenizer.vocab_size]
        merged = list(dict.fromkeys([*stops, *keep]))
        generation.eos_token_id = merged if len(merged) > 1 else merged[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = sets[0].manifest.tokenizer.pad_id


def _card(trainer: Any, sets: Sequence[ShardSet], settings: dict[str, Any]) -> str:
    base = settings.get("model")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapted = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    front = {"library_name": "peft" if adapted else "transformers", "pipeline_tag": "text-generation"}
    if base and not Path(base).exists():
        front["base_model"] = base
    lines = ["---", yaml.safe_dump(front).strip(), "---", "", f"# {Path(trainer.args.output_dir).name}", ""]
    kind = "Low-rank adapters for" if adapted else "Fine-tuned from"
    lines += [f"{kind} `{base}`." if base else f"Trained from scratch by `{settings.get('init_from_config')}`.", ""]
    lines += ["| set | rows | trained tokens | digest |", "|---|---|---|---|"]
    for opened in sets:
        manifest = opened.manifest
        lines.append(f"| {opened.folder.name} | {len(opened):,} | {manifest.ledger.tokens_trained:,} | `{manifest.digest}` |")
    lines += ["", f"{trainer.state.global_step:,} steps, {trainer.state.num_input_tokens_seen:,} tokens seen."]
    if history:
        first, last = history[0], history[-1]
        lines.append(f"Loss {first['loss']:.4f} (step {first['step']}) to {last['loss']:.4f} (step {last['step']}).")
    return "\n".join([*lines, "", f"Settings: `{SETTINGS_NAME}`. Every logged step: `train_log.jsonl`.", ""])
