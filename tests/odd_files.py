"""Files that are hard to cut: CR, marks of byte order, no last newline, quotes, brackets and escapes in texts."""

from __future__ import annotations

import csv
import io
import json
from random import Random

MARKS = (b"", b"\xef\xbb\xbf")


def text(rng: Random) -> str:
    length = rng.choice([0, 1, 3, 10, 40, 200])
    return "".join(
        rng.choice(rng.choice(['"', "\\", "{}[]", ",;\t", "\n\r", "é ", "abcdefghij"])) for _ in range(length)
    )


def lines(rng: Random) -> bytes:
    """JSON lines; some are empty, damaged or alike."""
    rows = [b'{"text": "alike"}'] * rng.randint(1, 900) if rng.random() < 0.1 else []
    for _ in range(rng.randint(1, 150)):
        row = json.dumps({"text": text(rng) * rng.choice([1, 1, 8])}, ensure_ascii=rng.random() < 0.5)
        odd = [b"", b"  ", b'{"broken": ', b'{"text": "alike"}']
        rows.append(rng.choice(odd) if rng.random() < 0.2 else row.encode())
    newline = rng.choice([b"\n", b"\r\n"])
    return rng.choice(MARKS) + newline.join(rows) + rng.choice([b"", newline])


def table(rng: Random) -> bytes:
    """A CSV; in some, quotes stand where they should not."""
    delimiter, spoilt, parts = rng.choice([",", ",", ";", "\t"]), rng.random() < 0.4, []
    rows = [
        ["prompt", "completion"],
        *([text(rng) * rng.choice([1, 5]), text(rng)] for _ in range(rng.randint(0, 120))),
    ]
    for row in rows:
        out = io.StringIO(newline="")
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(
            out, delimiter=delimiter, lineterminator=rng.choice(["\n", "\r\n"]), quoting=quoting
        ).writerow(row)
        record = out.getvalue().encode()
        if spoilt and parts and rng.random() < 0.1:
            place = rng.randint(0, len(record))
            record = record[:place] + rng.choice([b'"', b'""', b',"', b'"\n', b"\n"]) + record[place:]
        parts.append(record)
    data = b"".join(parts)
    return rng.choice(MARKS) + (data.rstrip(b"\r\n") if rng.random() < 0.5 else data)


def array(rng: Random, *, sound: bool = False) -> bytes:
    """An array of rows, or objects without brackets around them; some elements break a rule inside."""
    elements = []
    for _ in range(rng.randint(0, 80)):
        turns = [
            {"role": "user", "content": text(rng)},
            {"role": "assistant", "content": text(rng) * rng.choice([1, 5])},
        ]
        row = {rng.choice(["messages"] * 9 + ["others"]): turns}
        element = json.dumps(
            row, indent=rng.choice([None, None, 1]), ensure_ascii=rng.random() < 0.5
        ).encode()
        if not sound and rng.random() < 0.1:
            odd = [
                element.replace(b'"user"', b"NaN", 1),
                b"1",
                b'"str, }"',
                b"[1, {}]",
                b"{}",
                b"[" * 300 + b"]" * 300,
            ]
            element = rng.choice([*odd, element.replace(b'"', b"", 1)] if rng.random() < 0.1 else odd)
        elements.append(element)
    joined = rng.choice([b",", b", ", b",\n", b",\n  "]).join(elements)
    if sound or rng.random() < 0.8:
        joined = (
            b"["
            + rng.choice([b"", b"\n", b" "])
            + joined
            + rng.choice([b"", b"\n"])
            + b"]"
            + rng.choice([b"", b" \n"])
        )
    return rng.choice(MARKS) + (joined if sound or rng.random() < 0.9 else b"[" + joined)


KINDS = {".jsonl": lines, ".csv": table, ".json": array}
