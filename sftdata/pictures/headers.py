"""Sizes of pictures from the headers of their files, as a processor sees them: turned by EXIF, first frame.

Pillow opens a file lazily: it parses the header and decodes nothing. What it leaves undone is done here: a
PNG may carry its EXIF behind the pixels, and a file that was cut short has a perfect header.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

from sftdata.errors import RowError, need
from sftdata.output import one_line

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.ImageFile import ImageFile

PictureFormat = Literal["jpeg", "png", "webp", "gif"]

MAX_PIXELS = 178_956_970
"""Where Pillow stops opening a picture, since such a header is most often a decompression bomb."""
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_BEGINNINGS: tuple[tuple[bytes, PictureFormat], ...] = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
)
_OTHERS = (
    (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"%PDF", "PDF"), (b"<svg", "SVG"),
    (b"<?xml", "SVG"), (b"8BPS", "Photoshop"), (b"\0\0\0\x0cjP", "JPEG 2000"), (b"\xff\x0a", "JPEG XL"),
)  # fmt: skip
_BOXES = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}  # else a film: MP4, MOV
_TEXTS = (b"<", b"{", b"version https://git-lfs")


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a picture says.

    Attributes:
        height, width: in pixels, after the turn that EXIF asks for.
        orientation: the EXIF orientation, 1 to 8; 1 where there is none.
        animated: there are more frames; processors see the first.
    """

    format: PictureFormat
    height: int
    width: int
    orientation: int = 1
    animated: bool = False

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width


def read_header(data: bytes, where: str = "the picture") -> Header:
    """Return the header of a picture that is whole; nothing is decoded.

    Args:
        data: the file's bytes.
        where: the picture, for the message.

    Raises:
        RowError: no picture, one of another format, broken, cut short, or too large to decode.
        UsageError: Pillow is not installed.
    """
    name = _format_of(data, where)
    pillow = _pillow()
    try:
        header = _read(data, name, where)
    except RowError:
        raise
    except pillow.DecompressionBombError:
        header = None
    except Exception as error:  # Pillow raises what it likes on a broken file
        what = f"{where} is a {name.upper()} file with a broken header ({_in_words(error)})."
        raise RowError("image-unreadable", what, "save it again, or leave the row out.") from None
    if header is None or header.pixels > MAX_PIXELS:
        what = f"{where} has more than {MAX_PIXELS:,} pixels, the most that Pillow decodes."
        raise RowError("image-too-large", what, "save it smaller.")
    if not _ENDED[name](data):
        what = f"{where} is a {name.upper()} file of {len(data):,} bytes without its end: it was cut short."
        raise RowError("image-cut", what, "fetch the file again, or leave the row out.")
    return header


