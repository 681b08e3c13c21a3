"""Views by index: read as the written view would be, whatever they are made of, and refused once a base is another."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.batches import PackedRows
from sftdata.cli import main
from sftdata.errors import DataError, IntegrityError, UsageError
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.verify import verify
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from sfttrain.config import read_settings
from sfttrain.refusals import open_sets
from tests.view_sets import KINDS, Settings, chats, layouts, prepare, view, write_inputs, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], Settings]]:
    return write_inputs(tmp_path_factory.mktemp("indexed-inputs"))


def columns(rows: PackedRows) -> Iterator[bytes]:
    """Yield every column of some rows, as bytes."""
    for name in rows.__slots__:
        column = getattr(rows, name)
        yield b"" if column is None else bytes(column.dtype.str, "ascii") + column.tobytes()


def assert_reads_as_written(indexed: Path, written: Path) -> None:
    """All that a reader sees is the same, but for the digest; no byte of a token is in the view."""
    one, other = sftdata.open(indexed), sftdata.open(written)
    assert one.manifest.by_index
    assert not other.manifest.by_index
    assert one.manifest.ledger == other.manifest.ledger
    assert one.manifest.settings == other.manifest.settings
    assert one.manifest.sources == other.manifest.sources
    assert one.manifest.digest != other.manifest.digest
    shards = [("rows", "documents", "tokens", "tokens_trained")] * len(other.manifest.shards)
    for name, mine, theirs in zip(shards, one.manifest.shards, other.manifest.shards, strict=True):
        assert [getattr(mine, part) for part in name] == [getattr(theirs, part) for part in name]
    for mine, theirs in zip(one.batches(), other.batches(), strict=True):
        assert list(columns(mine)) == list(columns(theirs))
    for mine, theirs in zip(one, other, strict=True):
        for name in ("input_ids", "labels", "seq_lengths", "examples", "loss_weights"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert (left is None) == (right is None)
            assert left is None or (np.array_equal(left, right) and not left.flags.writeable)
    every = [*range(len(one) - 1, -1, -1), *range(len(one))]
    assert list(columns(one.take(every))) == list(columns(other.take(every)))
    assert one.arrow().equals(other.arrow())
    for pattern in ("index-*.arrow", "rejects.jsonl", "dropped.jsonl", "counted.jsonl"):
        found, expected = (sorted(folder.glob(pattern)) for folder in (indexed, written))
        assert [path.name for path in found] == [path.name for path in expected]
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]
    assert rest_of(indexed) == rest_of(written)


def rest_of(folder: Path) -> list[list[bytes]]:
    """Return what the rest of a set holds."""
    from sftdata.set.rows import SetFiles

    manifest = read_manifest(folder)
    files = SetFiles(folder, manifest)
    return [
        [*(getattr(part, name).tobytes() for name in ("input_ids", "labels", "row_offsets", "example_ids", "offset")),
         repr(part.reasons).encode(), b"" if part.loss_weights is None else part.loss_weights.tobytes()]
        for number in range(len(manifest.shards) + 20)
        for part in files.rest(number)
    ]  # fmt: skip


def both(tmp_path: Path, name: str, *bases: Path, **settings: Any) -> tuple[Manifest, Manifest] | None:
    """Make a view by index and the same one written; None where neither can be."""
    made: list[Manifest] = []
    for write in (False, True):
        with suppress(DataError):
            made.append(view(tmp_path / f"{name}-{write}", *bases, write=write, **settings))
    assert len(made) in (0, 2)
    return (made[0], made[1]) if made else None


def assert_views_by_index_are_as_written(
    tmp_path: Path, inputs: tuple[list[Path], Settings], bases: list[Settings], targets: list[Settings]
) -> None:
    files, settings = inputs
    compared = 0
    for number, (base, target) in enumerate((base, target) for base in bases for target in targets):
        folder = tmp_path / f"base-{bases.index(base)}"
        if not folder.exists():
            with suppress(DataError):
                prepare(folder, files, **settings, **base)
        if not folder.exists() or both(tmp_path, str(number), folder, **target) is None:
            continue
        assert_reads_as_written(tmp_path / f"{number}-False", tmp_path / f"{number}-True")
        assert not verify(tmp_path / f"{number}-False").problems, (base, target)
        compared += 1
    assert compared


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_by_index_is_read_as_the_written_one(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], kind: str
) -> None:
    rng = random.Random(f"{kind} by index")
    every = layouts(40, 150, 1000)
    assert_views_by_index_are_as_written(tmp_path, inputs[kind], rng.sample(every, 2), rng.sample(every, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_view_by_index_is_read_as_the_written_one(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], kind: str
) -> None:
    every = layouts(40, 150, 1000)
    assert_views_by_index_are_as_written(tmp_path, inputs[kind], random.Random(kind).sample(every, 6), every)


# ------------------------------------------------------------------------- what a view may be made of


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets `one`, `two` with rest beside the rows, and `weighted`."""
    folder = tmp_path_factory.mktemp("indexed-sets")
    files = {name: write_lines(folder / f"{name}.jsonl", chats(60, ord(name), 40)) for name in "abc"}
    prepare(folder / "one", [files["a"], files["b"]], max_length=128)
    prepare(folder / "two", [files["c"]], max_length=90, overlong="split")
    rows = [
        row | {"messages": [turn | {"weight": 0.5} for turn in row["messages"]]} for row in chats(40, 9, 40)
    ]
    prepare(folder / "weighted", [write_lines(folder / "w.jsonl", rows)], max_length=60, loss_weights=True)
    return folder


RECIPES: list[Settings] = [
    {"max_length": 64},
    {"max_length": 300, "overlong": "split", "order": "shuffled", "seed": 3},
    {"max_length": 100, "packing": "wrapped", "sources": "*b.jsonl"},
    {"max_length": 256, "dedup": "prompt", "cap": {"*": "25 rows"}},
    {"max_length": 128, "mix": {"*.jsonl": 1}, "passes": 2},
    {"packing": "none", "overlong": "truncate-left", "max_length": 50},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=[" ".join(recipe) for recipe in RECIPES])
def test_sets_with_and_without_weights_views_and_written_sets_mix(
    sets: Path, tmp_path: Path, recipe: Settings
) -> None:
    """A view of a view, a set and a set with weights; the view of the view reads the files beneath it."""
    first = both(tmp_path, "first", sets / "one", max_length=70, overlong="split", min_tokens=20)
    assert first is not None
    made = []
    for way in (False, True):
        name = f"second-{way}"
        assert both(tmp_path, name, tmp_path / f"first-{way}", sets / "two", sets / "weighted", **recipe)
        assert_reads_as_written(tmp_path / f"{name}-False", tmp_path / f"{name}-True")
        assert not verify(tmp_path / f"{name}-False", sha256=True).problems
        made.append(tmp_path / f"{name}-False")
    through_view, through_written = (sftdata.open(folder) for folder in made)
    for mine, theirs in zip(through_view, through_written, strict=True):
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.labels, theirs.labels)
    where = [(made[0] / base.path).resolve() for base in through_view.manifest.bases]
    assert where == [(sets / name).resolve() for name in ("one", "two", "weighted")]
    shutil.rmtree(tmp_path / "first-False")
    assert not verify(made[0]).problems


def test_a_view_of_two_views_of_one_set_opens_its_files_once(sets: Path, tmp_path: Path) -> None:
    for name in "ab":
        view(tmp_path / name, sets / "one", sources=f"{name}.jsonl", write=False)
    assert both(tmp_path, "joined", tmp_path / "a", tmp_path / "b", sets / "one", max_length=80)
    assert_reads_as_written(tmp_path / "joined-False", tmp_path / "joined-True")
    assert len(read_manifest(tmp_path / "joined-False").bases) == 1


@pytest.mark.parametrize("name", ["version-1-packed", "version-1-none"])
def test_a_set_of_version_1_may_be_viewed_by_index(tmp_path: Path, name: str) -> None:
    base = Path(__file__).parents[1] / "sets" / name
    if name == "version-1-packed":
        with suppress(UsageError):
            view(tmp_path / "none", base, write=False)
        if not (tmp_path / "none").exists():
            return
    assert both(tmp_path, "old", base, max_length=48)
    assert_reads_as_written(tmp_path / "old-False", tmp_path / "old-True")


def test_a_split_is_by_index_on_both_sides(sets: Path, tmp_path: Path) -> None:
    for write in (False, True):
        config = ViewConfig(sets=(str(sets / "one"),), output=tmp_path / str(write), eval="30%", write=write)
        make_view(config)
    for side in ("train", "eval"):
        assert_reads_as_written(tmp_path / "False" / side, tmp_path / "True" / side)
        assert not verify(tmp_path / "False" / side).problems
    config = config.model_copy(update={"output": tmp_path / "False", "write": False})
    said: list[str] = []
    make_view(config, say=said.append)
    assert all("is up to date" in line for line in said)


def test_what_a_view_holds_can_be_left_out_of_another(sets: Path, tmp_path: Path) -> None:
    held = view(tmp_path / "held", sets / "one", cap={"*": "20 rows"}, write=False)
    left = view(tmp_path / "left", sets / "one", exclude=str(tmp_path / "held"), exclude_by="row")
    inside = {
        id_ for folder in ("held", "left") for row in sftdata.open(tmp_path / folder) for id_ in row.examples
    }
    assert held.ledger.rows_kept + left.ledger.rows_kept <= read_manifest(sets / "one").ledger.rows_kept
    assert left.ledger.documents_left_out["exclude-row"] >= held.ledger.rows_kept
    assert len(inside - {-1}) == held.ledger.rows_kept + left.ledger.rows_kept


# ------------------------------------------------------------------------------------ its own digest


def test_the_digest_covers_packs_and_bases_and_no_path(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "one", tmp_path / "elsewhere" / "one")
    first = view(tmp_path / "view", sets / "one", max_length=64, write=False)
    same = view(tmp_path / "elsewhere" / "view", tmp_path / "elsewhere" / "one", max_length=64, write=False)
    other = view(tmp_path / "other", sets / "one", max_length=80, write=False)
    assert first.digest == same.digest != other.digest
    assert [shard.xxh3 for shard in first.shards] == [shard.xxh3 for shard in same.shards]


def test_written_and_by_index_are_two_sets_that_replace_each_other(sets: Path, tmp_path: Path) -> None:
    view(tmp_path / "view", sets / "one", max_length=64, write=False)
    with pytest.raises(UsageError, match=r"made otherwise \(write differ\)"):
        view(tmp_path / "view", sets / "one", max_length=64)
    expected = prepare(tmp_path / "made", [sets / "a.jsonl", sets / "b.jsonl"], max_length=64)
    written = view(tmp_path / "view", sets / "one", max_length=64, overwrite=True)
    assert written.digest == expected.digest
    assert not list((tmp_path / "view").glob("packs-*"))


# ----------------------------------------------------------------------------- where the bases are


