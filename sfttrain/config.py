"""Every setting of a run. Precedence: YAML file < `--set key=value` < flag.

Keys that are not ours are fields of transformers' TrainingArguments: `--set learning_rate=1e-5` reaches them all.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from sftdata.errors import UsageError
from sftdata.paths import local_output

# What we set otherwise than transformers does; each can be set back.
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,  # a packed row is a batch of its own
    "per_device_eval_batch_size": 1,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
    "save_total_limit": 2,  # one complete checkpoint stays while the next is written
    "report_to": "none",
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,  # every parameter takes part in every step
}
# Older names of the same thing, as scripts still have them.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_OURS = {"attn_implementation": "attention", "torch_dtype": "dtype", "dtype": "dtype", "revision": "revision"}


class LoraSettings(BaseModel):
    """Low-rank adapters: `r=16,alpha=32,target=all-linear,dropout=0.05,rslora=true`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(16, gt=0, description="Rank.")
    alpha: int = Field(32, gt=0, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target: str = Field("all-linear", description="all-linear, or names of modules joined by +, as q_proj+v_proj.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    rslora: bool = Field(False, description="Multiply by alpha / sqrt(r) instead, which keeps high ranks stable.")
    dora: bool = Field(False, description="Train magnitude and direction of the weights apart.")
    modules_to_save: str = Field("", description="Modules trained in full beside the adapters, joined by +.")


class TrainConfig(BaseModel):
    """What to train on what, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # ---- data
    sets: tuple[Path, ...] = Field((), description="Folders that `sftdata prepare` wrote.")
    weights: tuple[float, ...] = Field((), description="Passes over each set in one epoch; default: 1 each.")
    eval: dict[str, Path] = Field(default_factory=dict, description="Evaluation sets by name.")

    # ---- model
    model: str | None = Field(None, description="Folder or Hub id of the model.")
    init_from_config: Path | None = Field(None, description="config.json of a model to train from scratch.")
    revision: str | None = Field(None, description="Revision of a Hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the weights; auto: float32, but bfloat16 for a frozen base on a GPU that has it."
    )
    model_init_kwargs: dict[str, Any] = Field(default_factory=dict, description="More arguments for from_pretrained.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters only.")
    adapter: Path | None = Field(None, description="Folder of adapters to go on training.")
    resize_to_multiple_of: int = Field(1, gt=0, description="Round embeddings up to this when they grow for added tokens.")
    quantize: Literal["nf4", "int8", "torchao-int8"] | None = Field(
        None, description="Quantize the frozen base; needs lora, and bitsandbytes or torchao."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings along.")

    # ---- how
    attention: str = Field("auto", description="auto, or one implementation by name; sdpa:flash forces a kernel of sdpa.")
    loss: Literal["auto", "chunked", "torch", "liger", "plain"] = Field("auto", description="auto: chunked, where proven equal.")
    objective: Literal["nll", "dft"] = Field("nll", description="dft weighs each token's loss by its own probability.")
    packing: Literal["auto", "require", "unpack"] = Field(
        "auto", description="When packing would leak: auto unpacks and says so, require refuses, unpack always unpacks."
    )

    # ---- where
    output: Path = Field(description="Folder of the run: checkpoints, then the model.")
    overwrite: bool = Field(False, description="Start anew in a folder that holds a run.")
    push_to_hub: str | None = Field(None, description="Hub repository that gets the finished model, as name/model.")
    training: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers' TrainingArguments.")

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, value: Path) -> Path:
        return local_output(value)

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part]
        bad = [key for key, equals, _ in pairs if not equals]
        if bad:
            raise ValueError(f"expected key=value pairs such as r=16,alpha=32, found {bad[0]!r}")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @field_validator("quantize", mode="before")
    @classmethod
    def _known_quantization(cls, value: Any) -> Any:
        if value == "torchao-int4":
            raise ValueError("transformers trains on torchao's 8-bit weights only; for 4 bits set nf4")
        return value

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Take from model_init_kwargs what is a setting of its own, so that it is said and checked as one."""
        given = dict(settings.get("model_init_kwargs") or {})
        lifted = {
            ours: str(given.pop(name)).removeprefix("torch.") for name, ours in _OURS.items() if given.get(name) is not None
        }
        for name, value in lifted.items():
            if settings.get(name, value) != value:
                raise ValueError(f"model_init_kwargs says {name}={value}, and {name} is {settings[name]}; set one of them")
        return {**settings, **lifted, "model_init_kwargs": given} if given or lifted else settings

    @field_serializer("model_init_kwargs", when_used="json")
    def _plain(self, value: dict[str, Any]) -> dict[str, Any]:
        return {key: one if isinstance(one, bool | int | float | str | dict | None) else str(one) for key, one in value.items()}

    @field_validator("sets", mode="before")
    @classmethod
    def _one_set_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if (self.model is None) == (self.init_from_config is None):
            raise ValueError("name either a model or init_from_config")
        if self.lora and self.adapter:
            raise ValueError("adapter brings its own shape; leave lora out")
        if self.weights and len(self.weights) != len(self.sets):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sets)} sets")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights are above 0")
        if self.lora and self.init_from_config:
            raise ValueError("adapters of fresh random weights are of no use; name a model, or leave lora out")
        if self.quantize and not self.adapted:
            raise ValueError("quantize freezes the model, so it needs lora, as --lora r=16")
        return self

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained on a frozen model."""
        return self.lora is not None or self.adapter is not None

    @property
    def learning_rate(self) -> float:
        """The rate when none is set: weights from nothing bear more than adapters, adapters more than trained weights."""
        return 1e-3 if self.init_from_config else 2e-4 if self.adapted else 2e-5

    @property
    def set_weights(self) -> tuple[float, ...]:
        """Passes over each set in one epoch."""
        return self.weights or (1.0,) * len(self.sets)


def read_settings(file: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> TrainConfig:
    """Merge a YAML file, `key=value` overrides and flags into a checked configuration.

    Args:
        flags: flags by setting name; None means not given.

    Raises:
        UsageError: an unreadable file, an unknown key, or a value outside its range.
    """
    merged: dict[str, Any] = {"training": dict(TRAINING_DEFAULTS)}
    for source in (_from_file(file), _from_overrides(overrides), flags):
        for key, value in source.items():
            if value is None:
                continue
            if key == "training":
                if not isinstance(value, dict):
                    raise UsageError(
                        f"Setting 'training': expected fields of TrainingArguments; found {value!r:.200}.", "training.seed=1"
                    )
                for name, part in value.items():
                    _place(merged, name, part, own=False)
            else:
                _place(merged, key, value)
    if not merged.get("output"):
        raise UsageError("output is not given.", "name the folder of the run with -o, or in the YAML file as `output:`.")
    if merged.get("adapter") and not merged.get("model"):
        merged["model"] = adapter_base(Path(merged["adapter"]))
    try:
        return TrainConfig(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        where, text = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        found = f"Setting {where!r}: {text}; found {first.get('input')!r:.200}" if where else f"Settings: {text}"
        raise UsageError(f"{found}.", "see `sfttrain run --help`.") from None


def training_fields() -> dict[str, str]:
    """Return the fields of TrainingArguments and their types, as text."""
    from transformers import TrainingArguments

    known = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments) if field.init}
    return {name: known[old] for old, name in _RENAMED.items() if old in known} | known


def named_as_installed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments by the names of the installed transformers, which may be older than ours."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    older = {name: old for old, name in _RENAMED.items()}
    return {name if name in known else older.get(name, name): value for name, value in settings.items()}


def adapter_base(folder: Path) -> str:
    """Return the model that adapters were trained on.

    Raises:
        UsageError: the folder holds no adapters.
    """
    path = folder / "adapter_config.json"
    try:
        return str(json.loads(path.read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used ({error})"
        raise UsageError(f"{folder}: adapter_config.json {found}.", "name a folder that a run with --lora wrote.") from None


def checked_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments as it takes them.

    Raises:
        UsageError: it has no such field, or the value is no number where one is wanted.
    """
    known = training_fields()
    for key in given:
        if key not in known:
            raise _unknown(key, [*TrainConfig.model_fields, *known])
    return {key: _coerced(key, value, known[key]) for key, value in given.items()}


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: found {type(content).__name__}; expected settings, one `key: value` a line.")
    return content


