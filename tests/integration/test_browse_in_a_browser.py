"""`sftdata browse` on hostile rows, in headless Chromium: no request leaves the machine, no script of data runs, keys work."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

import sftdata
from sftdata.browse import background
from sftdata.browse.server import Server
from sftdata.browse.site import Site
from sftdata.show.view import open_shown
from tests.poison import cases
from tests.view_sets import TOKENIZER
from tests.waiting import HANGS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
    ),
]

OWN = "document.documentElement.dataset.owned=1;new Image().src='http://canary.example/script'"
ATTACKS = (
    f"<script>{OWN}</script>",
    f"</span></title></style></textarea></script><script>{OWN}</script>",
    f'<img src=http://canary.example/image onerror="{OWN}">',
    f'"><svg onload={OWN.replace(" ", "/**/")}>',
    f"' autofocus onfocus='{OWN}' x='",
    "<link rel=stylesheet href=http://canary.example/style><style>@import 'http://canary.example/import';</style>",
    "<meta http-equiv=refresh content='0;url=http://canary.example/refresh'>",
    "<base href=http://canary.example/><iframe src=http://canary.example/frame></iframe>",
    "<form action=http://canary.example/form><input name=text autofocus></form>",
    f"{{{{ self.__init__.__globals__ }}}}{{% include '/etc/passwd' %}}javascript:{OWN}",
    'x" style="background:url(http://canary.example/css)',
    "<video autoplay src=http://canary.example/video></video><object data=http://canary.example/object></object>",
)


class Canary(ThreadingHTTPServer):
    """Stands for every other host: hears each request that leaves the page."""

    daemon_threads = True

    def __init__(self) -> None:
        self.heard: list[str] = []
        super().__init__(("127.0.0.1", 0), _Hears)


class _Hears(BaseHTTPRequestHandler):
    server: Canary

    def do_GET(self) -> None:
        if "canary" in self.headers.get("Host", ""):  # Chromium asks for other things of its own
            self.server.heard.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with Canary() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def dumped(url: str, canary: Canary, profile: Path) -> str:
    """Return a page as Chromium has it after its scripts have run."""
    rules = f"MAP * 127.0.0.1:{canary.server_port}, EXCLUDE 127.0.0.1"
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=2000",
        "--disable-background-networking", f"--host-resolver-rules={rules}", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    return done.stdout


def test_the_canary_hears_and_the_mark_shows_where_nothing_is_escaped(canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "open.html").write_text("<!doctype html><title>open</title><body>" + "\n".join(ATTACKS[:3]))
    page = dumped((tmp_path / "open.html").as_uri(), canary, tmp_path / "profile")
    assert 'data-owned="1"' in page
    assert {"/script", "/image"} <= set(canary.heard)
    canary.heard.clear()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a set of poisoned rows and attacks: in messages, roles, columns, file and folder names, rejects."""
    folder = tmp_path_factory.mktemp("hostile")
    named = folder / "<img src=x onerror=alert(1)>' onclick='.jsonl"
    lines = [case.line for case in cases()]
    for attack in ATTACKS:
        turns = [{"role": "user", "content": attack}, {"role": "assistant", "content": attack * 2}]
        lines.append(json.dumps({"messages": turns}).encode())
        lines.append(json.dumps({"messages": [{"role": attack, "content": attack}]}).encode())
        lines.append(json.dumps({"messages": turns, attack: attack})[:-1].encode())
    named.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    output = folder / "set <script>alert(2)</script>"[:-1].replace("/", "_")
    sftdata.prepare(
        [named], tokenizer=TOKENIZER, output=output, max_length=128, max_rejects="100%", workers=1
    )
    shards = open_shown(output)
    with Server(Site([shards, shards]), 0) as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(background, "PATIENCE", HANGS)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PAGES = (
    "1/", "1/?page=2", "1/?text=" + quote("<script>"), "1/?text=" + quote(ATTACKS[4]), "1/left-out", "1/findings",
    "1/report", "diff",
    "1/row/0", "1/?sources=" + quote(ATTACKS[0]), "1/" + quote(ATTACKS[2], safe=""), "1/document/LAST",
)  # fmt: skip


@pytest.fixture(scope="module")
def opened(
    hostile: Server, canary: Canary, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], list[str]]:
    """Open every page, several at a time, since a start of Chromium is mostly waiting; return what was heard, too."""
    found = hostile.answer("127.0.0.1", address(hostile, "1/?text=canary")).body.decode()
    last = max(map(int, re.findall(r"/document/(\d+)", found)))
    canary.heard.clear()

    def open_page(page: str) -> str:
        url = hostile.url + page.replace("LAST", str(last))
        return dumped(url, canary, tmp_path_factory.mktemp("profile"))

    with ThreadPoolExecutor(4) as pool:
        texts = dict(zip(PAGES, pool.map(open_page, PAGES), strict=True))
    return texts, list(canary.heard)


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_the_data_acts(
    hostile: Server, opened: tuple[dict[str, str], list[str]], page: str
) -> None:
    text, heard = opened[0][page], opened[1]
    assert "sftdata" in text or "<nav>" in text
    assert heard == []
    assert "data-owned" not in text
    assert re.findall(r"<script[^>]*>", text) == [f'<script src="{address(hostile, "keys.js")}" defer="">']
    assert not re.search(r"<(?:iframe|base|object|video|link rel=.?s|img src=.?http|meta http)", text)
    shown = html.unescape(re.sub(r"<[^>]*>", "", text))
    if page in ("1/document/LAST", "1/?text=" + quote("<script>")):
        assert "http://canary.example/" in shown  # the text is there, as text


def address(server: Server, page: str) -> str:
    return server.url.partition(f":{server.server_port}")[2] + page


def test_keys_step_through_the_list_and_open_a_document(
    hostile: Server, canary: Canary, tmp_path: Path
) -> None:
    """The script of the page is run in a page that presses its keys and writes down where the focus is."""
    page = hostile.answer("127.0.0.1", address(hostile, "1/")).body.decode()
    script = hostile.answer("127.0.0.1", address(hostile, "keys.js")).body.decode()
    press = """
      const pressed = key => new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
      const press = key => document.activeElement.dispatchEvent(pressed(key));
      const at = () => [...document.querySelectorAll(".stop")].indexOf(document.activeElement);
      const seen = [at()];
      for (const key of ["j", "j", "j", "k", "x"]) { press(key); seen.push(at()); }
      press("/"); seen.push(document.activeElement.name);
      press("j"); seen.push(document.activeElement.name);
      press("Escape"); seen.push(at());
      document.body.textContent = JSON.stringify(seen);"""
    page = re.sub(r"<script[^>]*></script>", "", page).replace(
        "</body>", f"<script>{script}{press}</script></body>"
    )
    (tmp_path / "keys.html").write_text(page)
    found = re.search(
        r"<body>(.*)</body>",
        dumped((tmp_path / "keys.html").as_uri(), canary, tmp_path / "profile"),
        re.DOTALL,
    )
    assert found is not None
    assert json.loads(html.unescape(found[1])) == [-1, 0, 1, 2, 1, 1, "text", "text", -1]
