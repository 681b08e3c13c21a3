"""Take the pictures of docs/images: terminals, reports, pages and a notebook. Needs Chromium, and the notebooks extra.

A block of commands in docs/course and docs/gallery.md that is followed by a picture is what it shows, its page run from
the top: an SVG the terminal, a PNG the page that the block wrote.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image, ImageChops
from rich.console import Console
from rich.text import Text

import sftdata
from sftdata.browse import background
from sftdata.browse.site import Site
from sftdata.show.terminal import print_view

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
EXAMPLE = 3
COLUMNS = 108
BLOCK = re.compile(
    r"^```(?:console|bash)\n(?P<body>.*?)^```\n(?:\n!\[[^\]]*\]\((?:\.\./)?images/(?P<picture>[\w-]+\.(?:svg|png))\))?",
    re.M | re.S,
)
COMMAND = re.compile(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)", re.M)


def prepare(folder: Path) -> Path:
    """Build the set that the pictures show."""
    names = ("conversations.jsonl", "instructions.json", "completions.jsonl", "text.txt")
    inputs, chats = [f"examples/{name}" for name in names], folder / "chats"
    with contextlib.chdir(ROOT):  # so that the pictures show no path of one machine
        sftdata.prepare(inputs, tokenizer="examples/tokenizer", output=chats, max_length=192)
    return chats


def terminal_svg(folder: Path) -> str:
    """Return what `sftdata inspect` shows on a terminal; no fonts from elsewhere, so that nothing is fetched to see it."""
    shards = sftdata.open(folder)
    style = {"force_terminal": True, "color_system": "truecolor", "highlight": False, "markup": False}
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), **style)
    view = shards.view_example(EXAMPLE)
    print_view(type(view)("", view.documents), console)
    return as_svg(console, f"sftdata inspect chats --example {EXAMPLE}", "inspect")


def as_svg(console: Console, title: str, name: str) -> str:
    """Return what a console recorded, with fonts of the reader's machine."""
    svg = console.export_svg(title=title, unique_id=name)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, DejaVu Sans Mono, Menlo")


def page_pictures(page: Path, folder: Path) -> None:
    """Run the commands of a page, and draw the terminal, or the page written last, of each block that has a picture."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        commands = COMMAND.findall(block["body"]) or [block["body"].strip()]
        style = {"force_terminal": True, "color_system": "truecolor", "highlight": False, "markup": False}
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), **style)
        for command in commands:
            console.print(Text.assemble(("$ ", "green"), (command, "bold")))
            console.print(Text.from_ansi(terminal_of(command, folder)))
        picture, written = IMAGES / (block["picture"] or ""), commands[-1].partition("--html ")[2]
        if picture.suffix == ".svg":
            svg = as_svg(console, " ".join(commands[-1].split()[:2]), picture.stem)
            picture.write_text(svg, encoding="utf-8")
        elif picture.suffix == ".png" and written:
            photograph(folder / written, picture, 1000, 2100)


def terminal_of(command: str, folder: Path) -> str:
    """Return what a command prints on a terminal with colours."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {
        **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        "PATH": path,
        "COLUMNS": str(COLUMNS),
        "FORCE_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
        "SFTDATA_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    made = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
    )  # fmt: skip
    return made.stdout.rstrip("\n").replace(f"{folder}/", "")


def notebook_page(path: Path) -> str:
    """Return a notebook with its outputs as a page, after running it."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.sub(r"^#+ (.*)$", r"<h2>\1</h2>", html.escape(cell.source), flags=re.MULTILINE)
            parts.append(f"<div>{heading}</div>")
            continue
        parts.append(f"<pre class=code>{html.escape(cell.source)}</pre>")
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                parts.append(f"<div class=out>{data['text/html']}</div>")
            elif "image/png" in data:
                parts.append(f"<img src='data:image/png;base64,{data['image/png'].strip()}'>")
            elif "text/plain" in data:
                parts.append(f"<pre class=out>{html.escape(data['text/plain'])}</pre>")
    style = (
        "body{font:15px system-ui,sans-serif;max-width:860px;margin:24px auto;color:#222;background:#fff}"
        ".code{background:#f6f8fa;padding:10px;border-radius:6px;font-size:12px;overflow:hidden}"
        ".out{margin:8px 0 20px;font-size:13px}"
    )
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{''.join(parts)}"


def train(chats: Path, output: Path) -> Path:
    """Train the tiny model on the set and return its report."""
    settings = (
        "learning_rate=0.005",
        "per_device_train_batch_size=4",
        "logging_steps=2",
        "eval_strategy=steps",
        "eval_steps=10",
    )
    command = [
        "sfttrain",
        "run",
        str(chats),
        "--eval",
        f"same={chats}",
        "--init-from-config",
        "examples/tiny-model/config.json",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([*command, "-o", str(output), "--max-steps", "60", *options], check=True, cwd=ROOT)
    return output / "report.html"


def browse_pictures(chats: Path, folder: Path) -> None:
    """Take the pictures of docs/browse.md: the pages as the server sends them, without its script."""
    other = folder / "mixture"
    sftdata.view(chats, output=other, mix={"conversations.jsonl": 60, "text.txt": 40}, min_tokens=20)
    background.PATIENCE = 60
    one, both = Site([sftdata.open(chats)]), Site([sftdata.open(chats), sftdata.open(other)])
    for site, name, address, size, dark in (
        (one, "list", "1/?min_tokens=24", (1000, 1080), False),
        (one, "document", "1/document/3", (1000, 640), True),
        (one, "phone", "1/?sources=conversations.jsonl", (500, 1080), False),
        (both, "diff", "diff", (1000, 1060), False),
    ):
        path, _, query = address.partition("?")
        page = folder / f"browse-{name}.html"
        page.write_bytes(site.answer("", path, query).body)
        photograph(page, IMAGES / f"browse-{name}.png", *size, dark=dark)


def photograph(page: Path, picture: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Take a screenshot of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("Chromium is not installed; the SVG is written, the screenshots are not.")
    shot = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    subprocess.run(
        [*shot, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120, capture_output=True
    )
    trim(picture)


def trim(picture: Path) -> None:
    """Leave out what is empty below, and colours that nobody sees."""
    with Image.open(picture) as opened:
        shown = opened.convert("RGB")
    empty = Image.new("RGB", shown.size, shown.getpixel((0, shown.height - 1)))
    box = ImageChops.difference(shown, empty).getbbox() or (0, 0, *shown.size)
    shown.crop((0, 0, shown.width, min(box[3] + 20, shown.height))).quantize(128).save(picture, optimize=True)


def main() -> None:
    """Write docs/images."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = prepare(folder)
        (IMAGES / "inspect.svg").write_text(terminal_svg(chats), encoding="utf-8")
        notebook = folder / "notebook.html"
        browse_pictures(chats, folder)
        photograph(train(chats, folder / "model"), IMAGES / "training.png", 1000, 1250)
        notebook.write_text(
            notebook_page(ROOT / "notebooks/4-train-and-read-the-loss.ipynb"), encoding="utf-8"
        )
        photograph(notebook, IMAGES / "notebook.png", 920, 1960)
        for page in (*sorted((ROOT / "docs/course").glob("*.md")), ROOT / "docs/gallery.md"):
            page_pictures(page, folder / page.stem)


if __name__ == "__main__":
    main()
