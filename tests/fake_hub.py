"""A server on 127.0.0.1 that answers as the Hub does for one dataset: enough for huggingface_hub to write and read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.remote_stores import listening

REPOSITORY = "user/name"
_BELOW = f"/api/datasets/{REPOSITORY}"


class Hub:
    """What the server holds.

    Attributes:
        files: content by path, as committed.
        large: content that was uploaded beside commits, by sha256.
        uploads: how many such files came.
        commits: the paths of each.
        token: that may write.
        stop_at: refuse the commit of this number.
        private: whether who reads needs the token, too.
        busy: whether to refuse a read for now, by its number from 1.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.uploads = 0
        self.commits: list[list[str]] = []
        self.token, self.stop_at, self.url = "hf_may_write", -1, ""
        self.private, self.asked = False, 0
        self.busy: Callable[[int], bool] = lambda number: False

    def entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(".arrow"):
            found |= {"oid": "0" * 40}
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def tree(self, path: str, *, recursive: bool) -> list[dict[str, object]] | None:
        below = f"{path}/" if path else ""
        names = [name for name in sorted(self.files) if name.startswith(below)]
        folders = {
            below + name[len(below) :].rpartition("/")[0] for name in names if "/" in name[len(below) :]
        }
        if not recursive:
            names = [name for name in names if "/" not in name[len(below) :]]
            folders = {below + folder[len(below) :].partition("/")[0] for folder in folders}
        found = [self.entry(name) for name in names] + [self.folder(name) for name in sorted(folders)]
        return None if path and not found else found

    def folder(self, path: str) -> dict[str, object]:
        return {"type": "directory", "path": path, "size": 0, "oid": "2" * 40}

    def paths(self, names: list[str]) -> list[dict[str, object]]:
        """Describe those of these files and folders that are there."""
        files = [self.entry(name) for name in names if name in self.files]
        return files + [
            self.folder(name) for name in names if any(key.startswith(f"{name}/") for key in self.files)
        ]

    def preupload(self, files: list[dict[str, str]]) -> dict[str, object]:
        answers = []
        for file in files:
            known = self.entry(file["path"]) if file["path"] in self.files else {}
            lfs = known.get("lfs")
            oid = lfs["oid"] if isinstance(lfs, dict) else known.get("oid")
            mode = "lfs" if file["path"].endswith(".arrow") else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, objects: list[dict[str, str]]) -> dict[str, object]:
        return {
            "transfer": "basic",
            "objects": [
                one
                if one["oid"] in self.large
                else one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in objects
            ],
        }

    def commit(self, lines: bytes) -> dict[str, object] | None:
        parts = [json.loads(line) for line in lines.splitlines()]
        if len(self.commits) == self.stop_at:
            return None
        self.commits.append([part["value"]["path"] for part in parts if part["key"] != "header"])
        for part in parts:
            value = part["value"]
            if part["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        return {
            "commitUrl": f"{self.url}/datasets/{REPOSITORY}/commit/{len(self.commits)}",
            "commitOid": "1" * 40,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def say(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not allowed:
            self.say({"error": "Invalid username or password."}, 401)
        return allowed

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self.hub.uploads += 1
        self.say({})

    def do_POST(self) -> None:
        data, path = self.body(), urlsplit(self.path).path
        answers: dict[str, Callable[[], object]] = {
            "/api/repos/create": lambda: {"url": f"{self.hub.url}/datasets/{REPOSITORY}"},
            f"{_BELOW}/preupload/main": lambda: self.hub.preupload(json.loads(data)["files"]),
            f"/datasets/{REPOSITORY}.git/info/lfs/objects/batch": lambda: self.hub.batch(
                json.loads(data)["objects"]
            ),
            f"{_BELOW}/commit/main": lambda: self.hub.commit(data),
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
        }
        if path.startswith(f"{_BELOW}/paths-info/"):
            asked = parse_qs(data.decode()).get("paths") or json.loads(data)["paths"]
            self.say(self.hub.paths(asked))
        elif self.may_write():
            answer = answers[path]()
            self.say(answer, 200) if answer is not None else self.say({"error": "out of order"}, 500)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked += 1
        if self.hub.busy(self.hub.asked):
            self.say({"error": "We had to rate limit your IP."}, 429)
            return
        if self.hub.private and not self.may_write():
            return
        if found := re.fullmatch(rf"{_BELOW}/tree/[^/]+/?(.*)", path):
            tree = self.hub.tree(found[1], recursive="recursive=true" in self.path.lower())
            none = {"error": "no such folder"}
            self.say(none, 404, X_Error_Code="EntryNotFound") if tree is None else self.say(tree)
        elif path.startswith(f"{_BELOW}/revision/") or path == _BELOW:
            self.say({"id": REPOSITORY, "sha": "1" * 40, "siblings": [], "private": True})
        elif (found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.*)", path)) and found[
            1
        ] in self.hub.files:
            self.serve(self.hub.files[found[1]])
        else:
            what = "EntryNotFound" if REPOSITORY in path else "RepoNotFound"
            self.say({"error": "not found"}, 404, X_Error_Code=what)

    def serve(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": "1" * 40}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self.say(data, **headers)
            return
        first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
        self.say(data[first : last + 1], 206, **headers, Content_Range=f"bytes {first}-{last}/{len(data)}")


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve an empty dataset."""
    hub = Hub()
    with listening(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub
