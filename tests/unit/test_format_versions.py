"""Sets of each format version: those that release 0.1 wrote are read everywhere, and each is held to its own law."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from sftdata.config import make_config
from sftdata.errors import IntegrityError, UsageError
from sftdata.parts import prepare
from sftdata.set.manifest import FORMAT_VERSION, Manifest, read_manifest, seal, write_manifest
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from sftdata.show.audit import audit
from sftdata.show.stats import measure
from sftdata.show.view import open_shown
from sftdata.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
SETS = (
    ROOT / "tests" / "sets"
)  # `prepare examples/text.txt -t examples/tokenizer --max-length 64` of release 0.1
PACKING = {"version-1-packed": "bfd", "version-1-none": "none"}


def now(output: Path, packing: str, *, overwrite: bool = False) -> Manifest:
    config = make_config(
        inputs=str(ROOT / "examples/text.txt"),
        tokenizer=str(ROOT / "examples/tokenizer"),
        output=output,
        packing=packing,
        max_length=64,
        overwrite=overwrite,
    )
    return prepare(config, Workers(1))


@pytest.mark.parametrize("name", PACKING)
def test_a_set_of_version_1_is_read_everywhere(name: str) -> None:
    folder = SETS / name
    manifest = read_manifest(folder)
    assert manifest.format_version == 1
    assert verify(folder, sha256=True).ok
    shards = open_shown(folder)
    (january,) = shards.view_example(0).documents
    assert "".join(piece.text for piece in january.pieces).startswith("January. The ground is hard")
    assert measure(manifest).tokens
    assert not audit(folder)
    first = {int(document.labels[0]) for row in open_set(folder) for document in row.documents()}
    assert (first == {-100}) == (name == "version-1-packed")


@pytest.mark.parametrize("name", PACKING)
def test_the_trainer_takes_no_label_of_a_first_token_from_any_version(name: str) -> None:
    from sfttrain.data import Collator, TrainingRows

    rows = TrainingRows([open_set(SETS / name)])
    for flatten in (False, True):
        batch = Collator(flatten)([rows[0], rows[1]])
        assert set(batch["labels"][batch["position_ids"] == 0].tolist()) == {-100}


def test_a_packed_set_differs_from_version_1_in_the_number_alone(tmp_path: Path) -> None:
    old, new = read_manifest(SETS / "version-1-packed"), now(tmp_path / "set", "bfd")
    assert (new.format_version, new.shards, new.ledger) == (FORMAT_VERSION, old.shards, old.ledger)
    assert seal(msgspec.structs.replace(new, format_version=1)).digest == old.digest


def test_a_set_that_is_not_packed_differs_in_its_first_labels_alone(tmp_path: Path) -> None:
    now(tmp_path / "set", "none")
    old, new = open_set(SETS / "version-1-none"), open_set(tmp_path / "set")
    assert len(old) == len(new)
    for before, after in zip(old, new, strict=True):
        assert after.input_ids.tolist() == before.input_ids.tolist()
        assert after.labels.tolist() == [-100, *before.labels.tolist()[1:]]
        assert before.labels[0] == before.input_ids[0]


def test_a_first_label_breaks_the_law_of_version_2(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    sealed = now(folder, "none")
    old, shard = read_manifest(SETS / "version-1-none").shards[0], folder / "shard-00000.arrow"
    shutil.copy(SETS / "version-1-none" / old.name, shard)
    counts = {name: getattr(old, name) for name in ("bytes", "xxh3", "sha256", "tokens_trained")}
    sealed.ledger.tokens_context += sealed.ledger.tokens_trained - old.tokens_trained
    sealed.ledger.tokens_trained = old.tokens_trained
    shards = (msgspec.structs.replace(sealed.shards[0], **counts),)
    write_manifest(folder, msgspec.structs.replace(sealed, shards=shards))
    (problem,) = verify(folder).problems
    assert "the first token of a document is trained" in problem
    with pytest.raises(IntegrityError, match="row 0: the first token of a document is trained"):
        open_set(folder)[0]


def test_a_set_of_version_1_does_not_pass_for_one_of_version_2(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(SETS / "version-1-packed", folder)
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow is listed without index-00000\.arrow"):
        write_manifest(folder, msgspec.structs.replace(read_manifest(folder), format_version=2))


@pytest.mark.parametrize("name", PACKING)
def test_an_old_set_is_made_anew_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    """It lacks the rest and the index, so that a set which has them is another."""
    shutil.copytree(SETS / name, tmp_path / name)
    with pytest.raises(UsageError, match=r"made otherwise \(format_version differ\)"):
        now(tmp_path / name, PACKING[name])
    assert now(tmp_path / name, PACKING[name], overwrite=True).format_version == FORMAT_VERSION
    assert verify(tmp_path / name).ok


def test_an_unfinished_set_of_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    now(tmp_path / "set", "none")
    begun = tmp_path / "set.partial"
    begun.mkdir()
    plan = json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]
    (begun / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(UsageError, match="format_version: null -> 2"):
        now(tmp_path / "set", "none")
