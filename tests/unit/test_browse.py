"""The pages of `sftdata browse`: what they select, count, find and link to, beside slow walks over rows and rest."""

from __future__ import annotations

import html
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin

import numpy as np
import pytest
import yaml

import sftdata
from sftdata.browse import background, facets, reading
from sftdata.browse import site as pages
from sftdata.browse.catalog import BESIDE, IN_ROWS, SHARES, Catalog
from sftdata.browse.query import Query
from sftdata.browse.selection import select
from sftdata.browse.site import Answer, Site
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.index import slice_number
from sftdata.set.rows import SetFiles
from sftdata.show import audit, diff
from sftdata.show.view import ShownSet, open_shown
from sftdata.views.recipe import ViewConfig
from tests.view_sets import chats, prepare, view, write_inputs, write_lines
from tests.waiting import HANGS


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sets of every kind: cut, split and dropped documents, weights, several sources, views of both forms."""
    folder = tmp_path_factory.mktemp("browse")
    inputs = write_inputs(folder)
    made = {}
    layouts = {
        "chats": {"overlong": "truncate", "max_length": 128},
        "weighted": {"overlong": "split", "max_length": 96},
        "texts": {"packing": "wrapped", "max_length": 128},
        "rejects": {"overlong": "drop", "max_length": 128},
        "filtered": {"packing": "none", "max_length": 256},
        "tokens": {"overlong": "truncate-left", "max_length": 96},
    }
    for kind, layout in layouts.items():
        files, options = inputs[kind]
        made[kind] = folder / f"set-{kind}"
        prepare(made[kind], files, **{**options, **layout})
    made["view"] = folder / "view"
    view(made["view"], made["chats"], mix={"a.jsonl": 1, "b.jsonl": 2}, passes=3, order="shuffled", max_length=64,
         overlong="split", write=False)  # fmt: skip
    return made


def walked(shards: ShownSet) -> dict[int, dict[str, Any]]:
    """Return what rows and rest hold of each document, token by token."""
    found: dict[int, dict[str, Any]] = defaultdict(lambda: {"rows": set(), "rest": 0, "ids": {}})
    starts = {}
    files = SetFiles(shards.folder, shards.manifest)
    for number in {slice_number(file.name) for file in shards.manifest.files} - {None}:
        for part in files.rest(number):
            for row, example in enumerate(part.example_ids.tolist()):
                first, last = part.row_offsets[row : row + 2]
                ids = part.input_ids[first:last].tolist()
                starts.setdefault(example, []).append((int(part.offset[row]), ids))
                found[example]["rest"] += 1
    kept = defaultdict(list)
    for number, row in enumerate(shards):
        for document in row.documents():
            kept[document.example_id].append(document.input_ids.tolist())
            found[document.example_id]["rows"].add(number)
    for example in found:
        found[example]["tokens"] = sum(map(len, kept[example])) + sum(
            len(ids) for _, ids in starts.get(example, ())
        )
        found[example]["pieces"] = kept[example] + [ids for _, ids in starts.get(example, ())]
    return dict(found)


KINDS = ("chats", "weighted", "texts", "rejects", "filtered", "tokens", "view")


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalogue_knows_what_rows_and_rest_hold(sets: dict[str, Path], kind: str) -> None:
    shards = open_shown(sets[kind])
    catalog, known = Catalog(shards), walked(shards)
    assert np.flatnonzero(catalog.state).tolist() == sorted(known)
    for example, said in known.items():
        assert catalog.length[example] == said["tokens"]
        assert catalog.state[example] == IN_ROWS * bool(said["rows"]) + BESIDE * bool(said["rest"])
    reader = reading.Reader(catalog)
    for example in list(known)[::7]:
        shown, rows = reader.document(example)
        assert set(rows) == known[example]["rows"]
        read = [[token for piece in part.pieces for token in piece.ids] for part in shown.documents]
        assert sorted(read) == sorted(known[example]["pieces"])


@pytest.mark.parametrize("kind", ["weighted", "texts", "tokens"])
def test_trained_tokens_are_counted_as_in_a_view_of_whole_documents(
    sets: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    trained = Catalog(open_shown(sets[kind])).trained
    view(tmp_path / "whole", sets[kind], max_length=1 << 20, packing="none")
    documents = [one for row in sftdata.open(tmp_path / "whole") for one in row.documents()]
    held = {one.example_id: np.count_nonzero(one.labels[1:] != -100) for one in documents}
    assert held == {example: trained[example] for example in np.flatnonzero(trained).tolist()}


QUERIES = (
    "", "min_tokens=40", "max_tokens=64", "min_tokens=20&max_tokens=90", "min_trained=30%25", "max_trained=0.5",
    "min_trained=10%25&max_trained=60%25&min_tokens=30", "sources=a.jsonl", "sources=a.jsonl&sources=c*&min_tokens=50",
    "without=b.jsonl&max_trained=40%25",
)  # fmt: skip


@pytest.mark.parametrize("asked", QUERIES)
def test_a_query_selects_the_documents_that_the_view_of_its_recipe_holds(
    sets: dict[str, Path], asked: str, tmp_path: Path
) -> None:
    folder = sets["chats"]
    catalog, query = Catalog(open_shown(folder)), Query.read(folder, asked)
    chosen = select(catalog, query)
    recipe = yaml.safe_load(query.as_yaml())
    made = ViewConfig(output=tmp_path / "made", max_length=1 << 20, packing="none", **recipe)
    sftdata.view(**{name: getattr(made, name) for name in made.model_fields_set})
    held = {one.example_id for row in sftdata.open(tmp_path / "made") for one in row.documents()}
    listed = set(chosen.ids(0, len(catalog)))
    untrained = {one for one in listed if not catalog.trained[one]}  # a view drops them when it packs
    assert listed - untrained == held
    assert len(chosen) == len(listed)
    assert chosen.tokens == catalog.length[sorted(listed)].sum()


@pytest.mark.parametrize("kind", ["chats", "texts", "view"])
@pytest.mark.parametrize("asked", ["", "min_tokens=20&max_trained=75%25", "state=cut"])
def test_a_bar_counts_what_a_click_on_it_selects_and_is_faint_where_that_is_filtered_away(
    sets: dict[str, Path], kind: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "A_PAGE", 1000)
    site = Site([open_shown(sets[kind])])
    text = got(site, f"1/?{asked}")
    bar = r'<a class="trained( off)?"[^>]*href="([^"]+)"[^>]*title="([^"]*?): ([\d,]+) examples?"'
    bars = re.findall(bar, text)
    assert bars or (kind, asked) == ("texts", "state=cut")
    faint = {"trained" in title for off, _, title, _ in bars if off}
    assert faint == ({True, False} if "tokens" in asked else set())
    for off, link, _, count in bars:
        listed = got(site, address_of(link))
        assert re.search(r"<h2>([\d,]+)", listed)[1] == count, link
        assert not off or not documents_on(listed) & documents_on(text)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages wait for what is worked out beside them, however slow the machine."""
    monkeypatch.setattr(background, "PATIENCE", HANGS)


