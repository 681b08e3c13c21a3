"""`sftdata diff` says of any two sets what a slow comparison of their documents says, and its numbers add up."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.set.manifest import Manifest, read_manifest, write_manifest
from sftdata.show.diff import Both, Diff, diff
from sftdata.show.pairs import pair_up
from tests import made_tokenizers
from tests.oracles.set_diff import compare, documents_of
from tests.token_sets import TOKENIZER, Layout, Row, Sources, write_tokens

ROOT = Path(__file__).resolve().parents[2]
ALL = 1_000_000
LAYOUTS = [
    Layout(),
    *(Layout(8, "bfd", policy) for policy in ("truncate", "truncate-left", "drop", "split")),
    Layout(12, "none", "split"),
    Layout(8, "wrapped"),
]
Lines = dict[str, list[Row | None]]


def draw_row(rng: random.Random) -> Row:
    """Draw a document of few words, so that prompts, and whole documents, meet again."""
    ids: list[int] = []
    trained: list[bool] = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        prompt, answer = rng.randint(0, 3), rng.randint(1, 9)
        ids += [rng.randint(5, 6) for _ in range(prompt)] + [rng.randint(5, 8) for _ in range(answer)]
        trained += [False] * prompt + [True] * answer
    if rng.random() < 0.1:
        trained = [False] * len(ids)
    return Row(tuple(ids), tuple(trained))


def draw_lines(rng: random.Random) -> Lines:
    lines: Lines = {
        name: [draw_row(rng) for _ in range(rng.randint(1, 12))] for name in ("a.jsonl", "b.jsonl")
    }
    lines["b.jsonl"].append(None)
    return lines


def edited(rng: random.Random, row: Row) -> Row:
    """Change a document somewhere: a label, an id of the prompt or of an answer, or its end."""
    ids, trained = list(row.ids), list(row.trained)
    at = rng.randrange(len(ids))
    way = rng.choice(("label", "id", "id", "end", "all"))
    if way == "label":
        trained[at] = not trained[at]
    elif way == "id":
        ids[at] ^= 1
    elif way == "end":
        ids, trained = ids[: at + 1], trained[: at + 1]
    else:
        return draw_row(rng)
    return Row(tuple(ids), tuple(trained))


def mutate(rng: random.Random, lines: Lines) -> Lines:
    """Edit, remove, blank, insert, repeat and swap lines; rename and repeat sources."""
    lines = {name: list(rows) for name, rows in lines.items()}
    for _ in range(rng.randint(0, 9)):
        name = rng.choice(list(lines))
        rows = lines[name]
        at = rng.randrange(len(rows) + 1)
        row = rows[at] if at < len(rows) else None
        way = rng.choice((*["edit"] * 12, "remove", "blank", "insert", "copy", "swap", "rename", "repeat"))
        if way == "edit" and row:
            rows[at] = edited(rng, row)
        elif way == "remove" and len(rows) > 1:
            rows[at : at + 1] = []
        elif way == "blank" and row:
            rows[at] = None
        elif way == "insert":
            rows.insert(at, draw_row(rng))
        elif way == "copy":
            rows.insert(at, row)
        elif way == "swap":
            rng.shuffle(rows)
        elif way == "rename":
            lines = {f"new-{key}" if key == name else key: rows for key, rows in lines.items()}
        elif way == "repeat" and f"{name}#2" not in lines:
            lines[f"{name}#2"] = list(rows)
    return lines


def places(found: Diff) -> dict[str, list[tuple[str | None, str | None]]]:
    """Return the places of all documents of each kind."""
    return {
        change.kind: sorted((_at(each.a), _at(each.b)) for each in change.examples)
        for change in found.changes
        if change.documents
    }


def _at(version: object) -> str:
    return "" if version is None else str(version.place)  # type: ignore[attr-defined]


def expected(
    a: Sources, b: Sources, layouts: tuple[Layout, Layout], slices: int
) -> dict[str, list[tuple[str, str]]]:
    told = compare(documents_of(a, layouts[0], slices), documents_of(b, layouts[1], slices))
    return {
        kind: sorted(
            tuple("" if place is None else f"{place[0]}:{place[1]}" for place in pair) for pair in pairs
        )  # type: ignore[misc]
        for kind, pairs in told.items()
    }


def holds(found: Diff, a: Manifest, b: Manifest) -> None:
    """Assert that what came, went and changed is the difference of the two ledgers."""
    for name, of in (("documents", "rows_kept"), ("tokens", "tokens"), ("trained", "tokens_trained")):
        both = getattr(found, name)
        assert (both.a, both.b) == (getattr(a.ledger, of), getattr(b.ledger, of)), name
        assert sum(getattr(source, name).b for source in found.sources) == both.b, name
    count = {change.kind: change.documents for change in found.changes}
    assert found.documents.gain == count["came"] - count["went"]
    assert found.documents.b == found.same + found.moved + sum(count.values()) - count["went"]
    for name in ("tokens", "trained"):
        gained = sum(getattr(change, name).gain for change in found.changes)
        assert getattr(found, name).gain == gained, name
    for change in found.changes:
        in_sources = sum(source.changes.get(change.kind, 0) for source in found.sources)
        assert in_sources == change.documents, change.kind


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))]
)
def test_two_sets_differ_as_a_slow_comparison_says(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(25):
        one, slices = draw_lines(rng), rng.choice((1, 2))
        layout = rng.choice(LAYOUTS)
        other = mutate(rng, one)
        layouts = layout, (layout if rng.random() < 0.6 else rng.choice(LAYOUTS))
        folders = tmp_path / f"{number}-a", tmp_path / f"{number}-b"
        manifests = [
            write_tokens(folder, lines, own, slices)
            for folder, lines, own in zip(folders, (one, other), layouts, strict=True)
        ]
        found, told = diff(*folders, limit=ALL), expected(one, other, layouts, slices)
        assert found.same == len(told.pop("same", [])), (seed, number)
        assert found.moved == len(told.pop("moved", [])), (seed, number)
        for change in found.changes[:2]:
            assert change.copies == len(told.pop(f"{change.kind} copies", [])), (seed, number)
            assert change.beside == len(told.pop(f"{change.kind} beside", [])), (seed, number)
        assert places(found) == told, (seed, number)
        holds(found, *manifests)


@pytest.mark.parametrize("seed", range(20))
def test_equal_keys_are_paired_first_with_first_however_much_of_them_is_alike(seed: int) -> None:
    """Keys that differ in their lowest bits alone, between others that do not."""
    rng = np.random.default_rng(seed)
    high, low = (rng.integers(0, 3, 80).astype(np.uint64) for _ in range(2))
    keys = (high << np.uint64(61)) + low
    a, b = keys[:50], keys[50:]
    wanted = [
        pair
        for key in set(keys.tolist())
        for pair in zip(np.flatnonzero(a == key).tolist(), np.flatnonzero(b == key).tolist(), strict=False)
    ]
    for left, right in ((a, b), (np.stack([a, a ^ a], 1), np.stack([b, b ^ b], 1))):
        first, second = pair_up(left, right)
        assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == sorted(wanted)


def test_two_sources_of_one_name_are_two(tmp_path: Path) -> None:
    one, other = Row((5, 6, 7), (False, True, True)), Row((8, 6, 7), (False, True, True))
    for name, second in (("a", [one]), ("b", [one, other])):
        made = write_tokens(tmp_path / name, {"x.jsonl": [other, one], "y.jsonl": second}, Layout())
        same = [msgspec.structs.replace(source, name="x.jsonl") for source in made.sources]
        same[1] = msgspec.structs.replace(same[1], xxh3=name * 32)
        write_manifest(tmp_path / name, msgspec.structs.replace(made, sources=tuple(same)))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [(source.documents, source.changes, source.other_bytes) for source in found.sources] == [
        (Both(2, 2), {}, False),
        (Both(1, 2), {"came": 1}, True),
    ]


# --------------------------------------------------------------------------------------------- real sets


CHATS = [json.loads(line) for line in (ROOT / "examples/conversations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set `base` of some chats, and others made from it, from edited chats or with other settings."""
    folder = tmp_path_factory.mktemp("sets")
    prepared(folder / "base", CHATS)
    return folder


