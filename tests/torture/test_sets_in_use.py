"""A set that is open keeps its bytes or says that it lost them; a set that breaks a law is refused by whoever opens it."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError, SftError
from sftdata.set import shards as shards_module
from sftdata.set.manifest import Manifest, read_manifest, write_manifest
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.shards import read_batches
from sftdata.set.store import digest_file
from sftdata.set.verify import verify
from sfttrain.refusals import verify_sets
from tests.torture.runs import prepare
from tests.torture.test_changing_inputs import chats
from tests.train_runs import run, tiny_llama
from tests.train_sets import make_set

pytestmark = pytest.mark.slow

Columns = dict[str, np.ndarray]


@pytest.fixture
def data(place: Path) -> Path:
    return chats(place / "rows.jsonl", 60, "ALPHA")


def replace_set(data: Path, folder: Path) -> None:
    """Put another set in its place, whose shards have the same sizes and the same number of rows."""
    before = read_manifest(folder)
    prepare(data, folder, overwrite=True, train_on="all")
    after = read_manifest(folder)
    assert [shard.bytes for shard in after.shards] == [shard.bytes for shard in before.shards]
    assert after.digest != before.digest


REPLACED = (
    "set: replaced while it was in use: opened as [0-9a-f]{12}, now [0-9a-f]{12}. Fix: open the set again"
)
USES: dict[str, Callable[[ShardSet], object]] = {
    "last row": lambda opened: opened[-1],
    "batches": lambda opened: list(opened.batches()),
    "arrow": lambda opened: opened.arrow(),
    "polars": lambda opened: opened.polars(),
    "view": lambda opened: opened.view(len(opened) - 1),  # type: ignore[attr-defined]
    "pickled": lambda opened: pickle.loads(pickle.dumps(opened))[0],
}


@pytest.mark.parametrize("use", USES)
def test_a_replaced_set_is_never_read_under_the_old_manifest(data: Path, place: Path, use: str) -> None:
    prepare(data, place / "set")
    opened = sftdata.open(place / "set")
    first = opened[0].labels.copy()
    replace_set(data, place / "set")
    assert np.array_equal(opened[0].labels, first)  # mapped before
    with pytest.raises(IntegrityError, match=REPLACED):
        USES[use](opened)
    assert USES[use](sftdata.open(place / "set")) is not None  # the advice, followed


def test_a_set_that_is_gone_says_so(data: Path, place: Path) -> None:
    prepare(data, place / "set")
    opened = sftdata.open(place / "set")
    shutil.rmtree(place / "set")
    with pytest.raises(IntegrityError, match="set: gone while it was in use: "):
        opened[0]


def test_a_set_put_there_again_is_the_same(data: Path, place: Path) -> None:
    prepare(data, place / "set")
    opened = open_set(place / "set")
    shutil.copytree(place / "set", place / "copy")
    shutil.rmtree(place / "set")
    shutil.move(place / "copy", place / "set")
    assert len(list(opened)) == len(opened)


def labels_of(opened: ShardSet, into: multiprocessing.SimpleQueue[object]) -> None:
    try:
        into.put(sum(int((row.labels != -100).sum()) for row in opened))
    except SftError as error:
        into.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_have_the_bytes_of_a_set_that_is_held_or_say_that_they_have_not(
    data: Path, place: Path, method: str
) -> None:
    wanted = prepare(data, place / "set").ledger.tokens_trained
    opened = open_set(place / "set")
    verify_sets([opened])
    replace_set(data, place / "set")
    assert sum(int((row.labels != -100).sum()) for row in opened) == wanted
    context = multiprocessing.get_context(method)
    into = context.SimpleQueue()
    worker = context.Process(target=labels_of, args=(opened, into))
    worker.start()
    found = into.get()
    worker.join()
    assert found == wanted if method == "fork" else "replaced while it was in use" in str(found)


# ------------------------------------------------------------------------------------------------------------- forged


def bad_id(columns: Columns) -> None:
    columns["input_ids"][3] = 1 << 20


def negative_id(columns: Columns) -> None:
    columns["input_ids"][3] = -7


def bad_label(columns: Columns) -> None:
    trained = np.flatnonzero(columns["labels"] != -100)
    columns["labels"][trained[0]] += 1


def negative_label(columns: Columns) -> None:
    columns["labels"][np.flatnonzero(columns["labels"] != -100)[0]] = -5


def long_document(columns: Columns) -> None:
    columns["seq_lengths"][0] += 1


def negative_document(columns: Columns) -> None:
    columns["seq_lengths"][:2] += (-1 - columns["seq_lengths"][0], 1 + columns["seq_lengths"][0])


def strange_example(columns: Columns) -> None:
    columns["example_ids"][0] = 1 << 40


FORGED = (bad_id, negative_id, bad_label, negative_label, long_document, negative_document, strange_example)


def forge(folder: Path, change: Callable[[Columns], None]) -> None:
    """Change the values of a shard in place, and seal the set again as if that were its content."""
    manifest = read_manifest(folder)
    info = manifest.shards[0]
    path = folder / info.name
    raw = bytearray(path.read_bytes())
    whole = np.frombuffer(raw, np.uint8)
    batch = read_batches(path, manifest.max_length)[0]
    columns = {}
    for name in batch.schema.names:
        values = batch[name].values
        wanted = np.frombuffer(values.buffers()[1], np.uint8)
        at = bytes(raw).find(wanted.tobytes())
        columns[name] = whole[at : at + len(wanted)].view(values.type.to_pandas_dtype())
    change(columns)
    path.write_bytes(raw)
    found = digest_file(path)
    shard = msgspec.structs.replace(info, bytes=found.bytes, xxh3=found.xxh3, sha256=found.sha256)
    write_manifest(folder, msgspec.structs.replace(manifest, shards=(shard, *manifest.shards[1:])))


@pytest.mark.parametrize("change", FORGED, ids=lambda change: change.__name__)
def test_a_forged_set_is_one_line_for_whoever_opens_it(
    data: Path, place: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Columns], None]
) -> None:
    prepare(data, place / "set", workers=1)
    forge(place / "set", change)
    assert verify(place / "set").problems
    readers: list[Callable[[ShardSet], object]] = [
        lambda opened: opened[0],
        ShardSet.arrow,
        lambda opened: verify_sets([opened]),
    ]
    for read in readers:
        with pytest.raises(
            IntegrityError,
            match=r"shard-00000.arrow: row 0: .* Fix: repeat the command that made the set, with overwrite=True.",
        ):
            read(open_set(place / "set"))
    for command in (
        ["audit"],
        ["inspect"],
        ["inspect", "--row", "0", "--ids"],
        ["inspect", "--example", "1"],
    ):
        capsys.readouterr()
        assert main([*command, str(place / "set")]) == 4
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert "shard-00000.arrow: row 0: " in said


def test_the_trainer_refuses_a_forged_set_before_its_first_step(place: Path) -> None:
    make_set(place / "set")
    forge(place / "set", bad_id)
    model = tiny_llama(place / "model")
    code, _, said = run(
        ["run", str(place / "set"), "--model", str(model), "-o", str(place / "out"), "--max-steps", "1"]
    )
    assert code == 4
    assert "a token id is outside the vocabulary" in said.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- low memory


@pytest.mark.parametrize("error", [pa.ArrowMemoryError("malloc of size 64 failed"), OSError(12, "Cannot allocate memory"),
                                   OSError(24, "Too many open files")], ids=repr)  # fmt: skip
def test_a_machine_without_memory_is_not_called_damage(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prepare(data, place / "set")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pa, "memory_map", fail)
    with pytest.raises(
        SftError, match="cannot be read here: .* Fix: free memory or raise the limit"
    ) as caught:
        open_set(place / "set")[0]
    assert caught.value.exit_code == 1


@pytest.fixture
def several_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_BATCH_TOKENS", 256)
        yield


def test_the_row_that_breaks_a_law_is_counted_over_all_batches(
    data: Path, place: Path, several_batches: None
) -> None:
    made: Manifest = prepare(data, place / "set", slice_bytes=1 << 20)
    batches = read_batches(place / "set" / made.shards[0].name, made.max_length)
    assert len(batches) > 2

    raw = bytearray((place / "set" / made.shards[0].name).read_bytes())
    values = batches[-1]["input_ids"].values
    wanted = np.frombuffer(values.buffers()[1], np.uint8).tobytes()
    at = bytes(raw).rfind(wanted)
    np.frombuffer(raw, np.uint8)[at : at + len(wanted)].view(np.int32)[0] = -1
    (place / "set" / made.shards[0].name).write_bytes(raw)
    number = made.shards[0].rows - len(batches[-1])
    with pytest.raises(IntegrityError, match=f"row {number}: "):
        open_set(place / "set")[0]
