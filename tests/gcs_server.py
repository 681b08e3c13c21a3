"""A server on 127.0.0.1 that answers as Google Cloud Storage documents it, as far as obstore and gcsfs ask.

Both of its interfaces: XML, which obstore speaks, and JSON, which gcsfs speaks. Generations and their conditions are kept,
which the emulators that can be installed lack.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.remote_stores import listening

PAGE = 7  # objects of a listing


class Kept(NamedTuple):
    data: bytes
    generation: int
    headers: dict[str, str]

    @property
    def md5(self) -> bytes:
        return hashlib.md5(self.data).digest()


class Gcs:
    """What the server holds.

    Attributes:
        buckets: objects by bucket and name.
        tokens: those that are accepted, and whether they may write.
        conditions: keep the conditions of puts; False for a store that ignores them.
        answer: the status to answer a request with instead, by method and path; None to serve it.
        asked: methods and paths.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Kept]] = {"bucket": {}}
        self.tokens = {"Bearer none": True}
        self.conditions = True
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.url, self.turn, self._generation = "", threading.Lock(), 1_700_000_000_000_000

    def put(
        self, bucket: str, name: str, data: bytes, headers: dict[str, str], expected: str | None
    ) -> Kept | None:
        """Keep an object; None where its generation is another than expected, of which 0 is that of none."""
        with self.turn:
            known = self.buckets[bucket].get(name)
            if (
                self.conditions
                and expected is not None
                and int(expected) != (known.generation if known else 0)
            ):
                return None
            self._generation += 1
            self.buckets[bucket][name] = Kept(data, self._generation, headers)
            return self.buckets[bucket][name]

    def listed(self, bucket: str, query: dict[str, str]) -> tuple[list[tuple[str, Kept]], list[str], str]:
        """Return objects, common prefixes and the mark of the next page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        begin = query.get("continuation-token") or query.get("pageToken") or query.get("startOffset", "")
        objects: list[tuple[str, Kept]] = []
        folders: dict[str, None] = {}
        with self.turn:
            found = sorted(self.buckets[bucket].items())
        for name, kept in found:
            if not name.startswith(prefix) or name < begin:
                continue
            if len(objects) + len(folders) == PAGE:
                return objects, [*folders], name
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if not cut:
                objects.append((name, kept))
            elif prefix + head + cut >= begin or not begin.startswith(prefix + head + cut):
                folders[prefix + head + cut] = None
        return objects, [*folders], ""


class _Handler(BaseHTTPRequestHandler):
    gcs: Gcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart

    def log_message(self, *_: object) -> None:
        pass

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        xml = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        said = {"error": {"code": status, "message": message}}
        self.say(status, json.dumps(said).encode() if "/storage/v1/" in self.path else xml.encode())

    def serve(self) -> None:
        gcs, body = self.gcs, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        query = {key: found[0] for key, found in parse_qs(address.query).items()}
        parts = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/(o)(?:/(.+))?)?", address.path)
        bucket, name = (parts[1], parts[3] or "") if parts else address.path[1:].partition("/")[::2]
        bucket, name = unquote(bucket), unquote(name)
        gcs.asked.append((self.command, unquote(address.path)))
        if address.path == "/token":
            self.say(200, json.dumps({"access_token": "none", "expires_in": 3600}).encode())
        elif (refused := self.refusal(bucket, unquote(address.path))) is not None:
            self.refuse(*refused)
        elif self.command == "PUT":
            self.put(bucket, name, body)
        elif not name:
            (self.list_json if parts and parts[2] else self.list_xml)(bucket, query)
        elif (kept := gcs.buckets[bucket].get(name)) is None:
            self.refuse(404, "NoSuchKey", "The specified key does not exist.")
        elif self.command == "DELETE":
            gcs.buckets[bucket].pop(name, None)
            self.say(204)
        elif parts and query.get("alt") != "media":
            self.say(200, json.dumps(entry(bucket, name, kept)).encode())
        else:
            self.send(kept)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = serve

    def refusal(self, bucket: str, path: str) -> tuple[int, str, str] | None:
        """Return why a request is not served, whatever it asks for."""
        token = self.headers.get("Authorization", "Bearer none")  # gcsfs tells emulators none
        may_write = self.gcs.tokens.get(token)
        if (status := self.gcs.answer(self.command, path)) is not None:
            return status, "AccessDenied", "The test says so."
        if may_write is None:
            return 401, "AuthenticationRequired", "Authentication required."
        if not may_write and self.command in ("PUT", "DELETE"):
            return 403, "AccessDenied", "Access denied."
        if bucket not in self.gcs.buckets:
            return 404, "NoSuchBucket", "The specified bucket does not exist."
        return None

    def put(self, bucket: str, name: str, body: bytes) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        sent = headers.get("content-md5", "")
        if sent and base64.b64decode(sent) != hashlib.md5(body).digest():
            self.refuse(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
            return
        meta = {key: value for key, value in headers.items() if key.startswith("x-goog-meta-")}
        kept = self.gcs.put(bucket, name, body, meta, headers.get("x-goog-if-generation-match"))
        if kept is None:
            self.refuse(
                412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold."
            )
        else:
            self.say(200, ETag=f'"{kept.md5.hex()}"', x_goog_generation=str(kept.generation))

    def send(self, kept: Kept) -> None:
        headers = {"ETag": f'"{kept.md5.hex()}"', "x_goog_generation": str(kept.generation)} | kept.headers
        headers |= {"Last_Modified": formatdate(0, usegmt=True), "Content_Type": "application/octet-stream"}
        headers["x_goog_hash"] = f"md5={base64.b64encode(kept.md5).decode()}"
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            self.say(200, kept.data, **headers)
            return
        first, last = int(found[1]), min(int(found[2] or len(kept.data)), len(kept.data) - 1)
        self.say(
            206,
            kept.data[first : last + 1],
            **headers,
            Content_Range=f"bytes {first}-{last}/{len(kept.data)}",
        )

    def list_xml(self, bucket: str, query: dict[str, str]) -> None:
        objects, folders, after = self.gcs.listed(bucket, query)
        text = "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult>"
        text += f"<IsTruncated>{str(bool(after)).lower()}</IsTruncated>"
        text += f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if after else ""
        for name, kept in objects:
            text += f"<Contents><Key>{escape(name)}</Key><Generation>{kept.generation}</Generation>"
            text += "<LastModified>2026-11-28T00:00:00.000Z</LastModified>"
            text += f'<ETag>"{kept.md5.hex()}"</ETag><Size>{len(kept.data)}</Size></Contents>'
        text += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders
        )
        self.say(200, f"{text}</ListBucketResult>".encode())

    def list_json(self, bucket: str, query: dict[str, str]) -> None:
        objects, folders, after = self.gcs.listed(bucket, query)
        found: dict[str, object] = {"kind": "storage#objects", "prefixes": folders}
        found["items"] = [entry(bucket, name, kept) for name, kept in objects]
        self.say(200, json.dumps(found | ({"nextPageToken": after} if after else {})).encode())


def entry(bucket: str, name: str, kept: Kept) -> dict[str, object]:
    """Describe an object as the JSON interface does."""
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(kept.data)),
        "generation": str(kept.generation), "md5Hash": base64.b64encode(kept.md5).decode(), "etag": "CAE=",
        "updated": "2026-11-28T00:00:00.000Z", "timeCreated": "2026-11-28T00:00:00.000Z",
        "contentType": "application/octet-stream", "storageClass": "STANDARD",
    }  # fmt: skip


@contextmanager
def gcs_server() -> Iterator[Gcs]:
    """Serve one empty bucket named `bucket`."""
    gcs = Gcs()
    with listening(type("Handler", (_Handler,), {"gcs": gcs})) as gcs.url:
        yield gcs