@pytest.fixture
def moved(sets: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a set, and a view of it beside it."""
    shutil.copytree(sets / "one", tmp_path / "home" / "base")
    view(tmp_path / "home" / "view", tmp_path / "home" / "base", max_length=64, write=False)
    return tmp_path / "home" / "base", tmp_path / "home" / "view"


def refused(folder: Path) -> str:
    """Return what is said by opening a row, and by `verify`, which says the same."""
    with pytest.raises(IntegrityError) as caught:
        sftdata.open(folder)[0]
    assert verify(folder).problems == [str(caught.value)] == verify(folder, quick=True).problems
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_both_can_move(moved: tuple[Path, Path], tmp_path: Path) -> None:
    before = [row.input_ids.tolist() for row in sftdata.open(moved[1])]
    (tmp_path / "home").rename(tmp_path / "new")
    assert [row.input_ids.tolist() for row in sftdata.open(tmp_path / "new" / "view")] == before
    (tmp_path / "link").symlink_to(tmp_path / "new" / "view")
    assert [row.input_ids.tolist() for row in sftdata.open(tmp_path / "link")] == before
    assert verify(tmp_path / "link").ok


def test_a_base_that_is_gone_is_refused_and_found_again(moved: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = moved
    digest = read_manifest(folder).digest
    base.rename(tmp_path / "now here")
    said = refused(folder)
    assert said.startswith(
        f"{folder}: a view by index of {base} (digest {read_manifest(tmp_path / 'now here').digest[:12]})"
    )
    assert said.endswith("Fix: put that set back, or run the same `sftdata view` with the path it has now.")
    assert sftdata.open(folder).manifest.ledger.rows_packed  # the numbers need no base
    again = view(folder, tmp_path / "now here", max_length=64, write=False)
    assert again.digest == digest
    assert verify(folder).ok
    (tmp_path / "now here").rename(base)
    refused(folder)
    view(folder, base, max_length=64, write=False)
    assert verify(folder).ok


@pytest.mark.parametrize("command", ["stats", "inspect", "audit", "browse --no-open"])
def test_a_command_refuses_a_view_without_its_base_before_it_shows_anything(
    command: str, moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = moved
    base.rename(tmp_path / "away")
    assert main([*command.split(), str(folder)]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"{refused(folder)}\n"


def test_training_refuses_a_view_without_its_base_before_it_loads_a_model(
    moved: tuple[Path, Path], tmp_path: Path
) -> None:
    base, folder = moved
    base.rename(tmp_path / "away")
    given = {"sets": (folder,), "output": tmp_path / "run", "model": "nowhere"}
    with pytest.raises(IntegrityError) as caught:
        open_sets(read_settings(None, [], given))
    assert str(caught.value) == refused(folder)


def test_a_base_that_is_another_set_is_refused(moved: tuple[Path, Path], sets: Path, tmp_path: Path) -> None:
    base, folder = moved
    base.rename(tmp_path / "old")
    shutil.copytree(sets / "two", base)
    said = refused(folder)
    assert f"where a set with digest {read_manifest(base).digest[:12]} is now" in said
    assert said.endswith(
        "Fix: put the old set back, or repeat the command that made the set, with overwrite=True."
    )
    with pytest.raises(UsageError, match=r"made otherwise \(.*\bsets\b.* differ\)"):
        view(folder, base, max_length=64, write=False)
    view(folder, base, max_length=64, write=False, overwrite=True)
    assert verify(folder).ok
    shutil.rmtree(base)
    (tmp_path / "old").rename(base)
    refused(folder)


def test_a_base_with_another_rest_is_refused(moved: tuple[Path, Path]) -> None:
    from sftdata.set.manifest import write_manifest

    base, folder = moved
    manifest = read_manifest(base)
    files = tuple(file for file in manifest.files if not file.name.startswith("rest-00000"))
    import msgspec

    digest = write_manifest(base, msgspec.structs.replace(manifest, files=files)).digest
    assert digest == manifest.digest
    assert "where a set with other rest files is now" in refused(folder)


@pytest.mark.parametrize("name", ["shard-00000.arrow", "rest-00000.arrow"])
def test_damage_to_a_base_is_found_by_verify_and_by_the_trainer(moved: tuple[Path, Path], name: str) -> None:
    from sfttrain.refusals import verify_sets

    base, folder = moved
    raw = bytearray((base / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (base / name).write_bytes(raw)
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{base / name}: xxh3-128 is ")
    assert verify(folder, quick=True).ok  # it reads no tokens
    with pytest.raises(IntegrityError, match=name):
        verify_sets([sftdata.open(folder)])
    (base / name).write_bytes(raw[:-1])
    assert not verify(folder, quick=True).ok


@pytest.mark.parametrize("kind", ["packs", "rest", "index"])
def test_damage_to_the_view_is_found(moved: tuple[Path, Path], kind: str) -> None:
    path = moved[1] / f"{kind}-00000.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    for quick in (False, True):
        (problem,) = verify(moved[1], quick=quick).problems
        assert problem.startswith(f"{path}: xxh3-128 is ")


def test_a_base_that_is_replaced_under_an_open_view_is_refused(moved: tuple[Path, Path], sets: Path) -> None:
    base, folder = moved
    opened = sftdata.open(folder)
    opened[0]
    sent = pickle.loads(pickle.dumps(opened))
    opened.hold()
    kept = [row.labels.tolist() for row in opened]
    prepare(base, [sets / "c.jsonl"], max_length=128, overwrite=True)
    assert [row.labels.tolist() for row in opened] == kept  # mapped: it stays what it was
    with pytest.raises(IntegrityError, match="where a set with digest"):
        sent[0]


def test_a_view_must_not_lie_in_or_replace_what_holds_its_tokens(moved: tuple[Path, Path]) -> None:
    base, folder = moved
    for output in (base, base / "inside", base.parent):
        for of in (base, folder):
            config = ViewConfig(sets=(str(of),), output=output, max_length=80, overwrite=True)
            with pytest.raises(UsageError) as caught:
                make_view(config)
            assert caught.value.fix in (
                "choose another -o, or replace it by a set that stands alone: --write --overwrite.",
                "choose a folder beside it for -o.",
            )
    written = ViewConfig(sets=(str(folder),), output=base, max_length=80, overwrite=True, write=True)
    make_view(written)
    assert verify(base).ok
    view(base.parent / "beside", base, max_length=80, write=False)
    assert verify(base.parent / "beside").ok


# --------------------------------------------------------------------------------------- all its readers


def test_readers_of_shards_find_none_and_the_card_says_what_to_do(moved: tuple[Path, Path]) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises((FileNotFoundError, datasets.exceptions.DatasetNotFoundError, ValueError)):
        datasets.load_dataset(str(moved[1]))
    assert "`sftdata view` with `--write`" in (moved[1] / "README.md").read_text()


def test_every_command_takes_a_view_by_index(moved: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    from sftdata.cli import main

    view(tmp_path / "written", moved[0], max_length=64)
    for command in (["inspect", "--row", "1", "--json"], ["stats", "--json"], ["audit", "--json"]):
        found = []
        for folder in (moved[1], tmp_path / "written"):
            assert main([command[0], str(folder), *command[1:]]) == 0
            found.append(capsys.readouterr().out.replace(str(folder), "SET"))
        if command[0] != "stats":
            assert found[0] == found[1]
    assert main(["verify", str(moved[1]), "--quick"]) == 0
    assert "tokens by their size" in capsys.readouterr().out
    assert main(["stats", str(moved[1]), "--html", str(tmp_path / "page.html")]) == 0
    html = [sftdata.open(folder)[0]._repr_html_() for folder in (moved[1], tmp_path / "written")]
    assert html[0].replace(str(moved[1]), "") == html[1].replace(str(tmp_path / "written"), "")
