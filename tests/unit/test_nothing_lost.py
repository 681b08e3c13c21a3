"""A set holds every token that came in, once: rows and rest rebuild each document, whatever was cut, dropped or packed."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from sftdata.batches import Tally
from sftdata.config import PrepareConfig, make_config
from sftdata.errors import IntegrityError
from sftdata.formats.convert import convert_rows
from sftdata.parts import prepare
from sftdata.pipeline import load_stages, tokenize
from sftdata.plan import make_plan
from sftdata.set.index import Segments, read_index, read_rest, write_index, write_rest
from sftdata.set.manifest import Manifest, read_manifest, write_manifest
from sftdata.set.opened import open_set
from sftdata.set.shards import read_shard, write_shard
from sftdata.set.slices import read_slices
from sftdata.set.store import SetFile, digest_file
from sftdata.set.verify import verify
from sftdata.sources.source import read_chunk
from sftdata.workers import Workers

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tokenizer"
WHOLE = 1 << 20  # tokens; no document of these tests is longer
POLICIES, LENGTHS = ("truncate", "truncate-left", "drop", "split"), (5, 24, 90)
# The cut stream of `wrapped` has room for rows of any length, so that other policies are refused beside it.
CASES = [*product(("bfd", "none"), POLICIES, LENGTHS), *product(["wrapped"], ["truncate"], LENGTHS)]
Document = tuple[list[int], list[int]]


def chat(question: str, answer: str, **switches: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer, **switches}]}


def write_inputs(folder: Path) -> list[str]:
    """Chats, completions and texts: short, long, with nothing trained, empty, and twice the same."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    chats = [chat(" ".join(words[: n % 9]), " ".join(words * (n % 7)) or "yes") for n in range(40)]
    chats += [chat("Q?", "untrained", train=False), chat(" ".join(words * 9), "late"), chats[3], chats[3]]
    chats += [chat(" ".join(words * 20), "never", train=False)]
    texts = [{"text": " ".join(words * (n % 11)) + "."} for n in range(30)]
    pairs = [{"prompt": " ".join(words * (n % 5)) + ":", "completion": f" {n}"} for n in range(20)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in texts))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return [str(folder / name) for name in ("chats.jsonl", "texts.jsonl", "pairs.jsonl")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs: list[str], output: Path, **changes: Any) -> PrepareConfig:
    chosen = {"max_length": 24, "slice_bytes": 3000, "engine": "tokenizers", **changes}
    return make_config(inputs=inputs, tokenizer=str(TOKENIZER), output=output, **chosen)


# ---------------------------------------------------------------------------------- an oracle without limits and packs


@cache
def oracle(inputs: tuple[str, ...]) -> dict[int, Document]:
    """Ids and labels of every row, by example id, as the stages give them before anything is cut or packed."""
    plan = make_plan(settings(list(inputs), Path("unused"), packing="none", max_length=WHOLE))
    stages, found = load_stages(plan.job), dict[int, Document]()
    for chunk in (chunk for task in plan.tasks for chunk in task.chunks):
        rows, unreadable = read_chunk(chunk)
        tally = Tally(rows, unreadable)
        converted = convert_rows(rows, plan.job.formats[chunk.number], plan.job.options, tally)
        tokens = plan.job.mask.flags(tokenize(stages, converted, tally)[0], tally)
        assert not tally.rejects
        for n, row in enumerate(tokens.row.tolist()):
            ids = tokens.input_ids[tokens.offsets[n] : tokens.offsets[n + 1]].tolist()
            flags = tokens.trained[tokens.offsets[n] : tokens.offsets[n + 1]].tolist()
            labels = [token if flag else -100 for token, flag in zip(ids, flags, strict=True)]
            found[int(rows.example_ids[row])] = ids, labels
    return found


def table(path: Path) -> list[dict[str, Any]]:
    with pa.OSFile(str(path)) as file:
        rows: list[dict[str, Any]] = pa.ipc.open_file(file).read_all().to_pylist()
    return rows