def prepared(output: Path, rows: list[Any], **settings: Any) -> Path:
    data = output.parent / "data" / output.name / "chats.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": TOKENIZER, "max_length": 128, "workers": 1} | settings
    sftdata.prepare(data, output=output, **options)
    return output


def counts(found: Diff) -> dict[str, int]:
    same = {"same": found.same, "moved": found.moved}
    kinds = same | {change.kind: change.documents for change in found.changes}
    return {kind: count for kind, count in kinds.items() if count}


def test_a_line_put_in_at_the_top_moves_the_others_and_changes_none(sets: Path, tmp_path: Path) -> None:
    new = {"messages": [{"role": "user", "content": "new?"}, {"role": "assistant", "content": "New."}]}
    found = sftdata.diff(sets / "base", prepared(tmp_path / "longer", [new, *CHATS]))
    assert counts(found) == {"moved": found.documents.a, "came": 1}
    (example,) = found.changes[0].examples
    assert example.a is None
    assert example.b is not None
    assert example.b.place == "chats.jsonl:1"
    text = "".join(piece.text for piece in example.b.pieces if piece.trained)
    assert text == "New.<|im_end|>"


def test_another_answer_is_shown_from_where_it_differs(sets: Path, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(CHATS))
    last = rows[0]["messages"][-1]
    last["content"] = last["content"][:-1] + ", indeed!"
    found = sftdata.diff(sets / "base", prepared(tmp_path / "other", rows))
    assert counts(found) == {"same": found.documents.a - 1, "answer": 1}
    (example,) = found.changes[4].examples
    texts = ["".join(piece.text for piece in own.pieces) for own in (example.a, example.b) if own]
    assert "indeed" in texts[1]
    assert "indeed" not in texts[0]
    assert example.a
    assert example.a.skipped > 0


