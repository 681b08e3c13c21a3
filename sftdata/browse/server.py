"""The server of `sftdata browse`: to this machine only, to who has the address only, and to read only."""

from __future__ import annotations

import hmac
import secrets
import sys
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

from sftdata.browse.site import Answer, Site
from sftdata.errors import UsageError
from sftdata.output import one_line, print_line

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")  # any other name is one that a page elsewhere has made to point here
_SECONDS = 30  # that a connection may be silent
_HEADERS = {
    # It holds even where escaping should ever fail: nothing is fetched from elsewhere, no script of data
    # runs.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " script-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Answers requests from one site, one after the other; a browser holds connections open beside them.

    Args:
        site: makes the pages.
        port: 0 for any that is free.

    Attributes:
        url: of the first page; it holds a secret.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self._token, self._site, self._lock = secrets.token_urlsafe(16), site, Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--port {port}: cannot be listened to: {reason}.", "another one, or leave --port out."
            ) from None
        self.url = f"http://{HOST}:{self.server_port}/{self._token}/"

    def warm(self) -> None:
        """Read what the first page needs, before it is asked for."""
        with self._lock:
            self._site.warm()

    def answer(self, host: str, target: str) -> Answer:
        """Return what a request is answered with.

        Args:
            host: as the request names it.
            target: path and query.
        """
        try:
            name, asked = urlsplit(f"//{host}").hostname, urlsplit(target)
        except ValueError:
            return Answer(400, b"This is no address.\n")
        token, _, path = unquote(asked.path).removeprefix("/").partition("/")
        if name not in _NAMES or not hmac.compare_digest(token.encode(), self._token.encode()):
            return Answer(403, b"This address is not known here: use the one that sftdata printed.\n")
        with self._lock:
            try:
                return self._site.answer(f"/{token}", path, asked.query)
            except Exception as error:  # the other pages are still good
                said = f"Internal error: {type(error).__name__}: {error}"
                print_line(f"{said} (page {path})", err=True)
                return Answer(500, f"{one_line(said)}\n".encode(errors="backslashreplace"))

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that has gone away, in one line what else went wrong."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print_line(f"Internal error: {type(error).__name__}: {error}", err=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SECONDS
    server_version, sys_version = "sftdata", ""

    def do_GET(self) -> None:
        found = self.server.answer(self.headers.get("Host", ""), self.path)
        self.send_response(found.status)
        for name, value in {**_HEADERS, **found.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", found.kind)
        self.send_header("Content-Length", str(len(found.body)))
        self.end_headers()
        self.wfile.write(found.body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the address is a secret."""


def serve(site: Site, port: int, *, show: bool, tell: Callable[[str], object]) -> None:
    """Answer requests until Ctrl-C.

    Args:
        port: as for `Server`.
        show: open the browser.
        tell: called with the address.

    Raises:
        UsageError: the port cannot be listened to.
    """
    with Server(site, port) as server, suppress(KeyboardInterrupt):
        Thread(target=server.warm, daemon=True).start()  # while the browser opens
        tell(f"{server.url}  Ctrl-C ends it.")
        if show:
            _open(server.url)
        server.serve_forever()


def _open(url: str) -> None:
    """Open the browser, where there is one; not one that would take this terminal."""
    with suppress(webbrowser.Error):
        browser = webbrowser.get()
        if type(browser) is not webbrowser.GenericBrowser:
            browser.open(url)