def rebuilt(folder: Path) -> dict[int, Document]:
    """Join the documents of a set token by token, from its files alone, and assert that no token is there twice."""
    found: dict[int, dict[int, tuple[int, int]]] = {}
    for path in sorted(folder.glob("index-*.arrow")):
        shard = folder / path.name.replace("index", "shard")
        rest = folder / path.name.replace("index", "rest")
        stored = {False: table(shard) if shard.exists() else [], True: table(rest) if rest.exists() else []}
        used: Counter[tuple[bool, int]] = Counter()
        for segment in table(path):
            row = stored[segment["rest"]][segment["row"]]
            start = used[segment["rest"], segment["row"]]
            used[segment["rest"], segment["row"]] += segment["length"]
            ids = row["input_ids"][start : start + segment["length"]]
            labels = row["labels"][start : start + segment["length"]]
            if segment["rest"]:
                assert (row["example_id"], row["offset"]) == (segment["example_id"], segment["offset"])
            assert sum(label != -100 for label in labels[1:]) == segment["trained"]
            if segment["first_trained"]:
                labels[0] = ids[0]
            document = found.setdefault(segment["example_id"], {})
            for place, pair in enumerate(zip(ids, labels, strict=True), segment["offset"]):
                assert place not in document
                document[place] = pair
        for row, held in enumerate(stored[False]):
            padding = row_padding(held)
            assert used[False, row] + padding == len(held["input_ids"])
        assert all(used[True, row] == len(held["input_ids"]) for row, held in enumerate(stored[True]))
    for document in found.values():
        assert sorted(document) == list(range(len(document)))
    joined = {example: [document[place] for place in sorted(document)] for example, document in found.items()}
    return {
        example: ([token for token, _ in pairs], [label for _, label in pairs])
        for example, pairs in joined.items()
    }


def row_padding(row: dict[str, Any]) -> int:
    return int(row["seq_lengths"][-1]) if row["example_ids"][-1] == -1 else 0


# ------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize(("packing", "policy", "length"), CASES)
def test_rows_and_rest_rebuild_every_document(
    inputs: list[str], tmp_path: Path, packing: str, policy: str, length: int
) -> None:
    config = settings(inputs, tmp_path / "set", packing=packing, max_length=length, overlong=policy)
    manifest = prepare(config, Workers(1))
    assert rebuilt(tmp_path / "set") == oracle(tuple(inputs))
    assert verify(tmp_path / "set", sha256=True).problems == []
    rest = [row for path in (tmp_path / "set").glob("rest-*.arrow") for row in table(path)]
    cut, ledger = Counter[str](), manifest.ledger
    for row in rest:
        cut[row["reason"]] += len(row["input_ids"])
    assert sum(cut.values()) == sum(ledger.tokens_cut.values()) + ledger.tokens_in_dropped_rows
    assert cut[policy] == ledger.tokens_cut.get(policy, 0)


def test_a_set_without_a_limit_holds_the_documents_in_its_rows(inputs: list[str], tmp_path: Path) -> None:
    """The oracle of the other tests, held against what such a set has in its rows."""
    prepare(settings(inputs, tmp_path / "set", packing="none", max_length=WHOLE), Workers(1))
    documents, seen = oracle(tuple(inputs)), set[int]()
    for row in open_set(tmp_path / "set"):
        ids, labels = documents[int(row.examples[0])]
        assert row.input_ids.tolist() == ids
        assert row.labels.tolist() == [-100, *labels[1:]]
        seen.add(int(row.examples[0]))
    untrained = {example for example, (_, labels) in documents.items() if set(labels[1:]) <= {-100}}
    assert documents.keys() - seen == untrained
    assert untrained == {40, 44}


