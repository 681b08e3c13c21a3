"""Settings of both programs: file < `--set key=value` < flag; merged, validated, refused with their place.

The file and the values of `--set` are YAML; an error names where a key was set, as `sft.yaml:5`. For a
setting of another trainer, such as `max_seq_length` (TRL) or `cutoff_len` (LLaMA-Factory), it names ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sftdata.errors import UsageError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)
Program = Literal["sftdata", "sfttrain"]
Settings = dict[str, object]
Layer = tuple[Mapping[str, object], Mapping[str, str]]
"""The settings of one source, and the places of those that have one."""
Overlay = Callable[[Settings, Mapping[str, object], Mapping[str, str]], None]
"""Puts the settings of one source, with their places, over those of earlier sources."""


class NamesOfData:
    """Marks a mapping by names found in the data, as `Annotated[dict[str, str], NamesOfData]`.

    Such a name may hold dots, hyphens and equals signs; what it is mapped to holds no equals sign.
    """


def named_by_data(field: FieldInfo) -> bool:
    """Return whether a setting is a mapping by names found in the data."""
    return NamesOfData in field.metadata


_HELP = {"sftdata": "see `sftdata prepare --help`.", "sfttrain": "see `sfttrain run --help`."}
_KINDS = {
    dict: "a mapping", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"
}  # fmt: skip


def load_settings(
    model: type[Model],
    program: Program,
    files: Sequence[Layer],
    sets: Sequence[str],
    flags: Layer,
    overlay: Overlay = lambda settings, more, places: settings.update(more),
) -> Model:
    """Merge the settings of a program, each source over those before it, and validate them.

    Args:
        model: of all settings.
        sets: the `key=value` of each `--set`.
        overlay: how one source is merged; default: setting by setting.

    Raises:
        UsageError: a setting is unknown, missing or wrong, or a `--set` cannot be read.
    """
    settings: Settings = {}
    places: dict[str, str] = {}
    for values, lines in files:
        places |= lines
        overlay(settings, values, places)
    assigned: Settings = {}
    by_data = [name for name, field in model.model_fields.items() if named_by_data(field)]
    for text in sets:
        key = assign(assigned, text, settings, by_data)
        places[key] = f"--set {key}"
    overlay(settings, assigned, places)
    places |= flags[1]
    overlay(settings, flags[0], places)
    return check_settings(model, program, settings, places)


def check_settings(
    model: type[Model],
    program: Program,
    settings: Mapping[str, object],
    places: Mapping[str, str] | None = None,
) -> Model:
    """Validate settings, some of them with the place where they were set; None where there are only keywords.

    Raises:
        UsageError: an unknown or a missing key, or a value outside its range, with its place.
    """
    lines = places or {}
    for key in settings:
        if key not in model.model_fields:
            unknown = f"{lines[key]}: unknown" if key in lines else "Unknown"
            raise UsageError(f"{unknown} setting {key!r}.", _known(model, program, key))
    for key, field in model.model_fields.items():
        if field.is_required() and key not in settings:
            flag = flag_of(key, program)
            in_a_file = "" if places is None else f", or in the YAML file as `{key}:`"
            raise UsageError(f"{key} is not given.", f"name it with {flag}{in_a_file}.")
    try:
        return model(**settings)
    except ValidationError as error:
        raise _refusal(model, program, error, lines) from None


def _known(model: type[BaseModel], program: Program, key: str) -> str:
    """Return the fix for an unknown setting: ours of the same meaning, or of nearly the same name."""
    known = sorted(model.model_fields)
    meant = did_you_mean(key, known, f"known settings: {', '.join(known)}.")
    return answer(key, program) or meant


def _refusal(
    model: type[BaseModel], program: Program, error: ValidationError, places: Mapping[str, str]
) -> UsageError:
    """Return the first error of pydantic, as one line."""
    first = error.errors()[0]
    key, kind = ".".join(map(str, first["loc"])), first["type"]
    reason = first["msg"].removeprefix("Value error, ")
    if not key:  # several settings together
        what, _, fix = reason.partition("; ")
        return UsageError(f"Settings: {what}.", f"{fix}." if fix else _HELP[program])
    setting = key.partition(".")[0]
    field, place = model.model_fields.get(setting), places.get(setting, "")
    name = place if place.startswith("--") else f"{place}: setting {key!r}" if place else f"Setting {key!r}"
    meaning = f"correct it: {field.description}" if field and field.description else _HELP[program]
    choices = reason.split("'")[1::2] if kind == "literal_error" else ()
    found = first.get("input")
    digits = in_digits(str(found)) if kind.startswith(("int_", "float_")) else ""
    fix = digits or did_you_mean(str(found), choices, meaning)
    wanted = _wanted(kind, reason, first.get("ctx", {}))
    if kind == "string_pattern_mismatch" and field and field.examples:
        wanted = f"expected a text like {' or '.join(map(str, field.examples))}"
    return UsageError(f"{name}: found {found!r:.200}; {wanted}.", fix)


_WANTED = {
    "int": "expected a whole number", "float": "expected a number", "bool": "expected true or false",
    "string_type": "expected a text", "dict": "expected names and values, as NAME: VALUE",
    "tuple": "expected a list", "list": "expected a list", "path": "expected a path",
    "finite_number": "expected a finite number", "model": "expected names and values, as NAME: VALUE",
    "extra": "no such setting",
}  # fmt: skip
_BOUNDS = {
    "greater_than": "expected a number above {gt:,g}", "greater_than_equal": "expected {ge:,} or more",
    "less_than": "expected a number below {lt:,g}", "less_than_equal": "expected {le:,} or less",
    "literal_error": "expected {expected}", "too_short": "expected one or more",
}  # fmt: skip


def _wanted(kind: str, reason: str, context: Mapping[str, Any]) -> str:
    """Return what was expected, in our words, of a kind of error of pydantic; its reason for other kinds."""
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    return _WANTED.get(kind) or _WANTED.get(kind.partition("_")[0], reason)


def in_digits(text: str) -> str:
    """Return the fix for a number with a letter for thousands, which may count in tens or in twos.

    >>> in_digits("2k"), in_digits("two")
    ('write it in digits, as 2000 or 2048.', '')
    """
    found = re.fullmatch(r"(\d+)\s*([kKmM])", text.strip())
    if found is None:
        return ""
    power = "km".index(found[2].lower()) + 1
    return f"write it in digits, as {int(found[1]) * 1000**power} or {int(found[1]) * 1024**power}."


def read_settings_file(path: Path, *, names: bool = False) -> tuple[Settings, dict[str, str]]:
    """Read a settings file; return its settings, and the place of each, as `sft.yaml:5`.

    A hyphen in a top-level key counts as an underscore.

    Args:
        names: top-level keys are names of the user's, taken as they are.

    Raises:
        UsageError: an unreadable file, no mapping, or a repeated key.
    """
    try:
        text = path.read_text("utf-8")
        root, values = _parse(text)
    except IsADirectoryError:
        what = f"{path}: a folder; expected a YAML file of settings."
        raise UsageError(what, "name the file in it.") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.", "check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8.", "save the file as UTF-8.") from None
    except _NotYaml as error:
        line = f":{error.line}" if error.line else ""
        raise UsageError(f"{path}{line}: {error}.", "correct the file.") from None
    if root is None or not isinstance(values, dict):
        raise UsageError(f"{path}: found {_kind(values)}; expected settings, one `key: value` a line.")
    _refuse_duplicates(path, yaml.compose(text, yaml.SafeLoader))  # in `root` merges are written out
    places = {node.value: f"{path}:{node.start_mark.line + 1}" for node, _ in root.value}
    if names:
        return values, places
    places = {_spelled(key): place for key, place in places.items()}
    return {_spelled(key): value for key, value in values.items()}, places


def assign(
    settings: Settings,
    text: str,
    earlier: Mapping[str, object] | None = None,
    by_data: Collection[str] = (),
) -> str:
    """Apply one `key=value` of `--set`, where `a.b` is a key inside `a`. Return the setting it belongs to.

    Args:
        earlier: settings of other sources; `a.b` is set in a copy of theirs.
        by_data: settings inside which all up to the last equals sign is one name.

    Raises:
        UsageError: no `key=value`, a value that is not YAML, or a key inside a setting that is no mapping.
    """
    first, dot, _ = text.partition(".")
    if dot and first.strip().replace("-", "_") in by_data:
        key, equals, value = text.rpartition("=")
        parents, last = [first.strip().replace("-", "_")], key.partition(".")[2].strip()
    else:
        key, equals, value = text.partition("=")
        *parents, last = key.strip().replace("-", "_").split(".")
    if not equals or not all([*parents, last]):
        raise UsageError(f"--set {text:.80}: expected KEY=VALUE.", "--set max_length=2048")
    try:
        _, parsed = _parse(value)
    except _NotYaml as error:
        raise UsageError(
            f"--set {text:.80}: {error}.", "quote the value, as --set 'key=\"value\"'."
        ) from None
    if parents and earlier and parents[0] in earlier:
        settings.setdefault(parents[0], deepcopy(earlier[parents[0]]))
    inner = settings
    for depth, parent in enumerate(parents, start=1):
        value_there = inner.setdefault(parent, {})
        if not isinstance(value_there, dict):
            whole = ".".join(parents[:depth])
            raise UsageError(
                f"--set {text:.80}: {whole} is {_kind(value_there)}; nothing inside it can be set.",
                f"set {whole} whole.",
            )
        inner = value_there
    inner[last] = parsed
    return [*parents, last][0]


class _NotYaml(Exception):
    """The problem of a text, and its 1-based line; 0 if unknown."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


