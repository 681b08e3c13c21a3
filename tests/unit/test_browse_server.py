"""The server of `sftdata browse`: whom it answers, what it lets a page do, and how it ends."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sftdata.browse.server import Server
from sftdata.browse.site import Site
from sftdata.errors import UsageError
from sftdata.show.view import open_shown
from tests.shown_sets import CHAT, write_set
from tests.waiting import HANGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("served") / "set", [CHAT.format("What?", "That.")] * 3)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(Site([open_shown(folder)]), 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join(HANGS)


def asked(
    server: Server, path: str, host: str | None = None, method: str = "GET"
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=HANGS)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    return connection.getresponse()


def test_a_page_may_fetch_nothing_and_run_no_script_but_ours(server: Server) -> None:
    top = server.url.partition(str(server.server_port))[2]
    found = asked(server, f"{top}1/")
    policy = dict(part.split(" ", 1) for part in found.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["form-action"] == "'self'"
    assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert "connect-src" not in policy
    assert found.headers["Referrer-Policy"] == "no-referrer"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
    text = found.read().decode()
    assert re.findall(r"<script[^>]*>", text) == [f'<script src="{top}keys.js" defer>']
    assert not re.search(r"\son\w+=|https?://(?!www\.w3\.org)|@import|url\(", text)
    assert asked(server, f"{top}keys.js").headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1]", "", "::", "127.0.0.1@e"]
)
def test_another_name_for_this_machine_is_turned_away(server: Server, host: str) -> None:
    top = server.url.partition(str(server.server_port))[2]
    found = asked(server, f"{top}1/", host)
    assert found.status in (400, 403)
    assert b"What" not in found.read()


@pytest.mark.parametrize("path", ["/", "/1/", "/wrong/1/", "//1/", "/%2e%2e/1/", "http://evil.example/", "*"])
def test_who_does_not_have_the_address_sees_nothing(server: Server, path: str) -> None:
    found = asked(server, path)
    assert found.status in (400, 403)
    assert len(found.read()) < 100


def test_the_address_works_through_a_tunnel_from_another_port(server: Server) -> None:
    top = server.url.partition(str(server.server_port))[2]
    assert asked(server, f"{top}1/", "localhost:9").status == 200
    assert asked(server, top).headers["Location"] == f"{top}1/"


def test_nothing_can_be_written(server: Server) -> None:
    top = server.url.partition(str(server.server_port))[2]
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(server, f"{top}1/", method=method).status == 501


def test_it_listens_to_this_machine_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_two_servers_have_two_secrets(server: Server, folder: Path) -> None:
    with Server(Site([open_shown(folder)]), 0) as other:
        mine, its = (one.url.split("/")[3] for one in (server, other))
    assert mine != its
    assert len(mine) >= 20


def test_a_port_in_use_is_refused_with_another_way(folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match="another one, or leave"),
    ):
        Server(Site([open_shown(folder)]), taken.getsockname()[1])


def test_a_page_that_fails_is_said_here_and_there_and_costs_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    top = server.url.partition(str(server.server_port))[2]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("none\x1b left")

    with monkeypatch.context() as patched:
        patched.setattr(Site, "answer", fail)
        found = asked(server, f"{top}1/report")
        assert found.status == 500
        assert found.read() == "Internal error: ZeroDivisionError: none␛ left\n".encode()
    assert capsys.readouterr().err == "Internal error: ZeroDivisionError: none␛ left (page 1/report)\n"
    assert asked(server, f"{top}1/").status == 200


def test_an_idle_connection_keeps_no_other_waiting(server: Server) -> None:
    top = server.url.partition(str(server.server_port))[2]
    with socket.create_connection(("127.0.0.1", server.server_port)):
        assert asked(server, f"{top}1/").status == 200


def test_ctrl_c_ends_the_command_cleanly(folder: Path) -> None:
    command = [sys.executable, "-m", "sftdata", "browse", str(folder), "--no-open"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert re.match(r"http://127\.0\.0\.1:\d+/[\w-]+/  Ctrl-C ends it\.\n", running.stderr.readline())
        running.send_signal(signal.SIGINT)
        assert running.stderr.read() == ""
        assert running.wait(HANGS) == 0
