"""A view of views counts exactly what its documents are: which are there again, and what each set says of them."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.set.index import read_index
from sftdata.set.manifest import Manifest, in_first_pass
from sftdata.set.verify import verify
from sftdata.show.choice import choices_of, shares_of
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from tests.view_sets import Settings, chats, prepare, split, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    files = [write_lines(folder / f"{name}.jsonl", chats(50, ord(name), 30)) for name in "ab"]
    files.append(folder / "empty.jsonl")
    files[-1].write_text("")
    prepare(folder / "base", files, max_length=64)
    return folder / "base"


def documents_again(folder: Path, manifest: Manifest) -> int:
    """Count, by names and lines alone, documents in rows and rest of which another pass is there too."""
    opened = sftdata.open(folder)
    ids: set[int] = set()
    for path in folder.glob("index-*.arrow"):
        ids.update(read_index(path, manifest.weighted).example_ids.tolist())
    places = [opened.origin(number) for number in ids]
    return len(ids) - len({(re.sub(r"(#\d+)+$", "", name), line) for name, line in places})


def steps(tmp_path: Path) -> list[Settings]:
    """Return what a view in a chain may do."""
    (tmp_path / "list").write_text("a.jsonl:5\nb.jsonl:9\n")
    return [
        {},
        {"epochs": 2},
        {"epochs": 3, "cap": {"a*": "20 rows"}},
        {"mix": {"a.*": 2, "b.*": 1}, "passes": 2.5, "mix_by": "rows"},
        {"mix": {"*": 1}, "passes": 1.5},
        {"sources": ("*#2",)},
        {"without": ("b.jsonl", "a.jsonl#2")},
        {"cap": {"*": "60 rows"}, "seed": 3},
        {"dedup": "row"},
        {"drop": tmp_path / "list"},
        {"order": "length"},
        {"max_length": 40, "overlong": "split", "packing": "bfd"},
        {"packing": "wrapped", "max_length": 50},
    ]


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 60))]
)
def test_a_chain_of_views_counts_what_is_there_again(base: Path, tmp_path: Path, seed: int) -> None:
    rng, before, names = random.Random(seed), base, {"a.jsonl", "b.jsonl", "empty.jsonl"}
    for number in range(4):
        settings = rng.choice(steps(tmp_path))
        if "sources" in settings and not any(name.endswith("#2") for name in names):
            settings = {"epochs": 2}
        if "without" in settings and "a.jsonl#2" not in names:
            settings = {"order": "shuffled", "seed": number}
        output = tmp_path / str(number)
        try:
            made = view(output, before, write=rng.random() < 0.5, **settings)
        except sftdata.SftError as error:  # nothing is there any more of a source, or at all
            if not re.search("nothing left of it|no document is left", str(error)):
                raise
            continue
        assert made.ledger.documents_repeated == documents_again(output, made), settings
        assert not verify(output).problems
        counted = made.ledger.sources.values()
        assert sum(share.rows for share in shares_of(made)) == pytest.approx(1)
        assert len(shares_of(made)) <= len({re.sub(r"(#\d+)+$", "", name) for name in made.ledger.sources})
        assert sum(own.rows for own in counted) == made.ledger.rows_kept
        names, before = {source.name for source in made.sources}, output


def test_what_is_gone_through_again_is_not_again_where_the_first_pass_is_gone(
    base: Path, tmp_path: Path
) -> None:
    made = view(tmp_path / "three", base, epochs=3)
    alone = view(tmp_path / "alone", tmp_path / "three", sources=("a.jsonl#2", "b.jsonl#3"))
    assert alone.ledger.documents_repeated == 0
    assert alone.ledger.rows_kept == made.ledger.rows_kept // 3
    twice = view(tmp_path / "twice", tmp_path / "three", without=("*#3",))
    assert twice.ledger.documents_repeated == made.ledger.documents_repeated // 2
    both = view(tmp_path / "both", tmp_path / "three", base)
    assert both.ledger.documents_repeated == made.ledger.documents_repeated
    assert not view(tmp_path / "capped", tmp_path / "alone", cap={"*": "9 rows"}).ledger.documents_repeated


def test_passes_over_passes_are_passes_over_their_first(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "two", base, epochs=2)
    made = view(tmp_path / "four", tmp_path / "two", epochs=2)
    names = [source.name for source in made.sources if source.rows]
    assert sorted(names) == sorted(
        f"{name}.jsonl{again}" for name in "ab" for again in ("", "#2", "#3", "#4")
    )
    assert [share.name for share in shares_of(made)] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "list").write_text("a.jsonl:5\n")
    gone = view(tmp_path / "less", tmp_path / "four", drop=tmp_path / "list").ledger.documents_left_out
    assert gone == {"drop": 4}
    assert (in_first_pass(made.sources, in_first_pass(made.sources, _ids(made))) < 150).all()


def _ids(manifest: Manifest) -> Any:
    import numpy as np

    return np.arange(sum(source.rows for source in manifest.sources))


def test_a_view_of_a_view_has_settings_of_its_own(base: Path, tmp_path: Path) -> None:
    first = view(tmp_path / "first", base, dedup="row", cap={"*": "40 rows"}, epochs=2)
    second = view(tmp_path / "second", tmp_path / "first")
    assert second.settings["view"] == {"bases": [first.digest]}
    again = view(tmp_path / "like", tmp_path / "first", **_like(tmp_path / "second"))
    assert again.digest == second.digest
    told = dict(choices_of(second))
    assert told["cap"].startswith("in a set it is made of: ")
    assert "epochs" not in told


def _like(folder: Path) -> Settings:
    from sftdata.like import settings_like

    return settings_like(folder, ViewConfig.model_fields, {})


def test_an_order_that_is_not_kept_is_said(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "first", base, order="length", bands=2, pad_to_multiple_of=4)
    view(tmp_path / "steps", base, steps_for="2x2")
    said: list[str] = []

    def say(output: str, *sets: str, **settings: Any) -> list[str]:
        said.clear()
        sources = tuple(str(tmp_path / name) for name in sets)
        make_view(ViewConfig(sets=sources, output=tmp_path / output, **settings), say=said.append)
        return [line for line in said if "was laid out" in line]

    assert say("a", "first", "steps") == [
        f"{tmp_path}/first: was laid out by --order, --pad-to-multiple-of; its rows are packed anew, without.",
        f"{tmp_path}/steps: was laid out by --steps-for; its rows are packed anew, without.",
    ]
    assert say("b", "first", order="shuffled", pad_to_multiple_of=4) == []
    assert say("c", "steps", steps_for="2x2") == []


def test_views_are_made_again_from_the_lowest_on(base: Path, tmp_path: Path) -> None:
    chain, moved = [tmp_path / name for name in ("one", "two", "three")], tmp_path / "moved"
    shutil.copytree(base, tmp_path / "base")

    def make(first: Path, **settings: Any) -> list[str]:
        digests = []
        for below, folder in zip([first, *chain], chain, strict=False):
            keep = {"max_length": 50} if folder is chain[0] else {"cap": {"*": f"{len(folder.name)}0 rows"}}
            digests.append(view(folder, below, write=False, **keep, **settings).digest)
        return digests

    before = make(tmp_path / "base")
    (tmp_path / "base").rename(moved)
    between = "make the views between again, the lowest first, and this one last: for each, run the same"
    for folder in chain[1:]:
        assert between in verify(folder).problems[0]
    assert between not in verify(chain[0]).problems[0]
    assert make(moved) == before
    assert not [problem for folder in chain for problem in verify(folder).problems]
    prepare(moved, [*base.parent.glob("a.jsonl")], max_length=64, overwrite=True)
    for folder in chain[1:]:
        (problem,) = verify(folder).problems
        assert problem.endswith("and this one last: for each, the same `sftdata view` with overwrite=True.")
    make(moved, overwrite=True)
    assert not [problem for folder in chain for problem in verify(folder).problems]


def test_a_split_of_a_mixture_has_equal_documents_on_one_side(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "mixed", base, mix={"*": 1}, passes=2)
    both = split(tmp_path / "both", tmp_path / "mixed", eval="40%")
    for side, made in zip(("train", "eval"), both, strict=True):
        assert made.ledger.documents_repeated == documents_again(tmp_path / "both" / side, made) > 0