def _from_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UsageError(f"--set {text!r}: expected key=value.")
        *parents, leaf = key.strip().split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {text!r}: {parent} is {place!r} already, which has no {leaf}.", "set one of them.")
        try:
            place[leaf] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"--set {text!r}: the value is not YAML: {error}.", "quote it, as key='\"text\"'.") from None
    return settings


def _place(merged: dict[str, Any], key: str, value: Any, own: bool = True) -> None:
    """Put a setting where it belongs, or refuse its name."""
    if own and key in TrainConfig.model_fields:
        merged[key] = merged[key] | value if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        return
    merged["training"][_RENAMED.get(key, key)] = value


def _unknown(key: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(key, known, n=1)
    return UsageError(f"Unknown setting {key!r}.", f"did you mean {near[0]!r}?" if near else "see `sfttrain config`.")


def _coerced(key: str, value: Any, annotation: str) -> Any:
    """Undo what YAML does to `1e-5`, which it takes for text, and to `no`, which it takes for false."""
    if isinstance(value, bool) and "bool" not in annotation:
        return "yes" if value else "no"
    wanted = next((kind for kind in (float, int) if kind.__name__ in annotation), None)
    if isinstance(value, str) and wanted is not None:
        try:
            return wanted(value)
        except ValueError:
            if "str" not in annotation:
                raise UsageError(f"Setting {key!r}: expected a number; found {value!r}.", "write it as 2e-5 or 3.") from None
    return value
