"""Views in an order: bands, windows, steps of equal work, documents at multiples; each document once in all of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.steps import measure_balance, stored_steps
from sftdata.set.verify import verify
from tests.view_sets import chats, prepare, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model"
ORDERS: list[dict[str, Any]] = [
    {"order": "shuffled", "seed": 4},
    {"order": "length", "bands": 3},
    {"order": "trained", "bands": 2},
    {"order": "sources"},
    {"order": "windows", "window": 2},
    {"steps_for": "2x2"},
    {"steps_for": "3x1", "order": "sources"},
    {"steps_for": "2x2", "order": "length"},
    {"pad_to_multiple_of": 8},
    {"pad_to_multiple_of": 16, "steps_for": "2x1"},
    {"pad_to_multiple_of": 32, "pack_over": "slice"},
]
Documents = dict[tuple[int, int], tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two sources in several slices, the first one with shorter chats."""
    folder = tmp_path_factory.mktemp("sets")
    files = [
        write_lines(folder / f"{name}.jsonl", chats(120, 7 + size, size))
        for name, size in (("a", 15), ("b", 60))
    ]
    prepare(folder / "base", files, max_length=256, slice_bytes=20_000)
    return folder / "base"


def documents(opened: ShardSet) -> Documents:
    """Return ids and labels of every stretch of an example in the rows, numbered by its turn."""
    found: Documents = {}
    for row in opened:
        for document in row.documents():
            turn = sum(number == document.example_id for number, _ in found)
            found[document.example_id, turn] = document.input_ids.tolist(), document.labels.tolist()
    return found


def rows_of(folder: Path) -> list[list[int]]:
    return [[document.example_id for document in row.documents()] for row in open_set(folder)]


