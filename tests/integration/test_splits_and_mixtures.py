"""The laws of splits and mixtures, on real data: every prompt on one side and there to stay, every share as it was asked for."""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import sftdata
from sftdata.errors import UsageError
from sftdata.set.opened import ShardSet
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from tests.view_sets import prepare as prepare_small
from tests.view_sets import view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")

FILES = (
    "prompt_completion/t0_train.jsonl.gz", "prompt_completion/gsm8k_train.jsonl", "sharegpt/sharegpt_zh_1k.jsonl",
    "instruction/gpteacher_toolformer.json", "text/c4_demo.jsonl", "text/multilingual.txt",
)  # fmt: skip
LARGE = {
    "t0": "t0_train.jsonl.gz",
    "gsm8k": "gsm8k_train.jsonl",
    "sharegpt": "sharegpt_zh_1k.jsonl",
    "tools": "gpteacher_toolformer.json",
}
TEXTS = {"c4_demo.jsonl", "multilingual.txt"}
MOST = 10_000_000  # tokens: no document is cut
_NUMBERS = count()


@pytest.fixture(scope="module")
def store(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 18 million tokens of six sources, several of them of more than a million."""
    folder = tmp_path_factory.mktemp("real") / "store"
    inputs = [shared_data / "datasets" / name for name in FILES]
    sftdata.prepare(
        inputs,
        tokenizer=shared_data / "tokenizers/qwen2.5-instruct",
        output=folder,
        max_length=2048,
        workers=1,
    )
    return folder


def documents_of(opened: ShardSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return example id, tokens and trained tokens of every document in the rows, by its own count."""
    ids, lengths, trained = [], [], []
    for rows in opened.batches():
        ends = np.cumsum(rows.seq_lengths)
        labelled = np.concatenate([[0], np.cumsum(rows.labels != -100)])
        real = rows.example_ids >= 0
        ids.append(rows.example_ids[real])
        lengths.append(rows.seq_lengths[real])
        trained.append((labelled[ends] - labelled[ends - rows.seq_lengths])[real])
    return np.concatenate(ids), np.concatenate(lengths), np.concatenate(trained)


# ------------------------------------------------------------------------------------------- mixtures


@pytest.mark.slow
@pytest.mark.parametrize("by", ["rows", "tokens", "trained"])
def test_shares_of_real_sources_are_met_within_a_thousandth(store: Path, tmp_path: Path, by: str) -> None:
    """Of every source, those of less than a million tokens too; another recipe for each seed."""
    of_a_million = 0
    for seed in range(7):
        rng = np.random.default_rng(seed)
        drawn = rng.dirichlet(np.full(4, 5.0))
        mix = {f"*{name}": float(share) for name, share in zip(LARGE.values(), drawn, strict=True)}
        out = tmp_path / f"{by}-{seed}"
        view(
            out,
            store,
            mix=mix,
            mix_by=by,
            passes=8,
            seed=seed,
            write=False,
            max_length=int(rng.choice([1024, 4096, 32768])),
        )
        opened = sftdata.open(out)
        written = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
        assert opened.manifest.by_index
        assert written < opened.manifest.ledger.tokens, "a token has eight bytes and more: none was copied"
        ids, tokens, trained = documents_of(opened)
        amounts: Counter[str] = Counter()
        large: Counter[str] = Counter()
        for source in opened.manifest.sources:
            here = (ids >= source.first_id) & (ids < source.first_id + source.rows)
            name = source.name.rpartition("/")[2].partition("#")[0]
            amounts[name] += int({"rows": here, "tokens": tokens * here, "trained": trained * here}[by].sum())
            large[name] += int((tokens * here).sum())
        assert sum(amounts.values()) == sum(amounts[name] for name in LARGE.values())
        of_a_million += sum(large[name] > 1_000_000 for name in LARGE.values())
        for name, share in zip(LARGE.values(), drawn / drawn.sum(), strict=True):
            assert abs(amounts[name] / sum(amounts.values()) - share) < 0.001, (name, seed)
    assert of_a_million >= 14


@pytest.mark.slow
@pytest.mark.feature("mixtures")
def test_the_trainer_meets_shares_within_a_thousandth_of_sets_of_a_million_tokens(
    store: Path, tmp_path: Path
) -> None:
    """By rows of up to 8,192 tokens, once each set has given a million; a single row of 32,768 is more than that."""
    from sfttrain.data import read_contents
    from sfttrain.schedule import Mixture

    for length in (2048, 8192):
        for name, source in LARGE.items():
            view(tmp_path / f"{name}-{length}", store, sources=[f"*{source}"], max_length=length)
        contents = [read_contents(sftdata.open(tmp_path / f"{name}-{length}")) for name in LARGE]
        for by in ("rows", "tokens", "trained"):
            for seed in range(4):
                shares = np.random.default_rng(seed).dirichlet(np.full(4, 4.0))
                amounts = [part.amounts(by) for part in contents]
                mixture = Mixture(amounts, shares.tolist(), seed=seed)
                steps = next(
                    steps
                    for steps in count(100, 100)
                    if min(
                        int(times @ part.amounts("tokens"))
                        for times, part in zip(mixture.seen(steps, 8), contents, strict=True)
                    )
                    > 1_000_000
                )
                for more in range(5):
                    times = mixture.seen(steps + more, 8)
                    got = np.array([int(taken @ part) for taken, part in zip(times, amounts, strict=True)])
                    assert np.abs(got / got.sum() - shares).max() < 0.001, (length, by, seed)


# --------------------------------------------------------------------------------------------- splits


def sides_of(output: Path, *bases: Path, **settings: object) -> tuple[dict[str, tuple[str, bytes]], ...]:
    """Split sets without cutting a document; return side and prompt of each by its source and line, of both sides."""
    make_view(
        ViewConfig(
            sets=tuple(map(str, bases)),
            output=output,
            max_length=MOST,
            packing="none",
            overlong="error",
            **settings,
        )
    )
    sides = []
    for side in ("train", "eval"):
        opened = sftdata.open(output / side)
        found = {}
        for rows in opened.batches():
            ends = np.cumsum(rows.seq_lengths)
            for example, end, length in zip(
                rows.example_ids.tolist(), ends.tolist(), rows.seq_lengths.tolist(), strict=True
            ):
                ids, labels = rows.input_ids[end - length : end], rows.labels[end - length : end]
                name, line = opened.origin(example)
                found[f"{name.rpartition('/')[2]}:{line}"] = side, ids[: np.argmax(labels != -100)].tobytes()
        sides.append(found)
    return tuple(sides)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_of_real_data_is_on_both_sides_and_every_source_gives_its_share(
    store: Path, tmp_path: Path, seed: int
) -> None:
    train, held_out = sides_of(tmp_path / "split", store, eval="5%", seed=seed)
    assert not train.keys() & held_out.keys()
    prompts = [{prompt for _, prompt in side.values()} for side in (train, held_out)]
    # A text trains all but its first token, for want of a label: it has no prompt, and counts by all of its ids.
    both = prompts[0] & prompts[1]
    assert {len(prompt) for prompt in both} <= {4}
    assert {
        place.partition(":")[0]
        for side in (train, held_out)
        for place, (_, prompt) in side.items()
        if prompt in both
    } <= TEXTS
    assert len(prompts[0]) + len(prompts[1]) < len(train) + len(held_out), "there are equal prompts"
    for name in {place.partition(":")[0] for place in train}:
        count_of = [
            len({side[place][1][4:] or place for place in side if place.startswith(f"{name}:")})
            for side in (train, held_out)
        ]
        whole = sum(count_of)
        assert abs(count_of[1] - 0.05 * whole) < 5 * (0.05 * 0.95 * whole) ** 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("added", [0.01, 0.125, 1.0])
def test_no_row_of_real_data_changes_sides_when_data_is_added(
    shared_data: Path, tmp_path: Path, added: float
) -> None:
    """Lines at the end of a file, in the middle of it, at its top, and a file of their own in another set."""
    with gzip.open(shared_data / "datasets" / FILES[0], "rt", encoding="utf-8") as file:
        lines = [line for _, line in zip(range(8_000), file, strict=False)]
    first, more = lines[:4_000], lines[4_000 : 4_000 + int(4_000 * added)]
    grown = {
        "end": [*first, *more],
        "middle": [*first[:2_000], *more, *first[2_000:]],
        "top": [*more, *first],
    }
    tokenizer = shared_data / "tokenizers/qwen2.5-instruct"
    for name, content in {"base": first, "more": more, **grown}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(content))
        sftdata.prepare(
            tmp_path / f"{name}.jsonl", tokenizer=tokenizer, output=tmp_path / name, max_length=512, workers=1
        )
    for seed in (0, 1, 7):
        wanted = by_text(tmp_path, "base", first, seed)
        assert 0.03 < sum(side == "eval" for side in wanted.values()) / len(wanted) < 0.07
        for name, content in grown.items():
            after = by_text(tmp_path, name, content, seed)
            assert {text: after[text] for text in wanted} == wanted, (name, seed)
        train, held_out = sides_of(
            tmp_path / f"two-{seed}", tmp_path / "base", tmp_path / "more", eval="5%", seed=seed
        )
        both = {place: side for part in (train, held_out) for place, (side, _) in part.items()}
        assert {
            text: both[f"base.jsonl:{line}"] for line, text in enumerate(first, 1) if text in wanted
        } == wanted


