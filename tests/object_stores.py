"""An object store in memory, with the interface of obstore: it counts, fails and is killed as it is told."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from sftdata.set import stores


class Killed(BaseException):
    """Stands for SIGKILL: whoever catches it can do nothing with the store any more."""


class AlreadyExistsError(Exception):
    pass


class PreconditionError(Exception):
    pass


class Got:
    def __init__(self, data: bytes, tag: str, attributes: dict[str, str]) -> None:
        self.data, self.attributes = data, attributes
        self.meta = {"e_tag": tag, "version": None}

    def bytes(self) -> bytes:
        return self.data

    def __iter__(self) -> Iterator[bytes]:
        return (self.data[at : at + 1000] for at in range(0, len(self.data), 1000))


class Bucket:
    """All objects.

    Attributes:
        objects: content by key.
        changes: puts and deletions so far, by key.
        kill_at: number of the change, from 1, at which the process is killed: before it, or after with `after`.
        ignores: conditions of puts that this store does not know: "create", "swap".
        answer: called with operation and key before each request; raises what the store answers.
    """

    exceptions = SimpleNamespace(AlreadyExistsError=AlreadyExistsError, PreconditionError=PreconditionError)

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.changes: list[tuple[str, str]] = []
        self.kill_at, self.after, self.dead = 0, False, False
        self.ignores: set[str] = set()
        self.answer: Callable[[str, str], object] = lambda operation, key: None
        self._turn = threading.RLock()
        self._beside: dict[str, tuple[bytes, dict[str, str]]] = {}  # attributes, and of which bytes

    def revive(self, kill_at: int = 0, *, after: bool = False) -> None:
        """Let a new process use it."""
        self.changes.clear()
        self.kill_at, self.after, self.dead = kill_at, after, False

    def below(self, prefix: str) -> dict[str, bytes]:
        """Return the objects below a key, by the rest of theirs."""
        return {key[len(prefix) :]: data for key, data in self.objects.items() if key.startswith(prefix)}

    # ------------------------------------------------------------ as obstore, whose client is the prefix here

    def put(
        self,
        client: str,
        name: str,
        data: Any,
        *,
        mode: Any = "overwrite",
        use_multipart: bool,
        attributes: dict[str, str] | None = None,
    ) -> object:
        assert not use_multipart

        def put() -> None:
            known = self.objects.get(key)
            if mode == "create" and known is not None and "create" not in self.ignores:
                raise AlreadyExistsError(key)
            conditional = isinstance(mode, dict) and "swap" not in self.ignores
            if conditional and (known is None or mode["e_tag"] != tag_of(known)):
                raise PreconditionError(key)
            self.objects[key] = bytes(data)
            self._beside[key] = (self.objects[key], attributes or {})

        key = client + name
        return self._change("put", key, put)

    def delete(self, client: str, names: list[str]) -> object:
        for name in names:
            self._change("delete", client + name, lambda name=name: self.objects.pop(client + name, None))
        return None

    def get(self, client: str, name: str, *, options: dict[str, bool]) -> Got:
        data = self._ask("get", client + name).get(client + name)
        if data is None:
            raise FileNotFoundError(f"{client}{name} NoSuchKey 404 Not Found")
        put, attributes = self._beside.get(client + name, (None, {}))
        return Got(data, tag_of(data), attributes if put is data else {})

    def list(self, client: str, prefix: str | None) -> Iterator[list[dict[str, Any]]]:
        start = f"{client}{prefix}/" if prefix else client
        keys = sorted(key for key in self._ask("list", start) if key.startswith(start))
        for at in range(0, len(keys), 3):
            yield [{"path": key[len(client) :], "size": len(self.objects[key])} for key in keys[at : at + 3]]

    def list_with_delimiter(self, client: str) -> dict[str, Any]:
        names = [key[len(client) :] for key in self._ask("list", client) if key.startswith(client)]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        return {
            "common_prefixes": sorted(folders),
            "objects": [{"path": name} for name in names if "/" not in name],
        }

    def _ask(self, operation: str, key: str) -> dict[str, bytes]:
        if self.dead:
            raise Killed
        self.answer(operation, key)
        with self._turn:
            return dict(self.objects)

    def _change(self, operation: str, key: str, change: Callable[[], object]) -> object:
        self.answer(operation, key)
        with self._turn:
            if self.dead:
                raise Killed
            self.changes.append((operation, key))
            self.dead = len(self.changes) == self.kill_at
            if self.dead and not self.after:
                raise Killed
            change()
            if self.dead:
                raise Killed
            return None


def tag_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The store behind every URL; keys begin with `s3://`."""
    bucket = Bucket()
    monkeypatch.setattr(stores, "library", lambda url: bucket)
    monkeypatch.setattr(stores, "connect", cache(lambda url: f"{url}/"))
    return bucket
