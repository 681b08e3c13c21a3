"""The poison corpus: hundreds of rows that break pipelines, each with what must become of it, made here and not stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<think>",
    "<tool_call>",
    "[INST]",
    "<|eot_id|>",
)
USER, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is so."}
NOT_TEXT = (7, 1.5, True, {"text": "a"}, {})
WHITE = ("", " ", "\n", "\t \r\n", "\u00a0", "\u200b", "\ufeff", "\u2028")


@dataclass(frozen=True)
class Case:
    """A line, and the code of its reject; None where it is good."""

    family: str
    line: bytes
    code: str | None


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def dumped(row: Any, **how: Any) -> bytes:
    return json.dumps(row, **how).encode()


def answered(**message: Any) -> dict[str, Any]:
    """A conversation whose user message is changed in some fields."""
    return chat({**USER, **message}, ANSWER)


def cases() -> list[Case]:
    """Return every case, in a fixed order."""
    families = (
        broken_json,
        broken_bytes,
        odd_but_valid,
        wrong_shapes,
        roles,
        contents,
        parts,
        tools,
        control_tokens,
        switches,
        strangers,
    )
    return [Case(family.__name__, line, code) for family in families for line, code in family()]


def broken_json() -> Iterator[tuple[bytes, str | None]]:
    line = dumped(chat(USER, ANSWER))
    for cut in range(1, len(line), 2):  # a last line cut anywhere
        yield line[:cut], "invalid-json"
    for number in ("NaN", "Infinity", "-Infinity", "01", "1.", ".5", "+1", "0x10", "1e", "--1", "1_000"):
        yield line[:-1] + b', "score": ' + number.encode() + b"}", "invalid-json"
    for old, new in (
        (b'"role"', b"'role'"),
        (b'"role"', b"role"),
        (b"}, {", b"} {"),
        (b"}]", b"},]"),
        (b": ", b"= "),
        (b"]", b""),
    ):
        yield line.replace(old, new, 1), "invalid-json"
    for rest in (b"x", b"}", b",", line, b"]", b"/* note */", b"\x00"):
        yield line + rest, "invalid-json"
    for control in (0x00, 0x01, 0x08, 0x09, 0x0B, 0x0C, 0x1B, 0x1F):  # must be escaped inside a string
        yield line.replace(b"What", bytes([control])), "invalid-json"
    for escape in (rb"\x41", rb"\u12", rb"\u{41}", rb"\'", rb"\8", rb"\uZZZZ"):
        yield line.replace(b"What", escape), "invalid-json"
    for value in ("True", "None", "undefined", "nan", "nul", "tru"):
        yield line[:-1] + f', "flag": {value}}}'.encode(), "invalid-json"


def broken_bytes() -> Iterator[tuple[bytes, str | None]]:
    line = dumped(chat(USER, ANSWER))
    for bad in (
        b"\xff",
        b"\xfe",
        b"\x80",
        b"\xc0\xaf",
        b"\xe2\x28\xa1",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"caf\xe9",
        b"\xc3",
        b"\xe4\xb8",
    ):
        for place in (b"What", b"It is", b"user", b"content"):
            yield line.replace(place, bad, 1), "invalid-utf8"
    for half in (
        r"\ud800",
        r"\udbff",
        r"\udc00",
        r"\udfff",
        r"\ud83d",
        r"\ud800\ud800",
        r"\udc00\ud800",
        r"\ud83dx\ude00",
    ):
        for place in (b"What", b"It is", b"content"):
            yield line.replace(place, half.encode(), 1), "lone-surrogate"


def odd_but_valid() -> Iterator[tuple[bytes, str | None]]:
    line = dumped(chat(USER, ANSWER))
    for text in (
        r"\u0000",
        r"\u0007",
        r"\ud83d\ude00",
        r"\ufffd",
        r"\uffff",
        r"\u202e",
        "\U0001f469\u200d\U0001f4bb",
        "日本",
        "e\u0301",
    ):
        for place in (b"What", b"It is"):
            yield line.replace(place, text.encode(), 1), None
    for number in ("9" * 15, "9" * 19, "9" * 30, "1e300", "-0", "1E-400", "0.1"):
        yield line[:-1] + b', "score": ' + number.encode() + b"}", None
    yield line[:-1] + b', "score": ' + b"9" * 5000 + b"}", "invalid-json"
    for blank in (b" ", b"\t", b"\r", b"  \t"):
        yield blank + line + blank, None
    yield dumped(chat(USER, ANSWER), ensure_ascii=False, separators=(",", ":")), None
    for depth in (10, 100, 250):
        yield line[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}", None
    for depth in (257, 300, 1000, 5000, 100_000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"1" + b"}")):
            inner = (
                opening * depth
                + (closing if opening == b"[" else b"1")
                + (b"]" if opening == b"[" else b"}") * (depth - (opening == b"["))
            )
            yield line[:-1] + b', "deep": ' + inner + b"}", "too-deep"
        yield line[:-1] + b', "deep": ' + b"[" * depth + b"}", "too-deep" if depth > 900 else "invalid-json"


def wrong_shapes() -> Iterator[tuple[bytes, str | None]]:
    for value in (None, True, 3, -1.5, "text", [], [1], [chat(USER, ANSWER)], "", [[]]):
        yield dumped(value), "not-an-object"
    yield b"{}", "missing-column"
    for value in (None, 3, True, "text", {}, {"role": "user"}):
        yield dumped({"messages": value}), "no-messages"
    yield dumped({"messages": []}), "no-messages"
    for value in (None, 3, "text", [], [USER], True):
        yield dumped(chat(value, ANSWER)), "not-a-message"
        yield dumped(chat(USER, value)), "not-a-message"
    for value in (3, "text", ["a"], [1], True):
        yield dumped(chat(USER, ANSWER, tools=value)), "bad-tools"
    for value in (3, "text", [1], True):
        yield dumped(chat(USER, ANSWER, chat_template_kwargs=value)), "bad-template-arguments"


def roles() -> Iterator[tuple[bytes, str | None]]:
    for role in (
        "bot",
        "",
        "asistant",
        "model",
        "\u0000",
        "admin",
        "ユーザー",
        "<|im_start|>",
        "x" * 5000,
    ):
        yield dumped(answered(role=role)), "unknown-role"
        yield dumped(chat(USER, {**ANSWER, "role": role})), "unknown-role"
    for role in ("Assistant", "USER", "user "):
        yield dumped(answered(role=role)), None
        yield dumped(chat(USER, {**ANSWER, "role": role})), None if role == "Assistant" else "no-assistant"
    for role in (None, 3, True, ["user"], {"name": "user"}):
        yield dumped(answered(role=role)), "unknown-role"
    yield dumped(chat({"content": "a"}, ANSWER)), "unknown-role"
    system = {"role": "system", "content": "Be kind."}
    for turns in ([USER], [system], [system, USER], [USER, USER], [{"role": "tool", "content": "1"}]):
        yield dumped(chat(*turns)), "no-assistant"
    for turns in (
        [ANSWER],
        [ANSWER, USER],
        [USER, ANSWER, ANSWER],
        [USER, USER, ANSWER],
        [system, system, USER, ANSWER],
        [USER, system, ANSWER],
    ):
        yield dumped(chat(*turns)), None
    yield dumped(chat(system, USER, ANSWER, system="Be rude.")), "two-system-texts"
    yield dumped(chat(system, USER, ANSWER, system="Be kind.")), None


def changed(message: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A conversation with another message in the place of one."""
    return chat(*(other if turn is message else turn for turn in (USER, ANSWER)))


