"""Small pictures for pages: a data URI of a few kilobytes, whatever the size of the file."""

from __future__ import annotations

import base64
import io
import warnings

from sftdata.errors import UsageError, need

LONGEST = 160
"""Pixels of the longer side."""


def thumbnail(data: bytes) -> str:
    """Return a picture as a small JPEG in a data URI; "" for one that cannot be decoded here."""
    try:
        pillow = need("PIL.Image", "vision", "Pictures are shown with Pillow")
        turned = need("PIL.ImageOps", "vision", "Pictures are shown with Pillow").exif_transpose
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pillow.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF"))
            image.draft("RGB", (LONGEST, LONGEST))
            image = turned(image).convert("RGB")
            image.thumbnail((LONGEST, LONGEST))
            sink = io.BytesIO()
            image.save(sink, "JPEG", quality=70)
    except UsageError:
        return ""
    except Exception:  # Pillow raises what it likes on a broken file
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
