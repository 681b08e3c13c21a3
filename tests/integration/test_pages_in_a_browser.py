"""Every page we write, in headless Chromium: nothing on the console, nothing wider than a phone, readable in light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sftdata
from sftdata.browse import background
from sftdata.browse.site import Site
from sftdata.pages import write_page
from sftdata.show.audit import audit_set
from sftdata.show.report import make_report
from sftdata.show.view import open_shown, view_page
from sfttrain.report import make_report as make_training_report
from tests.shown_sets import CHAT, write_set
from tests.view_sets import chats, prepare, view, write_lines
from tests.waiting import HANGS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
BROWSED = (
    "1/?min_tokens=12&max_trained=90%25&text=what", "1/document/3", "1/findings", "2/left-out", "2/", "2/report",
    "diff",
)  # fmt: skip
PHONE, DESK = 360, 1200
# The pages run no script, so a frame around them measures. Luminance and contrast: WCAG 2.2, 1.4.3.
MEASURE = """<!doctype html><meta name="color-scheme" content="light dark"><script>
function light(rgb) {
  const [r, g, b] = rgb.match(/[0-9.]+/g).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function behind(node) {
  for (; node; node = node.parentElement) {
    const found = getComputedStyle(node).backgroundColor;
    if (/^rgb\\(/.test(found)) return found;
  }
  return "rgb(255, 255, 255)";
}
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, worst = {contrast: 99};
    for (const node of page.querySelectorAll("h1, h2, h3, h4, p, td, th, li, summary, nav a, legend, " +
        "button, .chips a, .about *, .facets a, .said, .figures b, .figures span, .turn > b")) {
      if (!node.textContent.trim()) continue;
      const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
      const contrast = (a + .05) / (b + .05);
      if (contrast < worst.contrast) Object.assign(worst, {contrast, text: node.textContent.slice(0, 40)});
    }
    const size = page.documentElement;
    const unseen = [...page.images].filter(image => !image.naturalWidth).length;
    return {pictures: page.images.length, unseen, width: frame.width, scroll: size.scrollWidth, height: size.scrollHeight, worst,
            dark: light(getComputedStyle(page.body).backgroundColor) < .2};
  });
  document.body.textContent = JSON.stringify(found);
};
</script><body>"""


def pages(folder: Path) -> dict[str, str]:
    shards = open_shown(
        write_set(
            folder / "a-set-with-quite-a-long-name",
            [
                CHAT.format(f"What is {i}? " * (i % 5 + 1), "Long" * 40 if i == 3 else f"{i}.")
                for i in range(30)
            ]
            + ["⟦Endless⟧"],
            cut=5,
            max_length=128,
        )
    )
    files = [write_lines(folder / f"chats-of-source-{name}.jsonl", chats(40, ord(name))) for name in "ab"]
    prepare(folder / "base", files)
    mix = {"*-a.jsonl": 30, "*-b.jsonl": 70}
    view(folder / "mixture", folder / "base", mix=mix, passes=2, dedup="prompt", eval="20%")
    mixture = open_shown(folder / "mixture" / "train")
    run = folder / "run"
    run.mkdir()
    lines = [
        {"step": i, "loss": 9 / i, "grad_norm": i % 3, "learning_rate": 1e-4, "tokens_per_second": 9e5}
        for i in range(1, 300)
    ]
    lines += [{"step": i, "eval_a_set_with_a_long_name_loss": 3.25} for i in (100, 200)]
    (run / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    subprocess.run(
        [sys.executable, "examples/build_pictures.py", str(folder / "vision")], cwd=ROOT, check=True
    )
    model = folder / "vision/processor"
    sftdata.prepare(
        folder / "vision/shapes.jsonl", tokenizer=model, output=folder / "shapes", max_length=512, workers=1
    )
    site = Site([shards, mixture])
    browsed = {
        f"browse {number}": re.sub(r"<script.*?</script>", "", site.answer("", path, asked).body.decode())
        for number, (path, _, asked) in enumerate(one.partition("?") for one in BROWSED)
    }
    return browsed | {
        "pictures": view_page(open_shown(folder / "shapes").view(0)),
        "report": make_report(shards, audit_set(shards)),
        "mixture": make_report(mixture, audit_set(mixture)),
        "view": view_page(shards.view(0), ids=True),
        "training": make_training_report(run),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_are_readable_and_say_nothing_on_the_console(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PATIENCE", HANGS)
    found = {}
    for name, text in pages(tmp_path).items():
        write_page(tmp_path / f"{name}.html", text)
        frames = "".join(
            f'<iframe src="{name}.html" width="{width}" height="900"></iframe>' for width in (PHONE, DESK)
        )
        (tmp_path / "measure.html").write_text(MEASURE + frames)
        done = subprocess.run(
            [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
             f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
             "--dump-dom", (tmp_path / "measure.html").as_uri()],
            capture_output=True, text=True, timeout=HANGS, check=True,
        )  # fmt: skip
        assert not re.findall(r".*CONSOLE.*", done.stderr), name
        body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
        assert body is not None
        found[name] = json.loads(html.unescape(body[1]))
    for name, frames_found in found.items():
        for frame in frames_found:
            assert frame["scroll"] <= int(frame["width"]), (name, frame)
            assert frame["height"] > 300, name
            assert (frame["pictures"] > 0) == (name == "pictures")
            assert not frame["unseen"], name
            assert frame["dark"] == (scheme == "dark"), name
            assert frame["worst"]["contrast"] >= 4.5, (name, frame["worst"])
