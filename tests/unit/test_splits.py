"""Several splits are asked for, and `--split` acts: on files, folders, patterns and saved datasets alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import sftdata
from sftdata.errors import UsageError
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.inputs import expand_inputs
from sftdata.sources.planning import numbered, plan_inputs, splits_of
from sftdata.sources.ranges import Sizes
from sftdata.sources.source import read_chunk

SIZES = Sizes(1 << 20, 1 << 20)
TOKENIZER = Path(__file__).parents[2] / "examples/tokenizer"


def rows_of(plans: list[SourcePlan]) -> list[Any]:
    return [row["text"] for plan in plans for piece in plan.chunks for row in read_chunk(piece)[0].rows]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


words = st.sampled_from(
    [
        "train",
        "test",
        "dev",
        "val",
        "valid",
        "eval",
        "training",
        "validation",
        "evaluation",
        "testing",
        "chats",
        "latest",
        "data",
    ]
)
marks = st.sampled_from(["-", "_", ".", " ", "0", "x"])
stems = st.builds(lambda a, mark, b: a + mark + b, words, marks, words) | words
files = st.builds(
    lambda folders, stem, number: "/".join([*folders, f"{stem}{number}.jsonl"]),
    st.lists(stems, max_size=2), stems, st.sampled_from(["", "-00000-of-00002", "-1"]),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(names=st.lists(files, min_size=1, max_size=6, unique=True))
def test_splits_are_those_that_datasets_finds(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names with a number of shards count wherever they lie; `datasets` sees them in data/ alone, and only them there."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    folder = tmp_path_factory.mktemp("d")
    if sharded := [name for name in names if re.fullmatch(r"\w+(\.\w+)*-\d{5}-of-.*", Path(name).name)]:
        names = sorted({f"data/{Path(name).name}" for name in sharded})
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    wanted = {}
    try:
        patterns_of = get_data_patterns(str(folder))
    except ValueError:  # a numbered name in data/ before the number is no split: `datasets` stops
        reject()
    for split, patterns in patterns_of.items():
        found = {path for pattern in patterns for path in _matches(resolve_pattern, pattern, folder)}
        wanted[str(split)] = {str(Path(path).relative_to(folder)) for path in found}
    found_here = {split: {names[index] for index in indices} for split, indices in splits_of(names).items()}
    assert (found_here or {"train": set(names)}) == wanted


def _matches(resolve: Any, pattern: str, folder: Path) -> list[str]:
    try:
        found: list[str] = resolve(pattern, str(folder))
    except FileNotFoundError:
        return []
    return found


SEVERAL = {
    "numbered in data/": ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
    "numbered": ["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"],
    "named": ["train.jsonl", "validation.jsonl"],
    "in folders": ["train/a.jsonl", "dev/a.jsonl"],
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("way", ["folder", "pattern", "listed", "url"])
def test_several_splits_are_asked_for_and_one_is_chosen(kind: str, way: str, tmp_path: Path) -> None:
    names = SEVERAL[kind]
    for name in names:
        write(tmp_path / name, [name])
    inputs = {
        "folder": [str(tmp_path)],
        "pattern": [str(tmp_path / "**" / "*.jsonl")],
        "listed": [str(tmp_path / name) for name in names],
        "url": [f"file://{tmp_path}/**/*.jsonl"],
    }[way]
    with pytest.raises(UsageError, match=r"holds the splits .*choose with split"):
        plan_inputs(inputs, None, None, SIZES)
    found = splits_of(names)
    splits, names = list(found), [names[index] for (index,) in found.values()]
    for split, name in zip(splits, names, strict=True):
        plans, notes = plan_inputs(inputs, split, None, SIZES)
        assert rows_of(plans) == [name]
        assert any("leaves out" in note for note in notes)
    assert rows_of(plan_inputs(inputs, "+".join(splits), None, SIZES)[0]) == names
    assert rows_of(plan_inputs(inputs, "+".join(reversed(splits)), None, SIZES)[0]) == names[::-1]
    with pytest.raises(UsageError, match=r'split="nowhere": no split .nowhere.; found'):
        plan_inputs(inputs, "nowhere", None, SIZES)


@pytest.mark.parametrize("name", ["rows.jsonl", "test.jsonl", "a-test-of-train.jsonl"])
def test_a_file_that_was_named_is_read_without_a_split(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ["a"])
    assert rows_of(plan_inputs([str(tmp_path / name)], None, None, SIZES)[0]) == ["a"]


def test_test_files_beside_files_of_no_split_are_asked_about_in_a_folder_only(tmp_path: Path) -> None:
    for name in ("chats.jsonl", "test.jsonl"):
        write(tmp_path / name, [name])
    with pytest.raises(
        UsageError, match=r'the split test beside files of no split.*split="test", or name the files'
    ):
        plan_inputs([str(tmp_path)], None, None, SIZES)
    named = [str(tmp_path / "chats.jsonl"), str(tmp_path / "test.jsonl")]
    assert rows_of(plan_inputs(named, None, None, SIZES)[0]) == ["chats.jsonl", "test.jsonl"]


def test_a_file_is_the_split_train_as_datasets_has_it(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", list("abc"))
    assert rows_of(plan_inputs([str(tmp_path / "rows.jsonl")], "train", None, SIZES)[0]) == list("abc")
    with pytest.raises(UsageError, match=r'split="validation": no split .validation.; found train'):
        plan_inputs([str(tmp_path / "rows.jsonl")], "validation", None, SIZES)


def bound(text: str, total: int, default: int) -> int:
    """Where a part of a split begins or ends, apart from `datasets`."""
    if not text:
        return default
    value = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(value + total if value < 0 else value, 0), total)


numbers = st.integers(-12, 12).map(str)
shares = st.integers(-100, 100).map(lambda share: f"{share}%")
parts = st.tuples(st.just("") | numbers, st.just("") | numbers) | st.tuples(
    st.just("") | shares, st.just("") | shares
)
CONTAINERS = ("jsonl", "csv", "json", "parquet", "txt")


@settings(deadline=None, max_examples=60)
@given(
    container=st.sampled_from(CONTAINERS),
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    spec=st.lists(parts, min_size=1, max_size=3),
    slice_bytes=st.integers(1, 60),
)
def test_parts_of_a_split_are_the_rows_that_datasets_would_take(
    container: str,
    counts: list[int],
    spec: list[tuple[str, str]],
    slice_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rows are counted over the files of the split, blank lines are not."""
    folder = tmp_path_factory.mktemp("p")
    texts = []
    for number, count in enumerate(counts):
        own = [f"row {number}.{index}" for index in range(count)]
        texts += own
        _write_as(folder / f"train-{number}.{container}", own)
    wanted = []
    for start, stop in spec:
        wanted += texts[bound(start, len(texts), 0) : bound(stop, len(texts), len(texts))]
    said = "+".join(f"train[{start}:{stop}]" for start, stop in spec)
    plans, _ = plan_inputs([str(folder)], said, None, Sizes(slice_bytes, 1 << 20))
    found = [
        row if isinstance(row, str) else row["text"]
        for plan in plans
        for piece in plan.chunks
        for row in read_chunk(piece)[0].rows
    ]
    assert found == wanted
    ids = [
        int(example)
        for plan in plans
        for piece in plan.chunks
        for example in read_chunk(piece)[0].example_ids
    ]
    assert len(set(ids)) == len(ids) == len(wanted)
    assert [plan.base_id for plan in plans] == [plan.base_id for plan in numbered(plans)]


