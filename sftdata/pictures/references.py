"""Where a picture is: a path below the folder of pictures, or bytes in the row; never fetched from afar."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from sftdata.errors import RowError
from sftdata.output import one_line
from sftdata.sources.jsonrows import JsonObject, kind_of

MAX_FILE_BYTES = 1 << 28
"""Larger than any picture that Pillow would decode, and read into memory without harm."""
FOLDER_FIX = "--images DIR, of a folder below which the pictures are; or leave the row out."
_UPWARDS_FIX = "write paths that start from a folder above all pictures, and name that: --images DIR"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
_NAMED = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif)", re.IGNORECASE)
_KEYS = ("bytes", "path", "url", "data", "base64", "image", "image_url", "source", "file", "value")


@dataclass(frozen=True, slots=True)
class Reference:
    """One picture of a row.

    Attributes:
        where: its place in the row, as `images[0]`.
        path: as the row gives it; None for one whose bytes are in the row.
        data: the bytes of its file; None for one with a path.
    """

    where: str
    path: str | None = None
    data: bytes | None = None


def looks_like_picture(value: object) -> bool:
    """Return whether a value of a column that nothing reads is, by its form, a picture, or a list of some."""
    if isinstance(value, list):
        return bool(value) and looks_like_picture(value[0])
    if isinstance(value, dict):
        return any(looks_like_picture(value.get(key)) for key in _KEYS)
    if not isinstance(value, str):
        return isinstance(value, bytes)
    named = _NAMED.fullmatch(os.path.splitext(value)[1])
    return bool(named or value[:11].lower() == "data:image/" or _BASE64.fullmatch(value))


def read_reference(value: object, where: str) -> Reference:
    """Return a reference written as a path, a data URI, base64, bytes, or an object with one of them.

    Args:
        where: the place of the value in the row.

    Raises:
        RowError: nothing there, a remote picture, or a value that is no reference.
    """
    if isinstance(value, dict):
        return _read_object(value, where)
    if isinstance(value, bytes) and value:
        return Reference(where, data=value)
    if value is None or value in ("", b""):
        what = f"{where} is {'null' if value is None else 'empty'}; expected a picture."
        raise RowError("image-missing", what, "give its path, or leave the row out.")
    if not isinstance(value, str):
        what = f"{where} is {kind_of(value)}; expected a path, a data URI, or an object with bytes or path."
        raise RowError("image-value", what, "write the path of the picture.")
    if value[:5].lower() == "data:":
        return Reference(where, data=_from_uri(value, where))
    if _BASE64.fullmatch(value):
        return Reference(where, data=_decoded(value, where))
    if value[:7].lower() == "file://":
        return Reference(where, path=unquote(urlsplit(value).path))
    if _SCHEME.match(value):
        what = f"{where} is the URL {one_line(value)[:80]!r}; pictures are never fetched."
        raise RowError("image-remote", what, "download it, and give the path of the file.")
    return Reference(where, path=value)


def _read_object(value: JsonObject, where: str) -> Reference:
    """Read {bytes, path} as datasets writes Image features, {url} as OpenAI does, {type: base64, data}."""
    found = next((key for key in _KEYS if value.get(key) is not None), None)
    if found is None:
        empty = any(key in value for key in _KEYS)
        what = f"{where} is an object without a picture; expected one of bytes, path and url in it."
        if empty:
            raise RowError("image-missing", what, "give its path, or leave the row out.")
        raise RowError("image-value", what, "write the path of the picture.")
    inside, place = value[found], f"{where}.{found}"
    if found in ("bytes", "data", "base64") and isinstance(inside, str) and inside[:5].lower() != "data:":
        return Reference(place, data=_decoded(inside, place))
    return read_reference(inside, place)


def _from_uri(value: str, where: str) -> bytes:
    kind, _, body = value[5:].partition(",")
    if kind.split("/")[0].lower() not in ("image", "application", ""):
        what = f"{where} is a data URI of {one_line(kind)[:40]!r}; expected image/..."
        raise RowError("image-value", what, "give a picture, or leave the row out.")
    return _decoded(body, where) if kind.lower().endswith(";base64") else unquote_to_bytes(body)


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        what = f"{where} is no base64 ({error})."
        raise RowError("image-unreadable", what, "encode the picture again, or leave the row out.") from None


def load_picture(reference: Reference, folder: Path) -> bytes:
    """Return the bytes of a picture's file.

    Args:
        folder: what relative paths start from; no path or link leads out of it, so that neither a row nor a
            folder of pictures from elsewhere can have any file of this machine read.

    Raises:
        RowError: no such file, one outside of the folder, no plain file, or too large a one.
    """
    if reference.data is not None:
        return reference.data
    given = reference.path or ""
    said = f"{reference.where} ({one_line(given)[:80]!r})"
    base = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(base, given))
    if os.path.commonpath([base, path]) != base:
        what = f"{said} is outside of {folder}, the folder of pictures."
        raise RowError("image-outside", what, FOLDER_FIX if os.path.isabs(given) else _UPWARDS_FIX)
    try:
        real, home = os.path.realpath(path), os.path.realpath(base)
        if os.path.commonpath([home, real]) != home:
            what = f"{said} is a link to {real}, outside of {folder}, the folder of pictures."
            raise RowError("image-outside", what, "put the file there, not a link to it.")
        with open(real, "rb", opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise RowError("image-unreadable", f"{said} is no plain file.", "give the path of a picture.")
            if facts.st_size > MAX_FILE_BYTES:
                what = f"{said} has {facts.st_size:,} bytes; a picture has at most {MAX_FILE_BYTES:,}."
                raise RowError("image-too-large", what, "save it smaller.")
            return file.read()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the name
        what = f"{said} is not there, below {folder}."
        raise RowError("image-missing", what, FOLDER_FIX) from None
    except OSError as error:
        what = f"{said} cannot be read ({error.strerror})."
        raise RowError("image-unreadable", what, "give the path of a picture.") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a path; a pipe without a writer does not hold up the run."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
