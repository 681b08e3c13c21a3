"""Names and values in the settings of views: what is found in data may be spelled in any way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import SftError, UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.verify import verify
from tests.view_sets import TOKENIZER, chats, prepare, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")

ODD = ("a=b.jsonl", "c.d-e.jsonl", "-f=.jsonl")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of sources whose names hold what separates names from values elsewhere."""
    folder = tmp_path_factory.mktemp("odd")
    prepare(folder / "set", [write_lines(folder / name, chats(40, ord(name[0]), 20)) for name in ODD])
    return folder / "set"


@pytest.mark.parametrize("spelled", ["flag", "set", "file"])
def test_a_source_is_named_whatever_its_name_holds(
    odd: Path, tmp_path: Path, spelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "cap": {name: f"{5 + number} rows" for number, name in enumerate(ODD)},
        "mix": dict.fromkeys(ODD, 1),
    }
    for setting, values in given.items():
        output = tmp_path / setting
        arguments = ["view", str(odd), "-o", str(output)]
        if spelled == "file":
            recipe = tmp_path / f"{setting}.yaml"
            recipe.write_text(json.dumps({"sets": [str(odd)], "output": str(output), setting: values}))
            arguments = ["view", str(recipe)]
        for name, value in values.items():
            if spelled != "file":
                arguments += (
                    [f"--{setting}", f"{name}={value}"]
                    if spelled == "flag"
                    else ["--set", f"{setting}.{name}={value}"]
                )
        assert main(arguments) == 0, capsys.readouterr().err
        assert (
            read_manifest(output).digest
            == view(tmp_path / f"{setting}-same", odd, write=False, **{setting: values}).digest
        )
    kept = read_manifest(tmp_path / "cap").ledger.sources
    assert [kept[name].rows for name in ODD] == [5, 6, 7]


def test_a_role_is_mapped_whatever_its_name_holds(tmp_path: Path) -> None:
    roles = {"my.bot-1=x": "assistant", "you": "user"}
    rows = [{"messages": [{"role": role, "content": "so it is"} for role in ("you", "my.bot-1=x")]}] * 3
    source = write_lines(tmp_path / "rows.jsonl", rows)
    expected = prepare(tmp_path / "set", [source], map_role=roles, max_length=64)
    command = ["prepare", str(source), "-t", TOKENIZER, "--max-length", "64", "--workers", "1"]
    for number, flag in enumerate((["--map-role"], ["--set"])):
        pairs = [f"{'map_role.' * (flag == ['--set'])}{name}={role}" for name, role in roles.items()]
        given = [part for pair in pairs for part in (*flag, pair)]
        output = tmp_path / f"made-{number}"
        assert main([*command, *given, "--set", "slice_bytes=30000", "-o", str(output)]) == 0
        assert read_manifest(output).digest == expected.digest


def test_shares_are_given_in_percent_too(odd: Path, tmp_path: Path) -> None:
    expected = view(tmp_path / "numbers", odd, mix={ODD[0]: 70, ODD[1]: 30}, write=False)
    percent = view(tmp_path / "percent", odd, mix={ODD[0]: "70%", ODD[1]: "30%"}, write=False)
    assert percent.digest == expected.digest
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sets: ['{odd}']\noutput: '{tmp_path / 'file'}'\nmix: {{'{ODD[0]}': 70%, {ODD[1]}: 30%}}\n"
    )
    assert main(["view", str(recipe)]) == 0
    assert read_manifest(tmp_path / "file").digest == expected.digest
    view(tmp_path / "thirds", odd, mix=dict.fromkeys(ODD, "33.3%"))
    for mix, said in (
        ({ODD[0]: "70%", ODD[1]: "20%"}, "the shares come to 90%; expected 100%"),
        ({ODD[0]: "70%", ODD[1]: 3}, "some shares are in percent, and some are not"),
        ({ODD[0]: "x%"}, "found 'x%'; expected a number"),
    ):
        with pytest.raises(UsageError, match=said):
            sftdata.view(odd, output=tmp_path / "refused", mix=mix)