def _write_as(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": text, "n": 1} for text in texts]
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv":
            path.write_text("text,n\n\n" + "\n\n".join(f"{text},1" for text in texts) + "\n\n")
        case ".txt":
            path.write_text("\n \n" + "\n\n".join(texts) + "\n\n")
        case _:
            path.write_text("\n \n" + "\n\n".join(map(json.dumps, rows)) + "\n\n")


@pytest.mark.parametrize(
    "spec", ["train[:x]", "train[5]", "train[:110%]", "[:5]", "train:5", "train[::2]", ""]
)
def test_a_split_that_cannot_be_cut_is_one_line(spec: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", list("abc"))
    with pytest.raises(UsageError, match=r'rows\.jsonl: split=".*found train'):
        plan_inputs([str(tmp_path / "rows.jsonl")], spec, None, SIZES)


def test_a_part_of_a_split_without_a_row_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(UsageError, match=r'split="train\[:40%\]": no row is in it.*larger part'):
        sftdata.prepare(
            tmp_path / "rows.jsonl", tokenizer=TOKENIZER, output=tmp_path / "set", split="train[:40%]"
        )


def test_the_advice_on_splits_gives_the_right_rows(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, [name])
    with pytest.raises(UsageError) as asked:
        plan_inputs([str(tmp_path)], None, None, SIZES)
    advised = re.findall(r"--split ([\w+]+)", asked.value.fix)
    assert [rows_of(plan_inputs([str(tmp_path)], split, None, SIZES)[0]) for split in advised] == [
        ["train.jsonl"],
        ["train.jsonl", "test.jsonl"],
    ]
    with pytest.raises(UsageError) as asked:
        plan_inputs([str(tmp_path)], "tran", None, SIZES)
    advised = re.findall(r"--split ('[^']+'|\w+)", asked.value.fix)
    assert [rows_of(plan_inputs([str(tmp_path)], split.strip("'"), None, SIZES)[0]) for split in advised] == [
        ["test.jsonl"]
    ] * 2


def test_a_subset_of_what_is_no_hub_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", list("abc"))
    with pytest.raises(UsageError, match='subset="en": names a configuration of a Hub dataset'):
        plan_inputs([str(tmp_path / "rows.jsonl")], None, "en", SIZES)


# ------------------------------------------------------------------------------------------ what lies beside the data

BESIDE = (
    "dataset_infos.json",
    "dataset_info.json",
    "state.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "LICENSE.txt",
)


@pytest.mark.parametrize("name", BESIDE)
def test_metadata_beside_data_is_left_out_aloud_and_read_where_it_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / "ds" / "rows.jsonl", ["a"])
    (tmp_path / "ds" / name).write_text('{"version": "1.0"}')
    for named in (str(tmp_path / "ds"), str(tmp_path / "ds" / "*")):
        paths, notes = expand_inputs([named])
        assert [Path(path).name for path in paths] == ["rows.jsonl"]
        assert any(name in note and "metadata" in note for note in notes)
    assert expand_inputs([str(tmp_path / "ds" / name)])[0] == [str(tmp_path / "ds" / name)]


def test_one_note_a_reason_however_many_files(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ["a"])
    for number in range(40):
        (tmp_path / f"picture-{number:02}.png").write_bytes(b"x")
        (tmp_path / f".hidden-{number:02}").write_bytes(b"x")
    _, notes = expand_inputs([str(tmp_path)])
    assert len(notes) == 2
    assert all("and 32 more" in note for note in notes)


def a_set(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("manifest.json", "rejects.jsonl", "shard-00000.arrow", "dropped.jsonl"):
        (folder / name).write_text('{"text": "not a row"}\n')


def test_a_set_made_earlier_is_left_out_aloud(tmp_path: Path) -> None:
    write(tmp_path / "in" / "rows.jsonl", ["a"])
    a_set(tmp_path / "in" / "set")
    (tmp_path / "in" / "next.partial" / "slices").mkdir(parents=True)
    (tmp_path / "in" / "next.partial" / "plan.json").write_text("{}")
    for named in ("in", "in/**", "in/**/*.json*", "in/*"):
        paths, notes = expand_inputs([str(tmp_path / named)])
        assert [str(Path(path).relative_to(tmp_path)) for path in paths] == ["in/rows.jsonl"], named
        assert any("a finished set" in note for note in notes)
    with pytest.raises(UsageError, match=r"set/\*\.jsonl: matches no data; .*a finished set"):
        expand_inputs([str(tmp_path / "in" / "set" / "*.jsonl")])


def test_a_set_or_a_file_of_one_is_named_as_such_and_its_rejects_are_rows(tmp_path: Path) -> None:
    a_set(tmp_path / "set")
    for name in ("", "manifest.json", "shard-00000.arrow", "dropped.jsonl"):
        with pytest.raises(UsageError, match="a finished set, not rows"):
            expand_inputs([str(tmp_path / "set" / name)])
    paths, notes = expand_inputs([str(tmp_path / "set" / "rejects.jsonl")])
    assert paths == [str(tmp_path / "set" / "rejects.jsonl")]
    assert "which a finished set rejected" in notes[0]


def test_a_shard_is_known_by_its_columns_wherever_it_lies(tmp_path: Path) -> None:
    import numpy as np

    from sftdata.batches import TokenBatch
    from sftdata.pack import gather, plan_packs
    from sftdata.set.shards import write_shard
    from sftdata.sources.source import open_source, plan_source

    tokens = TokenBatch(np.arange(9, dtype=np.int32), np.ones(9, np.bool_), np.array([0, 4, 9]), np.arange(2))
    rows = gather(tokens, np.arange(2), plan_packs(tokens.lengths, 16, "bfd"), 16, 0)
    write_shard(tmp_path / "copied.arrow", rows, 16)
    with pytest.raises(UsageError, match=r"copied\.arrow: a shard of a finished set"):
        plan_source(open_source(str(tmp_path / "copied.arrow")), 0, 1 << 20)


def test_a_pattern_in_a_url_is_listed_or_refused_in_words(tmp_path: Path) -> None:
    for name in ("a-1.jsonl", "a-2.jsonl", "b.jsonl"):
        write(tmp_path / name, [name])
    assert rows_of(plan_inputs([f"file://{tmp_path}/a-*.jsonl"], None, None, SIZES)[0]) == [
        "a-1.jsonl",
        "a-2.jsonl",
    ]
    with pytest.raises(UsageError, match="no file matches"):
        expand_inputs([f"file://{tmp_path}/c-*.jsonl"])
    with pytest.raises(UsageError, match="memory://nowhere/.*no file matches"):
        expand_inputs(["memory://nowhere/*.jsonl"])
    with pytest.raises(UsageError, match=r"cannot be listed.*name each file"):
        expand_inputs(["https://example.org/*.jsonl"])
