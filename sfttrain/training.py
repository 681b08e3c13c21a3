"""What a run does with torch: choose attention, prove packing and loss, load the model, resume or begin, train, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sftdata.errors import UsageError
from sftdata.shardset.opened import ShardSet
from sfttrain import checkpoint, preflight, refusals
from sfttrain.assemble import leave_gpus_idle, make_model, whole_weights
from sfttrain.attention import choose_attention, register_attention
from sfttrain.config import TrainConfig, checked_training, named_as_installed
from sfttrain.custom import CustomRows, StreamRows, custom_rows
from sfttrain.data import Collator, TrainingRows
from sfttrain.export import export
from sfttrain.hub import push
from sfttrain.isolation import Surroundings
from sfttrain.model import computes_in_bf16, load_config
from sfttrain.order import Order
from sfttrain.output import RUN_NAME
from sfttrain.path import Plan, choose_path
from sfttrain.progress import LOG_NAME, Progress, TrainLog
from sfttrain.report import write_report
from sfttrain.talk import Say, say
from sfttrain.trainer import SftTrainer


def train_on(
    config: TrainConfig, sets: list[ShardSet], evaluation: dict[str, ShardSet], model: Any, data: Any, extras: dict[str, Any]
) -> SftTrainer:
    """Train on opened sets; see `sfttrain.run.train`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    args = training_arguments(config)
    refusals.refuse_useless(config, args, model, data, extras, say)
    everything = [*sets, *evaluation.values()]
    args.distributed_state.wait_for_everyone()  # for the main process, which reads the sets
    model_config = load_config(config) if model is None else model.config
    refusals.refuse_architecture(config, model_config, model)
    refusals.refuse_too_long(everything, model_config, say)
    leave_gpus_idle(args, say)
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    with whole_weights(args):
        where = Surroundings(args.device.type, compute, *_reach(args, everything, data))
        plan = _choose_path(config, model_config, model, where, say)
        model, plan = make_model(config, model_config, model, plan, sets, args, say)
    rows = TrainingRows(sets, plan.unpack) if data is None else custom_rows(data, args.process_index, args.world_size)
    order = None if isinstance(rows, StreamRows) else _order(config, rows, args)
    run = _identity(config, sets, order, plan, args)
    resumed = _resume_point(config, args, run, say)
    trainer = _make_trainer(
        order=order,
        run=run,
        plan=plan,
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=_evaluation(evaluation, plan.unpack) | _as_named(extras.pop("eval_dataset", None)) or None,
        data_collator=Collator(plan.flatten, plan.boundaries, plan.restart),
        callbacks=[TrainLog(Path(args.output_dir) / LOG_NAME), Progress(), *extras.pop("callbacks", ())],
        **extras,
    )
    steps = int(args.max_steps) if order is None else _total_steps(args, order)
    if resumed is None:
        preflight.check_fit(trainer, compute, steps, say)
    if resumed is not None and resumed[1] >= steps:
        _restore(trainer, resumed[0], say)
    else:
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
    export(trainer, sets, effective_settings(config, args), run, say)
    _conclude(config, args, say)
    return trainer


def _choose_path(config: TrainConfig, model_config: Any, model: Any, where: Surroundings, say: Say) -> Plan:
    """Choose attention, and prove on it what training may use."""
    register_attention()
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    choice = choose_attention(config.attention, model_config, where.device, where.compute, own)
    say(f"attention: {choice.name} ({choice.reason})\n{choice.table}")
    return choose_path(config, model_config, choice, where, say)


def _reach(args: Any, sets: list[ShardSet], data: Any) -> tuple[int, int | None]:
    """Return the rows of the largest batch and the longest row, None where only the data knows."""
    lengths = [opened.manifest.max_length for opened in sets]
    known = [length for length in lengths if length is not None]
    return max(args.train_batch_size, args.eval_batch_size), max(known) if data is None and len(known) == len(lengths) else None


def _conclude(config: TrainConfig, args: Any, say: Say) -> None:
    """Write the report, and push what the hub shall have."""
    output = Path(str(args.output_dir))
    if args.should_save:
        say(f"report: {write_report(output)}")
    say(f"model: {output}")
    if config.push_to_hub and args.should_save:
        say(f"pushed: {push(output, config.push_to_hub)}")


