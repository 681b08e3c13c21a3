"""What other trainers call our settings, and which of our two programs a setting belongs to.

Whoever types `max_seq_length` (TRL), `sequence_len` (axolotl), `cutoff_len` (LLaMA-Factory) or `loss_scale` (ms-swift) is told
what does the same here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Program = Literal["sftdata", "sfttrain"]


class Answer(NamedTuple):
    """What does the same as a setting of another tool.

    Attributes:
        program: the one that has it.
        setting: our name of it; None where there is none to set.
        remark: how its values are written here, or why there is none.
    """

    program: Program
    setting: str | None
    remark: str = ""


def answer(name: str, program: Program) -> str | None:
    """Return how a setting that a program does not know is written; None for one that no tool has.

    >>> answer("--max-seq-length", "sftdata")
    'here it is --max-length.'
    >>> answer("max_length", "sfttrain")
    'it is a setting of `sftdata prepare`: --max-length.'
    """
    name = name.strip("-").replace("-", "_")
    found = ANSWERS.get(name) or (Answer("sftdata", name) if name in _OF_THE_DATA.split() else None)
    if found is None or (found.setting, found.program) == (name, program):
        return None
    remark = f" {found.remark}" if found.remark else ""
    if found.setting is None:
        return f"there is nothing to set:{remark}"
    flag = flag_of(found.setting, found.program)
    if found.program == program:
        return f"here it is {flag}.{remark}"
    command = "sftdata prepare" if found.program == "sftdata" else "sfttrain run"
    return f"it is a setting of `{command}`: {flag}.{remark}"


def flag_of(setting: str, program: Program = "sftdata") -> str:
    """Return how a setting is given on the command line."""
    if program == "sfttrain":
        return _FLAGS.get(setting, f"--set {setting}=VALUE")
    if setting == "inputs":
        return "INPUT, the first argument"
    return f"--set {setting}=VALUE" if setting in _WITHOUT_FLAG else "--" + setting.replace("_", "-")


_FLAGS = {
    "model": "--model", "lora": "--lora", "output": "-o", "adapter": "--adapter", "quantize": "--quantize",
    "attention": "--attention", "max_steps": "--max-steps", "num_train_epochs": "--epochs",
    "init_from_config": "--init-from-config", "push_to_hub": "--push-to-hub", "report_to": "--report-to",
}  # fmt: skip
_WITHOUT_FLAG = {"template_kwargs", "max_line_bytes", "slice_bytes"}
# Settings of `sftdata prepare` that no other tool has under another meaning.
_OF_THE_DATA = """
inputs split subset format map map_role formatter kind prompt_template max_line_bytes tokenizer chat_template
template_kwargs date train_on response_template instruction_template mask_mode loss_weights boundary eos_token
trust_control_tokens max_length overlong max_rejects slice_bytes workers engine
"""

# Settings of training that a user of other tools gives beside those of the data.
_OF_THE_TRAINING = """
model lora adapter quantize attention dtype objective loss learning_rate num_train_epochs max_steps optim weight_decay
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps
max_grad_norm bf16 fp16 seed logging_steps save_steps save_strategy save_total_limit eval_steps eval_strategy report_to
neftune_noise_alpha use_liger_kernel deepspeed fsdp resume_from_checkpoint push_to_hub trust_remote_code ddp_timeout
model_init_kwargs init_from_config activation_checkpointing
"""

_DEFAULT = "It is what happens by default."
_OF_SFTDATA: dict[str, tuple[str | None, str]] = {
    # TRL
    "max_seq_length": ("max_length", ""),
    "packing_strategy": ("packing", "bfd or wrapped."),
    "assistant_only_loss": ("train_on", f"assistant. {_DEFAULT}"),
    "completion_only_loss": ("train_on", f"completion. {_DEFAULT}"),
    "dataset_text_field": ("map", "text=COLUMN."),
    "pad_token": (None, "padding is never trained, whatever its token is."),
    "dataset_num_proc": ("workers", ""),
    "chat_template_path": ("chat_template", ""),
    "formatting_func": ("formatter", "module:function."),
    "truncation_mode": ("overlong", "truncate or truncate-left."),
    "response_part": ("response_template", ""),
    "instruction_part": ("instruction_template", ""),
    # axolotl
    "sequence_len": ("max_length", ""),
    "sample_packing": ("packing", "bfd, wrapped or none."),
    "eval_sample_packing": ("packing", "bfd, wrapped or none, when the set to evaluate on is prepared."),
    "eval_packing": ("packing", "bfd, wrapped or none, when the set to evaluate on is prepared."),
    "pad_to_sequence_len": (None, "packed rows always have the same length."),
    "train_on_inputs": ("train_on", "all, to train prompts too."),
    "roles_to_train": ("train_on", f"assistant. {_DEFAULT}"),
    "train_on_eos": (None, "the end of each trained turn is trained."),
    "train_on_eot": (None, "the end of each trained turn is trained."),
    "excess_length_strategy": ("overlong", "truncate or drop."),
    "dataset_processes": ("workers", ""),
    "tokenizer_config": ("tokenizer", ""),
    "tokenizer_name": ("tokenizer", ""),
    "tokenizer_name_or_path": ("tokenizer", ""),
    "datasets": ("inputs", ""),
    "dataset_prepared_path": ("output", ""),
    "field_messages": ("map", "messages=COLUMN."),
    "roles": ("map_role", "bot=assistant."),
    # LLaMA-Factory
    "cutoff_len": ("max_length", ""),
    "mask_history": ("train_on", "last-assistant."),
    "train_on_prompt": ("train_on", "all."),
    "template": ("chat_template", ""),
    "neat_packing": ("packing", f"bfd. {_DEFAULT}"),
    "preprocessing_num_workers": ("workers", ""),
    "dataset": ("inputs", ""),
    "dataset_dir": ("inputs", ""),
    "enable_thinking": ("template_kwargs", "As --set template_kwargs.enable_thinking=false."),
    # ms-swift
    "loss_scale": (
        "train_on",
        "assistant, last-assistant or all; a weight beside a message counts with --loss-weights.",
    ),
    "truncation_strategy": ("overlong", "truncate-left, truncate, drop or split."),
    "packing_length": ("max_length", ""),
    "columns": ("map", "messages=COLUMN."),
    "use_chat_template": ("kind", "conversation or text."),
}
_OF_SFTTRAIN: dict[str, tuple[str | None, str]] = {
    "padding_free": (None, "packed rows are trained without padding."),
    "batch_size": ("per_device_train_batch_size", ""),
    "micro_batch_size": ("per_device_train_batch_size", ""),
    "epochs": ("num_train_epochs", ""),
    "num_epochs": ("num_train_epochs", ""),
    "lr": ("learning_rate", ""),
    "lr_scheduler": ("lr_scheduler_type", ""),
    "optimizer": ("optim", ""),
    "base_model": ("model", ""),
    "model_name_or_path": ("model", ""),
    "output_dir": ("output", ""),
    "load_in_4bit": ("quantize", "nf4."),
    "load_in_8bit": ("quantize", "int8."),
    "quantization_bit": ("quantize", "nf4 or int8."),
    "finetuning_type": ("lora", "r=16 for lora; leave it out for full."),
    "tuner_type": ("lora", "r=16 for lora; leave it out for full."),
    "adapter_name_or_path": ("adapter", ""),
    "use_dora": ("lora", "r=16,dora=true."),
    "use_rslora": ("lora", "r=16,rslora=true."),
    "flash_attention": ("attention", ""),
    "flash_attn": ("attention", ""),
    "sdp_attention": ("attention", ""),
    "attn_impl": ("attention", ""),
    "attn_implementation": ("attention", ""),
    "torch_dtype": ("dtype", ""),
    "loss_type": ("objective", "nll or dft."),
    "use_dft_loss": ("objective", "dft."),
    "use_liger": ("loss", "liger."),
    "gradient_checkpointing": ("activation_checkpointing", "true."),
    "neftune_alpha": ("neftune_noise_alpha", ""),
    **dict.fromkeys(
        ("lora_r", "lora_rank", "lora_alpha", "lora_dropout"), ("lora", "r=16,alpha=32,dropout=0.05.")
    ),
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "target_modules"), ("lora", "r=16,target=all-linear.")
    ),
    **{name: (name, "") for name in _OF_THE_TRAINING.split()},
}
ANSWERS: dict[str, Answer] = {name: Answer("sftdata", *rest) for name, rest in _OF_SFTDATA.items()}
ANSWERS |= {name: Answer("sfttrain", *rest) for name, rest in _OF_SFTTRAIN.items()}