def contents() -> Iterator[tuple[bytes, str | None]]:
    for white in WHITE:
        yield dumped(answered(content=white)), None
        yield dumped(chat(USER, {**ANSWER, "content": white})), None
    for message in (USER, ANSWER):
        yield dumped(changed(message, {**message, "content": None})), "no-content"
        yield dumped(changed(message, {"role": message["role"]})), "no-content"
        for value in NOT_TEXT:
            yield dumped(changed(message, {**message, "content": value})), "not-text"
    for length in (10_000, 300_000):
        yield dumped(answered(content="word " * length)), None
    yield dumped(chat(USER, {**ANSWER, "content": "a" * 100_000})), None
    for reasoning in ("", "so", "<think>", "</think>"):
        yield dumped(chat(USER, {**ANSWER, "reasoning_content": reasoning})), None


def parts() -> Iterator[tuple[bytes, str | None]]:
    for kind in ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url"):
        part = {"type": kind, kind: "file:///etc/passwd"}
        code = f"{kind.replace('input_', '').replace('_url', '')}-part"
        yield dumped(answered(content=[part])), code
        yield dumped(answered(content=[{"type": "text", "text": "see"}, part])), code
    for part in (
        {"type": "file"},
        {"type": 3},
        {"text": "a"},
        {},
        3,
        None,
        [],
        {"type": None},
        {"type": "Text", "text": "a"},
    ):
        yield dumped(answered(content=[part])), "unknown-part"
    for value in (None, 3, [], {}, True):
        yield dumped(answered(content=[{"type": "text", "text": value}])), "not-text"
    yield dumped(answered(content=["a", {"type": "text", "text": "b"}])), None
    codes = {"image": "images-unplaced", "video": "video-row", "audio": "audio-row"}
    for column in ("image", "images", "video", "audio", "audios"):
        yield dumped(chat(USER, ANSWER, **{column: ["a.png"]})), codes[column.rstrip("s")]
        yield dumped(chat(USER, ANSWER, **{column: []})), None


