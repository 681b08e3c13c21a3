"""Messages name settings as their reader does: flags in a shell, keywords in Python.

That the rule is exact depends on the form of messages: every text of the source that names a flag is tried.
"""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftdata
import sfttrain
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.show.view import ShownSet
from sftdata.wording import _BETWEEN, _known, as_keywords, in_a_shell, shell_quote, worded
from sfttrain.arguments import training_fields
from tests.advice import ROOT, texts_of

CALLED = (
    sftdata.prepare, sftdata.preview, sftdata.stream, sftdata.view, sftdata.audit, sftdata.diff, sftdata.export,
    sftdata.verify, ShownSet.view, ShownSet.view_example, sfttrain.train, sfttrain.open_chat,
)  # fmt: skip
KEYWORDS = {name for function in CALLED for name in inspect.signature(function).parameters} | {
    *training_fields()
}


@pytest.mark.parametrize(
    ("said", "in_python"),
    [
        ("a larger --max-length, or --overlong drop.", 'a larger max_length, or overlong="drop".'),
        ("--max-length 4096.", "max_length=4096."),
        ("--max-new-tokens 8 --temperature -1: none", "max_new_tokens=8, temperature=-1: none"),
        ("fewer workers (--workers 1)", "fewer workers (workers=1)"),
        ("start anew with --overwrite.", "start anew with overwrite=True."),
        ("stands alone: --write --overwrite.", "stands alone: write=True, overwrite=True."),
        ("--quantize nf4 --lora r=16", 'quantize="nf4", lora="r=16"'),
        ("leave --revision out.", "leave revision out."),
        ("leave -o out, or -o out", 'leave output out, or output="out"'),
        ("choose another -o.", "choose another output."),
        ("did you mean -t toks/a?", 'did you mean tokenizer="toks/a"?'),
        ("did you mean --map answer='my answer'?", 'did you mean map={"answer": "my answer"}?'),
        ("--map question=q --map answer=a, or --format", 'map={"question": "q", "answer": "a"}, or format'),
        ("--eval 5%, or --eval held=FOLDER", 'eval="5%", or eval={"held": "FOLDER"}'),
        ("give it as --mix chats=70.", 'give it as mix={"chats": 70}.'),
        ("--max-rejects 20 or --max-rejects 5%", 'max_rejects=20 or max_rejects="5%"'),
        ("--response-template '### A:', or '[1, 2]'", "response_template=\"### A:\", or '[1, 2]'"),
        ("--response-template $'\\n### A:'", 'response_template="\\n### A:"'),
        ("ids, as --response-template '[1, 2]'.", "ids, as response_template=[1, 2]."),
        ("raise it with --set max_line_bytes=N.", "raise it with max_line_bytes=N."),
        ("a smaller --set slice_bytes.", "a smaller slice_bytes."),
        ("--set training.seed=1", "seed=1"),
        ("optim_args=nonsense=1: not read", 'optim_args="nonsense=1": not read'),
        ("as --set template_kwargs.think=false.", 'as template_kwargs={"think": False}.'),
        ("set fp16=true, or save_strategy=no.", 'set fp16=True, or save_strategy="no".'),
        ("--order length orders rows; --order says how", 'order="length" orders rows; order says how'),
        ("--model without --steps-for: it has no effect.", "model without steps_for: it has no effect."),
        ("-o my sets/a: is a file.", 'output="my sets/a": is a file.'),
        ("--map-role my bot=assistant: no message", 'map_role={"my bot": "assistant"}: no message'),
        ("rows.jsonl: --split 'a + b': found c", 'rows.jsonl: split="a + b": found c'),
        ("--format beside --formatter: the function says", "format beside formatter: the function says"),
        ("--mix chats: no set of that name.", "mix chats: no set of that name."),
        # what stays
        ("run `sftdata view SET --max-length 8`.", "run `sftdata view SET --max-length 8`."),
        ("then: sftdata view SET -o OUT --like a", "then: sftdata view SET -o OUT --like a"),
        ("as with iconv -f latin1 -t utf-8.", "as with iconv -f latin1 -t utf-8."),
        ("torchrun --nproc-per-node 4 -m sfttrain run ...", "torchrun --nproc-per-node 4 -m sfttrain run ..."),
        ("a.jsonl: found '--max-length 8'; it's odd", "a.jsonl: found '--max-length 8'; it's odd"),
        ("the last part, or the command without --part", "the last part, or the command without --part"),
        ("the model's r=16, lr=0.1 and out/max_length=8", "the model's r=16, lr=0.1 and out/max_length=8"),
    ],
)  # fmt: skip
def test_flags_are_said_as_keywords_in_python(said: str, in_python: str) -> None:
    assert as_keywords(said) == in_python
    assert as_keywords(in_python) == in_python


