"""Settings of TRL, axolotl and LLaMA-Factory as settings of `sftdata prepare` and of `sfttrain run`.

One table a tool, followed in its own order: what a later setting refines, an earlier one has set, however the
file is sorted. A setting that no table knows is lost; what a tool does where its file says nothing is carried
over too, so that the file means the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sftdata.carried import (
    Carried,
    Rule,
    Said,
    Settings,
    Tool,
    bits,
    both,
    chosen,
    listed,
    lost,
    needless,
    share,
    targets,
    to,
    where,
)
from sftdata.errors import UsageError

_SAME = """
adam_beta1 adam_beta2 adam_epsilon bf16 data_seed dataloader_num_workers dataloader_pin_memory ddp_timeout
deepspeed
eval_steps eval_strategy fp16 gradient_accumulation_steps learning_rate logging_steps logging_strategy
lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps neftune_noise_alpha num_train_epochs optim
optim_args per_device_eval_batch_size per_device_train_batch_size report_to run_name save_only_model
save_steps save_strategy save_total_limit seed tf32 use_cpu weight_decay warmup_steps
load_best_model_at_end metric_for_best_model greater_is_better eval_on_start logging_first_step
"""
_MODEL = both(to("train", "model"), to("data", "tokenizer"))
_TRUSTED = to("train", "trust_remote_code")
_DEFAULT = needless("it is what happens by default.")
_FASTEST = needless("the fastest attention that is proven right is chosen.")
_LIGER = where(True, lambda found, name, _: found.put("train", "kernels", "liger", name), _DEFAULT)
_SHARDED = lost("accelerate launch --config_file examples/accelerate/fsdp2.yaml -m sfttrain run ... shards.")
_CHECKPOINTING = to("train", "activation_checkpointing")
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
        found.put("train", "warmup_steps", value, name)  # below 1 it is a share of the steps


_COMMON: dict[str, Rule] = {
    **{name: _same(name) for name in _SAME.split()},
    "warmup_ratio": _warmup_ratio,
    "trust_remote_code": _TRUSTED,
    "gradient_checkpointing": _CHECKPOINTING,
    "lora_dropout": to("train", "lora.dropout"),
    "lora_alpha": to("train", "lora.alpha"),
    "output_dir": to("train", "output"),
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
    "model_revision": both(to("train", "revision"), to("data", "revision")),
    "dtype": to("train", "dtype"),
    "torch_dtype": to("train", "dtype"),
    "attn_implementation": _FASTEST,
    "dataset_name": to("data", "inputs", lambda value: [value]),
    "dataset_config": to("data", "subset"),
    "dataset_train_split": to("data", "split"),
    "dataset_test_split": lost("sftdata prepare --split makes a set of it, which --eval NAME=FOLDER names."),
    "dataset_streaming": needless("rows are read in slices."),
    "dataset_num_proc": to("data", "workers"),
    "dataset_text_field": where("text", _DEFAULT, to("data", "map.text")),
    "max_length": to("data", "max_length"),
    "max_seq_length": to("data", "max_length"),
    "truncation_mode": to(
        "data", "overlong", chosen({"keep_start": "truncate", "keep_end": "truncate-left"})
    ),
    "packing": _PACKING,
    "packing_strategy": _trl_strategy,
    "eval_packing": lost("prepare the set to evaluate on with --packing."),
    "padding_free": needless("packed rows are trained without padding."),
    "pad_token": needless("padding is never trained, whatever its token is."),
    "eos_token": to("data", "eos_token"),
    "chat_template_path": to("data", "chat_template"),
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
    "lora_r": to("train", "lora.r"),
    "lora_target_modules": to("train", "lora.target", targets),
    "lora_target_parameters": to("train", "lora.parameters", targets),
    "lora_modules_to_save": to("train", "lora.modules_to_save", targets),
    "lora_task_type": _DEFAULT,
    "use_rslora": to("train", "lora.rslora"),
    "use_dora": to("train", "lora.dora"),
    "push_to_hub": _trl_push,
    "hub_model_id": _trl_hub_id,
}  # fmt: skip

# --------------------------------------------------------------------------------------------- axolotl

_AX_KINDS = {"chat_template": "conversation", "alpaca": "completion", "completion": "text"}
_AX_SETTINGS = {"split": "split", "name": "subset", "field_messages": "map.messages", "field": "map.text"}
_AX_DEFAULTS = [
    ("message_property_mappings", {"role": "from", "content": "value"}), ("roles_to_train", ["assistant"]),
    ("field_messages", "messages"), ("field_messages", "conversations"), ("field", "text"),
]  # fmt: skip


def _ax_datasets(found: Carried, name: str, value: Any) -> None:
    """Carry the list of datasets over, each of its keys by itself."""
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    inputs: list[str] = []
    said: list[Said] = []
    for number, entry in enumerate(entries, start=1):
        files, path = entry.get("data_files"), str(entry.get("path"))
        files = [files] if isinstance(files, str) else files or []
        inputs += [f"hf://datasets/{path}/{file}" for file in files] or [path]
        said.append({})
        for key, setting in entry.items():
            if key not in ("path", "data_files"):
                _ax_dataset_key(found, said[-1], f"{name}[{number}].{key}", key, setting)
    found.put_agreed(said)
    if inputs:
        found.put("data", "inputs", inputs, name)
    else:
        found.lost[name] = "it names no path."


def _ax_dataset_key(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if (key, value) in _AX_DEFAULTS:
        found.needless[place] = "it is found, or what happens by default."
    elif key in _AX_SETTINGS:
        said[_AX_SETTINGS[key]] = value, place
    elif key == "type" and str(value) in _AX_KINDS:
        said["kind"] = _AX_KINDS[str(value)], place
    else:
        found.lost[place] = f"{value!r}: no dataset has such a setting of its own; see --format and --map."


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


def _ax_special(found: Carried, name: str, value: Any) -> None:
    for key, token in dict(value).items():
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
    "tokenizer_config": to("data", "tokenizer"),
    "revision_of_model": both(to("train", "revision"), to("data", "revision")),
    **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config"), _READ_FROM_MODEL),
    "datasets": _ax_datasets,
    "val_set_size": where(0, needless("nothing is held out by default."), to("data", "eval", share)),
    "dataset_prepared_path": to("data", "output"),
    "dataset_processes": to("data", "workers"),
    "sequence_len": to("data", "max_length"),
    "sample_packing": _PACKING,
    "eval_sample_packing": lost("the held-out set is packed as the other is."),
    "max_packed_sequence_len": lost("sequence_len, here max_length, is the length of packed rows."),
    "pad_to_sequence_len": needless("packed rows always have the same length."),
    "train_on_inputs": to("data", "train_on", lambda _: "all"),
    "group_by_length": lost("sftdata view --order length orders rows by length."),
    "chat_template": where("tokenizer_default", _DEFAULT, to("data", "chat_template")),
    "special_tokens": _ax_special,
    "adapter": _ax_adapter,
    "load_in_4bit": to("train", "quantize", lambda _: "nf4"),
    "load_in_8bit": to("train", "quantize", lambda _: "int8"),
    "lora_r": to("train", "lora.r"),
    "lora_target_linear": to("train", "lora.target", lambda _: "all-linear"),
    "lora_target_modules": to("train", "lora.target", targets),
    "lora_modules_to_save": to("train", "lora.modules_to_save", targets),
    "lora_model_dir": to("train", "adapter"),
    "peft_use_rslora": to("train", "lora.rslora"),
    "peft_use_dora": to("train", "lora.dora"),
    "micro_batch_size": to("train", "per_device_train_batch_size"),
    "batch_size": lost("it is micro_batch_size x gradient_accumulation_steps x GPUs."),
    "num_epochs": to("train", "num_train_epochs"),
    "optimizer": to("train", "optim"),
    "lr_scheduler": to("train", "lr_scheduler_type"),
    "bf16": where("auto", _DEFAULT, to("train", "bf16")),
    "gradient_checkpointing_kwargs": to("train", "activation_checkpointing_kwargs"),
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


def _lf_datasets(found: Carried, name: str, value: Any) -> None:
    """Find each name in dataset_info.json."""
    folder = str(found.given.get("dataset_dir") or "data")
    path, known = _lf_info(found.folder / folder, found.folder)
    inputs = []
    said: list[Said] = []
    for dataset in listed(value):
        entry = known.get(dataset)
        if entry is None:
            reason = f"no dataset_info.json beside the file, or in its {folder}/, knows it."
            found.lost[f"{name}: {dataset}"] = reason
            continue
        local = path.parent / entry["file_name"] if "file_name" in entry else entry.get("script_url")
        inputs.append(str(entry.get("hf_hub_url") or local))
        said.append({})
        for key, setting in entry.items():
            _lf_entry(found, said[-1], f"{name}: {dataset}.{key}", key, setting)
    found.put_agreed(said)
    if inputs:
        found.put("data", "inputs", inputs, name)


def _lf_info(*folders: Path) -> tuple[Path, Mapping[str, Settings]]:
    """Return the dataset_info.json that is there, and what it holds; nothing where none is."""
    paths = [folder / "dataset_info.json" for folder in folders]
    path = next(filter(Path.is_file, paths), paths[0])
    try:
        return path, json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}).", "correct it; it is JSON.") from None


_LF_NEEDLESS = {
    **dict.fromkeys(("ms_hub_url", "om_hub_url"), "the Hub has it."),
    **dict.fromkeys(("formatting", "tags"), "the format is found from the rows; sftdata detect shows it."),
}
_LF_COLUMNS = {
    "messages": "messages", "prompt": "instruction", "query": "input", "response": "output",
    "tools": "tools", "system": "system", "history": "history",
}  # fmt: skip


def _lf_entry(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if key in _LF_NEEDLESS:
        found.needless[place] = _LF_NEEDLESS[key]
    elif key in ("subset", "split"):
        said[key] = value, place
    elif key == "columns" and set(value) <= set(_LF_COLUMNS):
        named = {_LF_COLUMNS[name]: column for name, column in value.items()}
        others = {name: column for name, column in named.items() if column not in (name, "conversations")}
        said |= {f"map.{name}": (column, place) for name, column in others.items()}
        if not others:
            found.needless[place] = "the columns are found."
    elif key not in ("file_name", "hf_hub_url"):
        found.lost[place] = "no dataset has such a setting of its own."


_FACTORY: dict[str, Rule] = {
    "model_name_or_path": _MODEL,
    "stage": where("sft", _DEFAULT, lost("only supervised fine-tuning is carried over.")),
    "finetuning_type": where("full", _DEFAULT, to("train", "lora.r", chosen({"lora": 8}))),
    "lora_rank": to("train", "lora.r"),
    "lora_target": to("train", "lora.target", targets),
    "use_rslora": to("train", "lora.rslora"),
    "use_dora": to("train", "lora.dora"),
    "additional_target": to("train", "lora.modules_to_save", targets),
    "adapter_name_or_path": to("train", "adapter"),
    "dataset": _lf_datasets,
    "dataset_dir": needless("the datasets are named with their folder."),
    "eval_dataset": lost("prepare it as a set of its own, which --eval NAME=FOLDER names."),
    "template": lost("the tokenizer's own chat template is used; chat_template names another."),
    "cutoff_len": to("data", "max_length"),
    "max_samples": lambda found, name, value: (
        lost("it is of each dataset: sftdata prepare --cap NAME='N rows', once for each of them.")
        if len(found.data.get("inputs", ())) > 1
        else to("data", "cap", lambda value: {"*": f"{value} rows"}))(found, name, value),
    "val_size": to("data", "eval", share),
    "packing": _PACKING,
    "neat_packing": to("data", "packing", lambda _: "bfd"),
    "mask_history": to("data", "train_on", lambda _: "last-assistant"),
    "train_on_prompt": to("data", "train_on", lambda _: "all"),
    "preprocessing_num_workers": to("data", "workers"),
    "overwrite_cache": needless("a set is up to date, or made anew."),
    "tokenized_path": to("data", "output"),
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
    Tool("axolotl", ("base_model",), _AXOLOTL, {"max_length": 512, "packing": "none"},
         {"per_device_train_batch_size": 1, "lr_scheduler_type": "cosine", "num_train_epochs": 1},
         {"alpha": 16, "target": "q_proj+v_proj"}, "adapter"),
    Tool("LLaMA-Factory", ("stage", "finetuning_type", "cutoff_len", "template"), _FACTORY,
         {"max_length": 2048, "packing": "none"},
         {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3},
         {"target": "all-linear"}, "finetuning_type", {"finetuning_type": "lora"}),
    Tool("TRL", ("model_name_or_path",), _TRL, {"max_length": 1024, "packing": "none"},
         {"learning_rate": 2e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3},
         {"alpha": 32, "dropout": 0.05, "target": "q_proj+v_proj"}, "use_peft"),
)  # fmt: skip


_PLACE = "where it lies, in both files"
_SAID_BY_OFF = {
    "packing", "sample_packing", "completion_only_loss", "assistant_only_loss", "report_to", "bf16",
    "eval_strategy", "save_strategy", "logging_strategy", "greater_is_better",
}  # fmt: skip


def carry_over(path: Path, output: str) -> Carried:
    """Read a settings file of another tool.

    Args:
        path: of the file.
        output: folder of the set, where the file names none.

    Raises:
        UsageError: it cannot be read, or is none of a tool that is known.
    """
    try:
        read = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--from {path}: cannot be read ({reason}).", "name a YAML file.") from None
    names = read if isinstance(read, dict) else {}
    tool = next((tool for tool in TOOLS if any(mark in names for mark in tool.marks)), None)
    if tool is None:
        what = f"--from {path}: names no model by model_name_or_path or base_model."
        raise UsageError(what, "give the settings file of TRL, axolotl or LLaMA-Factory.")
    found = Carried(tool.name, path.parent, {str(name): value for name, value in names.items()})
    rules = _COMMON | dict(tool.rules)
    places = {name: place for place, name in enumerate(rules)}
    given = dict(tool.unsaid) | names
    for name in sorted(given, key=lambda name: places.get(name, len(places))):
        value = given[name]
        if value is None or (_off(value) and name not in _SAID_BY_OFF):
            found.needless[name] = "it is off, or empty."
        else:
            rules.get(name, lost("there is no such setting."))(found, str(name), value)
    _fill_up(found, tool, output)
    return found


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
    found.train = sets | {"output": "out"} | train | found.train


def _settle_adapters(found: Carried, tool: Tool) -> None:
    """Fill up the settings of new adapters; leave them out where none are made, and say so."""
    names = found.origins.get(("train", "lora"), [])
    if tool.adapters in names and not found.train.get("adapter"):
        lora = tool.lora | found.train["lora"]
        found.train["lora"] = {"alpha": 2 * int(lora["r"])} | lora
    elif names:
        reason = "adapters are given." if tool.adapters in names else f"no {tool.adapters} asks for adapters."
        found.needless |= {name: reason for name in names if name in found.given}
        del found.train["lora"], found.origins["train", "lora"]