def documents_on(page: str) -> set[str]:
    return set(re.findall(r"/document/(\d+)", page))


def got(site: Site, address: str, status: int = 200) -> str:
    """Return a page as text."""
    found = answered(site, address)
    assert found.status == status, found.body[-300:]
    return found.body.decode()


def address_of(link: str) -> str:
    """Return where a link of the list leads, as a browser reads it."""
    return urljoin("/TOP/1/", html.unescape(link)).removeprefix("/TOP/")


def answered(site: Site, address: str) -> Answer:
    path, _, asked = address.partition("?")
    return site.answer("/TOP", unquote(path), asked)


def test_all_documents_are_on_the_pages_once_and_every_link_leads_somewhere(
    sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "A_PAGE", 20)
    for kind in ("rejects", "view"):
        shards = open_shown(sets[kind])
        site, last = Site([shards]), len(shards) - 1
        seen: list[str] = []
        todo, done = ["1/", f"1/row/{last}"], set()
        while todo:
            address = todo.pop()
            done.add(address)
            text = got(site, address)
            if re.match(r"1/(\?page=\d+)?$", address):
                seen += re.findall(r"/TOP/1/document/(\d+)\?", text)
            links = {address_of(link) for link in re.findall(r'<a[^>]*href="([^"]+)"', text)}
            todo += sorted({one for one in links if is_opened(one, last)} - done - set(todo))
        assert sorted(map(int, seen)) == sorted(walked(shards))
        assert {"1/findings", "1/left-out", "1/report", "1/row/0"} <= done