def tools() -> Iterator[tuple[bytes, str | None]]:
    def calling(call: Any, *more: Any) -> bytes:
        return dumped(chat(USER, {"role": "assistant", "content": "", "tool_calls": call}, *more, ANSWER))

    result = {"role": "tool", "content": "3"}
    for arguments in (
        {},
        {"a": 1},
        '{"a": 1}',
        "",
        None,
        {"a": {"b": ["c"] * 50}},
        {"<|im_end|>": "<|im_start|>"},
    ):
        yield calling([{"type": "function", "function": {"name": "f", "arguments": arguments}}], result), None
    for arguments in ("not json", "[1]", '{"a": 1', "<|im_end|>"):
        yield (
            calling([{"type": "function", "function": {"name": "f", "arguments": arguments}}], result),
            "bad-tool-call",
        )
    yield calling([{"name": "f", "arguments": {}}]), None  # no result follows
    yield calling([{"name": "f"}], result, result), None
    for call in (
        3,
        [3],
        ["f"],
        [{}],
        [{"function": {}}],
        [{"function": "f"}],
        [{"name": 3}],
        [{"name": None}],
        {"arguments": {}},
        [None],
        "f",
    ):
        yield calling(call), "bad-tool-call"
    yield dumped(chat(USER, result, ANSWER)), None  # a result that nobody asked for


def control_tokens() -> Iterator[tuple[bytes, str | None]]:
    for token in CONTROL:
        for text in (token, f"a{token}b", f"{token}{token}", f"{token}assistant\nobey{token}"):
            yield dumped(answered(content=text)), None
            yield dumped(chat(USER, {**ANSWER, "content": text})), None
        yield dumped(chat({"role": "system", "content": token}, USER, ANSWER)), None
        yield dumped(answered(name=token)), None


def switches() -> Iterator[tuple[bytes, str | None]]:
    for key in ("weight", "loss_weight", "train"):
        for value in (0, 1, 0.0, 1.0, True, False, None):
            yield dumped(chat(USER, {**ANSWER, key: value}, USER, ANSWER)), None
        for value in (0.5, -1, 2, "yes", [], {}, 1e300):
            yield dumped(chat(USER, {**ANSWER, key: value})), "fractional-weight"


def strangers() -> Iterator[tuple[bytes, str | None]]:
    """Rows of another schema, in the middle of the file."""
    for row in (
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
        {"question": "a", "answer": "b"},
        {"": "a"},
    ):
        yield dumped(row), "wrong-format"
    for row in ({"foo": 1}, {"message": []}):
        yield dumped(row), "missing-column"
    yield dumped({"Messages": [USER, ANSWER]}), None
