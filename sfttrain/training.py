"""A run's work with torch: choose attention, prove packing and loss, load, resume or begin, train, export."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sftdata.errors import IntegrityError, UsageError
from sftdata.output import StoppedError, counted
from sftdata.set.opened import ShardSet
from sfttrain import checkpoint, preflight, refusals
from sfttrain.arguments import Run, effective_settings, refuse_inert, training_arguments, try_optimizer
from sfttrain.attention import Choice, choose_attention, register_attention
from sfttrain.compiling import (
    ENOUGH_STEPS,
    Compilation,
    choose_compile,
    free_to_keep,
    layers_compiled,
    start_compiled,
    stop_compiled,
)
from sfttrain.config import TrainConfig
from sfttrain.data import Collator, TrainingRows, read_contents
from sfttrain.device import out_of_memory, refuse_too_large
from sfttrain.documents import DocumentLog
from sfttrain.export import conclude, conclude_again, export, folders_beside, tokenizer_folder
from sfttrain.given import CustomRows, StreamRows, custom_rows
from sfttrain.kernels import add_kernels
from sfttrain.model import load_config, make_model, outline, whole_weights
from sfttrain.order import FetchAhead, account_of, make_order, planned, total_steps
from sfttrain.path import Plan, choose_path
from sfttrain.pictures import inputs_of, refuse_other_model
from sfttrain.process import Say, StopRequest, failing_together, rank, say, share_of_rows
from sfttrain.progress import (
    LOG_NAME,
    FollowSettings,
    LogEnds,
    Progress,
    StopAtStepEnd,
    TrainLog,
    forget_after,
)
from sfttrain.proofs import Surroundings
from sfttrain.resume import Point, finished, identity_of, resume_point
from sfttrain.samples import Samples
from sfttrain.schedule import Order
from sfttrain.seen import Account
from sfttrain.sequence import Sliced, refuse_unshared, share_rows
from sfttrain.trainer import SftTrainer
from sfttrain.vocabulary import ready_generation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments


_WORKERS = 8  # of a process; a core prepares 10 to 70 pictures a second


def train_on(
    config: TrainConfig, sets: list[ShardSet], evaluation: dict[str, ShardSet], reading: refusals.Reading,
    model: PreTrainedModel | None, data: object, objects: dict[str, object], request: StopRequest,
) -> SftTrainer | None:  # fmt: skip
    """Train on opened sets; see `sfttrain.run.train`.

    Args:
        reading: the verification of the sets; nothing is trained, and no run called finished, before its end.
        objects: what transformers' Trainer takes as objects.
        request: where signals are noted.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    evaluated = bool(evaluation) or objects.get("eval_dataset") is not None
    args = training_arguments(config, evaluated=evaluated)
    add_workers(config, args, [*sets, *evaluation.values()])
    reading.check()
    setting = Run(config, args, objects, evaluated=evaluated)
    _refuse_settings(setting, model, data)
    identity = identity_of(setting, sets, evaluation)
    done = finished(config, identity)
    if done is not None:
        reading.finish()
        conclude_again(config, args, done)
        return None
    stop = StopAtStepEnd(request, args.world_size)
    with failing_together(args.world_size):
        with reading.first():
            trainer, resumed, steps = _assemble(setting, sets, evaluation, reading, model, data, identity)
        trainer.add_callback(stop)
        _take_steps(trainer, resumed, steps)
    if stop.number:
        say(
            f"stopped after step {trainer.state.global_step:,}: "
            f"{_what_is_saved(args, trainer.state.global_step)}"
        )
        raise StoppedError(stop.number)
    request.done = True
    export(trainer, sets, effective_settings(setting, cast("PreTrainedModel", trainer.model)), trainer.run)
    conclude(config, args)
    return trainer