def test_another_mask_changes_labels_and_no_id(sets: Path, tmp_path: Path) -> None:
    found = sftdata.diff(sets / "base", prepared(tmp_path / "all", CHATS, train_on="all", max_rejects=1))
    assert counts(found)["labels"] >= found.documents.a - 3
    assert found.tokens.gain == sum(change.tokens.gain for change in found.changes)
    assert found.settings == {"train_on": ("auto", "all")}


def test_views_are_compared_as_what_they_hold(sets: Path, tmp_path: Path) -> None:
    sftdata.view(sets / "base", output=tmp_path / "parts", eval="30%", max_length=512)
    found = sftdata.diff(tmp_path / "parts/train", tmp_path / "parts/eval")
    assert counts(found) == {"came": found.documents.b, "went": found.documents.a}
    sftdata.view(sets / "base", output=tmp_path / "twice", mix={"*": 1}, passes=2)
    found = sftdata.diff(sets / "base", tmp_path / "twice")
    assert counts(found) == {"same": found.documents.a, "came": found.documents.a}
    assert found.changes[0].copies == found.documents.a
    sftdata.view(sets / "base", output=tmp_path / "short", max_length=64, overlong="split")
    found = sftdata.diff(sets / "base", tmp_path / "short")
    assert counts(found)["cut"] > 10
    assert found.settings["max_length"] == (128, 64)


