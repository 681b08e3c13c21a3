"""What is fuzzed: each target takes bytes, and fails where a promise is broken. Bytes are edits of a sound input."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sftdata.batches import Conversation
from sftdata.errors import RowError, SftError
from sftdata.formats.detect import detect
from sftdata.formats.fields import FormatOptions
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate, choose_template, control_tokens
from sftdata.set.manifest import read_manifest
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from sftdata.sources import arrays, lines, streams
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams
from tests.one_stage import convert_rows
from tests.oracles.char_masks import Format, trained_spans
from tests.poison import ANSWER, USER, chat, dumped
from tests.torture.runs import content, prepare, write_chats

FRAGMENTS = (
    *(
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        rb"\ud800",
        b"NaN",
        b"null",
    ),
    *(
        b"1e999",
        b'"role": ',
        b'"content": null',
        b'"messages": [',
        b"\xe2\x80\xa8",
        b"9" * 40,
        b"-",
        b"true",
        b" " * 9,
        b"../",
    ),
    *(b'{"text": "a"}\n', b'"from": "gpt"', b"<|im_end|>", b"ARROW1"),
)
ROWS = b"\n".join(
    [
        dumped(chat(USER, ANSWER)),
        dumped({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ]
    * 4
    + [
        dumped(
            chat(
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
                ANSWER,
            )
        )
    ]
)
SHAPES = (ROWS, b"[" + ROWS.replace(b"\n", b",\n") + b"]", json.dumps([chat(USER, ANSWER)] * 3, indent=1).encode(),
          b"prompt,completion\n" + b'a,"b, c"\nd,e\n' * 5)  # fmt: skip
PIECES = (
    *(
        "Hi",
        " ",
        "\n",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</think>",
        "<think>",
        "</s>",
        "[INST]",
        "### Response:\n",
        "é",
    ),
    *(
        "日本",
        "\u200d",
        "\U0010fff0",
        "{{ 1 }}",
        "{%",
        "lorem ipsum dolor sit amet",
        "\t",
        "<|eot_id|>",
        "<start_of_turn>model\n",
        "e\u0301",
    ),
)
TEMPLATES = ("chatml", "llama-3", "gemma", "zephyr", "vicuna", "llama-2")
STOPS = {"chatml": ["<|im_end|>"], "llama-3": ["<|eot_id|>"], "gemma": ["<end_of_turn>"]}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def edited(sound: bytes, edits: bytes) -> bytes:
    """Apply edits of four bytes each: where (two bytes), what, with which fragment."""
    raw = bytearray(sound)
    for at in range(0, len(edits) - 3, 4):
        place = int.from_bytes(edits[at : at + 2], "big") * (len(raw) + 1) >> 16
        kind, which = edits[at + 2] % 5, edits[at + 3]
        if kind == 0:
            raw[place : place + 1] = bytes([which])
        elif kind == 1:
            raw[place:place] = FRAGMENTS[which % len(FRAGMENTS)]
        elif kind == 2:
            del raw[place : place + which]
        elif kind == 3:
            raw[place:place] = raw[max(place - which, 0) : place]
        else:
            del raw[place:]
    return bytes(raw)


def rows(data: bytes) -> None:
    """Reading and detection: slices and blocks of any size give the same rows, each of them one row or one fault."""
    shape, size, edits = SHAPES[data[0] % 4] if data else ROWS, 1 + sum(data[1:2]) * 7, data[2:]
    limit = 200 if size % 2 else 1 << 20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(edited(shape, edits))
        try:
            with patch.object(lines, "RECORD_LIMIT", limit):
                whole, bad, records = _read(path, 1 << 20, limit)
                with patch.object(arrays, "CACHED_BYTES", size), patch.object(streams, "BLOCK_BYTES", size):
                    small, small_bad, _ = _read(path, size, limit)
            assert (whole, bad) == (small, small_bad)
            assert len({place for place, _ in whole + bad}) == len(whole) + len(bad) <= records
            name = detect([plan_source(open_source(str(path)), 0, 1 << 20)]).format
            _convert(path, name)
        except SftError as error:
            _is_plain(error)
        finally:
            close_streams()


def _read(
    path: Path, slice_bytes: int, limit: int
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], int]:
    plan = plan_source(open_source(str(path)), 0, slice_bytes, limit)
    good, bad = [], []
    for piece in plan.chunks:
        batch, unreadable = read_chunk(piece, limit)
        good += list(zip(batch.example_ids.tolist(), map(repr, batch.rows), strict=True))
        bad += [(row.record - 1, row.code) for row in unreadable]
    return good, bad, plan.records


def _convert(path: Path, name: str) -> None:
    for piece in plan_source(open_source(str(path)), 0, 1 << 20).chunks:
        batch, _ = read_chunk(piece, 1 << 20)
        found = convert_rows(batch, name, FormatOptions())
        assert sorted([*found.row.tolist(), *(index for index, _ in found.faults)]) == list(
            range(len(batch.rows))
        )


def masks(data: bytes) -> None:
    """What is trained is what the oracle says, whatever is typed into the messages."""
    form, finder = _template(TEMPLATES[data[0] % len(TEMPLATES)] if data else "chatml")
    messages = _messages(data[1:])
    if not messages or any(stop in message["content"] for stop in form.stops for message in messages):
        return  # the oracle cannot tell a stop that is typed from the template's own
    if any("</think>" in message["content"] for message in messages):
        return  # the oracle parts texts there, and loses the stop behind a part that does not vary
    try:
        rendered = finder.render(Conversation(messages, [None] * len(messages), None))
    except RowError:
        return  # rejected by name
    assert rendered.text == form.render(messages)
    spans = {turn.message: (turn.start, turn.stop) for turn in rendered.turns}
    assert spans == trained_spans(form, messages), (form.source[:40], messages)


def _messages(data: bytes) -> list[dict[str, Any]]:
    """Return turns in their order; a byte of 200 or more ends a turn, any other adds a piece of text."""
    turns = [[]]  # type: list[list[str]]
    for byte in data[:40]:
        if byte >= 200:
            turns.append([])
        else:
            turns[-1].append(PIECES[byte % len(PIECES)])
    pairs = [
        {"role": ("user", "assistant")[number % 2], "content": "".join(turn)}
        for number, turn in enumerate(turns)
    ]
    return pairs[: len(pairs) // 2 * 2]


@cache
def _template(name: str) -> tuple[Format, SpanFinder]:
    choice = choose_template(name, None, lambda other: (None, (), None))
    assert choice is not None
    stops = STOPS.get(name, ["</s>"])
    finder = SpanFinder(ChatTemplate(choice.text, SPECIAL), tuple(stops), control_tokens(choice.text))
    return Format(choice.text, stops, SPECIAL), finder


@cache
def _set() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(write_chats(Path(folder) / "chats.jsonl", 12), Path(folder) / "set", slice_bytes=1 << 20)
        return content(Path(folder) / "set")


def manifest(data: bytes) -> None:
    """A changed manifest is refused in one line."""
    _damaged("manifest.json", data)


def shard(data: bytes) -> None:
    """A changed shard is named by verify, and reading it ends with rows or with an error of one line."""
    _damaged("shard-00000.arrow", data)


def _damaged(name: str, edits: bytes) -> None:
    files = dict(_set())
    sound = files[name]
    files[name] = edited(sound, edits)
    with tempfile.TemporaryDirectory() as folder:
        for file, raw in files.items():
            (Path(folder) / file).parent.mkdir(exist_ok=True)
            (Path(folder) / file).write_bytes(raw)
        try:
            report = verify(Path(folder))
            assert read_manifest(Path(folder))
            same = files[name] == sound or (
                name == "manifest.json" and json.loads(files[name]) == json.loads(sound)
            )
            assert bool(report.problems) != same, report.problems
            assert all(name in line for line in report.problems)
            assert sum(len(row.input_ids) for row in open_set(folder)) > 0
        except SftError as error:
            _is_plain(error)
            if files[name] == sound:
                raise


def _is_plain(error: SftError) -> None:
    assert error.exit_code in (2, 3, 4)
    assert "\n" not in str(error)


TARGETS: tuple[Callable[[bytes], None], ...] = (rows, masks, manifest, shard)
