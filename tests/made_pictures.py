"""Pictures made here: every format, mode and turn that a processor may meet, of odd sizes, and hostile ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def make(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a picture of coarse noise, as stored (before any turn)."""
    dots = random.Random(seed).randbytes(48)
    return Image.frombytes("RGB", (4, 4), dots).resize((width, height)).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def moved_behind(png: bytes, kind: bytes) -> bytes:
    """Return a PNG whose chunk of this kind stands behind its pixels, as some writers put it."""
    at = png.index(kind) - 4
    end = at + 12 + int.from_bytes(png[at : at + 4])
    last = png.rindex(b"IEND") - 4
    return png[:at] + png[end:last] + png[at:end] + png[last:]


def raw_profile(png: bytes, exif: bytes) -> bytes:
    """Return a PNG with EXIF as text, as ImageMagick writes it."""
    body = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode())
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk(b"zTXt", body) + png[at:]


def bomb() -> bytes:
    """Return a PNG of a few bytes whose header says 40,000 x 40,000."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def good_pictures() -> dict[str, bytes]:
    """Return name -> file of more than 60 pictures that a processor takes."""
    sizes = [
        (1, 1),
        (1, 3),
        (3, 1),
        (2, 2),
        (3, 3),
        (7, 31),
        (40, 6),
        (28, 28),
        (57, 29),
        (99, 640),
        (333, 77),
        (224, 225),
    ]
    found = {}
    for number, (height, width) in enumerate(sizes):
        image = make(height, width, seed=number)
        found[f"jpeg {width}x{height}"] = saved(image, "JPEG", quality=60)
        found[f"png {width}x{height}"] = saved(image, "PNG")
        found[f"webp {width}x{height}"] = saved(image, "WEBP")
    for orientation in range(1, 9):
        image = make(37, 101, seed=orientation)
        found[f"jpeg turned {orientation}"] = saved(image, "JPEG", exif=turned(orientation))
        found[f"png turned {orientation}"] = saved(image, "PNG", exif=turned(orientation))
        found[f"webp turned {orientation}"] = saved(image, "WEBP", exif=turned(orientation))
    late = saved(make(30, 90), "PNG", exif=turned(6))
    found["png turned behind its pixels"] = moved_behind(late, b"eXIf")
    found["png turned by text"] = raw_profile(saved(make(30, 91), "PNG"), turned(8).tobytes())
    found["png turned by text behind its pixels"] = moved_behind(found["png turned by text"], b"zTXt")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.format(6))
    found["png turned by XMP"] = saved(make(30, 92), "PNG", pnginfo=info)
    found["jpeg turned by XMP"] = saved(make(30, 93), "JPEG", xmp=XMP.format(5).encode())
    found["webp turned by XMP"] = saved(make(30, 94), "WEBP", xmp=XMP.format(7).encode())
    found["png with an odd turn"] = saved(make(30, 95), "PNG", exif=turned(9))
    found["jpeg cmyk"] = saved(make(61, 45, "CMYK"), "JPEG")
    found["jpeg grey"] = saved(make(62, 45, "L"), "JPEG")
    found["jpeg progressive"] = saved(make(300, 200), "JPEG", progressive=True)
    found["jpeg with a tail"] = saved(make(63, 45), "JPEG") + b"\0tail\xff\xda\0" * 9
    for mode in ("1", "L", "LA", "P", "RGBA", "RGB"):
        found[f"png {mode}"] = saved(make(64, 46, mode), "PNG")
    found["webp lossless with alpha"] = saved(make(65, 47, "RGBA"), "WEBP", lossless=True)
    found["gif"] = saved(make(66, 48, "P"), "GIF")
    found["gif grey"] = saved(make(67, 49, "L"), "GIF")
    return found


def moving_pictures() -> dict[str, bytes]:
    """Return name -> file of animations; a processor sees the first frame."""
    frames = [make(40, 64, seed=number) for number in range(3)]
    return {
        kind: saved(frames[0], kind.upper(), save_all=True, append_images=frames[1:], duration=40)
        for kind in ("gif", "png", "webp")
    }