def weighted_inputs(folder: Path) -> str:
    rows = [chat("Q " * (n % 5), "answer " * (n % 9 + 1), weight=0.5 + n) for n in range(30)]
    texts = [
        {"messages": [{"role": "assistant", "content": "one " * n, "weight": 0.25 * n}]} for n in range(1, 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *texts]))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_weights_are_conserved_too(tmp_path: Path, packing: str) -> None:
    source = weighted_inputs(tmp_path)
    config = settings([source], tmp_path / "set", packing=packing, max_length=12, loss_weights=True)
    prepare(config, Workers(1))
    assert verify(tmp_path / "set").problems == []
    whole = settings([source], tmp_path / "whole", packing="bfd", max_length=400, loss_weights=True)
    prepare(whole, Workers(1))
    assert weights_of(tmp_path / "set") == weights_of(tmp_path / "whole")


def weights_of(folder: Path) -> dict[int, list[float]]:
    """The weight of every token, by example id, joined from rows, rest and the index's first weights."""
    found: dict[int, dict[int, float]] = {}
    for path in sorted(folder.glob("index-*.arrow")):
        shard = table(folder / path.name.replace("index", "shard"))
        rest_path = folder / path.name.replace("index", "rest")
        rest = table(rest_path) if rest_path.exists() else []
        for segment, start in zip(
            table(path), read_index(path, weighted=True).starts().tolist(), strict=True
        ):
            held = (rest if segment["rest"] else shard)[segment["row"]]
            weights = held["loss_weights"][start : start + segment["length"]]
            if segment["rest"]:
                assert weights[0] == segment["first_weight"]
            weights[0] = segment["first_weight"]
            places = range(segment["offset"], segment["offset"] + segment["length"])
            found.setdefault(segment["example_id"], {}).update(zip(places, weights, strict=True))
    return {example: [weights[place] for place in sorted(weights)] for example, weights in found.items()}


# ---------------------------------------------------------------------------------------------------- the index


def test_hashes_are_those_of_the_page_on_the_format(inputs: list[str], tmp_path: Path) -> None:
    prepare(settings(inputs, tmp_path / "set", overlong="split", max_length=9), Workers(1))
    documents = oracle(tuple(inputs))
    for path in (tmp_path / "set").glob("index-*.arrow"):
        for segment in table(path):
            ids, labels = documents[segment["example_id"]]
            codes = [2 * token + (label != -100) for token, label in zip(ids, labels, strict=True)]
            expected = xxhash.xxh3_128_digest(b"".join(code.to_bytes(4, "little") for code in codes))
            assert segment["document_hash"] == expected
            prompt = next((n for n, label in enumerate(labels) if label != -100), len(ids))
            raw = b"".join(token.to_bytes(4, "little") for token in ids[:prompt])
            assert segment["prompt_hash"] == (xxhash.xxh3_64_intdigest(raw) if prompt else 0)
            assert segment["whole"] == (segment["length"] == len(ids))


def test_equal_rows_have_equal_hashes(inputs: list[str], tmp_path: Path) -> None:
    prepare(settings(inputs, tmp_path / "set"), Workers(1))
    rows = [row for path in (tmp_path / "set").glob("index-*.arrow") for row in table(path)]
    same = {row["document_hash"] for row in rows if row["example_id"] in (3, 42, 43)}
    other = {row["document_hash"] for row in rows if row["example_id"] in (2, 4)}
    assert len(same) == 1
    assert not same & other


def test_a_bos_alone_is_no_prompt() -> None:
    from sftdata.batches import TokenBatch
    from sftdata.set.hashes import hash_prompts

    ids = np.array([1, 5, 6, 1, 5, 6, 5, 6, 1, 1], np.int32)
    trained = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 0], np.bool_)
    documents = TokenBatch(ids, trained, np.array([0, 3, 6, 8, 10, 10]), np.arange(5))
    raw = [np.array(prompt, "<i4").tobytes() for prompt in ([1, 5], [1, 1])]
    two, untrained = map(xxhash.xxh3_64_intdigest, raw)
    assert hash_prompts(documents, 1).tolist() == [0, two, 0, untrained, 0]
    one = xxhash.xxh3_64_intdigest(np.array([1], "<i4").tobytes())
    assert hash_prompts(documents, None).tolist() == [one, two, 0, untrained, 0]