def require_pixels(data: bytes, where: str) -> None:
    """Decode the first frame of a picture, which `read_header` took: a whole file may hold broken pixels.

    Raises:
        RowError: they cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _open(data).load()
    except Exception as error:  # Pillow raises what it likes on a broken file
        what = f"{where} cannot be decoded ({_in_words(error)})."
        raise RowError("image-unreadable", what, "save it again, or leave the row out.") from None


def _in_words(error: Exception) -> str:
    """Return an error of Pillow without the address of the buffer, which is another in each run."""
    return one_line(re.sub(r" <\S+ object at 0x\w+>", "", f"{type(error).__name__}: {error}"))[:160]


def _read(data: bytes, name: PictureFormat, where: str) -> Header:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and odd EXIF, which change no size
        image = _open(_with_late_metadata(data) if name == "png" else data)
        if image.mode.startswith("I"):
            what = f"{where} is a PNG in grey of 16 bits, of which processors turn all above 255 white."
            raise RowError("image-format", what, "save it with 8 bits.")
        orientation = _orientation(image)
        several = name in ("png", "webp") and bool(getattr(image, "is_animated", False))
    width, height = image.size
    if orientation in _SIDEWAYS:
        height, width = width, height
    several = several or (name == "gif" and _gif_frames(data)[0] > 1)
    return Header(name, height, width, orientation, several)


def _format_of(data: bytes, where: str) -> PictureFormat:
    """Return the format that the first bytes announce, whatever the name of the file says."""
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if not data:
        raise RowError(
            "image-unreadable", f"{where} is empty.", "fetch the file again, or leave the row out."
        )
    other = next((kind for beginning, kind in _OTHERS if data.startswith(beginning)), None)
    if data[4:8] == b"ftyp":
        other = _BOXES.get(data[8:12], "MP4 or MOV, a film")
    if other:
        what = f"{where} is in the format {other}; expected JPEG, PNG, WebP or GIF."
        raise RowError("image-format", what, "convert it to one of them.")
    is_text = data.lstrip()[:24].startswith(_TEXTS)
    found = f"text ({one_line(data[:40].decode('utf-8', 'replace'))!r})" if is_text else "no picture"
    what = f"{where} holds {found}; expected JPEG, PNG, WebP or GIF."
    raise RowError("image-unreadable", what, "fetch the file again, or leave the row out.")


@lru_cache(maxsize=1)
def _pillow() -> ModuleType:
    pillow = need("PIL.Image", "vision", "Pictures are read with Pillow")
    need("PIL.WebPImagePlugin", "vision", "Pictures are read with Pillow")  # else WebP loads every plugin
    return pillow


def _open(data: bytes) -> ImageFile:
    opened = _pillow().open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF"))
    return cast("ImageFile", opened)


def _orientation(image: ImageFile) -> int:
    """Return the orientation by which `ImageOps.exif_transpose` turns a picture: that of EXIF, else of XMP.

    `getexif` of a PNG decodes every pixel, to find EXIF behind them; that of its base class does not.
    """
    found = _pillow().Image.getexif(image).get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


# --------------------------------------------------------------------------------- what the header leaves out


def _with_late_metadata(data: bytes) -> bytes:
    """Return a PNG with all of its metadata before its pixels, where Pillow reads them with the header."""
    late: list[bytes] = []
    first = 0
    for kind, start, end in _png_chunks(data):
        if kind == b"IDAT":
            first = first or start
        elif first and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            late.append(data[start:end])
    return data[:first] + b"".join(late) + data[first:] if late else data


def _png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Return (kind, start, end) of the chunks of a PNG that are there whole, up to the one that ends it."""
    chunks, start = [], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if end > len(data):
            break
        kind = data[start + 4 : start + 8]
        chunks.append((kind, start, end))
        if kind == b"IEND":
            break
        start = end
    return chunks


def _png_ended(data: bytes) -> bool:
    chunks = _png_chunks(data)
    return bool(chunks) and chunks[-1][0] == b"IEND"


def _jpeg_ended(data: bytes) -> bool:
    """Return whether the scan behind the header is closed; a preview inside the header does not count."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # filling, and markers without a length
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _webp_ended(data: bytes) -> bool:
    return 8 + int.from_bytes(data[4:8], "little") <= len(data)


def _gif_ended(data: bytes) -> bool:
    return _gif_frames(data)[1]


def _gif_frames(data: bytes) -> tuple[int, bool]:
    """Return how many frames of a GIF are there whole, and whether its end is."""
    frames = 0
    at = 13 + _palette(data, 10)
    while at < len(data):
        block = data[at]
        if block == 0x3B:
            return frames, True
        if block == 0x2C:
            at += 11 + _palette(data, at + 9)
        else:
            at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        frames += block == 0x2C and at <= len(data)
    return frames, False


def _palette(data: bytes, flags: int) -> int:
    """Return the bytes of the palette that these flags announce."""
    if flags >= len(data) or not data[flags] & 0x80:
        return 0
    return int(3 << ((data[flags] & 7) + 1))


_ENDED = {"jpeg": _jpeg_ended, "png": _png_ended, "webp": _webp_ended, "gif": _gif_ended}