def plan_run(config: TrainConfig) -> list[str]:
    """Return what a fresh run would take of each set and of the device, and how each attention fares.

    Nothing is trained, and no weights are loaded: packing is proven on the model's architecture.

    Raises:
        SftError: a set cannot be opened, or the run would be refused for its settings or its model.
    """
    args = training_arguments(config, evaluated=bool(config.eval))
    setting = Run(config, args, {}, evaluated=bool(config.eval))
    _refuse_settings(setting, None, None)
    sets, evaluation = refusals.open_sets(config)
    _samples(config, sets, args)
    with whole_weights(args):
        model_config, where, plan, choice = _choose(setting, [*sets, *evaluation.values()], None, None)
        model = outline(config, model_config, plan, sets, args)
    contents = [read_contents(opened, plan.unpack) for opened in sets]
    order = make_order(config, sets, [part.rows for part in contents], contents, args)
    account = account_of(config, sets, contents, order)
    steps = total_steps(args, order)
    tokens = sum(part.tokens for part in account.leg(steps).sets) // args.world_size
    whole = ", the base not yet quantized" if config.quantize else ""
    return [
        *planned(config, account, order, steps),
        f"memory: {preflight.describe_memory(model)}{whole}",
        preflight.describe_time(model, tokens, args.device, where.compute),
        *([] if choice is None else [f"attention, fastest first:\n{choice.table}"]),
    ]


def _assemble(
    setting: Run,
    sets: list[ShardSet],
    evaluation: dict[str, ShardSet],
    reading: refusals.Reading,
    model: PreTrainedModel | None,
    data: object,
    identity: checkpoint.Identity,
) -> tuple[SftTrainer, Point | None, int]:
    """Load and prove everything; return the trainer, where it goes on, and how many steps there are."""
    config, args, objects = setting.config, setting.args, dict(setting.objects)
    samples = _samples(config, sets, args)
    model, plan, where = load(setting, sets, evaluation, model, data)
    ready_generation(model, sets, say)
    reading.finish()
    args.distributed_state.wait_for_everyone()  # for the main process, which reads the sets
    places = config.log_documents
    rows = TrainingRows(sets, plan.unpack, places=places) if data is None else _custom_rows(data, args)
    order, account = _plan_data(config, sets, rows, plan, args)
    run = identity | _planned(order, plan)
    steps = int(args.max_steps) if order is None else total_steps(args, order)
    resumed = resume_point(config, args, run, steps, say)
    if order is not None:
        order.begin_at(resumed.first_step if resumed else 0)
        run["first_step"] = order.first_step
        _tell_plan(config, account, order, resumed, steps)
    trainer = _make_trainer(
        order=order,
        account=account,
        run=run,
        plan=plan,
        beside=folders_beside(sets, evaluation.values(), say),
        documents=DocumentLog(config.output, sets, args.process_index) if config.log_documents else None,
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=_evaluation(evaluation, plan.unpack) | _as_named(objects.pop("eval_dataset", None))
        or None,
        data_collator=_collator(plan, args),
        callbacks=[
            FollowSettings(),
            LogEnds(),
            TrainLog(config.output / LOG_NAME),
            Progress(),
            *samples,
            *([FetchAhead(sets, order)] if order is not None and order.window else []),
            *cast("Sequence[TrainerCallback]", objects.pop("callbacks", ())),
        ],
        **objects,
    )
    try_optimizer(setting, model, steps)
    _speed_up(setting, trainer, where, steps, resumed is None)
    return trainer, resumed, steps


def load(
    setting: Run, sets: list[ShardSet], evaluation: dict[str, ShardSet], model: PreTrainedModel | None,
    data: object,
) -> tuple[PreTrainedModel, Plan, Surroundings]:  # fmt: skip
    """Choose and prove how a model reads these sets, and load it where it is not given."""
    config, args, everything = setting.config, setting.args, [*sets, *evaluation.values()]
    with whole_weights(args):
        model_config, where, plan, _ = _choose(setting, everything, model, data)
        return *make_model(config, model_config, model, plan, sets, args, say), where


