"""Sources with names: an input of that name is read as its entry says, and as the same file with flags would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftdata
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.verify import verify
from tests.view_sets import TOKENIZER

pytestmark = pytest.mark.usefixtures("no_sync")
ROWS: dict[str, list[dict[str, Any]]] = {
    "data/chats.jsonl": [
        {"talk": [{"role": "user", "content": f"{n}?"}, {"role": "bot", "content": f"Yes, {n}."}]}
        for n in range(40)
    ],
    "data/web/a.jsonl": [{"text": f"Of {n} beans."} for n in range(30)],
    "data/web/b.jsonl": [{"text": f"Of {n} peas."} for n in range(30)],
    "qa.jsonl": [{"question": f"{n} and {n}?", "answer": f"{2 * n}"} for n in range(30)],
}
ENTRIES: dict[str, Any] = {
    "chats": {
        "path": "data/chats.jsonl", "map": {"messages": "talk"}, "map_role": {"bot": "assistant"}, "licence": "CC-BY-4.0",
    },
    "web": "data/web",
    "q-a": {"path": "qa.jsonl", "kind": "completion", "licence": "MIT"},
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, rows in ROWS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(ENTRIES, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _prepare(output: str, *inputs: str) -> Manifest:
    assert (
        main(
            ["prepare", *inputs, "-t", str(TOKENIZER), "-o", output, "--max-length", "128", "--workers", "1"]
        )
        == 0
    )
    return read_manifest(Path(output))


def _documents(folder: str, source: str) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of the documents of a source, in its order."""
    opened = sftdata.open(folder)
    found = []
    for row in opened:
        starts = row.seq_lengths.cumsum() - row.seq_lengths
        for start, length, example in zip(starts, row.seq_lengths, row.examples, strict=True):
            if example >= 0 and opened.origin(int(example))[0] == source:
                part = slice(int(start), int(start + length))
                found.append((int(example), row.input_ids[part].tolist(), row.labels[part].tolist()))
    return [(ids, labels) for _, ids, labels in sorted(found)]


@pytest.mark.feature("named sources")
def test_each_source_is_read_as_by_itself_with_flags(here: Path) -> None:
    together = _prepare("set", "chats", "web", "q-a")
    assert [source.name for source in together.sources] == ["chats", "web/a.jsonl", "web/b.jsonl", "q-a"]
    assert [source.licence for source in together.sources] == ["CC-BY-4.0", None, None, "MIT"]
    flags = {
        "chats": ["data/chats.jsonl", "--map", "messages=talk", "--map-role", "bot=assistant"],
        "web/a.jsonl": ["data/web/a.jsonl"], "web/b.jsonl": ["data/web/b.jsonl"],
        "q-a": ["qa.jsonl", "--kind", "completion"],
    }  # fmt: skip
    for number, (name, arguments) in enumerate(flags.items()):
        alone = _prepare(f"alone{number}", *arguments)
        assert _documents("set", name) == _documents(f"alone{number}", alone.sources[0].name), name
    assert verify(Path("set")).ok
    card = Path("set/README.md").read_text()
    assert "- `chats`: CC-BY-4.0\n- `q-a`: MIT\n" in card


def test_names_choose_among_sources_and_views_keep_names_and_licences(here: Path) -> None:
    mixed = _prepare(
        "set", "chats", "web", "q-a", "--mix", "chats=50%", "--mix", "web=50%", "--cap", "q-a=3 rows"
    )
    assert {share.name: share.rows > 0 for share in mixed.shares} == {"chats": True, "web": True}
    _prepare("whole", "chats", "web")
    assert main(["view", "whole", "-o", "view", "--sources", "web", "--write"]) == 0
    view = read_manifest(Path("view"))
    assert {source.name: source.licence for source in view.sources}["chats"] == "CC-BY-4.0"
    assert view.ledger.rows_kept == 60
    assert "CC-BY-4.0" in Path("view/README.md").read_text()