def is_opened(address: str, last: int) -> bool:
    """Whether a link is followed: of documents each tenth, and of rows up to the last these and the outermost."""
    row = re.match(r"1/row/(\d+)", address)
    if row and 1 < int(row[1]) < last - 1:
        return int(row[1]) % 10 == 0
    return not re.search(r"tokens=|trained=|yaml|txt|sources=|document/\d*[1-9]\b", address)


@pytest.mark.parametrize(("kind", "budget"), [("chats", 500), ("weighted", 1), ("view", 10_000)])
def test_a_search_finds_every_document_that_holds_the_text_however_little_a_page_looks_through(
    sets: dict[str, Path], kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SEARCHED", budget)
    monkeypatch.setattr(reading, "_TOGETHER", 8)
    shards = open_shown(sets[kind])
    catalog = Catalog(shards)
    reader, chosen = reading.Reader(catalog), select(catalog, Query.read(sets[kind], "min_tokens=70"))
    texts = {
        example: "".join(map(shards.vocabulary.text_of, walked_in_order(reader, example))).casefold()
        for example in chosen.ids(0, len(catalog))
    }
    for text in ("lazy DOG", "stars", "<|im_start|>", "nothing of the kind"):
        found, after = [], -1
        while after is not None:
            page = reader.search(chosen, text, after, most=7)
            found += [line.example_id for line in page.lines]
            assert page.after is None or page.after > after
            after = page.after
        assert found == [example for example, whole in texts.items() if text.casefold() in whole]
        assert page.looked == len(chosen)


def walked_in_order(reader: reading.Reader, example: int) -> Iterator[list[int]]:
    for part in reader.document(example)[0].documents:
        yield [token for piece in part.pieces for token in piece.ids]


@pytest.mark.parametrize("address", ["document/3", "row/1"])
def test_the_parts_of_a_long_page_are_the_page_token_for_token_in_its_turns(
    sets: dict[str, Path], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site([open_shown(sets["chats"])])
    shown = re.compile(r'<b>(\w+)</b>|data-ids="([\d ]+)"')
    whole = shown.findall(got(site, f"1/{address}"))
    monkeypatch.setattr(reading, "PART", 17)
    parts = int(re.search(r"part 1 of (\d+)", got(site, f"1/{address}"))[1])
    assert parts > 2
    pages = [shown.findall(got(site, f"1/{address}?part={part}")) for part in range(1, parts + 1)]
    assert [ids for page in pages for _, ids in page if ids] == [ids for _, ids in whole if ids]
    assert all(sum(len(ids.split()) for _, ids in page) <= 17 + 8 for page in pages)
    assert with_roles(pages) == with_roles([whole])
    assert f"there are {parts}" in got(site, f"1/{address}?part={parts + 1}", 404)


def with_roles(pages: list[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return the role and the ids of each piece, in order."""
    found, role = [], ""
    for page in pages:
        for name, ids in page:
            role = name or role
            found += [(role, ids)] if ids else []
    return found


def test_a_list_of_a_selection_is_what_drop_takes_out(sets: dict[str, Path], tmp_path: Path) -> None:
    site = Site([open_shown(sets["chats"])])
    asked = "min_tokens=60&sources=b.jsonl"
    listed = got(site, f"1/list.txt?{asked}")
    (tmp_path / "drop.txt").write_text(listed)
    options = {"max_length": 1 << 20, "packing": "none"}
    sftdata.view(sets["chats"], output=tmp_path / "rest", drop=tmp_path / "drop.txt", **options)
    held = {one.example_id for row in sftdata.open(tmp_path / "rest") for one in row.documents()}
    catalog = Catalog(open_shown(sets["chats"]))
    dropped = set(select(catalog, Query.read(sets["chats"], asked)).ids(0, len(catalog)))
    assert dropped
    assert held == {one for one in np.flatnonzero(catalog.state).tolist() if catalog.trained[one]} - dropped


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("1/?min_token=3", "min_tokens"),
        ("1/?min_tokens=3&min_tokens=4", "given 2 times"),
        ("1/?min_tokens=three", "'three'"),
        ("1/?max_trained=120%25", "100%"),
        ("1/?sources=z.jsonl", "no source of that name"),
        ("1/?state=lost", "rows, cut, dropped"),
        ("1/?finding=double-bos", "no double-bos was found"),
        ("1/?page=-1", "expected a number"),
        ("1/recipe.yaml?state=cut&text=a", "state, text: no recipe"),
        ("1/list.txt?text=a", "lists nothing"),
        ("1/document/99999", "no document 99999"),
        ("1/row/99999", "the set has rows 0 to"),
        ("1/left-out?why=bad-luck", "nothing was left out for bad-luck"),
        ("1/../../etc/passwd", "no such page"),
        ("2/", "no such page"),
        ("diff", "no such page"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line_that_says_why(
    sets: dict[str, Path], address: str, said: str
) -> None:
    text = got(Site([open_shown(sets["chats"])]), address, 404)
    assert said in html.unescape(text)
    assert "Traceback" not in text


def test_a_set_of_the_first_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "sets"
    old = next((path for path in sorted(folder.iterdir()) if "1" in path.name and path.is_dir()), None)
    assert old is not None
    with pytest.raises(UsageError, match="format version 1, without an index"):
        Catalog(open_shown(old))


def test_rows_left_out_are_listed_with_their_reasons(sets: dict[str, Path]) -> None:
    shards = open_shown(sets["rejects"])
    ledger, site = shards.manifest.ledger, Site([shards])
    for why, count in (ledger.rows_rejected | ledger.rows_dropped).items():
        text = got(site, f"1/left-out?why={why}")
        assert len(re.findall(rf'<em class="(?:rejected|dropped)">{why}</em>', text)) == count
    linked = re.findall(r"/TOP/1/document/(\d+)\"", got(site, "1/left-out?why=over-long"))
    assert len(linked) == ledger.rows_dropped["over-long"]
    assert "in no row: over-long" in got(site, f"1/document/{linked[0]}")


def test_each_finding_leads_to_all_its_examples(tmp_path: Path) -> None:
    rows = [
        *chats(40, 5),
        *(
            {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b " * 300}]}
            for _ in range(5)
        ),
    ]
    prepare(tmp_path / "set", [write_lines(tmp_path / "rows.jsonl", rows)], max_length=128)
    shards = open_shown(tmp_path / "set")
    site, found = Site([shards]), sftdata.audit(tmp_path / "set", every=True)
    text = got(site, "1/findings")
    counted = [one for one in found if one.examples]
    assert len(counted) > 1
    for finding in counted:
        assert f"/TOP/1/?finding={finding.code}" in text
        listed = got(site, f"1/?finding={finding.code}")
        places = re.findall(r'<span class="about"><b>([^<]+)</b>', listed)
        assert places == sorted(finding.examples, key=lambda one: int(one.rpartition(":")[2]))[:50]


def test_what_is_known_of_a_part_grows_when_all_is_looked_at(
    sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "glance", partial(audit.glance, tokens=1000))
    site, address = Site([open_shown(sets["chats"])]), "1/?finding=duplicate-prompt"
    assert "Look at all of them" in got(site, "1/findings")
    assert "the finding is known of the" in (first := got(site, address))
    assert "Look at all of them" not in got(site, "1/findings?every=1")
    (found,) = (one for one in sftdata.audit(sets["chats"]) if one.code == "duplicate-prompt")
    assert len(documents_on(first)) < len(documents_on(got(site, address))) == found.count


@pytest.mark.parametrize("address", ["1/findings?every=1", "diff"])
def test_what_takes_long_keeps_no_other_page_waiting_and_is_shown_when_it_is_done(
    sets: dict[str, Path], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [open_shown(sets["chats"]), open_shown(sets["view"])]
    expected = got(Site(both), address)
    go_on, fails = threading.Event(), [IntegrityError("a shard is gone.", "restore it.")]

    def slowly(work: Callable[..., object], *given: object) -> object:
        if type(given[0]) is ShownSet:  # a glance
            return work(*given)
        assert go_on.wait(HANGS)
        if fails:
            raise fails.pop()
        return work(*given)

    monkeypatch.setattr(background, "PATIENCE", 0)
    monkeypatch.setattr(audit, "glance", partial(audit.glance, tokens=1000))
    monkeypatch.setattr(audit, "audit_set", partial(slowly, audit.audit_set))
    monkeypatch.setattr(diff, "diff", partial(slowly, diff.diff))
    site = Site(both)
    begun = answered(site, address)
    assert begun.headers == {"Refresh": "2"}
    assert re.search(r"Looking at all of them: 0.0% done|<h2>Comparing", begun.body.decode())
    assert documents_on(got(site, "1/")) == documents_on(got(site, "1/?page=1"))
    go_on.set()
    assert "a shard is gone" in until_done(site, address, 500)  # and the next visit tries again
    assert until_done(site, address) == expected


def until_done(site: Site, address: str, status: int = 200) -> str:
    """Return a page when what it shows is done."""
    until = time.monotonic() + HANGS
    while "Refresh" in (found := answered(site, address)).headers:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert found.status == status
    return found.body.decode()


def test_two_sets_are_shown_beside_each_other(sets: dict[str, Path]) -> None:
    site = Site([open_shown(sets["chats"]), open_shown(sets["view"])])
    text = got(site, "diff")
    assert "What differs" in text
    assert got(site, "2/") != got(site, "1/")
    for link in re.findall(r'href="(/TOP/[12]/document/\d+)"', text):
        got(site, link.removeprefix("/TOP/"))


def test_another_filter_begins_with_the_first_page() -> None:
    query = Query.read(Path(), "page=3&part=2&after=5&min_tokens=4")
    assert query.link(state="cut") == "?min_tokens=4&state=cut"


def test_a_line_shows_how_a_document_begins_and_how_its_first_answer_does(tmp_path: Path) -> None:
    turns = [("user", "Begin " + "and so on " * 99), ("assistant", "Here it ends.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    prepare(tmp_path / "set", [write_lines(tmp_path / "rows.jsonl", [row])], max_length=1024)
    text = got(Site([open_shown(tmp_path / "set")]), "1/")
    line = re.search(r'<span class="sft-view">(.*?)</a></li>', text, re.DOTALL)[1]
    assert re.search(r"Begin.* … .*<span class=\"t\">Here it ends\.", line, re.DOTALL)
    assert len(line) < 800


def test_shares_are_sixteenths_whose_edges_a_recipe_can_say_exactly() -> None:
    for number in range(SHARES):
        share = float(f"{100 * number / SHARES:.6g}") / 100
        assert share == number / SHARES


def test_of_many_sources_the_largest_are_links_and_those_that_are_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [*chats(rows, 3)]) for rows, name in enumerate("abcde", 2)
    ]
    prepare(tmp_path / "set", files)
    monkeypatch.setattr(facets, "MOST_SOURCES", 2)
    site = Site([open_shown(tmp_path / "set")])
    linked = re.compile(r'<li><a href="[^"]*"[^>]*>(\w)\.jsonl</a>')
    assert linked.findall(got(site, "1/")) == ["e", "d"]
    assert linked.findall(got(site, "1/?sources=b.jsonl")) == ["e", "d", "b"]
    assert "5 sources" in got(site, "1/?sources=b.jsonl")
    assert "and 3 more" in got(site, "1/")
