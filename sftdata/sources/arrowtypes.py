"""From values as Arrow gives them to JSON data, by the types of the schema.

Arrow holds a JSON document as its text (the extension type arrow.json) and an object of any keys as a list of pairs (a map). It
gives every struct of a column every field that any row has: a null there says only that another row had the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

Convert = Callable[[Any], Any]
_decode = msgspec.json.Decoder().decode


def converters(schema: Any) -> dict[str, Convert]:
    """Return, for each column of a `pyarrow.Schema` that needs it, what turns its values into JSON data.

    A converter raises msgspec.DecodeError for a document of the type arrow.json that is not JSON.
    """
    found = {field.name: _converter(field.type) for field in schema}
    return {name: convert for name, convert in found.items() if convert}


def _converter(kind: Any) -> Convert | None:
    import pyarrow as pa
    from pyarrow import types

    if isinstance(kind, pa.BaseExtensionType):
        return _or_null(_decode) if kind.extension_name == "arrow.json" else None
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_map(kind):
        return _of_map(_converter(kind.item_type))
    if types.is_struct(kind):
        return _of_struct({field.name: _converter(field.type) for field in kind})
    if hasattr(kind, "value_field"):  # every kind of list
        inner = _converter(kind.value_type)
        return inner and _of_list(inner)
    return None


def _or_null(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _of_list(inner: Convert) -> Convert:
    return _or_null(lambda values: [inner(value) for value in values])


def _of_map(inner: Convert | None) -> Convert:
    def convert(pairs: Any) -> dict[str, Any]:
        return {str(key): inner(value) if inner else value for key, value in pairs}

    return _or_null(convert)


def _of_struct(inner: dict[str, Convert | None]) -> Convert:
    """Leave null fields out."""

    def convert(struct: Any) -> dict[str, Any]:
        given = ((name, value, inner[name]) for name, value in struct.items() if value is not None)
        return {name: found(value) if found else value for name, value, found in given}

    return _or_null(convert)
