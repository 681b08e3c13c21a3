"""A picture as a set keeps it: what its file is, and its path or its bytes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sftdata.errors import RowError
from sftdata.pictures.headers import read_header, require_pixels
from sftdata.pictures.layouts import Size
from sftdata.pictures.references import Reference, load_picture


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a row, read.

    Attributes:
        height, width: in pixels, after the turn that EXIF asks for.
        format: "jpeg", "png", "webp" or "gif".
        sha256: of the file's bytes.
        file_bytes: how many these are.
        path: from the folder of pictures; "" for one whose bytes are in the row.
        data: these bytes; empty for one with a path.
        animated: there are more frames; processors see the first.
    """

    height: int
    width: int
    format: str = ""
    sha256: bytes = b""
    file_bytes: int = 0
    path: str = ""
    data: bytes | memoryview = b""
    animated: bool = False

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """What the paths of pictures start from, and how closely files are looked at.

    Attributes:
        folder: absolute.
        check_pixels: decode every picture, to prove it whole.
    """

    folder: Path
    check_pixels: bool = False

    def load(self, reference: Reference) -> Picture:
        """Read a picture's file, and of it the header.

        Raises:
            RowError: no picture that can be used.
            UsageError: Pillow is not installed.
        """
        data = load_picture(reference, self.folder)
        where = reference.where if reference.path is None else f"{reference.where} ({reference.path[:80]!r})"
        header = read_header(data, where)
        if self.check_pixels:
            require_pixels(data, where)
        digest = hashlib.sha256(data).digest()
        size = header.height, header.width, header.format, digest, len(data)
        if reference.path is None:
            return Picture(*size, data=data, animated=header.animated)
        return Picture(*size, path=self._from_folder(reference.path, where), animated=header.animated)

    def _from_folder(self, path: str, where: str) -> str:
        base = os.path.abspath(self.folder)
        found = os.path.relpath(os.path.join(base, path), base)
        try:
            found.encode()
        except UnicodeEncodeError:
            raise RowError("image-value", f"{where}: the path is no UTF-8.", "rename the file.") from None
        return found
