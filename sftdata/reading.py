"""Settings that say how rows are read, each defined once: runs and sources of the registry have them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sftdata.settings import NamesOfData

REGISTRY_NAME = "datasets.yaml"

Split = Annotated[
    str | None,
    Field(
        description="Split of a dataset, or of files named after splits;"
        " also slices, as train[:95%] or train+test."
    ),
]
Subset = Annotated[str | None, Field(description="Configuration name of a Hub dataset.")]
RowFormat = Annotated[str | None, Field(description="Row format by name; default: detected.")]
Columns = Annotated[
    dict[str, str], Field(description="Canonical column = column in the data, e.g. completion=response.")
]
Roles = Annotated[
    dict[str, str], NamesOfData, Field(description="Role in the data = canonical role, e.g. bot=assistant.")
]
Formatter = Annotated[str | None, Field(description="module:function that turns a row into a canonical row.")]
Kind = Annotated[
    Literal["auto", "conversation", "completion", "text"],
    Field(
        description="Treat instruction-like rows as this kind;"
        " auto: conversation if a chat template is in use."
    ),
]
PromptTemplate = Annotated[
    str | None,
    Field(description="File with {field} placeholders, for instruction rows without a chat template."),
]