def test_a_folder_of_sets_is_refused_by_the_names_of_those_it_holds(odd: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    sftdata.view(odd, output=both, eval="30%", max_length=64)
    for use in (
        lambda: view(tmp_path / "view", both),
        lambda: sftdata.open(both),
        lambda: sftdata.verify(both),
    ):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == (
            f"{both}: holds sets and is none itself: eval, train. Fix: name one, as {both / 'train'}."
        )
    assert view(tmp_path / "view", both / "train", max_length=32).ledger.rows_kept


def test_what_a_set_is_excluded_from_is_not_itself(odd: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare(other, [write_lines(tmp_path / "other.jsonl", chats(20, 1))])
    for sets in ([odd], [other, odd]):
        with pytest.raises(UsageError, match="is one of the sets that the view is made of") as caught:
            sftdata.view(sets, output=tmp_path / "view", exclude=[odd])
        assert caught.value.fix == "take it out of --exclude, or out of the sets."
    with pytest.raises(UsageError, match=r'exclude=".*": named twice\. Fix: name it once\.$'):
        sftdata.view(odd, output=tmp_path / "view", exclude=[other, other])
    sftdata.view(other, output=tmp_path / "out-of-the-sets", exclude=[odd])
    sftdata.view(odd, output=tmp_path / "once", exclude=other)


def test_a_set_is_not_replaced_by_a_split_unasked(odd: Path, tmp_path: Path) -> None:
    output = tmp_path / "view"
    before = view(output, odd, max_length=64)
    with pytest.raises(SftError, match=r"holds a finished set made otherwise \(eval differ\)"):
        sftdata.view(odd, output=output, eval="30%", max_length=64)
    assert read_manifest(output).digest == before.digest
    sftdata.view(odd, output=output, eval="30%", max_length=64, overwrite=True)
    assert verify(output / "train").ok


def test_rejects_say_of_which_set_their_source_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bad = {"messages": [{"role": "nobody", "content": f"{name}\u2028é", "half": "\ud800"}]}
        source = write_lines(tmp_path / name / "a.jsonl", [*chats(8, 9, 9), bad])
        prepare(tmp_path / name / "set", [source], max_rejects="50%")
    sets = [tmp_path / name / "set" for name in ("one", "two")]
    made = view(tmp_path / "view", *sets)
    again = view(tmp_path / "again", tmp_path / "view", max_length=64)
    names = [source.name for source in made.sources]
    for folder in ("view", "again"):
        rejects = [
            json.loads(line) for line in (tmp_path / folder / "rejects.jsonl").read_text().splitlines()
        ]
        assert [reject["file"] for reject in rejects] == names == ["one/set/a.jsonl", "two/set/a.jsonl"]
        assert all(name in str(reject["row"]) for name, reject in zip(("one", "two"), rejects, strict=True))
    assert again.ledger.rows_rejected == made.ledger.rows_rejected
    assert (
        (tmp_path / "view" / "rejects.jsonl")
        .read_bytes()
        .endswith((tmp_path / "two/set/rejects.jsonl").read_bytes().partition(b",")[2])
    )


def test_a_card_names_the_command_that_made_its_set(odd: Path, tmp_path: Path) -> None:
    view(tmp_path / "view", odd, max_length=64)
    for folder, command in ((odd, "prepare"), (tmp_path / "view", "view")):
        assert f"made by `sftdata {command}`" in (folder / "README.md").read_text()


def test_one_set_is_returned_where_one_is_made(odd: Path, tmp_path: Path) -> None:
    made = sftdata.view(odd, output=tmp_path / "one", max_length=64)
    assert made.digest == read_manifest(tmp_path / "one").digest
    train, held_out = sftdata.view(odd, output=tmp_path / "two", max_length=64, eval=0.3)
    assert [train.digest, held_out.digest] == [
        read_manifest(tmp_path / "two" / side).digest for side in ("train", "eval")
    ]


def test_a_name_means_the_source_that_has_it_before_those_in_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "in", tmp_path / "in" / "sub", tmp_path / "in" / "other"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        write_lines(folder / "a.jsonl", chats(20, number, 20))
    write_lines(tmp_path / "in" / "[b].jsonl", chats(20, 7, 20))
    write_lines(tmp_path / "in" / "b.jsonl", [])
    prepare(tmp_path / "set", [tmp_path / "in"])
    base = tmp_path / "set"
    plain = {name: own.rows for name, own in read_manifest(base).ledger.sources.items()}
    assert sorted(plain) == ["[b].jsonl", "a.jsonl", "other/a.jsonl", "sub/a.jsonl"]

    def left(**settings: object) -> dict[str, int]:
        made = view(tmp_path / f"view{len([*tmp_path.iterdir()])}", base, **settings)
        return {name: own.rows for name, own in made.ledger.sources.items() if own.rows}

    assert left(sources=("a.jsonl",)) == {"a.jsonl": plain["a.jsonl"]}
    assert left(without=("[b].jsonl",)).keys() == plain.keys() - {"[b].jsonl"}
    assert left(mix={"a.jsonl": 1, "sub/a.jsonl": 1}, mix_by="rows").keys() == {"a.jsonl", "sub/a.jsonl"}
    assert left(cap={"a.jsonl": "3 rows"}) == plain | {"a.jsonl": 3}
    (tmp_path / "list").write_text("a.jsonl:1\nsub/a.jsonl:2\n")
    gone = {name: plain[name] - rows for name, rows in left(drop=tmp_path / "list").items()}
    assert gone == dict.fromkeys(plain, 0) | {"a.jsonl": 1, "sub/a.jsonl": 1}
    (tmp_path / "list").write_text("b.jsonl:1\n")
    with pytest.raises(UsageError, match="found b.jsonl:1; it is empty"):
        view(tmp_path / "refused", base, drop=tmp_path / "list")
    (tmp_path / "in" / "a.jsonl").unlink()
    prepare(base, [tmp_path / "in"], overwrite=True)
    assert left(sources=("a.jsonl",)).keys() == {"other/a.jsonl", "sub/a.jsonl"}
