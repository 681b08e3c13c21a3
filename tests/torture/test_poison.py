"""The poison corpus: each bad row is one reject that says where, what and how to mend it; each good row is kept."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.errors import SftError
from tests.compressed import zstd
from tests.poison import ANSWER, USER, cases, chat, dumped
from tests.torture.runs import prepare, settings
from tests.waiting import HANGS

pytestmark = pytest.mark.slow

GOOD = dumped(chat(USER, ANSWER))
CASES = cases()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on an odd line, a good row on every even one; the last line has no newline."""
    folder = tmp_path_factory.mktemp("poison")
    assert not any(b"\n" in case.line for case in CASES)
    (folder / "poison.jsonl").write_bytes(b"\n".join(line for case in CASES for line in (case.line, GOOD)))
    prepare(folder / "poison.jsonl", folder / "set", slice_bytes=50_000, max_rejects="100%", workers=2)
    return folder


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_bytes().splitlines()]


def test_there_are_five_hundred_cases_of_many_kinds() -> None:
    assert len(CASES) >= 500
    assert len({case.code for case in CASES}) > 20
    assert len({case.family for case in CASES}) > 10


def test_each_bad_row_is_one_reject_with_place_code_reason_and_fix(poisoned: Path) -> None:
    found = {reject["line"]: reject for reject in rejects(poisoned / "set")}
    assert len(found) == len(rejects(poisoned / "set"))
    expected = {2 * index + 1: case for index, case in enumerate(CASES) if case.code is not None}
    wrong = {
        line: (case.family, case.line[:200], case.code, found.get(line))
        for line, case in expected.items()
        if line not in found or found[line]["code"] != case.code
    }
    assert not wrong
    assert found.keys() == expected.keys(), "a good row was rejected"
    offsets = np.cumsum([0] + [len(line) + 1 for case in CASES for line in (case.line, GOOD)])
    for line, reject in found.items():
        assert reject["file"] == "poison.jsonl"
        assert reject["byte_offset"] == offsets[line - 1]
        assert reject["reason"]
        assert reject["fix"]
        assert "\n" not in reject["reason"] + reject["fix"]
        assert len(reject["reason"]) < 6000
        assert "Traceback" not in reject["reason"]


def test_each_good_row_is_kept_and_every_row_accounted_for(poisoned: Path) -> None:
    shards = sftdata.open(poisoned / "set")
    ledger = shards.manifest.ledger
    held = {example for row in shards for example in row.examples.tolist() if example >= 0}
    good = {2 * index for index, case in enumerate(CASES) if case.code is None} | {
        2 * index + 1 for index in range(len(CASES))
    }
    assert held <= good
    assert len(good - held) == sum(ledger.rows_dropped.values()) < 5
    assert ledger.rows_in == 2 * len(CASES)
    assert ledger.rows_in == ledger.rows_kept + sum(ledger.rows_rejected.values()) + sum(
        ledger.rows_dropped.values()
    )


def test_rejects_that_are_mended_run_through(poisoned: Path, tmp_path: Path) -> None:
    """A script may mend them in place, with the envelope around the row or without it."""
    mended = [
        reject | {"row": chat(USER, ANSWER)} if reject["line"] % 4 == 1 else chat(USER, ANSWER)
        for reject in rejects(poisoned / "set")
    ]
    (tmp_path / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mended))
    manifest = prepare(tmp_path / "rejects.jsonl", tmp_path / "set", max_rejects="0")
    assert manifest.ledger.rows_kept == len(mended)


def test_rejects_that_are_not_mended_are_rejected_again(poisoned: Path, tmp_path: Path) -> None:
    first = rejects(poisoned / "set")
    good = [{"messages": [USER, ANSWER]}] * len(first)
    (tmp_path / "again.jsonl").write_bytes(
        (poisoned / "set" / "rejects.jsonl").read_bytes()
        + "".join(json.dumps(row) + "\n" for row in good).encode()
    )
    prepare(tmp_path / "again.jsonl", tmp_path / "set", max_rejects="100%")
    assert [reject["line"] for reject in rejects(tmp_path / "set")] == list(range(1, len(first) + 1))
    # Bytes that are no text come as \\xff in the reject, which is text, but no JSON.
    codes = [reject["code"].replace("invalid-utf8", "invalid-json") for reject in first]
    assert [reject["code"] for reject in rejects(tmp_path / "set")] == codes


def test_the_fix_of_an_unknown_role_is_a_flag_that_works(tmp_path: Path) -> None:
    for role in ("bot", "asistant", "AI", "model"):
        (tmp_path / "rows.jsonl").write_bytes(
            dumped(chat({**USER, "role": role}, ANSWER)) + b"\n" + GOOD + b"\n"
        )
        prepare(tmp_path / "rows.jsonl", tmp_path / role, max_rejects="100%")
        (reject,) = rejects(tmp_path / role)
        flag, mapping = reject["fix"].split()
        assert flag == "--map-role"
        manifest = prepare(
            tmp_path / "rows.jsonl",
            tmp_path / f"{role}-mended",
            map_role=dict([mapping.split("=")]),
            max_rejects="0",
        )
        assert manifest.ledger.rows_kept == 2


# ------------------------------------------------------------------------------------------------- whole files