def test_who_runs_a_command_reads_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = UsageError("a: found 3 --epochs.", "a larger --max-length, or --overwrite.")
    assert str(error) == "a: found 3 epochs. Fix: a larger max_length, or overwrite=True."
    with in_a_shell():
        assert str(error) == "a: found 3 --epochs. Fix: a larger --max-length, or --overwrite."
        assert worded("--overwrite") == "--overwrite"
    assert main(["prepare", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "set")]) == 2
    assert "name it with --tokenizer, or in the YAML file" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"tokenizer is not given\. Fix: name it with tokenizer\.$"):
        sftdata.prepare(tmp_path / "none.jsonl", output=tmp_path / "set")


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"], whitelist_characters="\n\t"), min_size=1))
def test_any_value_that_is_advised_is_that_value_in_python(value: str) -> None:
    if _BETWEEN.fullmatch(value) or re.match(r"-\D", value) or "=" in value:
        return
    quoted = shell_quote(value)
    said = as_keywords(f"give --like {quoted}.").removeprefix("give ").removesuffix(".")
    assert eval(f"dict({said})") == {"like": value}
    said = as_keywords(f"--map answer={quoted} --map question=q")
    assert eval(f"dict({said})") == {"map": {"answer": value, "question": "q"}}


# ---------------------------------------------------------------------------------- the form of messages

HOLE = "HOLE"
# Flags of commands that no function has.
OF_COMMANDS = {
    "--help", "--debug", "--part", "--ray", "--html", "--strict", "--step", "--port", "--from", "--gguf", "--gptq",
    "--prompt", "--batch-size", "--set", "--nproc-per-node", "--enable-lora", "--max-lora-rank", "--lora-modules",
    "--jinja", "--no-", "--init", "--config",
}  # fmt: skip
# Values of texts that messages name themselves.
VALUES = {
    HOLE, "...", "chatml", "chosen", "developer", "Qwen/Qwen2.5-0.5B-Instruct", "module:function",
    "my_rows:to_messages", "rows:fix", "converted", "flash_attention_2", "user/model", "r=16", "### Assistant:",
    "tinker", "datasets", f"{HOLE}:{HOLE}", f"{HOLE}[:95%]", "HOLE-files",
    "TOKEN", "TOKENIZER", "FOLDER", "DIR", "FILE", "SET", "OUT",
}  # fmt: skip


@cache
def said_in_python() -> dict[str, str]:
    """Return what is said instead of each text that names a setting; HOLE stands for what is filled in."""
    texts = (
        text.replace("{}", HOLE)
        for package in ("sftdata", "sfttrain")
        for path in (ROOT / package).rglob("*.py")
        if "cli" not in path.relative_to(ROOT).as_posix() and path.name != "other_tools.py"
        for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))
    )
    return {text: as_keywords(text) for text in texts if re.search(r"(?<![\w-])-[-to]|\w=", text)}


def test_no_message_says_a_flag_to_who_called_a_function() -> None:
    for text, said in said_in_python().items():
        outside = re.sub(r"`[^`]*`|\b(?:sftdata|sfttrain|iconv) .*|'[^']*'|\"[^\"]*\"", "", said)
        assert {*re.findall(r"(?<![\w-])(?:--[a-z][a-z-]*|-[to]\b)", outside)} <= OF_COMMANDS, text


def test_a_message_gives_a_keyword_only_what_is_meant_as_its_value() -> None:
    for text, said in said_in_python().items():
        for name, value in re.findall(r"(?<!')\b(\w+)=\"([^\"]+)\"", said):
            if f'{name}="{value}"' not in text and f"{name}={value}" not in text:
                assert name in KEYWORDS, text
                assert value in VALUES or f"'{value}'" in "".join(_known()[name]), text
