"""Settings that say how rows are read, each defined once: runs and sources of the registry have them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sftdata.settings import NamesOfData

REGISTRY_NAME = "datasets.yaml"


class Reading(BaseModel):
    """How rows are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    split: str | None = Field(
        None,
        description="Split of a dataset, or of files named after splits;"
        " also slices, as train[:95%] or train+test.",
    )
    subset: str | None = Field(None, description="Configuration name of a Hub dataset.")
    format: str | None = Field(None, description="Row format by name; default: detected.")
    map: dict[str, str] = Field(
        default_factory=dict, description="Canonical column = column in the data, e.g. completion=response."
    )
    map_role: Annotated[dict[str, str], NamesOfData] = Field(
        default_factory=dict, description="Role in the data = canonical role, e.g. bot=assistant."
    )
    formatter: str | None = Field(None, description="module:function that turns a row into a canonical row.")
    kind: Literal["auto", "conversation", "completion", "text"] = Field(
        "auto",
        description="Treat instruction-like rows as this kind;"
        " auto: conversation if a chat template is in use.",
    )
    prompt_template: str | None = Field(
        None, description="File with {field} placeholders, for instruction rows without a chat template."
    )
