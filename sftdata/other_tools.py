"""Settings of TRL, axolotl and LLaMA-Factory as settings of `sftdata prepare` and of `sfttrain run`.

One table a tool, followed in its own order: what a later setting refines, an earlier one has set, however the
file is sorted. A setting that no table knows is lost; what a tool does where its file says nothing is carried
over too, so that the file means the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftdata.carried import (
    Carried,
    OfAnotherKind,
    Rule,
    Tool,
    bits,
    both,
    chosen,
    listed,
    lost,
    mapping,
    needless,
    number,
    refuse_kind,
    share,
    switch,
    targets,
    text,
    to,
    where,
    whole,
)
from sftdata.config import PrepareConfig
from sftdata.errors import UsageError
from sftdata.other_datasets import axolotl_datasets, factory_datasets
from sftdata.settings import check_settings, read_settings_file

_NUMBERS = """
adam_beta1 adam_beta2 adam_epsilon data_seed dataloader_num_workers ddp_timeout eval_steps
gradient_accumulation_steps learning_rate logging_steps max_grad_norm max_steps neftune_noise_alpha
num_train_epochs per_device_eval_batch_size per_device_train_batch_size save_steps save_total_limit seed
weight_decay warmup_steps
"""
_SWITCHES = """
bf16 dataloader_pin_memory fp16 save_only_model tf32 use_cpu load_best_model_at_end greater_is_better
eval_on_start logging_first_step
"""
_OTHERS = """
deepspeed eval_strategy logging_strategy lr_scheduler_kwargs lr_scheduler_type optim optim_args report_to
run_name save_strategy metric_for_best_model
"""
_MODEL = both(to("train", "model", text), to("data", "tokenizer", text))
_TRUSTED = to("train", "trust_remote_code", switch)
_DEFAULT = needless("it is what happens by default.")
_FASTEST = needless("the fastest attention that is proven right is chosen.")
_LIGER = where(True, lambda found, name, _: found.put("train", "kernels", "liger", name), _DEFAULT)
_SHARDED = lost("accelerate launch --config_file examples/accelerate/fsdp2.yaml -m sfttrain run ... shards.")
_CHECKPOINTING = to("train", "activation_checkpointing", switch)
_RESUMES = needless("the same command resumes.")
_PACKING = to("data", "packing", chosen({True: "bfd", False: "none"}))


def _same(name: str) -> Rule:
    """Set the field of the same name; YAML reads the `no` of a strategy as false."""
    return to("train", name, lambda value: "no" if value is False and name.endswith("strategy") else value)


def _off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {}, "none", "no")


def _warmup_ratio(found: Carried, name: str, value: Any) -> None:
    if found.train.get("warmup_steps"):
        found.needless[name] = "warmup_steps outranks it."
    else:
        found.put("train", "warmup_steps", number(value), name)  # below 1 it is a share of the steps


_COMMON: dict[str, Rule] = {
    **{name: to("train", name, number) for name in _NUMBERS.split()},
    **{name: to("train", name, switch) for name in _SWITCHES.split()},
    **{name: _same(name) for name in _OTHERS.split()},
    "warmup_ratio": _warmup_ratio,
    "trust_remote_code": _TRUSTED,
    "gradient_checkpointing": _CHECKPOINTING,
    "lora_dropout": to("train", "lora.dropout", number),
    "lora_alpha": to("train", "lora.alpha", number),
    "output_dir": to("train", "output", text),
    "resume_from_checkpoint": _RESUMES,
    "overwrite_output_dir": needless("the same command resumes, and --overwrite starts over."),
    "do_train": _DEFAULT,
}

# ------------------------------------------------------------------------------------------------- TRL


def _trl_strategy(found: Carried, name: str, value: Any) -> None:
    if found.data.get("packing") == "bfd":
        where("bfd", _DEFAULT, to("data", "packing", chosen({"wrapped": "wrapped"})))(found, name, value)
    else:
        found.needless[name] = "nothing is packed."


def _trl_push(found: Carried, name: str, value: Any) -> None:
    if "hub_model_id" in found.given:
        found.put("train", "push_to_hub", value, name)
    else:
        found.lost[name] = "say where to, as push_to_hub: USER/MODEL."


def _trl_hub_id(found: Carried, name: str, value: Any) -> None:
    if found.train.get("push_to_hub"):
        found.put("train", "push_to_hub", value, name)
    else:
        found.needless[name] = "nothing is pushed without push_to_hub."


_TRL: dict[str, Rule] = {
    "model_name_or_path": _MODEL,
    "model_revision": both(to("train", "revision", text), to("data", "revision", text)),
    "dtype": to("train", "dtype", text),
    "torch_dtype": to("train", "dtype", text),
    "attn_implementation": _FASTEST,
    "dataset_name": to("data", "inputs", lambda value: [text(value)]),
    "dataset_config": to("data", "subset", text),
    "dataset_train_split": to("data", "split", text),
    "dataset_test_split": lost("sftdata prepare --split makes a set of it, which --eval NAME=FOLDER names."),
    "dataset_streaming": needless("rows are read in slices."),
    "dataset_num_proc": to("data", "workers", whole),
    "dataset_text_field": where("text", _DEFAULT, to("data", "map.text", text)),
    "max_length": to("data", "max_length", whole),
    "max_seq_length": to("data", "max_length", whole),
    "truncation_mode": to(
        "data", "overlong", chosen({"keep_start": "truncate", "keep_end": "truncate-left"})
    ),
    "packing": _PACKING,
    "packing_strategy": _trl_strategy,
    "eval_packing": lost("prepare the set to evaluate on with --packing."),
    "padding_free": needless("packed rows are trained without padding."),
    "pad_token": needless("padding is never trained, whatever its token is."),
    "eos_token": to("data", "eos_token", text),
    "chat_template_path": to("data", "chat_template", text),
    "assistant_only_loss": where(True, to("data", "train_on", lambda _: "assistant"), lost(
        "TRL then trains conversations whole, which here is train_on: all.")),
    "completion_only_loss": to("data", "train_on", chosen({True: "completion", False: "all"})),
    "loss_type": to("train", "objective", chosen({"nll": "nll", "dft": "dft", "chunked_nll": "nll"})),
    "use_liger_kernel": _LIGER,
    "activation_offloading": lost("set activation_checkpointing_kwargs.offload=true."),
    "load_in_4bit": to("train", "quantize", lambda _: "nf4"),
    "load_in_8bit": to("train", "quantize", lambda _: "int8"),
    "bnb_4bit_quant_type": where("nf4", _DEFAULT, lost("of 4 bits there is nf4.")),
    "use_bnb_nested_quant": _DEFAULT,
    "use_peft": to("train", "lora.r", lambda _: 16),
    "lora_r": to("train", "lora.r", whole),
    "lora_target_modules": to("train", "lora.target", targets),
    "lora_target_parameters": to("train", "lora.parameters", targets),
    "lora_modules_to_save": to("train", "lora.modules_to_save", targets),
    "lora_task_type": _DEFAULT,
    "use_rslora": to("train", "lora.rslora", switch),
    "use_dora": to("train", "lora.dora", switch),
    "push_to_hub": _trl_push,
    "hub_model_id": _trl_hub_id,
}  # fmt: skip

# --------------------------------------------------------------------------------------------- axolotl


def _ax_plugins(found: Carried, name: str, value: Any) -> None:
    for plugin in listed(value):
        if plugin.endswith("LigerPlugin"):
            found.put("train", "kernels", "liger", name)
        elif plugin.endswith("CutCrossEntropyPlugin"):
            found.needless[f"{name}: {plugin}"] = "the loss is computed without all logits at once."
        else:
            found.lost[f"{name}: {plugin}"] = "it has no counterpart."


def _ax_adapter(found: Carried, name: str, value: Any) -> None:
    if value not in ("lora", "qlora"):
        found.lost[name] = f"{value!r}: adapters are lora, with quantize or without."
        return
    found.put("train", "lora.r", 8, name)
    if value == "qlora":
        found.put("train", "quantize", "nf4", name)


def _ax_train_on_inputs(found: Carried, name: str, value: Any) -> None:
    found.put("data", "train_on", "all", name)
    if any(entry.get("type") == "chat_template" for entry in found.given.get("datasets") or []):
        found.lost["(train_on)"] = (
            "headers of turns are trained too; axolotl trains what is said and its end."
        )


def _ax_special(found: Carried, name: str, value: Any) -> None:
    for key, token in mapping(value).items():
        if key == "eos_token":
            found.put("data", "eos_token", token, f"{name}.{key}")
        elif key == "pad_token":
            found.needless[f"{name}.{key}"] = "padding is never trained, whatever its token is."
        else:
            found.lost[f"{name}.{key}"] = "the tokenizer's own is used; change the tokenizer for another."


def _times(strategy: str) -> Rule:
    steps = strategy.replace("strategy", "steps")
    reason = f"`sfttrain plan` says what an epoch is; set {strategy}=steps and {steps}."
    return where(1, to("train", strategy, lambda _: "epoch"), lost(reason))


_IN_ENVIRONMENT = lost("trackers read it from the environment, as WANDB_PROJECT; report_to names one.")
_READ_FROM_MODEL = needless("it is read from the model's own files.")
_AXOLOTL: dict[str, Rule] = {
    "base_model": _MODEL,
    "tokenizer_config": to("data", "tokenizer", text),
    "revision_of_model": both(to("train", "revision", text), to("data", "revision", text)),
    **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config"), _READ_FROM_MODEL),
    "excess_length_strategy": to(
        "data", "overlong", chosen({"drop": "drop", "truncate": "truncate", "raise": "error"})
    ),
    "datasets": axolotl_datasets,
    "val_set_size": where(0, needless("nothing is held out by default."), to("data", "eval", share)),
    "dataset_prepared_path": to("data", "output", text),
    "dataset_processes": to("data", "workers", whole),
    "sequence_len": to("data", "max_length", whole),
    "sample_packing": _PACKING,
    "eval_sample_packing": lost("the held-out set is packed as the other is."),
    "max_packed_sequence_len": lost("sequence_len, here max_length, is the length of packed rows."),
    "pad_to_sequence_len": needless("packed rows always have the same length."),
    "train_on_inputs": _ax_train_on_inputs,
    "group_by_length": lost("sftdata view --order length orders rows by length."),
    "chat_template": where("tokenizer_default", _DEFAULT, to("data", "chat_template", text)),
    "special_tokens": _ax_special,
    "adapter": _ax_adapter,
    "load_in_4bit": to("train", "quantize", lambda _: "nf4"),
    "load_in_8bit": to("train", "quantize", lambda _: "int8"),
    "lora_r": to("train", "lora.r", whole),
    "lora_target_linear": to("train", "lora.target", lambda _: "all-linear"),
    "lora_target_modules": to("train", "lora.target", targets),
    "lora_modules_to_save": to("train", "lora.modules_to_save", targets),
    "lora_model_dir": to("train", "adapter", text),
    "peft_use_rslora": to("train", "lora.rslora", switch),
    "peft_use_dora": to("train", "lora.dora", switch),
    "micro_batch_size": to("train", "per_device_train_batch_size", number),
    "batch_size": lost("it is micro_batch_size x gradient_accumulation_steps x GPUs."),
    "num_epochs": to("train", "num_train_epochs", number),
    "optimizer": to("train", "optim", text),
    "lr_scheduler": to("train", "lr_scheduler_type", text),
    "bf16": where("auto", _DEFAULT, to("train", "bf16", switch)),
    "gradient_checkpointing_kwargs": to("train", "activation_checkpointing_kwargs", mapping),
    "evals_per_epoch": _times("eval_strategy"),
    "saves_per_epoch": _times("save_strategy"),
    "plugins": _ax_plugins,
    **dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm"),
                    needless("kernels: liger, from the plugin, says it.")),
    "liger_fused_linear_cross_entropy": needless("the loss is computed without all logits at once."),
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "sdp_attention", "xformers_attention"), _FASTEST
    ),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "dp_shard_size"), _SHARDED),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model"), _IN_ENVIRONMENT
    ),
    "auto_resume_from_checkpoints": _RESUMES,
    "strict": needless("an unknown setting is always refused."),
}  # fmt: skip

# --------------------------------------------------------------------------------------- LLaMA-Factory


_FACTORY: dict[str, Rule] = {
    "model_name_or_path": _MODEL,
    "stage": where("sft", _DEFAULT, lost("only supervised fine-tuning is carried over.")),
    "finetuning_type": where("full", _DEFAULT, to("train", "lora.r", chosen({"lora": 8}))),
    "lora_rank": to("train", "lora.r", whole),
    "lora_target": to("train", "lora.target", targets),
    "use_rslora": to("train", "lora.rslora", switch),
    "use_dora": to("train", "lora.dora", switch),
    "additional_target": to("train", "lora.modules_to_save", targets),
    "adapter_name_or_path": to("train", "adapter", text),
    "dataset": factory_datasets,
    "dataset_dir": needless("the datasets are named with their folder."),
    "eval_dataset": lost("prepare it as a set of its own, which --eval NAME=FOLDER names."),
    "template": where("", lost(
        "LLaMA-Factory takes the tokenizer's chat template apart: a system turn that it always writes, as"
        " Llama 3.2's does, then stands before each question; here it is used whole, and writes that once."),
        lost("the tokenizer's own chat template is used; chat_template names another.")),
    "cutoff_len": to("data", "max_length", whole),
    "max_samples": lambda found, name, value: to("data", "cap", lambda value: {
        source: f"{whole(value)} rows" for source in found.sources or ["*"]})(found, name, value),
    "val_size": to("data", "eval", share),
    "packing": _PACKING,
    "neat_packing": to("data", "packing", lambda _: "bfd"),
    "mask_history": both(to("data", "train_on", lambda _: "last-assistant"),
                         to("data", "overlong", lambda _: "truncate-left")),
    "train_on_prompt": to("data", "train_on", lambda _: "all"),
    "preprocessing_num_workers": to("data", "workers", whole),
    "overwrite_cache": needless("a set is up to date, or made anew."),
    "tokenized_path": to("data", "output", text),
    "plot_loss": needless("every run ends with a report."),
    "pure_bf16": to("train", "dtype", lambda _: "bfloat16"),
    "flash_attn": _FASTEST,
    "enable_liger_kernel": _LIGER,
    "use_dft_loss": to("train", "objective", lambda _: "dft"),
    "quantization_bit": to("train", "quantize", bits),
    "quantization_method": where("bnb", _DEFAULT, lost("quantize: nf4 or int8 are bitsandbytes'.")),
    "double_quantization": _DEFAULT,
    "disable_gradient_checkpointing": to("train", "activation_checkpointing", lambda _: False),
    "fsdp": _SHARDED,
    "fsdp_transformer_layer_cls_to_wrap": _SHARDED,
}  # fmt: skip


TOOLS = (
    Tool("axolotl", ("base_model",), _AXOLOTL, {"max_length": 512, "packing": "none", "overlong": "drop"},
         {"per_device_train_batch_size": 1, "lr_scheduler_type": "cosine", "num_train_epochs": 1},
         {"alpha": 16, "target": "q_proj+v_proj"}, "adapter", evaluates=True),
    Tool("LLaMA-Factory", ("stage", "finetuning_type", "cutoff_len", "template"), _FACTORY,
         {"max_length": 2048, "packing": "none"},
         {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3, "bf16": False},
         {"target": "all-linear"}, "finetuning_type", {"finetuning_type": "lora", "template": ""}),
    Tool("TRL", ("model_name_or_path",), _TRL, {"max_length": 1024, "packing": "none"},
         {"learning_rate": 2e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3},
         {"alpha": 32, "dropout": 0.05, "target": "q_proj+v_proj"}, "use_peft"),
)  # fmt: skip


_PLACE = "where it lies, in both files"
_SAID_BY_OFF = {
    "packing", "sample_packing", "completion_only_loss", "assistant_only_loss", "report_to", "bf16",
    "eval_strategy", "save_strategy", "logging_strategy", "greater_is_better", "template",
}  # fmt: skip


def carry_over(path: Path, output: str) -> Carried:
    """Read a settings file of another tool.

    Args:
        path: of the file.
        output: folder of the set, where the file names none.

    Raises:
        UsageError: it cannot be read, or is none of a tool that is known.
    """
    names, places = read_settings_file(path)
    tool = next((tool for tool in TOOLS if any(mark in names for mark in tool.marks)), None)
    if tool is None:
        what = f"--from {path}: names no model by model_name_or_path or base_model."
        raise UsageError(what, "give the settings file of TRL, axolotl or LLaMA-Factory.")
    found = Carried(tool.name, path.parent, names, places)
    rules = _COMMON | dict(tool.rules)
    ranks = {name: rank for rank, name in enumerate(rules)}
    given = names | {name: value for name, value in tool.unsaid.items() if names.get(name) is None}
    for name in sorted(given, key=lambda name: ranks.get(name, len(ranks))):
        value = given[name]
        if value is None or (_off(value) and name not in _SAID_BY_OFF):
            found.needless[name] = "it is off, or empty."
        else:
            try:
                rules.get(name, lost("there is no such setting."))(found, name, value)
            except OfAnotherKind as error:
                raise refuse_kind(found, name, value, error) from None
    _fill_up(found, tool, output)
    _check_data(found)
    return found


def _check_data(found: Carried) -> None:
    """Refuse a value that `sftdata prepare` would refuse, where the file says it."""
    origins = {name: names[0] for (program, name), names in found.origins.items() if program == "data"}
    places = {name: found.place(origin) for name, origin in origins.items() if origin in found.given}
    check_settings(PrepareConfig, "sftdata", {"tokenizer": "TOKENIZER"} | found.data, places)


def _fill_up(found: Carried, tool: Tool, output: str) -> None:
    """Add what the tool does where its file says nothing, and what both programs need of each other."""
    lengths = ("max_steps", "num_train_epochs")
    if "inputs" not in found.data:
        found.lost["(inputs)"] = "no dataset is named; write its file, folder or Hub id in their place."
    found.data = {"inputs": ["INPUT"], "output": output} | tool.data | found.data
    ours = [("data", "inputs"), ("data", "output"), ("train", "sets"), ("train", "eval"), ("train", "output")]
    for key in ours:
        found.origins.setdefault(key, [_PLACE])
    train = {name: value for name, value in tool.train.items() if name not in lengths}
    if not any(name in found.train for name in lengths):
        train = tool.train
    if "max_steps" in found.train:
        found.train.pop("num_train_epochs", None)
    _settle_adapters(found, tool)
    folder = str(found.data["output"])
    sets = (
        {"sets": [f"{folder}/train"], "eval": {"held": f"{folder}/eval"}}
        if "eval" in found.data
        else {"sets": [folder]}
    )
    unasked = {"eval_strategy": "no"} if "eval" in found.data and not tool.evaluates else {}
    found.train = sets | {"output": "out"} | train | unasked | found.train


def _settle_adapters(found: Carried, tool: Tool) -> None:
    """Fill up the settings of new adapters; leave them out where none are made, and say so."""
    names = found.origins.get(("train", "lora"), [])
    if tool.adapters in names and not found.train.get("adapter"):
        lora = tool.lora | found.train["lora"]
        found.train["lora"] = {"alpha": 2 * lora["r"]} | lora
        if tool.name == "LLaMA-Factory" and not any(
            found.train.get(name) for name in ("bf16", "fp16", "dtype")
        ):
            found.lost["(dtype)"] = (
                "without bf16 it computes in the dtype that the model is stored in; here the frozen base is"
                " bfloat16 on a GPU that computes in it, and float32 elsewhere: dtype names another."
            )
    elif names:
        reason = "adapters are given." if tool.adapters in names else f"no {tool.adapters} asks for adapters."
        found.needless |= {name: reason for name in names if name in found.given}
        del found.train["lora"], found.origins["train", "lora"]
