"""Every code that the source can give has its paragraph, and no paragraph stands for a code that is gone."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sftdata.browse.site import Site
from sftdata.cli import main
from sftdata.errors import UsageError, explain, read_codes
from sftdata.formats.calls import MEDIA
from sftdata.limit import REASONS
from sftdata.render.spellings import NULL_AS_EMPTY
from sftdata.set.ledger import PICTURES
from sftdata.show import audit
from sftdata.show.audit import audit_set
from sftdata.show.findings import COUNTED, KINDS
from sftdata.show.report import make_report
from sftdata.show.view import open_shown

SOURCE = Path(__file__).resolve().parents[2] / "sftdata"
COMPUTED = {
    "MEDIA[kind]": set(MEDIA.values()),
    "code": set(),
}  # `code`: RowError hands its argument on to Fault


def calls() -> Iterator[tuple[str, ast.expr]]:
    """Yield (place, first argument) of everything in the source that makes a fault."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Fault", "RowError")
            ):
                yield f"{path.name}:{node.lineno}", node.args[0] if node.args else node.keywords[0].value


def fault_codes() -> set[str]:
    codes: set[str] = set()
    for place, argument in calls():
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            codes.add(argument.value)
        else:
            assert ast.unparse(argument) in COMPUTED, (
                f"{place}: name the code itself, so that its paragraph can be checked"
            )
            codes |= COMPUTED[ast.unparse(argument)]
    return codes


def counters() -> set[str]:
    """Return the names in `counts["..."]`, `tally.count("...")`, `counted.append("...")`."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))]
    call = r'\b(?:counts\[|tally\.count(?:_rows)?\(|counted\.append\()"(\w+)"'
    written = {name for source in sources for name in re.findall(call, source)} | {NULL_AS_EMPTY}
    written |= {name for source in sources for name in re.findall(r'f"(\w+_unused):', source)}
    return written | set(COUNTED) | set(PICTURES)


def section(title: str) -> set[str]:
    return {code for code, (kind, _) in read_codes().items() if kind == title}


def test_every_fault_of_the_source_has_its_paragraph() -> None:
    assert len(fault_codes()) > 40
    assert section("Rejected rows") == fault_codes()


def test_every_finding_of_the_audit_has_its_paragraph() -> None:
    assert section("Audit findings") | {"nothing-trained"} == set(KINDS)


def test_every_reason_to_leave_a_row_out_has_its_paragraph() -> None:
    assert section("Dropped and filtered rows") == {*REASONS, "formatter"}


def test_every_counter_has_its_paragraph() -> None:
    assert section("Counters") == counters()


@pytest.mark.parametrize("code", read_codes())
def test_a_paragraph_says_something(code: str) -> None:
    _, paragraph = read_codes()[code]
    assert paragraph[0].isupper() or paragraph[0] == "`"
    assert paragraph.endswith(".")


def test_codes_are_found_as_the_summary_writes_them() -> None:
    assert explain("rows cut") == explain("rows_cut")
    assert explain("column_unused:id") == explain("column unused:id")


def test_a_mistyped_code_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'unknown-role'"):
        explain("unknow-role")


def test_what_a_page_or_a_message_names_by_a_code_is_explained_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    glance = audit.glance
    monkeypatch.setattr(audit, "glance", lambda *given: replace(glance(*given), looked=1, documents=3))
    examples, made = SOURCE.parent / "examples", tmp_path / "set"
    command = ["prepare", str(examples / "messy.jsonl"), "-t", str(examples / "tokenizer"), "--workers", "1"]
    command += ["--max-length", "128", "-o"]
    assert main([*command, str(tmp_path / "refused")]) == 3
    code = re.findall(r"sftdata explain ([\w-]+)\.", capsys.readouterr().err)[0]
    assert main([*command, str(made), "--max-rejects", "90%"]) == 0
    notes = capsys.readouterr().err
    said = re.findall(r"sftdata explain ([\w-]+)", notes)
    assert re.search(r"notes? in 1 of 3 documents; `sftdata audit \S+` reads all; sftdata explain", notes)
    assert [main(["explain", one]) for one in (code, *said)] == [0] * 3
    capsys.readouterr()
    assert main(["audit", str(made)]) == 0
    assert [f"sftdata explain {code} says more.\n" for code in said[1:]] == [capsys.readouterr().err]
    shards = open_shown(made)
    ledger, site = shards.manifest.ledger, Site([shards])
    found = [finding.code for finding in audit_set(shards)]
    report = make_report(shards, audit_set(shards))
    for code in [*ledger.rows_rejected, *found, *ledger.counters]:
        assert plain(explain(code).partition("): ")[2]) in plain(report)
    for code in found:
        assert plain(explain(code).partition("): ")[2]) in plain(
            site.answer("", "1/findings", "").body.decode()
        )
    for code in ledger.rows_rejected:
        page = site.answer("", "1/left-out", f"why={code}").body.decode()
        assert plain(explain(code).partition("): ")[2]) in plain(page)


def plain(page: str) -> str:
    """Return the text of a page, or of a paragraph as it is written."""
    return html.unescape(re.sub(r"</?code>|`", "", page))
