"""Every setting of `prepare`, in one frozen model; the manifest stores it whole.

Precedence: YAML file < `--set key=value` < flag. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, field_validator

from sftdata.choosing import CHOOSING, Choosing, Like
from sftdata.errors import UsageError
from sftdata.output import StoreUrl, output_at
from sftdata.reading import REGISTRY_NAME, Reading
from sftdata.settings import check_settings

if TYPE_CHECKING:
    from sftdata.registry import Entry

DEFAULT_DATE = "2025-01-01"
DEFAULT_MAX_LENGTH = 1024
FAST_ENGINE_MIN_BYTES = 4 << 20  # of input; below it a second tokenizer engine costs more than it saves
DEFAULT_LINE_BYTES = 64 << 20
MOST_TOKENS = (1 << 31) - 1  # of one row: Arrow counts them in int32
WINDOW = 64  # shards, in which the rows of a view may be shuffled
MOST_BYTES = 1 << 40
MOST_WORKERS = 4096


OF_PICTURES = ("processor", "max_pixels", "min_pixels", "images", "embed_images", "check_pixels")
"""Settings that act on rows with pictures alone."""


def _output(value: object) -> Path | StoreUrl:
    if not isinstance(value, (str, Path)):
        raise ValueError("not a path")
    return output_at(value)


Output = Annotated[Path | StoreUrl, PlainValidator(_output, json_schema_input_type=Path)]


def _read(value: object) -> object:
    from sftdata.registry import read_registry  # here: a run without a registry need not build its model

    return None if value is None else read_registry(value)


class _Sources:
    """Describes the sources of a registry in a JSON schema."""

    def __get_pydantic_json_schema__(self, core_schema: object, handler: object) -> dict[str, Any]:
        from sftdata.registry import Entry

        sources = {"type": "object", "additionalProperties": Entry.model_json_schema()}
        return {"anyOf": [{"type": "string", "format": "path"}, sources, {"type": "null"}]}


Registry = Annotated[
    Path | dict[str, Any] | None,
    BeforeValidator(_read),
    _Sources(),
    Field(
        description=f"YAML file of sources with names; default: {REGISTRY_NAME} beside the settings file,"
        " or here if there is none."
    ),
]


class InputsConfig(BaseModel):
    """What is read."""

    model_config = ConfigDict(defer_build=True)

    inputs: tuple[str, ...] = Field(
        min_length=1, description="Files, folders, globs, URLs, Hub dataset ids, or names of a registry."
    )
    like: Like = None


class RowsConfig(Reading, InputsConfig):
    """What to read, how to render and mask it, and how to cut, pack and store it."""

    registry: Registry = None
    max_line_bytes: int = Field(
        DEFAULT_LINE_BYTES,
        gt=0,
        le=MOST_BYTES,
        description="Longest line in bytes; longer ones are rejected.",
    )

    # ---- what is rendered and trained
    tokenizer: str = Field(description="Folder or Hub id of the tokenizer.")
    revision: str | None = Field(None, description="Revision of a Hub tokenizer.")
    chat_template: str | None = Field(
        None, description="Built-in name, template file, or tokenizer to clone from."
    )
    template_kwargs: dict[str, object] = Field(
        default_factory=dict, description="Arguments for every render of the chat template."
    )
    date: str = Field(
        DEFAULT_DATE,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        examples=["2026-01-31"],
        description="Date that strftime_now returns in templates.",
    )
    train_on: Literal["auto", "assistant", "last-assistant", "completion", "all"] = Field(
        "auto",
        description="auto: assistant for conversations, completion for prompt/completion, all for text.",
    )
    response_template: str | tuple[int, ...] | None = Field(
        None, description="Marker before each trained answer in running text."
    )
    instruction_template: str | tuple[int, ...] | None = Field(
        None, description="Marker before each instruction."
    )
    mask_mode: Literal["default", "trl-0.7.10"] = Field(
        "default", description="How response templates are applied."
    )
    loss_weights: bool = Field(
        False, description="Keep fractional message weights, in the column loss_weights."
    )
    boundary: Literal["split", "merge"] = Field(
        "split", description="How to treat tokens that straddle the edge of a trained span."
    )
    eos_token: str | None = Field(
        None, description="End token to write after the last trained turn, or in place of the tokenizer's."
    )
    trust_control_tokens: bool = Field(
        False, description="Let control tokens typed in message content count as such."
    )

    # ---- how pictures are read
    processor: Path | None = Field(
        None, description="Folder of the model's processor; default: the tokenizer's, if it holds one."
    )
    max_pixels: int | None = Field(
        None,
        gt=0,
        le=MOST_TOKENS,
        description="Most pixels of a resized picture, in place of the processor's.",
    )
    min_pixels: int | None = Field(
        None,
        gt=0,
        le=MOST_TOKENS,
        description="Fewest pixels of a resized picture, in place of the processor's.",
    )
    images: Path | None = Field(
        None, description="Folder that paths of pictures start from; default: the input's."
    )
    embed_images: bool = Field(False, description="Store the files of pictures in the set, not their paths.")
    check_pixels: bool = Field(False, description="Decode every picture, to reject broken ones.")

    # ---- how it is cut, packed and stored
    output: Output = Field(description="Folder of the set, here or in an object store: s3://, gs://, az://.")
    max_length: int | None = Field(
        None, gt=0, le=MOST_TOKENS, description="Tokens per packed row; default min(model_max_length, 1024)."
    )
    overlong: Literal["truncate", "truncate-left", "drop", "split", "error"] = Field(
        "truncate", description="What to do with rows longer than max_length."
    )
    packing: Literal["bfd", "wrapped", "none"] = Field(
        "bfd", description="Best-fit decreasing, one stream cut into rows, or one example per row."
    )
    max_rejects: str = Field(
        "1%",
        pattern=r"^\d+(\.\d+)?%?$",
        examples=["1%", "20"],
        description="Rejected rows tolerated: a share (1%) or a count (20).",
    )
    slice_bytes: int = Field(
        8 << 20,
        gt=0,
        le=MOST_BYTES,
        description="Input bytes of a slice, about; packing does not cross slices.",
    )


class PrepareConfig(Choosing, RowsConfig):
    """What to read, how to render and mask it, how to cut, pack and store it, and which documents to keep."""

    # ---- how the work is done (never changes a byte of the set)
    workers: int | None = Field(
        None, gt=0, le=MOST_WORKERS, description="Worker processes; default: one per usable core."
    )
    engine: Literal["auto", "gigatoken", "tokenizers"] = Field(
        "auto", description="Tokenizer engine; auto picks the fast one where proven equal."
    )
    overwrite: bool = Field(False, description="Replace a finished set made with other settings.")

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_input_is_a_list(cls, value: object) -> object:
        """Take a single path as a list of one.

        Raises:
            UsageError: data instead of the names of data.
        """
        if isinstance(value, (str, Path)):
            return (str(value),)
        names = value if isinstance(value, (list, tuple)) else [value]
        if not names:
            raise UsageError("inputs: found nothing; expected rows, or paths.", "name a file, or give rows.")
        for name in names:
            if not isinstance(name, (str, Path)):
                raise UsageError(
                    f"inputs: found a {type(name).__name__};"
                    " expected paths of files, folders or globs, URLs or Hub ids, or rows.",
                    "from Python, give rows as one dataset, table or list of dicts.",
                )
        return tuple(map(str, names))

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _tokenizer_is_a_name(cls, value: object) -> object:
        if not isinstance(value, (str, Path)):
            raise UsageError(
                f"tokenizer: found a {type(value).__name__}; expected a folder, a Hub id,"
                " or from Python a tokenizer of transformers.",
                "PreTrainedTokenizerFast(tokenizer_object=...) makes one of a tokenizers.Tokenizer.",
            )
        return str(value)

    @field_validator("max_rejects", "date", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """Undo the conversion of `5` and `2025-01-01` by YAML."""
        return str(value) if type(value) in (int, float, date) else value

    @field_validator("max_rejects")
    @classmethod
    def _at_most_all(cls, value: str) -> str:
        if value.endswith("%") and float(value[:-1]) > 100:
            raise ValueError("a share is at most 100%")
        return value

    @field_validator("date")
    @classmethod
    def _in_the_calendar(cls, value: str) -> str:
        date.fromisoformat(value)
        return value

    @property
    def folder(self) -> Path:
        """The output, where only a folder of this machine will do.

        Raises:
            UsageError: it is a URL.
        """
        if isinstance(self.output, Path):
            return self.output
        raise UsageError(f"-o {self.output}: a URL.", "name a local folder with -o.")

    def content(self) -> dict[str, object]:
        """Return the settings that decide the bytes of the set; a resume refuses if one of them differs.

        Those that choose among its documents aside: they decide what is made of the set of all. Those on
        pictures, too: a set without pictures has none.
        """
        how = {"like", "registry", "output", "workers", "engine", "overwrite", "max_rejects"}
        return self.model_dump(mode="json", exclude=how.union(CHOOSING, OF_PICTURES)) | {
            "split": self.split or "train"
        }

    def entry(self, name: str) -> Entry | None:
        """Return the source that an input of this name means; None where it is none of the registry."""
        return self.registry.get(name) if isinstance(self.registry, dict) else None

    def refuse_idle_registry(self) -> None:
        """Refuse a registry that was asked for, and of which no input is a source."""
        if isinstance(self.registry, dict) and not any(name in self.registry for name in self.inputs):
            found = ", ".join(self.registry) or "nothing"
            raise UsageError(
                f"registry: none of the inputs is a source of it; it holds {found}.",
                "name one of its sources as an input, or leave the registry out.",
            )

    def paths(self, inputs: Iterable[str]) -> list[str]:
        """Return what inputs stand for: the paths of sources of the registry, or themselves."""
        found = [(name, self.entry(name)) for name in inputs]
        return [path for name, entry in found for path in ((name,) if entry is None else entry.path)]

    def reading(self, name: str) -> PrepareConfig:
        """Return the settings for the rows of a source of the registry; an empty name stands for others."""
        entry = self.entry(name)
        return self if entry is None else self.model_copy(update=entry.own())

    @property
    def chooses(self) -> bool:
        """Whether the set may hold less, or more, than all documents once."""
        return bool(self.dedup or self.exclude or self.cap or self.eval is not None or self.mix)

    def chosen(self) -> dict[str, object]:
        """Return the settings that choose among documents, without those at their defaults."""
        return self.model_dump(include=set(CHOOSING), exclude_defaults=True)


def make_config(**settings: object) -> PrepareConfig:
    """Validate settings, with a one-line error that names the nearest known key.

    Raises:
        UsageError: an unknown or a missing key, a value outside its range, or a registry without use.
    """
    config = check_settings(PrepareConfig, "sftdata", settings)
    config.refuse_idle_registry()
    return config