def by_text(folder: Path, name: str, lines: list[str], seed: int) -> dict[str, str]:
    """Return the side of each row that is in a row of either side, by its text."""
    train, held_out = sides_of(
        folder / f"{name}-{seed}-{next(_NUMBERS)}", folder / name, eval="5%", seed=seed
    )
    return {
        lines[int(place.rpartition(":")[2]) - 1]: side
        for part in (train, held_out)
        for place, (side, _) in part.items()
    }


def test_a_source_that_a_side_has_nothing_of_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The draw is by prompt alone: a source of few prompts may come out whole, and it stays where it is."""
    for name, rows in (("many", 60), ("one", 1), ("two", 2)):
        chats = [
            [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "look on"}]
            for n in range(rows)
        ]
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": chat} for chat in chats])
    prepare_small(tmp_path / "set", [tmp_path / f"{name}.jsonl" for name in ("many", "one", "two")])
    said: list[str] = []
    train, held_out = make_view(
        ViewConfig(sets=(str(tmp_path / "set"),), output=tmp_path / "split", eval="10%"), say=said.append
    )
    assert set(train.ledger.sources) == {"many.jsonl", "one.jsonl", "two.jsonl"}
    assert set(held_out.ledger.sources) == {"many.jsonl"}
    assert "eval: holds nothing of one.jsonl, two.jsonl." in said
    assert not any(text.startswith("train: ") for text in said)


# ------------------------------------------------------------------------------------------ bad input


def test_a_mixture_that_cannot_be_says_how_it_can(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n} look on"} for n in range(40)])
        for name in "ab"
    ]
    prepare_small(tmp_path / "set", files)

    def refusal(**settings: object) -> UsageError:
        with pytest.raises(UsageError) as refused:
            view(tmp_path / "out", tmp_path / "set", **settings)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()
        return refused.value

    mix = {"a.jsonl": 90, "b.jsonl": 10}
    few = refusal(mix=mix, mix_by="rows", total="400 rows")
    assert "--mix a.jsonl=90: takes 9.00 passes for --total 400 rows; --passes allows 1" in few.message
    assert few.fix == "--passes 9, or a smaller --total."
    made = view(tmp_path / "passes", tmp_path / "set", mix=mix, mix_by="rows", total="400 rows", passes=9)
    assert made.ledger.rows_kept == 400
    assert (
        view(tmp_path / "smaller", tmp_path / "set", mix=mix, mix_by="rows", total="44 rows").ledger.rows_kept
        == 44
    )
    unknown = refusal(mix={"a.json": 1, "b.jsonl": 1})
    assert "--mix a.json: no source of that name" in unknown.message
    assert unknown.fix == "did you mean 'a.jsonl'?"
    assert refusal(mix={"elsewhere/*": 1}).fix == "the sources are a.jsonl, b.jsonl."
    nothing = refusal(mix=mix, without="b.jsonl")
    assert "--mix b.jsonl: nothing left of it to take" in nothing.message
    assert nothing.fix == "take it out of --mix, or loosen the filters."
    twice = refusal(mix={"a.jsonl": 1, "*": 1})
    assert "--mix: a.jsonl has two shares" in twice.message


def test_what_a_manifest_says_of_its_shares_is_what_its_rows_hold(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n} look on"} for n in range(50)])
        for name in "ab"
    ]
    prepare_small(tmp_path / "set", files)
    made = view(tmp_path / "out", tmp_path / "set", mix={"a.jsonl": 75, "b.jsonl": 25}, passes=3)
    ids, tokens, trained = documents_of(sftdata.open(tmp_path / "out"))
    places = [sftdata.open(tmp_path / "out").origin(int(example))[0].partition("#")[0] for example in ids]
    for share in made.shares:
        here = np.array([place == share.name for place in places])
        assert (share.rows, share.tokens, share.trained) == (
            here.sum(),
            tokens[here].sum(),
            trained[here].sum(),
        )
    assert [share.asked for share in made.shares] == [0.75, 0.25]