@pytest.mark.parametrize(
    ("settings", "packing"),
    [
        pytest.param(settings, packing, id="-".join([packing, *map(str, settings.values())]))
        for settings in ORDERS
        for packing in ("bfd", "wrapped", "none")
        if packing != "none" or "pad_to_multiple_of" not in settings
    ],
)
def test_every_document_is_there_once_in_every_order(
    base: Path, tmp_path: Path, settings: dict[str, Any], packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.views.order.SHARD_TOKENS", 2048)
    made = view(tmp_path / "made", base, packing=packing, max_length=128, **settings)
    plain = view(tmp_path / "plain", base, packing=packing, max_length=128, pack_over="view")
    assert len(made.shards) > 2
    assert verify(tmp_path / "made").ok
    assert (made.ledger.tokens, made.ledger.rows_kept) == (plain.ledger.tokens, plain.ledger.rows_kept)
    kept = {number for row in rows_of(tmp_path / "made") for number in row}
    assert kept == {number for row in rows_of(tmp_path / "plain") for number in row}
    if packing != "wrapped":  # a stream is cut elsewhere
        assert documents(open_set(tmp_path / "made")) == documents(open_set(tmp_path / "plain"))
    # And packed again it is what the base gives.
    for source, name in ((tmp_path / "made", "again"), (base, "direct")):
        view(
            tmp_path / name,
            source,
            packing="none",
            max_length=9999,
            overlong="error",
            order="as-is",
            pack_over="view",
        )
    again, direct = documents(open_set(tmp_path / "again")), documents(open_set(tmp_path / "direct"))
    assert again == direct
    view_of_view = read_manifest(tmp_path / "again").settings["view"]
    assert not {"steps", "order", "pad_to_multiple_of"} & view_of_view.keys()


def test_bands_by_length_rise_and_are_shuffled_inside(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "made", base, max_length=128, order="length", bands=4, seed=1)
    longest = [
        max(len(document.input_ids) for document in row.documents()) for row in open_set(tmp_path / "made")
    ]
    bands = [longest[len(longest) * band // 4 : len(longest) * (band + 1) // 4] for band in range(4)]
    assert all(max(low) <= min(high) for low, high in pairwise(bands))
    assert longest != sorted(longest)
    view(tmp_path / "other", base, max_length=128, order="length", bands=4, seed=2)
    assert rows_of(tmp_path / "other") != rows_of(tmp_path / "made")


def test_bands_by_trained_share_hold_their_documents_apart(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "made", base, max_length=1024, order="trained", bands=3)
    shares = [
        [float((document.labels[1:] >= 0).sum()) / len(document.labels) for document in row.documents()]
        for row in open_set(tmp_path / "made")
    ]
    lowest, highest = min(shares[0] + shares[1]), max(shares[-1] + shares[-2])
    assert lowest < highest
    edges = [max(row) for row in shares]
    assert max(edges[: len(edges) // 4]) <= min(min(row) for row in shares[-len(edges) // 4 :])


def test_sources_come_one_after_the_other(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "made", base, max_length=128, order="sources", seed=3)
    opened = open_set(tmp_path / "made")
    names = [{opened.origin(number)[0] for number in row} for row in rows_of(tmp_path / "made")]
    assert all(len(name) == 1 for name in names)
    order = [next(iter(name)) for name in names]
    assert order == sorted(order)
    assert len({*order}) == 2


def test_windows_mix_neighbouring_slices_only(base: Path, tmp_path: Path) -> None:
    shards = len(read_manifest(base).shards)
    assert shards > 4
    slices: dict[int, int] = {}
    first, opened = 0, open_set(base)
    for number, shard in enumerate(opened.manifest.shards):
        for row in opened[first : first + shard.rows]:
            slices |= dict.fromkeys((document.example_id for document in row.documents()), number)
        first += shard.rows
    view(tmp_path / "made", base, max_length=256, order="windows", window=2, seed=3)
    windows = [{slices[number] // 2 for number in row} for row in rows_of(tmp_path / "made")]
    assert all(len(window) == 1 for window in windows)
    numbers = [next(iter(window)) for window in windows]
    assert numbers == sorted(numbers)
    assert len({*numbers}) == -(-shards // 2)
    assert any({slices[number] for number in row} == {0, 1} for row in rows_of(tmp_path / "made"))


# ----------------------------------------------------------------------------------------------- steps


def test_steps_are_in_the_manifest_and_measured_from_the_rows(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        )
    )
    said: list[str] = []
    sftdata.view(
        base,
        output=tmp_path / "made",
        steps_for="2x3",
        model=config,
        max_length=256,
        pack_over="view",
        on_note=said.append,
    )
    made = open_set(tmp_path / "made")
    steps = stored_steps(made.manifest)
    assert steps is not None
    assert (steps.ranks, steps.rows, steps.cost.square) == (2, 3, 16)
    assert "steps_for" not in made.manifest.settings["view"]
    balance = measure_balance(made)
    assert balance is not None
    costs = [
        sum(steps.cost.token * length + 16 * length**2 for length in row.seq_lengths.tolist()) for row in made
    ]
    ratios = [
        max(sum(costs[at : at + 3]), sum(costs[at + 3 : at + 6])) / (sum(costs[at : at + 6]) / 2)
        for at in range(0, len(costs) - 5, 6)
    ]
    assert balance.mean == pytest.approx(np.mean(ratios))
    assert balance.missing == -len(costs) % 6
    assert balance.mean <= 1.01 < balance.shuffled
    assert any(f"{balance.mean:.3f} times the mean work" in note for note in said)
    assert any(note.endswith(f" if rows were shuffled{balance.incomplete}.") for note in said)
    assert any("Cost of rows: of config.json, 1 layer, " in note for note in said)
    view(tmp_path / "plain", base, max_length=256)
    assert measure_balance(open_set(tmp_path / "plain")) is None


def test_the_cost_is_part_of_the_digest_and_where_the_model_lies_is_not(base: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    digests = []
    for name, width in (("x", 8), ("y", 8), ("z", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape | {"intermediate_size": width}))
        made = view(tmp_path / f"made-{name}", base, steps_for="2x2", model=tmp_path / name)
        digests.append(made.digest)
    assert digests[0] == digests[1] != digests[2]


def test_with_a_split_the_training_side_takes_the_steps(base: Path, tmp_path: Path) -> None:
    train, held_out = sftdata.view(base, output=tmp_path / "both", eval="5%", steps_for="4x2")
    assert stored_steps(train) is not None
    assert stored_steps(held_out) is None


# --------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_documents_begin_at_multiples_and_padding_is_never_trained(
    base: Path, tmp_path: Path, packing: str
) -> None:
    made = view(tmp_path / "made", base, packing=packing, max_length=256, pad_to_multiple_of=16)
    padding = between = 0
    for row in open_set(tmp_path / "made"):
        ends = np.cumsum(row.seq_lengths)
        for start, stop, example in zip(ends - row.seq_lengths, ends, row.examples, strict=True):
            if example >= 0:
                assert start % 16 == 0
                continue
            padding += int(stop - start)
            between += int(stop) < 256
            assert (row.labels[start:stop] == -100).all()
            assert (row.input_ids[start:stop] == made.tokenizer.pad_id).all()
        assert ends[-1] == 256
    assert between > 20
    assert padding == made.ledger.tokens_padding
    assert verify(tmp_path / "made").ok


def test_verify_knows_where_padding_may_stand(base: Path, tmp_path: Path) -> None:
    """The rows of one view under the manifest of another: what each law is for."""
    from sftdata.set.laws import broken_laws

    for name, multiple in (("eight", 8), ("sixteen", 16), ("one", 1)):
        view(tmp_path / name, base, max_length=256, pad_to_multiple_of=multiple, pack_over="view")
    found = {
        (rows, laws): {
            what
            for batch in open_set(tmp_path / rows).batches()
            for _, what in broken_laws(batch, read_manifest(tmp_path / laws))
        }
        for rows in ("eight", "sixteen", "one")
        for laws in ("eight", "sixteen", "one")
    }
    assert found["eight", "eight"] == found["sixteen", "sixteen"] == found["one", "one"] == set()
    assert found["eight", "one"] == found["sixteen", "one"] == {"padding stands before a document"}
    assert found["one", "eight"] == {"a document does not begin at a multiple of 8"}
    assert found["sixteen", "eight"] == {"more padding than needed stands before a document"}
    assert "a document does not begin at a multiple of 16" in found["eight", "sixteen"]


def test_a_view_of_padded_rows_finds_every_token(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "padded", base, max_length=128, overlong="split", pad_to_multiple_of=8)
    for multiple in (1, 32):
        settings: dict[str, Any] = {
            "max_length": 256,
            "overlong": "truncate",
            "pad_to_multiple_of": multiple,
            "pack_over": "view",
        }
        views = [
            view(tmp_path / f"{name}-{multiple}", source, **settings)
            for name, source in (("a", base), ("b", tmp_path / "padded"))
        ]
        assert [shard.sha256 for shard in views[0].shards] == [shard.sha256 for shard in views[1].shards]


def test_the_trainer_takes_padding_between_documents_for_none_of_their_tokens(
    base: Path, tmp_path: Path
) -> None:
    from sfttrain.vocabulary import _control_tokens

    view(tmp_path / "padded", base, max_length=256, pad_to_multiple_of=16)
    pad_id = read_manifest(tmp_path / "padded").tokenizer.pad_id
    assert all(pad_id not in ids for ids, _ in documents(open_set(base)).values())
    assert _control_tokens(open_set(tmp_path / "padded")) == _control_tokens(open_set(base)) != set()


# --------------------------------------------------------------------------------------------- refused


ODD = {"hidden_size": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("settings", "found", "fix", "followed"),
    [
        ({"order": "windows", "pack_over": "slice"}, 'order="windows": rows are ordered over the whole view',
         'pack_over="view".', {"pack_over": "view"}),
        ({"steps_for": "2x2", "pack_over": "slice"}, 'steps_for="2x2": rows are ordered',
         'pack_over="view".', {"pack_over": "view"}),
        ({"bands": 3}, 'bands without order="length" or trained', "leave bands out.", {"bands": 8}),
        ({"window": 3, "order": "length"}, 'window without order="windows"', "leave window out.", {"window": 64}),
        ({"model": "x"}, "model without steps_for", "leave model out.", {"model": None}),
        ({"steps_for": "64x64"}, 'steps_for="64x64": a step takes 4,096 rows; the view has',
         "fewer ranks or rows in steps_for, or a smaller max_length.", {"steps_for": "2x2"}),
        ({"steps_for": "12x4", "max_length": 1024}, "a step takes 48 rows; the view has",
         "fewer ranks or rows in steps_for, or a smaller max_length.", {"max_length": 256}),
        ({"steps_for": "2x2", "model": "nowhere"}, 'model="nowhere": cannot be read: No such file',
         "name the folder of a model, or its config.json.", {"model": MODEL}),
        ({"steps_for": "2x2", "model": "odd"}, "its config has no num_attention_heads",
         "name the config.json of a transformer, or leave model out.", {"model": None}),
        ({"pad_to_multiple_of": 24}, "max_length 256 is no multiple of it", "max_length=240.", {"max_length": 240}),
        ({"pad_to_multiple_of": 8, "packing": "none"}, "such rows hold no padding",
         'packing="bfd", or leave pad_to_multiple_of out.', {"packing": "bfd"}),
        ({"seed": 3, "pad_to_multiple_of": 8}, "seed: nothing is drawn", "leave seed out.", {"seed": 0}),
    ],
)  # fmt: skip
def test_what_cannot_be_ordered_is_refused_and_the_advice_followed(
    base: Path, tmp_path: Path, settings: dict[str, Any], found: str, fix: str, followed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").write_text(json.dumps(ODD))
    with pytest.raises(UsageError) as error:
        view(tmp_path / "made", base, **settings)
    assert found in str(error.value)
    assert str(error.value).endswith(f"Fix: {fix}")
    assert not (tmp_path / "made").exists()
    assert view(tmp_path / "made", base, **(settings | followed)).ledger.rows_kept > 200


@pytest.mark.parametrize("text", ["8", "8x", "0x4", "8x4x2", "-1x2", "8 x 4"])
def test_steps_are_for_ranks_and_rows(base: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(sftdata.SftError, match="is not RANKSxROWS, as 8x4"):
        sftdata.view(base, output=tmp_path / "made", steps_for=text)


def test_rows_that_break_the_law_of_padding_are_not_read(base: Path, tmp_path: Path) -> None:
    """A manifest that was made to say another multiple would be damage: the seal comes first, the rows second."""
    view(tmp_path / "made", base, max_length=256, pad_to_multiple_of=8)
    path = tmp_path / "made" / "manifest.json"
    path.write_text(path.read_text().replace('"pad_to_multiple_of": 8', '"pad_to_multiple_of": 4'))
    with pytest.raises(IntegrityError, match="changed after it was written"):
        read_manifest(tmp_path / "made")
