"""Advice followed in Python: what raised it is called again with the keywords that it names."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.wording import as_keywords
from tests.test_advice import (
    FOLLOWED,
    ROOT,
    TOKENIZER,
    named,
    run_command,
    text_of,
    trained_of,
    write_materials,
)

# Of `--set` itself, which is no keyword.
OF_A_SHELL = {"--set max_length=2048", "quote the value, as --set 'key=\"value\"'."}
GIVEN = re.compile(r"\b[a-z_]+=(?:\{.*?\}|\"(?:\\.|[^\"\\])*\"|\[.*?\]|\w+)")


def keywords(flags: list[str]) -> dict[str, Any]:
    """Return flags as keywords of a call."""
    return dict(eval(f"dict({as_keywords(shlex.join(flags))})"))


def prepare(name: str, given: dict[str, Any]) -> sftdata.SftError | None:
    """Return what `sftdata.prepare` raises."""
    try:
        sftdata.prepare(
            name, **{"output": "set", "tokenizer": TOKENIZER, "workers": 1, "on_note": str} | given
        )
    except sftdata.SftError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("advice", sorted(FOLLOWED.keys() - OF_A_SHELL))
def test_advice_is_followed_in_python_as_it_is_said(
    advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FOLLOWED[advice]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    write_materials()
    Path(case.name).write_bytes(case.rows if isinstance(case.rows, bytes) else text_of(case.rows).encode())
    flags = shlex.split(case.flags)
    given = keywords(flags)
    error = prepare(case.name, given)
    assert error is not None
    fix = str(error).rpartition("Fix: ")[2].split(" All are in")[0]
    calls = GIVEN.findall(fix)
    assert {call.partition("=")[0] for call in calls} <= inspect.signature(sftdata.prepare).parameters.keys()
    assert not re.search(r"(?<![\w-])--[a-z]|(?<![\w-])-[to] ", re.sub(r"`[^`]*`|iconv .*", "", str(error)))
    if case.then:
        run_command(fix, case)
    if case.does in (None, named):
        given |= eval(f"dict({calls[0]})")
    elif case.does is not None:
        given = keywords(case.does(flags, error.fix))
    assert prepare(case.then or case.name, given) is None
    if case.trained is not None:
        assert trained_of("set") == case.trained