def add_workers(config: TrainConfig, args: TrainingArguments, sets: Sequence[ShardSet]) -> None:
    """Let workers decode pictures ahead of the steps, unless settings say how many do."""
    pictured = any(opened.manifest.vision is not None for opened in sets)
    if pictured and "dataloader_num_workers" not in config.training:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        args.dataloader_num_workers = max(1, min(_WORKERS, (os.cpu_count() or 1) // beside))
        if "dataloader_persistent_workers" not in config.training:
            args.dataloader_persistent_workers = True


def _refuse_settings(setting: Run, model: PreTrainedModel | None, data: object) -> None:
    config, args, objects = setting.config, setting.args, setting.objects
    refusals.refuse_useless(config, args, model, data, objects, say)
    refuse_unshared(config, args, objects)
    refuse_inert(setting)


def _choose(
    setting: Run, sets: list[ShardSet], model: PreTrainedModel | None, data: object
) -> tuple[PreTrainedConfig, Surroundings, Plan, Choice | None]:
    """Refuse a model that cannot be trained on these sets; choose and prove how it reads them."""
    config, args = setting.config, setting.args
    model_config = load_config(config) if model is None else model.config
    refusals.refuse_architecture(config, model_config, setting.trains, model)
    pictures = inputs_of(sets)
    if pictures is not None:
        refuse_other_model(pictures, model_config)
    refusals.refuse_too_long(sets, model_config, say)
    where = replace(_surroundings(args, sets, data), pictures=pictures)
    return model_config, where, *_choose_path(config, model_config, model, where, say)


def _samples(config: TrainConfig, sets: list[ShardSet], args: TrainingArguments) -> list[TrainerCallback]:
    """Return what answers the prompts of `sample`, where there are any."""
    if config.sample is None:
        return []
    return [Samples(config.sample, tokenizer_folder(sets), config.output, args)]


def _collator(plan: Plan, args: TrainingArguments) -> Collator | Sliced:
    """Return what makes batches; of ranks that hold rows together, each takes its slice."""
    whole = Collator(plan.flatten, plan.boundaries, plan.restart, plan.pictures)
    width = args.world_size // share_of_rows(args)[1]
    return Sliced(whole, args.process_index % width, width) if width > 1 else whole


def _plan_data(
    config: TrainConfig,
    sets: list[ShardSet],
    rows: TrainingRows | CustomRows | StreamRows,
    plan: Plan,
    args: TrainingArguments,
) -> tuple[Order | None, Account | None]:
    """Return the batches of this rank, None for a stream, and in the main process the account of sets."""
    if isinstance(rows, StreamRows):
        return None, None
    kept = config.mix or rank() == 0
    contents = [read_contents(opened, plan.unpack) for opened in sets] if kept else []
    order = make_order(config, sets, rows.sizes, contents, args)
    return order, account_of(config, sets, contents, order) if sets and rank() == 0 else None


def _tell_plan(
    config: TrainConfig, account: Account | None, order: Order, resumed: Point | None, steps: int
) -> None:
    """Say what the run takes of each set, over its whole leg."""
    if account is None:
        return
    if resumed is not None:
        account.go_on(resumed.folder, resumed.step)
    for line in planned(config, account, order, steps):
        say(line)


def _custom_rows(data: object, args: TrainingArguments) -> CustomRows | StreamRows:
    return custom_rows(data, *share_of_rows(args))


def _speed_up(setting: Run, trainer: SftTrainer, where: Surroundings, steps: int, fresh: bool) -> None:
    """Choose kernels, and what to compile; try both, and the room there is, where the run is fresh."""
    choice, model = _choose_compile(setting, trainer, where, steps), cast(nn.Module, trainer.model)
    if fresh or preflight.memory_decides(trainer):
        preflight.check_fit(trainer, where.compute, choice, say)
    elif choice.what != "none":
        say(f"compile: {start_compiled(model, choice)} ({choice.reason})")
    if choice.what == "layers" and not layers_compiled(model):
        _add_kernels(setting, trainer, where)  # what the compiler could not do


def _choose_compile(setting: Run, trainer: SftTrainer, where: Surroundings, steps: int) -> Compilation:
    """Return what to compile; where that is not the layers, put kernels on them."""
    config = setting.config
    choice = choose_compile(
        config, setting.args, cast(nn.Module, trainer.model), steps, config.kernels == "liger"
    )
    if choice.what == "none" and where.device == "cuda":
        say(f"compile: nothing ({choice.reason})")
    if config.kernels == "liger" or (choice.what != "layers" and steps >= ENOUGH_STEPS):
        _add_kernels(setting, trainer, where)
    elif choice.what != "layers" and where.device == "cuda" and config.kernels == "auto":
        say(f"kernels: PyTorch's ({counted(steps, 'step')}, fewer than {ENOUGH_STEPS})")
    args = setting.args
    if choice.what != "layers" or not args.activation_checkpointing or where.reach is None:
        return choice
    tokens, accumulated = args.train_batch_size * where.reach, args.gradient_accumulation_steps > 1
    return choice._replace(keep=free_to_keep(cast(nn.Module, trainer.model), tokens, accumulated))


def _add_kernels(setting: Run, trainer: SftTrainer, where: Surroundings) -> None:
    model, asked = cast(nn.Module, trainer.model), setting.config.kernels
    if asked == "liger" or (asked == "auto" and where.device == "cuda"):
        unwrap = getattr(model, "get_base_model", None)
        inner = model if unwrap is None else unwrap()
        add_kernels(setting.config, inner, setting.args.liger_kernel_config, where, say)


def _take_steps(trainer: SftTrainer, resumed: Point | None, steps: int) -> None:
    """Train, or take what a run left that was stopped after its last step."""
    try:
        if resumed is not None and resumed.step == steps:
            _restore(trainer, resumed.folder, say)
            if trainer.state.is_world_process_zero:
                forget_after(Path(str(trainer.args.output_dir), LOG_NAME), steps)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, Samples):  # what the run ended without
                    callback.on_train_end(
                        trainer.args, trainer.state, trainer.control, cast("PreTrainedModel", trainer.model)
                    )
        else:
            trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
    except RuntimeError as error:
        refused = out_of_memory(error, trainer.state.global_step + 1)
        if refused is None:
            raise
        raise refused from None
    except UnpicklingError:
        place = resumed.folder if resumed else trainer.args.output_dir
        found = f"{place}: holds a pickle that is more than tensors, which loading would run"
        fix = "remove the folder, then run again: it resumes from the one before."
        raise IntegrityError(f"{found}.", fix) from None
    finally:
        stop_compiled(cast(nn.Module, trainer.model))
        if trainer.documents is not None:
            trainer.documents.close()


def _what_is_saved(args: TrainingArguments, step: int) -> str:
    if args.save_only_model:
        return "nothing is saved, since save_only_model=true saves nothing to go on from"
    return f"checkpoint-{step} is complete"


def _choose_path(
    config: TrainConfig,
    model_config: PreTrainedConfig,
    model: nn.Module | None,
    where: Surroundings,
    say: Say,
) -> tuple[Plan, Choice | None]:
    """Choose attention, and prove on it what training may use; no choice where processes share rows."""
    register_attention()
    if config.sequence_parallel > 1:
        return share_rows(config, model_config, where, say), None
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    choice = choose_attention(config.attention, model_config, where.device, where.compute, own)
    say(f"attention: {choice.name} ({choice.reason})")
    return choose_path(config, model_config, choice, where, say), choice


def _surroundings(args: TrainingArguments, sets: list[ShardSet], data: object) -> Surroundings:
    """Return what a proof depends on beside the model; the longest row where not only the data knows it."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    lengths = [opened.manifest.max_length for opened in sets]
    known = [length for length in lengths if length is not None]
    longest = max(known) if data is None and len(known) == len(lengths) else None
    return Surroundings(args.device.type, compute, max(args.train_batch_size, args.eval_batch_size), longest)


def _make_trainer(**arguments: Any) -> SftTrainer:
    refuse_too_large(arguments["model"], arguments["args"])
    try:
        return SftTrainer(**arguments)
    except (ValueError, ImportError, RuntimeError) as error:  # what transformers finds out only now
        refused = out_of_memory(error, 0) if isinstance(error, RuntimeError) else None
        if refused is not None:
            raise refused from None
        if isinstance(error, RuntimeError) and "install" not in str(error):
            raise
        raise UsageError(f"Training settings: {str(error).strip()}", "see `sfttrain config`.") from None


def _evaluation(sets: dict[str, ShardSet], unpack: bool) -> dict[str, object]:
    return {name: TrainingRows([opened], unpack, by_source=True) for name, opened in sets.items()}


def _as_named(data: object) -> dict[str, object]:
    """Wrap datasets to evaluate on; one alone is called "data"."""
    if data is None:
        return {}
    return {
        name: custom_rows(rows)
        for name, rows in (data.items() if isinstance(data, dict) else [("data", data)])
    }


def _restore(trainer: SftTrainer, folder: Path, say: Say) -> None:
    """Load the model that the last step left, or the best one where that is asked for."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(folder / checkpoint.STATE))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    chosen = folder.parent / Path(best).name if best else folder
    say(f"all steps are done: writing the model of {chosen.name} only")
    trainer._load_from_checkpoint(str(chosen))


def _planned(order: Order | None, plan: Plan) -> checkpoint.Identity:
    """Return what belongs to a run's identity and is known only with its rows and its model."""
    return {
        "data_seed": order.schedule.seed if order else None,
        "shuffle": order.schedule.shuffle if order else False,
        "window": order.window if order else None,
        "rows": order.schedule.sizes if order else None,
        "unpack": plan.unpack,
    }