LINES = (GOOD + b"\n") * 5
FILES = {
    "utf-16 little-endian": (LINES.decode().encode("utf-16"), "UTF-16"),
    "utf-16 big-endian": (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "UTF-16"),
    "utf-16 without a mark": (LINES.decode().encode("utf-16-le"), "UTF-16"),
    "old line ends": (LINES.replace(b"\n", b"\r"), "CR"),
    "empty": (b"", "no rows"),
    "blank lines": (b"\n \n\r\n\t\n", "no rows"),
    "byte order mark only": (b"\xef\xbb\xbf", "no rows"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "pickle"),
    "zeros": (bytes(5000), "binary"),
    "one NUL": (b"\0", "binary"),
    "noise": (bytes(range(256)) * 20, "invalid-utf8"),
    "gzip cut short": (gzip.compress(LINES * 500, mtime=0)[:-20], "damaged"),
    "zstd with a broken byte": (zstd.compress(LINES * 500)[:30] + b"\xff" * 30, "damaged"),
    "brackets": (b"[" * 100_000, None),
    "braces": (b'{"a":' * 100_000, None),
    "parquet without an end": (b"PAR1" + bytes(200), "arquet"),
    "arrow without an end": (b"ARROW1\x00\x00" + bytes(200), "rrow"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hopeless_file_is_one_line(tmp_path: Path, name: str) -> None:
    data, said = FILES[name]
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(SftError) as caught:
        prepare(tmp_path / "rows.jsonl", tmp_path / "set", max_rejects="0")
    assert caught.value.exit_code in (2, 3, 4)
    assert said is None or said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("CRLF", LINES.replace(b"\n", b"\r\n")),
        ("byte order mark", b"\xef\xbb\xbf" + LINES),
        ("no last newline", LINES[:-1]),
        ("blank lines between", LINES.replace(b"\n", b"\n\n \n")),
        ("array", b"[" + b",\n".join([GOOD] * 5) + b"]"),
        ("array that is not closed", b"[" + b",\n".join([GOOD] * 5)),
        ("array with a comma too many", b"[" + b",\n".join([GOOD] * 5) + b",]"),
        (
            "two gzip members",
            gzip.compress(LINES[: len(LINES) // 5]) + gzip.compress(LINES[len(LINES) // 5 :]),
        ),
        ("first line of another schema", b'{"text": "a"}\n' + LINES),
    ],
)
def test_an_odd_file_gives_all_its_rows(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "rows").write_bytes(data)
    assert (
        prepare(tmp_path / "rows", tmp_path / "set", max_rejects="1", format="messages").ledger.rows_kept == 5
    )


# ------------------------------------------------------------------------------------------- bombs and endless lines


OPENERS: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "gzip": (gzip.open, {"compresslevel": 1}),
    "zstd": (zstd.open, {}),
    "bz2": (bz2.open, {"compresslevel": 1}),
    "xz": (lzma.open, {"preset": 0}),
}


def peak_of(data: Path, output: Path, **more: Any) -> tuple[int, int]:
    """Run `prepare` in a process of its own; return its peak memory in MiB and how many rows it rejected."""
    script = (
        "import json, re, sys, sftdata\n"
        "given = json.loads(sys.argv[1])\n"
        "rejected = sum(sftdata.prepare(**given).ledger.rows_rejected.values())\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10, rejected)\n"
    )
    given = settings(data, output, **more) | {
        "inputs": str(data),
        "output": str(output),
        "slice_bytes": 32 << 20,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, rejected = map(int, done.stdout.split())
    return peak, rejected


# What comes before and after a good row, and what joins it to the next.
SHAPES = {"lines": (b"", b"\n", b""), "array": (b"[", b",\n", b"]")}
BOMBS = [
    *((compression, "lines", 100) for compression in OPENERS),
    *((compression, "array", 100) for compression in ("gzip", "zstd")),
    *(pytest.param(name, shape, 5000, marks=pytest.mark.torture) for name in OPENERS for shape in SHAPES),
]


@pytest.mark.parametrize(("compression", "shape", "megabytes"), BOMBS)
def test_a_bomb_of_one_endless_row_is_one_reject_within_the_line_cap(
    place: Path, compression: str, shape: str, megabytes: int
) -> None:
    bomb = place / f"bomb.{compression}"
    compress, how = OPENERS[compression]
    before, between, after = SHAPES[shape]
    with compress(bomb, "wb", **how) as file:
        file.write(before + (GOOD + between) * 5 + b'{"messages": "')
        for _ in range(megabytes):
            file.write(b"a" * (1 << 20))
        file.write(b'"}' + (between + GOOD) * 5 + after)
    (place / "small").write_bytes(LINES * 2)
    assert bomb.stat().st_size < megabytes << 13
    baseline, _ = peak_of(place / "small", place / "one")
    peak, rejected = peak_of(bomb, place / "two", max_line_bytes=16 << 20)
    assert rejected == 1
    assert peak - baseline < 16 + 64, (peak, baseline)
    (reject,) = rejects(place / "two")
    assert (reject["record"], reject["code"]) == (6, "line-too-long")
    assert sftdata.open(place / "two").manifest.ledger.rows_kept == 10