def test_a_view_by_index_is_equal_to_the_same_view_written(sets: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_length": 64, "dedup": "prompt", "overlong": "split"}
    sftdata.view(sets / "base", output=tmp_path / "index", **settings)
    sftdata.view(sets / "base", output=tmp_path / "written", write=True, **settings)
    assert sftdata.diff(tmp_path / "index", tmp_path / "written").equal
    found = sftdata.diff(tmp_path / "index", sets / "base", limit=ALL)
    assert found.trained.gain == sum(change.trained.gain for change in found.changes)


def test_a_copy_is_equal(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sets / "base", tmp_path / "copy")
    assert main(["diff", str(sets / "base"), str(tmp_path / "copy")]) == 0
    assert "are equal" in capsys.readouterr().out
    assert main(["diff", str(sets / "base"), str(tmp_path / "copy"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"]
    assert told["changes"]["came"]["documents"] == 0


def test_the_command_says_what_differs_and_exits_with_1(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = prepared(tmp_path / "other", [*CHATS[1:], CHATS[3]], train_on="last-assistant")
    assert main(["diff", str(sets / "base"), str(other), "--limit", "1"]) == 1
    told = capsys.readouterr().out
    for part in ("train_on  auto → last-assistant", "same ids, other labels", "went", "chats.jsonl:1 ", "⟦"):
        assert part in told
    assert main(["diff", str(sets / "base"), str(other), "--json", "--limit", "0"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["changes"]["went"]["examples"] == []
    assert data["documents"] == {"a": 38, "b": 38}
    found = sftdata.diff(sets / "base", other)
    assert "same ids, other labels" in found._repr_html_()
    assert repr(found).endswith("; settings differ: 1>")


def test_it_says_why_the_other_set_lacks_a_row(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(json.dumps(CHATS))
    rows[2]["messages"][-1]["role"] = "helper"
    other = prepared(tmp_path / "other", rows, max_length=512, max_rejects=5)
    found = sftdata.diff(sets / "base", other, limit=ALL)
    examples = [each for change in found.changes[:2] for each in change.examples]
    told = {own.place: each.why for each in examples if (own := each.a or each.b)}
    assert told.pop("chats.jsonl:3") == "rejected: unknown-role"
    assert set(told.values()) == {"dropped: no-trained-tokens"}
    assert main(["diff", str(sets / "base"), str(other)]) == 1
    assert "b rejected: unknown-role" in capsys.readouterr().out
    (other / "rejects.jsonl").write_text("{")
    assert main(["diff", str(sets / "base"), str(other)]) == 4
    assert "rejects.jsonl" in capsys.readouterr().err


def test_two_tokenizers_are_compared_by_place_and_text(tmp_path: Path) -> None:
    made_tokenizers.write_tokenizers(tmp_path)
    rows = [CHATS[number] for number in (3, 4, 7, 9)]
    settings = {"max_length": 2048, "chat_template": "chatml"}
    one = prepared(tmp_path / "one", rows, **settings)
    rows = json.loads(json.dumps([*rows[1:], rows[0]]))
    rows[1]["messages"][-1]["content"] = "Nothing."
    other = prepared(
        tmp_path / "other", rows, tokenizer=tmp_path / "tokenizers" / "made-metaspace", **settings
    )
    found = sftdata.diff(one, other)
    assert counts(found) == {"moved": 3, "answer": 1}
    assert "tokenizer sha256" in found.settings
    assert "compared by place and text" in found.notes[0]
    (example,) = found.changes[4].examples
    assert example.b
    assert "Nothing" in "".join(piece.text for piece in example.b.pieces)


def test_weights_are_labels_too(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": w}]}
            for w in (1, 1)]  # fmt: skip
    one = prepared(tmp_path / "one", rows)
    rows[1]["messages"][-1]["weight"] = 0.5
    other = prepared(tmp_path / "other", rows, loss_weights=True)
    found = sftdata.diff(one, other)
    assert counts(found) == {"same": 1, "labels": 1}
    assert "has weights" in found.notes[0]


@pytest.mark.parametrize("name", ["version-1-packed", "version-1-none"])
def test_sets_of_version_1_are_compared_where_they_are_whole(tmp_path: Path, name: str) -> None:
    old = ROOT / "tests/sets" / name
    packing = "none" if name.endswith("none") else "bfd"
    now = tmp_path / "now"
    sftdata.prepare(
        ROOT / "examples/text.txt", tokenizer=TOKENIZER, output=now, max_length=64, packing=packing
    )
    lost = read_manifest(old).ledger.tokens_cut
    if lost:
        with pytest.raises(UsageError, match="format version 1, without an index; lost"):
            sftdata.diff(old, now)
        return
    found = sftdata.diff(old, now)
    assert counts(found) == {"same": found.documents.a}
    assert found.settings["format version"] == (1, 2)
    assert sftdata.diff(old, old).equal


def test_two_sets_of_version_1_differ_in_no_label_that_trains_nothing() -> None:
    packed, alone = (ROOT / "tests/sets" / name for name in ("version-1-packed", "version-1-none"))
    found = sftdata.diff(packed, alone)
    assert counts(found) == {"same": found.documents.a}
    assert found.settings == {"packing": ("bfd", "none")}
    assert "both are of format version 1" in found.notes[0]


def test_a_damaged_set_is_refused(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sets / "base", tmp_path / "copy")
    index = tmp_path / "copy" / "index-00000.arrow"
    index.write_bytes(index.read_bytes()[:-1] + b"!")
    assert main(["diff", str(sets / "base"), str(tmp_path / "copy")]) == 4
    assert "xxh3-128" in capsys.readouterr().err
    assert main(["diff", str(sets / "base"), str(tmp_path / "none")]) == 2
