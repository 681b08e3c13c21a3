"""A set that was damaged, cut, swapped or mixed with another: verify names the file, and training on it does not begin."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sftdata.errors import IntegrityError, SftError
from sftdata.set import shards as shards_module
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from sfttrain.refusals import verify_sets
from tests.torture.runs import content, prepare, write_chats
from tests.train_runs import run, tiny_llama, train_in_process

pytestmark = pytest.mark.slow

Files = dict[str, bytes]
MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A set of a few shards of several record batches each, with its tokenizer and rejects."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_BATCH_TOKENS", 512)
        prepare(write_chats(folder / "chats.jsonl", 300), folder / "set", slice_bytes=20_000)
    assert 3 <= len(list((folder / "set").glob("shard-*.arrow"))) <= 5
    assert len(boundaries((folder / "set" / "shard-00000.arrow").read_bytes())) > 6
    yield folder / "set"
    assert trained(folder / "set") is None, "the sound set is refused, or was changed"


@pytest.fixture
def set_folder(sound: Path, place: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, place / "set"))


def boundaries(raw: bytes) -> list[int]:
    """Return where the messages of an Arrow file begin."""
    return [at for at in range(8, len(raw) - 8, 8) if raw[at : at + 4] == b"\xff\xff\xff\xff"]


def verified(folder: Path) -> list[str]:
    """Return what verify says is wrong."""
    try:
        return verify(folder).problems
    except SftError as error:
        return [str(error)]


def trained(folder: Path) -> str | None:
    """Return why training on the set does not begin; None where its bytes are no reason."""
    try:
        verify_sets([open_set(folder)])
    except SftError as error:
        return str(error)
    return None


def is_named(folder: Path, name: str) -> None:
    """Assert that both name the file, in one line, and what to do."""
    problems, refusal = verified(folder), trained(folder)
    assert problems, f"a change of {name} is not noticed"
    said = [*problems] if name == REJECTS else [*problems, refusal or "training begins"]
    for line in said:
        assert line.startswith(f"{folder / name}: "), line
        assert " Fix: " in line
        assert "\n" not in line


def written(folder: Path) -> dict[str, bytes]:
    """Return the files that hold something: an empty list of rows has no bit to flip."""
    return {name: raw for name, raw in content(folder).items() if raw}


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def with_file(folder: Path, name: str, raw: bytes) -> None:
    """Check a set in which one file holds other bytes."""
    path = folder / name
    sound = path.read_bytes()
    if name == MANIFEST and same_json(raw, sound):
        return  # a line end at the end of the file is no part of it
    path.write_bytes(raw)
    is_named(folder, name)
    path.write_bytes(sound)


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.torture)])
def test_every_flipped_bit_of_any_file_is_named_and_refused(set_folder: Path, flips: int) -> None:
    rng, files = np.random.default_rng(flips), written(set_folder)
    assert REJECTS in files
    assert "tokenizer/tokenizer.json" in files
    for _ in range(flips):
        name = str(rng.choice(sorted(files)))
        changed = bytearray(files[name])
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        with_file(set_folder, name, bytes(changed))


@pytest.mark.parametrize("cuts", [20, pytest.param(200, marks=pytest.mark.torture)])
def test_every_truncation_of_any_file_is_named_and_refused(set_folder: Path, cuts: int) -> None:
    rng, files = np.random.default_rng(cuts), written(set_folder)
    places = [(name, size) for name in files for size in (0, len(files[name]) - 1)]
    places += [
        (name, size) for name, raw in files.items() if name.endswith(".arrow") for size in boundaries(raw)
    ]
    rng.shuffle(places)
    while len(places) < cuts:
        name = str(rng.choice(sorted(files)))
        places.append((name, int(rng.integers(len(files[name])))))
    for name, size in places[:cuts]:
        with_file(set_folder, str(name), files[str(name)][: int(size)])


def swap(folder: Path) -> str:
    one, other = folder / "shard-00000.arrow", folder / "shard-00002.arrow"
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)
    return one.name


def lose(folder: Path) -> str:
    (folder / "shard-00001.arrow").unlink()
    return "shard-00001.arrow"


def double(folder: Path) -> str:
    shutil.copy(folder / "shard-00001.arrow", folder / "shard-00003.arrow")
    return "shard-00003.arrow"


def repeat(folder: Path) -> str:
    """One shard in the place of another as well."""
    shutil.copy(folder / "shard-00001.arrow", folder / "shard-00002.arrow")
    return "shard-00002.arrow"


def add_foreign(folder: Path) -> str:
    other = folder.parent / "other"
    prepare(write_chats(folder.parent / "other.jsonl", 20, seed=9), other)
    shutil.copy(other / "shard-00000.arrow", folder / "shard-00007.arrow")
    return "shard-00007.arrow"


def replace_by_foreign(folder: Path) -> str:
    shutil.move(folder.parent / "set" / add_foreign(folder), folder / "shard-00001.arrow")
    return "shard-00001.arrow"


def link(folder: Path) -> str:
    path = folder / "shard-00001.arrow"
    path.rename(folder.parent / "outside.arrow")
    path.symlink_to(folder.parent / "outside.arrow")
    return path.name


def forge_count(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"rows_in": 300', b'"rows_in": 299'))
    return MANIFEST


def other_tokenizer(folder: Path) -> str:
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    return "tokenizer/tokenizer.json"


MIXED = (swap, lose, double, repeat, add_foreign, replace_by_foreign, link, forge_count, other_tokenizer)


@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.__name__)
def test_shards_that_are_not_where_they_belong_are_named_and_refused(
    set_folder: Path, mix: Callable[[Path], str]
) -> None:
    name = mix(set_folder)
    assert any(line.startswith(f"{set_folder / name}: ") for line in verified(set_folder))
    assert (trained(set_folder) or "").startswith(f"{set_folder / name}: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), vocabulary=1024)


@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.__name__)
def test_a_run_on_a_damaged_set_ends_before_it_writes_anything(
    set_folder: Path, model: Path, place: Path, mix: Callable[[Path], str]
) -> None:
    name = mix(set_folder)
    with pytest.raises(IntegrityError, match=name):
        train_in_process(set_folder, model, place / "out", {"max_steps": 1})
    assert not (place / "out").exists() or not os.listdir(place / "out")


def test_the_command_ends_with_one_line_and_exit_code_4(set_folder: Path, model: Path, place: Path) -> None:
    name = repeat(set_folder)
    code, _, said = run(
        ["run", str(set_folder), "--model", str(model), "-o", str(place / "out"), "--max-steps", "1"]
    )
    assert code == 4
    assert said.splitlines()[-1].startswith(f"{set_folder / name}: ")
    assert "Traceback" not in said


def test_rejects_under_repair_do_not_keep_a_set_from_being_trained(set_folder: Path) -> None:
    (set_folder / REJECTS).write_text("{}\n")
    assert any(REJECTS in line for line in verified(set_folder))
    assert trained(set_folder) is None
