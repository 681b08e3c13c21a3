"""Servers on 127.0.0.1 that stand for the stores inputs come from: they count what they send, and fail as they are told."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.waiting import HANGS

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Web:
    """Files behind http, with ranges and tags.

    Attributes:
        files: content by name.
        sent: bytes of bodies, by name.
        answer: status to answer a GET of a name with instead, by how often it was asked for; None to serve it.
        ranges: serve ranges.
        wrong_region: answer as S3 does where the region is wrong.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sent: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.answer: Callable[[str, int], int | None] = lambda name, times: None
        self.ranges = True
        self.wrong_region = False
        self.url = ""

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def web_handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.serve(body=False)

        def do_GET(self) -> None:
            self.serve(body=True)

        def serve(self, *, body: bool) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            data = web.files.get(name)
            web.asked[name] = web.asked.get(name, 0) + body
            if web.wrong_region:
                text = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-west-1'</Message></Error>"
                self.send_response(400)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text * body)
                return
            status = web.answer(name, web.asked[name]) if body else None
            if data is None or status is not None:
                self.send_response(status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if web.ranges else None
            part = data
            if found:
                first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
                part = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{hash(data)}"')
            self.end_headers()
            if body:
                web.sent[name] = web.sent.get(name, 0) + len(part)
                with suppress(ConnectionError):
                    self.wfile.write(part)

    return Handler


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer on a free port of 127.0.0.1; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served() -> Iterator[Web]:
    """Serve files by http."""
    web = Web()
    with listening(web_handler(web)) as web.url:
        yield web


def serve(web: Web, folder: Path, at: str = "set") -> str:
    """Put a set on the server; return its URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            web.files[f"{at}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return f"{web.url}/{at}"


def arrows(web: Web) -> dict[str, int]:
    """How often each shard was asked for."""
    return {
        name.rpartition("/")[2]: times for name, times in web.asked.items() if "/shard-" in name and times
    }


class Counter:
    """Passes connections on to a server, and counts what that sends."""

    def __init__(self, port: int) -> None:
        self.sent, self._to = 0, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.sent += len(data) * counted
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        self._listener.close()


class Gate:
    """Passes connections on to the server; kills a process at its n-th put, or says that it is asked too often.

    Attributes:
        slow: says so of a request, by its number from 1.
        slowly: how it says so.
        moment: of the kill: "before" the server hears of it, in the "middle" of what it hears, or "after" its answer.
    """

    slowly = "503 Slow Down"

    def __init__(self, port: int) -> None:
        self._to, self._turn = port, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.number, self.moment, self.puts = 0, "", 0
        self.kill: Callable[[], None] = lambda: None
        self.requests, self.slow = 0, lambda number: False
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, number: int, moment: str) -> None:
        self.number, self.moment, self.puts = number, moment, 0

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                last = threading.Event()
                threading.Thread(target=self._ask, args=(client, server, last), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client, last), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, last: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 20):
                with self._turn:
                    self.puts += data.startswith(b"PUT ")
                    here = data.startswith(b"PUT ") and self.puts == self.number
                    self.requests += data.startswith((b"PUT ", b"GET ", b"POST "))
                    slow = self.slow(self.requests)
                if slow:
                    client.settimeout(0.05)
                    with suppress(TimeoutError):
                        while client.recv(1 << 20):
                            pass
                    answer = f"HTTP/1.1 {self.slowly}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    client.sendall(answer.encode())
                    break
                if here and self.moment == "after":
                    last.set()
                elif here:
                    if self.moment == "middle":
                        server.sendall(data[: len(data) // 2])
                    self.kill()
                    break
                server.sendall(data)
        self._hang_up(client, server)

    def _answer(self, server: socket.socket, client: socket.socket, last: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 20):
                if last.is_set():
                    self.kill()
                    break
                client.sendall(data)
        self._hang_up(server, client)

    def _hang_up(self, own: socket.socket, other: socket.socket) -> None:
        """End a connection on both sides; the thread that reads the other closes that."""
        for end in (own, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        own.close()

    def close(self) -> None:
        self._listener.close()


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """Run moto's server in a process of its own; yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])",
    ]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **KEYS})
    try:
        deadline = time.monotonic() + HANGS
        while True:
            with suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=HANGS).close()
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        _forget_clients()
        yield port
    finally:
        process.terminate()
        process.wait(HANGS)


def _forget_clients() -> None:
    """Let this process connect anew: clients of fsspec live as long as it, and know the server of an earlier test."""
    if loaded := sys.modules.get("s3fs"):
        loaded.S3FileSystem.clear_instance_cache()


_EXTRAS = {"ray": "ray", "gcsfs": "gcs", "adlfs": "azure", "azure": "azure"}


def need_packages(*names: str) -> None:
    """Skip aloud where a package is missing: of the extra `scale`, or Ray, of its own."""
    for name in names:
        pytest.importorskip(
            name,
            reason=f"{name} is not installed: pip install 'sftdata[{_EXTRAS.get(name, 'scale')}]'",
        )