def test_an_index_takes_at_most_64_bytes_a_document(tmp_path: Path) -> None:
    """At the lengths of real chats, by the kilobyte that the file has beside its columns."""
    rows = [{"text": f"{n} " * (n % 7 + 1)} for n in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings([str(tmp_path / "rows.jsonl")], tmp_path / "set", max_length=1024, slice_bytes=1 << 20)
    prepare(config, Workers(1))
    size = sum(path.stat().st_size for path in (tmp_path / "set").glob("index-*.arrow"))
    assert size <= 64 * 4000


def test_the_files_read_back_as_they_were_written(inputs: list[str], tmp_path: Path) -> None:
    prepare(settings(inputs, tmp_path / "set", overlong="split", max_length=9), Workers(1))
    for path in sorted((tmp_path / "set").glob("index-*.arrow")):
        write_index(tmp_path / path.name, read_index(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    for path in sorted((tmp_path / "set").glob("rest-*.arrow")):
        (rows,) = read_rest(path)
        write_rest(tmp_path / path.name, rows)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_rest_of_several_record_batches_is_numbered_through(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.set.shards._BATCH_TOKENS", 40)
    prepare(settings(inputs, tmp_path / "set", overlong="drop", max_length=30), Workers(1))
    assert max(len(read_rest(path)) for path in (tmp_path / "set").glob("rest-*.arrow")) > 2
    assert rebuilt(tmp_path / "set") == oracle(tuple(inputs))
    assert verify(tmp_path / "set").problems == []


# ----------------------------------------------------------------------------------- what is not whole is refused


@pytest.fixture
def made(inputs: list[str], tmp_path: Path) -> Path:
    prepare(settings(inputs, tmp_path / "set", max_length=12, overlong="truncate"), Workers(1))
    return tmp_path / "set"


@pytest.mark.parametrize("kind", ["rest", "index"])
def test_a_missing_file_is_named(made: Path, kind: str) -> None:
    path = sorted(made.glob(f"{kind}-*.arrow"))[0]
    path.unlink()
    (problem,) = verify(made).problems
    assert problem.startswith(f"{path}: missing")


@pytest.mark.parametrize("kind", ["rest", "index", "slices", "shard"])
def test_a_flipped_bit_is_found_in_every_kind_of_file(made: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    for path in made.glob(f"{kind}*"):
        raw = path.read_bytes()
        for _ in range(20):
            changed = bytearray(raw)
            changed[rng.integers(len(raw))] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            (problem,) = verify(made).problems
            assert problem.startswith(f"{path}: xxh3-128 is ")
        path.write_bytes(raw)
    assert verify(made).ok


def reseal(folder: Path, leave_out: str = "nothing") -> Manifest:
    """Describe the files of a set as they are now, as a forger would."""
    sealed = read_manifest(folder)
    shards = [msgspec.structs.replace(info, **described(folder / info.name)) for info in sealed.shards]
    kept = [file.name for file in sealed.files if not re.match(leave_out, file.name)]
    files = [SetFile(name=name, **described(folder / name)) for name in kept]
    return write_manifest(folder, msgspec.structs.replace(sealed, shards=tuple(shards), files=tuple(files)))


def described(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.structs.asdict(digest_file(path))
    return found


def test_a_manifest_that_names_no_rest_for_what_was_cut_is_refused(made: Path) -> None:
    with pytest.raises(IntegrityError, match="tokens were cut or dropped, and no rest file is listed"):
        reseal(made, leave_out="rest-")


def test_a_manifest_that_names_no_index_for_a_shard_is_refused(made: Path) -> None:
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow is listed without index-00000\.arrow"):
        reseal(made, leave_out="index-00000")


Change = Callable[[Path], object]


def without_a_rest_row(folder: Path) -> None:
    path = sorted(folder.glob("rest-*.arrow"))[0]
    (rows,) = read_rest(path)
    last = int(rows.row_offsets[-2])
    shorter = type(rows)(
        rows.input_ids[:last], rows.labels[:last], rows.row_offsets[:-1], rows.example_ids[:-1], rows.offset[:-1],
        rows.reasons[:-1],
    )  # fmt: skip
    write_rest(path, shorter)


def poke_rest(column: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        path = sorted(folder.glob("rest-*.arrow"))[0]
        (rows,) = read_rest(path)
        columns = {name: getattr(rows, name) for name in rows.__slots__}
        columns[column] = columns[column].copy()
        columns[column][0] = value
        write_rest(path, type(rows)(**columns))

    return change


def poke_index(column: str, change_value: Callable[[Any], Any]) -> Change:
    def change(folder: Path) -> None:
        path = sorted(folder.glob("index-*.arrow"))[0]
        index = read_index(path)
        columns = {name: getattr(index, name) for name in index.__slots__}
        columns[column] = columns[column].copy()
        columns[column][0] = change_value(columns[column][0])
        write_index(path, Segments(**columns))

    return change


def poke_shard(folder: Path) -> None:
    """Change an id, and a label with it, in a row."""
    path = folder / "shard-00000.arrow"
    (rows,) = read_shard(path, 12)
    ids, labels = rows.input_ids.copy(), rows.labels.copy()
    place = int(np.flatnonzero(labels != -100)[0])
    ids[place] = labels[place] = ids[place] + 1
    changed = type(rows)(
        ids, labels, rows.row_offsets, rows.seq_lengths, rows.example_ids, rows.segment_offsets
    )
    write_shard(path, changed, 12)


def poke_slices(folder: Path) -> None:
    path = folder / "slices.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"rows_in":', b'"rows_in":1', 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_rest_row, "index-00000.arrow: example_id differs from what rows and rest hold"),
        (poke_rest("input_ids", 7), "do not hold example"),
        (poke_rest("offset", 3), "index-00000.arrow: offset differs"),
        (poke_rest("example_ids", 3), "index-00000.arrow: example_id differs"),
        (poke_rest("reasons", "nothing-trained"), "rows_dropped nothing-trained is|tokens_cut is"),
        (poke_index("row", lambda value: value + 1), "index-00000.arrow: row differs"),
        (poke_index("length", lambda value: value + 1), "index-00000.arrow: length differs"),
        (poke_index("trained", lambda value: value + 1), "index-00000.arrow: trained differs"),
        (poke_index("offset", lambda value: value + 1), "do not hold example"),
        (poke_index("whole", lambda value: not value), "do not hold example"),
        (poke_index("first_trained", lambda value: not value), "do not hold example"),
        (poke_index("document_hash", lambda value: value + 1), "do not hold example"),
        (poke_index("prompt_hash", lambda value: value + 1), "do not hold example"),
        (poke_shard, "do not hold example"),
        (poke_slices, "slices.jsonl: its ledgers do not add up"),
    ],
)  # fmt: skip
def test_a_forged_set_does_not_pass(made: Path, change: Change, message: str) -> None:
    change(made)
    reseal(made)
    problems = verify(made).problems
    assert problems
    assert re.search(message, problems[0]), problems


def test_a_document_that_is_there_twice_is_found(made: Path) -> None:
    for kind in ("rest", "index"):
        shutil.copy(made / f"{kind}-00000.arrow", made / f"{kind}-00099.arrow")
    path = made / "index-00099.arrow"
    index = read_index(path)
    only_rest = np.flatnonzero(index.rest & index.whole)
    assert len(only_rest)
    sealed = read_manifest(made)
    (rows,) = read_rest(made / "rest-00099.arrow")
    keep = index.row[only_rest]
    tokens = np.concatenate([np.arange(rows.row_offsets[n], rows.row_offsets[n + 1]) for n in keep])
    offsets = np.append(0, np.cumsum(index.length[only_rest])).astype(np.int64)
    reasons = [rows.reasons[n] for n in keep]
    twice = type(rows)(
        rows.input_ids[tokens],
        rows.labels[tokens],
        offsets,
        rows.example_ids[keep],
        rows.offset[keep],
        reasons,
    )
    write_rest(made / "rest-00099.arrow", twice)
    columns = {name: getattr(index.take(only_rest), name) for name in index.__slots__}
    columns["row"] = np.arange(len(only_rest), dtype=np.int32)
    write_index(path, Segments(**columns))
    more = tuple(
        SetFile(name=name, **described(made / name)) for name in ("rest-00099.arrow", "index-00099.arrow")
    )
    write_manifest(made, msgspec.structs.replace(sealed, files=(*sealed.files, *more)))
    assert "is in the set twice" in verify(made).problems[0]


# --------------------------------------------------------------------------------------- written as shards are


def test_every_worker_count_gives_the_same_files(inputs: list[str], tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(
            settings(inputs, tmp_path / f"set{workers}", overlong="split", max_length=9), Workers(workers)
        )
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("set1", "set2")
    )
    assert one == two
    assert {"rest-00000.arrow", "index-00000.arrow", "slices.jsonl"} <= one.keys()


@pytest.mark.parametrize("kind", ["rest", "index"])
def test_a_resume_makes_a_slice_again_that_lacks_a_file(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = settings(inputs, tmp_path / "set", max_length=9)
    prepare(settings(inputs, tmp_path / "whole", max_length=9), Workers(1))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sftdata.run.conclude", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, Workers(1))
    path = sorted((tmp_path / "set.partial").glob(f"{kind}-*.arrow"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    told: list[str] = []
    manifest = prepare(config, Workers(1), note=told.append)
    slices = len(read_slices(tmp_path / "set"))
    assert f"Resuming: {slices - 1}/{slices} slices complete; settings match." in told
    assert manifest.files == read_manifest(tmp_path / "whole").files


def test_a_slice_without_rows_has_an_index_and_a_rest(tmp_path: Path) -> None:
    rows = [chat("Q?", "A.", train=False) for _ in range(20)] + [chat("Q?", "A.")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare(
        settings([str(tmp_path / "rows.jsonl")], tmp_path / "set", slice_bytes=300), Workers(1)
    )
    names = {file.name for file in manifest.files}
    assert "shard-00000.arrow" not in {shard.name for shard in manifest.shards}
    assert {"index-00000.arrow", "rest-00000.arrow"} <= names
    assert verify(tmp_path / "set").ok


# ------------------------------------------------------------------------------------------------ slice records


def test_a_slice_names_the_bytes_that_it_was_made_from(inputs: list[str], tmp_path: Path) -> None:
    manifest = prepare(settings(inputs, tmp_path / "set"), Workers(1))
    records = read_slices(tmp_path / "set")
    rows = {name: Path(path).read_bytes() for path, name in zip(inputs, names_of(manifest), strict=True)}
    covered = Counter[str]()
    for record in records:
        for source in record.sources:
            assert source.start == covered[source.name]
            covered[source.name] = source.stop
            before = rows[source.name][: source.start]
            assert source.first_record == before.count(b"\n")
            first = next(found.first_id for found in manifest.sources if found.name == source.name)
            assert source.first_id == first + source.first_record
            assert source.records == rows[source.name][source.start : source.stop].count(b"\n")
            blocks = xxhash.xxh3_64_digest(rows[source.name])  # each of these files is shorter than a block
            assert source.xxh3 == xxhash.xxh3_128_hexdigest(blocks)
    assert covered == {name: len(raw) for name, raw in rows.items()}
    assert sum(record.ledger["rows_in"] for record in records) == manifest.ledger.rows_in  # type: ignore[misc]
    listed = {file.name for file in (*manifest.shards, *manifest.files)}
    assert {name for record in records for name in record.files} == {
        name for name in listed if re.match("(shard|index|rest)-", name)
    }


def names_of(manifest: Manifest) -> list[str]:
    return [source.name for source in manifest.sources]


def test_a_slice_is_made_with_its_settings_and_not_with_its_neighbours(
    inputs: list[str], tmp_path: Path
) -> None:
    def made_with(name: str, paths: list[str], **changes: Any) -> str:
        prepare(settings(paths, tmp_path / name, **changes), Workers(1))
        return read_slices(tmp_path / name)[0].made_with

    first = made_with("one", inputs)
    assert made_with("more", inputs[:2]) == first
    assert made_with("other", inputs, max_length=25) != first