def test_the_registry_lies_beside_the_settings_file_or_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "recipes").mkdir()
    recipe = {"inputs": ["mine"], "tokenizer": str(TOKENIZER), "output": "set", "max_length": 64}
    Path("recipes/sft.yaml").write_text(yaml.safe_dump(recipe))
    Path("recipes/datasets.yaml").write_text("mine: ../qa.jsonl\n")
    assert main(["prepare", "recipes/sft.yaml"]) == 0
    assert [source.name for source in read_manifest(Path("set")).sources] == ["mine"]
    Path("recipes/datasets.yaml").rename("others.yaml")
    Path("others.yaml").write_text("mine: qa.jsonl\n")
    assert main(["prepare", "recipes/sft.yaml", "--registry", "others.yaml"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert main(["config", "check", "recipes/sft.yaml", "--set", "registry=others.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["registry"]["mine"]["path"] == ["qa.jsonl"]
    inline = sftdata.prepare(
        "mine",
        tokenizer=TOKENIZER,
        output="inline",
        max_length=64,
        registry={"mine": {"path": "qa.jsonl"}},
        workers=1,
    )
    assert inline.digest == read_manifest(Path("set")).digest


def test_a_registry_that_was_asked_for_and_names_no_input_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-t", str(TOKENIZER), "-o", "set", "--max-length", "64"]
    Path("others.yaml").write_text("mine: qa.jsonl\nyours: qa.jsonl\n")
    advice = (
        r"registry: none of the inputs is a source of it; it holds mine, yours\. Fix: name one of its sources"
    )
    assert main(["prepare", "qa.jsonl", *flags, "--registry", "others.yaml"]) == 2
    assert re.search(advice, capsys.readouterr().err)
    with pytest.raises(UsageError, match=advice):
        sftdata.prepare("qa.jsonl", tokenizer=TOKENIZER, output="set", registry="others.yaml")
    assert main(["prepare", "mine", *flags, "--registry", "others.yaml"]) == 0
    assert main(["prepare", "qa.jsonl", *flags, "--overwrite"]) == 0, (
        "one that only lies here is not asked for"
    )


def test_what_an_entry_says_decides_whether_a_set_is_up_to_date(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _prepare("set", "chats", "q-a")
    assert _prepare("set", "chats", "q-a").digest == first.digest
    assert "up to date: same" in capsys.readouterr().err
    for change, same in (({"licence": "MIT-0"}, True), ({"kind": "conversation"}, False)):
        entries = ENTRIES | {"q-a": ENTRIES["q-a"] | change}
        Path("datasets.yaml").write_text(yaml.safe_dump(entries))
        made = _prepare("set", "chats", "q-a")
        assert (made.digest == first.digest) is same
        fresh = _prepare(f"fresh{same}", "chats", "q-a")
        assert fresh.digest == made.digest
        assert [source.licence for source in made.sources] == [source.licence for source in fresh.sources]
    Path("datasets.yaml").write_text(yaml.safe_dump(ENTRIES | {"q-a": "qa.jsonl"}))
    assert _prepare("set", "chats", "q-a").digest != first.digest


def test_a_name_that_is_a_file_too_means_the_source_and_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chats").write_text('{"text": "a file"}\n')
    assert _prepare("set", "chats").sources[0].rows == 40
    assert (
        "chats: the source of this name in the registry, not the file; ./chats is the file."
        in capsys.readouterr().err
    )
    assert _prepare("file", "./chats").sources[0].rows == 1


def test_detect_and_preview_take_a_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "chats"]) == 0
    assert capsys.readouterr().out.startswith("messages")
    assert main(["preview", "chats", "-t", str(TOKENIZER), "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger"]["rows_kept"] == 40
    assert main(["detect", "chats", "web"]) == 2
    assert "chats and web: are looked at apart. Fix: name one source." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n  formt: alpaca\n  path: qa.jsonl\n", r"datasets.yaml:1: a: unknown setting 'formt'.*did you mean 'format'"),
        ("a:\n  format: alpaca\n", r"datasets.yaml:1: a: names no path\. Fix: add `path:`"),
        ("a: 7\n", r"datasets.yaml:1: a: names no path"),
        ("x: qa.jsonl\na/b: qa.jsonl\n", r"datasets.yaml:2: a/b: is no name; expected letters"),
        ("a:\n  path: qa.jsonl\n  kind: chat\n", r"datasets.yaml:1: a: setting 'kind': found 'chat'"),
        ("a:\n  path: qa.jsonl\n  licence: 5\n", r"datasets.yaml:1: a: setting 'licence': found 5"),
        ("- a\n", r"datasets.yaml: found a list; expected settings"),
        ("a:\n  path: qa.jsonl\n  map_role: {bot: user}\n", r"--map-role bot=user acts on conversations"),
        ("a:\n  path: none.jsonl\n", r"none.jsonl: no such file"),
        ("no: qa.jsonl\n", r"registry: False: is no text. Fix: put the name in quotes"),
        ("b: &b {path: qa.jsonl}\na: {<<: *b, path: none.jsonl}\n", r"none.jsonl: no such file"),
        ("a: qa.jsonl\na: qa.jsonl\n", r"datasets.yaml:2: 'a' is there twice"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused_in_one_line(
    text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("datasets.yaml").write_text(text)
    assert (
        main(
            ["prepare", "a", "-t", str(TOKENIZER), "-o", "set", "--max-length", "64", "--kind", "completion"]
        )
        == 2
    )
    assert re.search(said, capsys.readouterr().err)


def test_a_setting_of_the_run_that_no_source_leaves_room_for_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-t", str(TOKENIZER), "-o", "set", "--max-length", "64"]
    assert main(["prepare", "q-a", *flags, "--kind", "conversation"]) == 2
    assert "each source of the registry says its own. Fix: leave it out." in capsys.readouterr().err
    assert main(["prepare", "q-a", "qa.jsonl", *flags, "--kind", "conversation"]) == 0


def test_from_python_what_is_no_registry_is_refused() -> None:
    with pytest.raises(UsageError, match="registry: found 5; expected a YAML file"):
        sftdata.prepare("a", tokenizer=TOKENIZER, output="set", registry=5)  # type: ignore[call-overload]
