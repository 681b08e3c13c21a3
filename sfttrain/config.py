"""Every setting of a run. Precedence: YAML file < `--set key=value` < flag.

Keys that are not ours are fields of transformers' TrainingArguments: `--set learning_rate=1e-5` reaches them
all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from sftdata.choosing import MixBy, Shares
from sftdata.errors import UsageError, did_you_mean
from sftdata.output import counted, local_output
from sftdata.settings import Layer, answer, load_settings, read_settings_file

WINDOW = 64  # shards, of sets behind URLs
# Our defaults where they differ from transformers'; each can be set back.
TRAINING_DEFAULTS: dict[str, object] = {
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
RENAMED = {
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
    target: str = Field(
        "all-linear", description="all-linear, or module names joined by +, as q_proj+v_proj."
    )
    parameters: str = Field(
        "",
        description="Parameters that are not a module's weight, such as experts', joined by +:"
        " experts.gate_up_proj.",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    rslora: bool = Field(
        False, description="Multiply by alpha / sqrt(r) instead, which keeps high ranks stable."
    )
    dora: bool = Field(False, description="Train magnitude and direction of the weights separately.")
    modules_to_save: str = Field("", description="Modules trained in full besides the adapters, joined by +.")


class TrainConfig(BaseModel):
    """What to train on what, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # ---- data
    sets: tuple[Path, ...] = Field((), description="Folders or URLs of finished sets.")
    weights: tuple[float, ...] = Field((), description="Passes over each set in one epoch; default: 1 each.")
    mix: Shares = Field(
        default_factory=dict,
        description="Shares of the sets, instead of weights: NAME=SHARE by the folder's name or its path; all"
        " in percent, or in proportion to each other.",
    )
    mix_by: MixBy = "trained"
    passes: float | None = Field(None, gt=0, description="How often a run may go through a set, at most.")
    window: int | None = Field(
        None,
        ge=1,
        description="Shuffle rows in a window of so many shards that moves through each set; default:"
        f" {WINDOW} for sets behind URLs, else over the whole set.",
    )
    new_leg: bool = Field(
        False, description="Let a run go on with other sets, weights or shares than it had so far."
    )
    eval: dict[str, Path] = Field(default_factory=dict, description="Evaluation sets by name.")

    # ---- model
    model: str | None = Field(None, description="Folder or Hub id of the model.")
    init_from_config: Path | None = Field(None, description="config.json of a model to train from scratch.")
    revision: str | None = Field(None, description="Revision of a Hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the weights; auto: float32,"
        " but bfloat16 for a frozen base on a GPU that supports it.",
    )
    model_init_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments for from_pretrained."
    )
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters only.")
    adapter: Path | None = Field(None, description="Folder of adapters to continue training.")
    freeze: Literal["auto", "none", "vision", "vision+projector"] = Field(
        "auto",
        description="What is not trained, nor gets adapters, in a model of pictures; auto: its vision tower,"
        " and under adapters its projector too.",
    )
    resize_to_multiple_of: int = Field(
        1, gt=0, description="Round embeddings up to this when they grow for added tokens."
    )
    quantize: Literal["nf4", "int8", "torchao-int8"] | None = Field(
        None, description="Quantize the frozen base; needs lora, and bitsandbytes or torchao."
    )
    trust_remote_code: bool = Field(False, description="Run code from the model's repository.")

    # ---- how
    attention: str = Field(
        "auto", description="auto, or one implementation by name; sdpa:flash forces a kernel of sdpa."
    )
    loss: Literal["auto", "chunked", "torch", "plain"] = Field(
        "auto", description="auto: chunked, where proven equal."
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto",
        description="Norms, rotary factors, activations; auto: Liger's on a GPU, where proven,"
        " in runs of 50 steps and more whose layers are not compiled.",
    )
    compile: Literal["auto", "layers", "loss", "none"] = Field(
        "auto", description="auto: the repeated layer and the loss on a GPU, in runs of 50 steps and more."
    )
    objective: Literal["nll", "dft"] = Field(
        "nll", description="dft weights each token's loss by its own probability."
    )
    packing: Literal["auto", "require", "unpack"] = Field(
        "auto",
        description="If packing would leak: auto unpacks and logs it, require refuses."
        " unpack always unpacks.",
    )
    sequence_parallel: int = Field(
        1, gt=0, description="Processes that hold each row together, a slice each: for rows too long for one."
    )
    prove_again: bool = Field(
        False, description="Prove anew what an earlier run of the same model, versions and device has proven."
    )

    # ---- where
    output: Path = Field(description="Folder of the run: checkpoints, then the model.")
    log_documents: bool = Field(
        False, description="Log the loss of each document of each step, for `sftdata blame`."
    )
    sample: Path | None = Field(
        None,
        description="File of a few held rows; log and report get the model's answers at each evaluation.",
    )
    overwrite: bool = Field(False, description="Start over in a folder that holds a run.")
    push_to_hub: str | None = Field(None, description="Hub repository for the finished model, as user/model.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Fields of transformers' TrainingArguments."
    )

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, value: Path) -> Path:
        return local_output(value)

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part]
        bad = [key for key, equals, _ in pairs if not equals]
        if bad:
            raise ValueError(f"expected key=value pairs such as r=16,alpha=32, found {bad[0]!r}")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @field_validator("loss", mode="before")
    @classmethod
    def _liger_is_no_loss(cls, value: object) -> object:
        if value == "liger":
            raise ValueError("Liger's kernels come without its loss now; set kernels=liger")
        return value

    @field_validator("packing", mode="before")
    @classmethod
    def _packing_of_the_set(cls, value: object) -> object:
        if value in (True, False, "bfd", "wrapped", "none", "bfd_split"):
            raise ValueError(
                "documents are packed by `sftdata prepare --packing`;"
                " here it is what to do where packing leaks"
            )
        return value

    @field_validator("quantize", mode="before")
    @classmethod
    def _known_quantization(cls, value: object) -> object:
        if value == "torchao-int4":
            raise ValueError("transformers trains on torchao's 8-bit weights only; for 4 bits set nf4")
        return value

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Take the base's name from the adapters, and from model_init_kwargs what is a setting here."""
        adapter, given = settings.get("adapter"), settings.get("model_init_kwargs") or {}
        if adapter and isinstance(adapter, str | Path) and not settings.get("model"):
            settings = settings | {"model": adapter_base(Path(adapter))}
        if not isinstance(given, Mapping):
            return settings  # which its own field refuses
        given = dict(given)
        lifted = {
            ours: str(given.pop(name)).removeprefix("torch.")
            for name, ours in _OURS.items()
            if given.get(name) is not None
        }
        for name, value in lifted.items():
            if settings.get(name, value) != value:
                raise ValueError(
                    f"model_init_kwargs says {name}={value}, and {name} is {settings[name]}; set one of them"
                )
        return {**settings, **lifted, "model_init_kwargs": given} if given or lifted else settings

    @field_serializer("model_init_kwargs", when_used="json")
    def _plain(self, value: dict[str, Any]) -> dict[str, Any]:
        return {
            key: one if isinstance(one, bool | int | float | str | dict | None) else str(one)
            for key, one in value.items()
        }

    @field_validator("sets", mode="before")
    @classmethod
    def _one_set_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _check_model(self) -> TrainConfig:
        if self.model is None and self.init_from_config is None:
            raise ValueError("no model is named; --model FOLDER or a Hub id, or --init-from-config FILE")
        if self.model is not None and self.init_from_config is not None:
            raise ValueError("model and init_from_config both name a model; leave one of them out")
        if self.lora and self.adapter:
            raise ValueError("adapter brings its own shape; leave lora out")
        if self.lora and self.init_from_config:
            raise ValueError(
                "adapters of fresh random weights are of no use; name a model, or leave lora out"
            )
        if self.quantize and not self.adapted:
            raise ValueError("quantize freezes the model, so it needs lora; add --lora r=16")
        if self.log_documents and self.loss == "torch":
            raise ValueError(
                "loss=torch gives no losses of tokens; set loss=auto, or leave log_documents out"
            )
        return self

    @model_validator(mode="after")
    def _check_sets(self) -> TrainConfig:
        if self.weights and len(self.weights) != len(self.sets):
            weights, sets = counted(len(self.weights), "weight"), counted(len(self.sets), "set")
            raise ValueError(f"{weights} for {sets}; give one for each")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"the weight {min(self.weights):g} is not above 0; leave its set out instead")
        if self.mix and self.weights:
            raise ValueError("weights count passes, mix gives shares; leave one of them out")
        if self.mix_by != "trained" and not self.mix:
            raise ValueError(f"mix_by={self.mix_by} needs mix; leave it out, or give each set a share")
        self.set_shares()
        return self

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained on a frozen model."""
        return self.lora is not None or self.adapter is not None

    @property
    def learning_rate(self) -> float:
        """The default: highest from scratch, lower for adapters, lowest for full fine-tuning."""
        return 1e-3 if self.init_from_config else 2e-4 if self.adapted else 2e-5

    @property
    def set_weights(self) -> tuple[float, ...]:
        """Passes over each set in one epoch."""
        return self.weights or (1.0,) * len(self.sets)

    def set_shares(self) -> tuple[float, ...]:
        """The share of each set; empty without `mix`.

        Raises:
            UsageError: a name is that of no set or of several, or a set has no share.
        """
        if not self.mix:
            return ()
        shares = dict[Path, float]()
        for name, share in self.mix.items():
            folder = self._set_named(name)
            if folder in shares:
                raise UsageError(f"--mix {name}: {folder} has two shares.", "leave one of them out.")
            shares[folder] = share
        if without := [folder for folder in self.sets if folder not in shares]:
            what = f"{without[0]}: --mix gives it no share."
            raise UsageError(what, f"--mix {without[0]}=SHARE, or leave the set out.")
        return tuple(shares[folder] for folder in self.sets)

    def _set_named(self, name: str) -> Path:
        found = [folder for folder in self.sets if folder == Path(name)]
        found = found or [folder for folder in self.sets if folder.resolve().name == name]
        if not found:
            names = [folder.resolve().name for folder in self.sets]
            otherwise = f"name sets, as {', '.join(names)}; `sftdata view --mix` takes sources of sets."
            raise UsageError(f"--mix {name}: no set of that name.", did_you_mean(name, names, otherwise))
        if len(found) > 1:
            what = f"--mix {name}: {len(found)} sets have that name."
            raise UsageError(what, f"name them by path, as {found[0]}=SHARE.")
        return found[0]


LENGTH = ("max_steps", "num_train_epochs")
_MAPPINGS = ("eval", "mix", "lora", "model_init_kwargs")


def read_settings(file: Path | None, overrides: Sequence[str], flags: Mapping[str, object]) -> TrainConfig:
    """Merge a YAML file, `key=value` overrides and flags into a checked configuration.

    Args:
        flags: flags by setting name; None means not given.

    Raises:
        UsageError: an unreadable file, an unknown key, or a value outside its range.
    """
    files: list[Layer] = [({"training": TRAINING_DEFAULTS}, {})]
    if file is not None:
        files.append(read_settings_file(file))
    return load_settings(TrainConfig, "sfttrain", files, overrides, (flags, {}), _overlay)


def _overlay(settings: dict[str, Any], more: Mapping[str, object], places: Mapping[str, str]) -> None:
    """Merge the settings of one source; keys that are not ours are fields of TrainingArguments."""
    training = settings.setdefault("training", {})
    fields: dict[str, object] = {}
    for key, value in more.items():
        place = places.get(key, key)
        if value is None:
            continue
        if key == "training" or key not in TrainConfig.model_fields:
            fields |= _training(value if key == "training" else {key: value}, place)
        elif isinstance(value, dict):
            if key not in _MAPPINGS:
                raise UsageError(f"{place}: {key} holds no settings of its own.", f"set {key} whole.")
            before = settings.get(key)
            settings[key] = before | value if isinstance(before, dict) else value
        else:
            settings[key] = value
    fields = {name: value for name, value in fields.items() if training.get(name, ...) != value}
    if any(fields.get(name) is not None for name in LENGTH):
        # `--max-steps` replaces the epochs of a file, and the other way round: they say one thing.
        for name in LENGTH:
            training.pop(name, None)
    training |= fields
    if training.get("activation_checkpointing") == "auto":
        del training["activation_checkpointing"]  # what is not given is left to the memory that there is


def _training(given: object, place: str) -> dict[str, object]:
    """Return fields of TrainingArguments by the names they have now.

    Raises:
        UsageError: no mapping, or a name that another tool has for a setting of ours.
    """
    if not isinstance(given, dict):
        what = f"{place}: found {given!r:.200}; expected fields of TrainingArguments."
        raise UsageError(what, "--set training.seed=1")
    fields = {}
    for name, value in given.items():
        known = RENAMED.get(name, str(name))
        if instead := answer(known, "sfttrain"):
            raise UsageError(f"{place}: unknown setting {name!r}.", instead)
        fields[known] = value
    return fields


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
        what = f"{folder}: adapter_config.json {found}."
        raise UsageError(what, "name a folder written by a run with --lora.") from None