def _parse(text: str) -> tuple[yaml.Node | None, object]:
    """Return the root node and the value of a text."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    except RecursionError:
        raise _NotYaml("nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise _NotYaml(f"not YAML: {problem:.200}", mark.line + 1 if mark else 0) from None


def _refuse_duplicates(path: Path, root: yaml.Node) -> None:
    """Refuse a mapping with a repeated key; every node is visited once, as an alias is the node it names."""
    seen, nodes = set(), [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = _spelled(key.value) if node is root else str(key.value), key.start_mark.line + 1
                if name in lines:
                    repeated = f"{path}:{line}: {name!r} is there twice, in lines {lines[name]} and {line}."
                    raise UsageError(repeated, "keep one of them.")
                lines[name] = line
                nodes.append(value)


def _spelled(key: object) -> str:
    return str(key).replace("-", "_")


def _kind(value: object) -> str:
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


# ----------------------------------------------------------------- names of settings here and elsewhere


class Answer(NamedTuple):
    """Our equivalent of another tool's setting.

    Attributes:
        program: the one that has it.
        setting: our name of it; None if there is nothing to set.
        remark: how its values are written here, or why there is nothing to set.
    """

    program: Program
    setting: str | None
    remark: str = ""


def answer(name: str, program: Program) -> str | None:
    """Return our equivalent of a setting, or option, that a program does not have; None if no tool has it.

    >>> answer("--max-seq-length", "sftdata"), answer("max_seq_length", "sftdata")
    ('here it is --max-length.', 'here it is max_length.')
    >>> answer("max_length", "sfttrain")
    'it is a setting of `sftdata prepare`: --max-length.'
    """
    asked, name = name, name.strip("-").replace("-", "_")
    ours = ANSWERS.get(name) or (Answer("sftdata", name) if name in _OF_THE_DATA.split() else None)
    if ours is None or (ours.setting, ours.program) == (name, program):
        return None
    remark = f" {ours.remark}" if ours.remark else ""
    if ours.setting is None:
        return f"there is nothing to set:{remark}"
    flag, end = flag_of(ours.setting, ours.program), "," if remark and ours.remark[0].islower() else "."
    if ours.program == program:
        return f"here it is {flag if asked.startswith('-') else ours.setting}{end}{remark}"
    command = "sftdata prepare" if ours.program == "sftdata" else "sfttrain run"
    return f"it is a setting of `{command}`: {flag}{end}{remark}"


def flag_of(setting: str, program: Program = "sftdata") -> str:
    """Return the option of the command line for a setting."""
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
# Settings of `sftdata prepare` whose names mean the same in other tools, if they have them.
_OF_THE_DATA = """
inputs split subset format map map_role formatter kind prompt_template registry max_line_bytes tokenizer
chat_template template_kwargs date train_on response_template instruction_template mask_mode loss_weights
boundary eos_token trust_control_tokens max_length overlong max_rejects slice_bytes workers engine
like dedup exclude exclude_by cap mix mix_by passes total
processor max_pixels min_pixels images embed_images check_pixels
"""

# Settings of training that other tools take beside those of the data.
_OF_THE_TRAINING = """
model lora adapter quantize attention dtype objective loss learning_rate num_train_epochs max_steps optim
weight_decay per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
lr_scheduler_type warmup_steps max_grad_norm bf16 fp16 seed logging_steps save_steps save_strategy
save_total_limit eval_steps eval_strategy report_to neftune_noise_alpha use_liger_kernel deepspeed fsdp
resume_from_checkpoint push_to_hub trust_remote_code ddp_timeout model_init_kwargs init_from_config
activation_checkpointing
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
    "val_set_size": ("eval", "as 5%."),
    "dataset_exact_deduplication": ("dedup", "row."),
    # LLaMA-Factory
    "cutoff_len": ("max_length", ""),
    "mask_history": ("train_on", "last-assistant."),
    "train_on_prompt": ("train_on", "all."),
    "template": ("chat_template", ""),
    "neat_packing": ("packing", f"bfd. {_DEFAULT}"),
    "preprocessing_num_workers": ("workers", ""),
    "dataset": ("inputs", ""),
    "dataset_dir": ("inputs", ""),
    "val_size": ("eval", "as 5%."),
    "interleave_probs": ("mix", "NAME=SHARE, once for each source."),
    "max_samples": ("cap", "NAME=AMOUNT, as '*=1000 rows'."),
    "enable_thinking": ("template_kwargs", "As --set template_kwargs.enable_thinking=false."),
    # ms-swift
    "loss_scale": (
        "train_on",
        "assistant, last-assistant or all; a weight beside a message counts with --loss-weights.",
    ),
    "truncation_strategy": ("overlong", "truncate-left, truncate, drop or split."),
    "packing_length": ("max_length", ""),
    "split_dataset_ratio": ("eval", "as 5%."),
    "columns": ("map", "messages=COLUMN."),
    "use_chat_template": ("kind", "conversation or text."),
}
_OF_SFTTRAIN: dict[str, tuple[str | None, str]] = {
    "dry_run": (None, "`sfttrain plan` says what a run would take, and trains nothing."),
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
    "use_liger": ("kernels", "liger."),
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