def training_arguments(config: TrainConfig) -> Any:
    """Return transformers' TrainingArguments for a configuration.

    Raises:
        UsageError: transformers refuses a value.
    """
    from transformers import TrainingArguments

    settings = {"output_dir": str(config.output), "disable_tqdm": True, **checked_training(config.training)}
    refusals.refuse_missing_launch(settings)
    settings.setdefault("learning_rate", config.learning_rate)
    settings.setdefault("use_cpu", not torch.accelerator.is_available())  # else ranks without a GPU find no backend
    settings.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    settings.setdefault("bf16", computes_in_bf16() and not settings.get("fp16"))
    if config.loss == "liger":
        settings["use_liger_kernel"] = True
    if settings.get("activation_checkpointing"):
        # Reentrant checkpoints run a parameter's hooks twice, which DDP refuses.
        settings["activation_checkpointing_kwargs"] = {
            "use_reentrant": False,
            **_given(settings, "activation_checkpointing_kwargs"),
        }
    if settings.get("save_total_limit") == 1:
        raise UsageError("save_total_limit=1 leaves no complete checkpoint while the next is written.", "set 2 or more.")
    try:
        args = TrainingArguments(**named_as_installed(settings))
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"Training settings: {reason}", "see `sfttrain config`.") from None
    if not hasattr(args, "activation_checkpointing"):  # older transformers have another name for it
        old: Any = args
        old.activation_checkpointing, old.activation_checkpointing_kwargs = (
            old.gradient_checkpointing,
            old.gradient_checkpointing_kwargs,
        )
    return args


def effective_settings(config: TrainConfig, args: Any) -> dict[str, Any]:
    """Return every setting with defaults resolved, as plain data."""
    own = config.model_dump(mode="json", exclude={"training"})
    return own | {"training": {key: value for key, value in args.to_dict().items() if not key.startswith("_")}}


def _make_trainer(**arguments: Any) -> SftTrainer:
    try:
        return SftTrainer(**arguments)
    except (ValueError, ImportError) as error:  # what transformers finds out only now
        raise UsageError(f"Training settings: {str(error).strip()}", "see `sfttrain config`.") from None


def _evaluation(sets: dict[str, ShardSet], unpack: bool) -> dict[str, Any]:
    return {name: TrainingRows([opened], unpack, by_source=True) for name, opened in sets.items()}


def _as_named(data: Any) -> dict[str, Any]:
    """Wrap datasets to evaluate on; one alone is called "data"."""
    if data is None:
        return {}
    return {name: custom_rows(rows) for name, rows in (data.items() if isinstance(data, dict) else [("data", data)])}


def _given(settings: dict[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    return dict(json.loads(value) if isinstance(value, str) else value)


def _order(config: TrainConfig, rows: TrainingRows | CustomRows, args: Any) -> Order:
    return Order(
        rows.sizes,
        config.set_weights or (1.0,),
        seed=args.seed if args.data_seed is None else args.data_seed,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=args.process_index,
        ranks=args.world_size,
        shuffle=args.train_sampling_strategy != "sequential",
    )


def _identity(config: TrainConfig, sets: list[ShardSet], order: Order | None, plan: Plan, args: Any) -> dict[str, Any]:
    """What a resumed run must share with the one before it."""
    return {
        "sets": [opened.manifest.digest for opened in sets],
        "weights": list(config.set_weights),
        "tokenizer": [opened.manifest.tokenizer.sha256 for opened in sets],
        "chat_template": [opened.manifest.chat_template_sha256 for opened in sets],
        "model": str(config.model or config.init_from_config),
        "lora": config.lora.model_dump() if config.lora else None,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "data_seed": order.seed if order else None,
        "shuffle": order.shuffle if order else False,
        "rows": order.sizes if order else None,
        "unpack": plan.unpack,
        **({"adapter": str(config.adapter)} if config.adapter else {}),
    }


def _resume_point(config: TrainConfig, args: Any, run: dict[str, Any], say: Say) -> tuple[Path, int] | None:
    """Find the newest complete checkpoint; the main process alone looks and cleans, the others follow it."""
    from accelerate.utils import broadcast_object_list

    output = Path(args.output_dir)
    found: list[Any] = [None]
    if args.process_index == 0:
        found = [_find_checkpoint(config, output, run, say)]
    if args.world_size > 1:
        broadcast_object_list(found)
    point: tuple[Path, int] | None = found[0]
    return point


def _find_checkpoint(config: TrainConfig, output: Path, run: dict[str, Any], say: Say) -> tuple[Path, int] | None:
    output.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        checkpoint.clear(output)
        for name in (RUN_NAME, LOG_NAME):
            (output / name).unlink(missing_ok=True)
        return None
    newest = checkpoint.newest_complete(output)
    if newest is not None:
        checkpoint.check_unchanged(newest[1].run, run, newest[0])
    elif (output / RUN_NAME).exists():
        raise UsageError(f"{output}: holds a finished run without a checkpoint.", "choose another output folder, or --overwrite.")
    step = newest[1].step if newest else 0
    for name in checkpoint.remove_after(output, step):
        say(f"{output / name}: incomplete, removed")
    if newest is not None:
        say(f"resuming from {newest[0]} (step {step})")
    return (newest[0], step) if newest else None


def _restore(trainer: SftTrainer, folder: Path, say: Say) -> None:
    say("all steps are done: writing the model only")
    trainer._load_from_checkpoint(str(folder))
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))


def _total_steps(args: Any, order: Order) -> int:
    return int(args.max_steps) if args.max_steps > 0 else -int(-args.num_train_epochs * order.steps_per_epoch // 1)
