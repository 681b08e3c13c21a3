"""A folder of objects behind a URL, read through fsspec: of web servers, and of the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from sftdata.errors import IntegrityError
from sftdata.set.store import Sink
from sftdata.set.stores import Found
from sftdata.sources.remote import hashes_below, read_object, size_of, sizes_below

_AT_ONCE = 8


class Web:
    """Objects below a URL, which are only read.

    Args:
        url: as `https://host/set`.

    Raises:
        SftError: by each method: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def find(self, name: str) -> Found | None:
        """Return an object; None where there is none."""
        data = read_object(f"{self.url}/{name}")
        return None if data is None else Found(data, {})

    def copy(self, name: str, sink: Sink) -> None:
        """Write an object's content to a sink."""
        if (found := self.find(name)) is None:
            raise IntegrityError(f"{self.url}/{name}: missing.", "restore the object.")
        sink.write(found.data)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each object below a folder; none where the server tells no names."""
        return sizes_below(f"{self.url}/{folder}".rstrip("/"))

    def sizes_of(self, names: Iterable[str]) -> dict[str, int]:
        """Return the bytes of these objects; those that are not there are left out."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {name: pool.submit(size_of, f"{self.url}/{name}") for name in names}
            return {name: size for name, found in asked.items() if (size := found.result()) is not None}

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of these objects that the server tells: the Hub, sha256 of large ones."""
        found = hashes_below(self.url)
        return {name: found[name] for name in names if name in found}
