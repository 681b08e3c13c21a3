"""Advice on sets, finished or not, and the audit's: when it is followed the set is made or shown, and the finding is gone."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import SftError
from sftdata.set.build import Build
from sftdata.show.audit import audit
from tests.advice import ROOT

pytestmark = pytest.mark.slow

TOKENIZER = ROOT / "examples/tokenizer"
Row = dict[str, Any]
END, ASKED = "<|im_end|>", {"role": "user", "content": "Q"}


def chat(*contents: str, **more: Any) -> Row:
    """Return a conversation that begins with a question; `more` goes into the answers."""
    turns = [
        {"role": "assistant", "content": text} | more if n % 2 else {"role": "user", "content": text}
        for n, text in enumerate(contents)
    ]
    return {"messages": turns}


def begun(role: str) -> Row:
    return {"messages": [{"role": role, "content": "Be kind."}, *chat("Q", "A")["messages"]]}


# ------------------------------------------------------------------------------------------- the audit


WRITES_ALL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHT = "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content +"
TEMPLATES = {
    "plain": WRITES_ALL,
    "deaf": WRITES_ALL.replace("in messages", "in messages if m.role not in ('system', 'developer')"),
    "undeveloped": WRITES_ALL.replace("in messages", "in messages if m.role != 'developer'"),
    "forgetful": WRITES_ALL.replace("m.content +", THOUGHT.replace("if m.r", "if loop.last and m.r")),
    "thinking": WRITES_ALL.replace("m.content +", THOUGHT),
    "opening": WRITES_ALL.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"),
    "endless": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "opened": "{{ bos_token }}" + WRITES_ALL,
    "sparing": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
TEMPLATES["untagged"] = (
    TEMPLATES["sparing"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
LONG = chat("Q", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)
TWO = {"text": "### Q: a ### A: b ### Q: c ### A: d"}
ASKED_TWICE = {"text": "### Q: a ### Q: b ### A: c"}
MARKED = "--response-template '### A:' --instruction-template '### Q:' "
THINKING = chat("Q", "A", "Q2", "B", reasoning_content="Hm.")
THINKING["messages"][-1]["reasoning_content"] = "So."


@dataclass(frozen=True)
class Found:
    """A finding with its advice, and who follows it: with other flags, other rows or another tokenizer.

    Attributes:
        advice: as the source has it.
        rows, flags: what the set is made of that has the finding.
        followed: the flags of each way to follow it.
        then: the rows of who follows it; the same where empty.
        ends: of the fix that is given, where it is filled in.
    """

    code: str
    advice: str
    rows: list[Row]
    flags: str
    followed: list[str]
    then: list[Row] = field(default_factory=list)


FOUND = [
    Found(
        "answer-cut", "a larger --max-length, or --overlong drop or split (drop where there are pictures)",
        [chat("Q", "A"), LONG],
        "--max-length 32 --overlong truncate",
        ["--max-length 256", "--max-length 32 --overlong drop", "--max-length 32 --overlong split"],
    ),
    Found(
        "answer-split", "--packing bfd with a --max-length that holds the example",
        [chat("Q", "A"), chat("R", "A"), chat("S", "A")],
        "--packing wrapped --max-length 17", ["--packing bfd --max-length 17"],
    ),
    Found(
        "missing-bos", "begin their text or ids with {token}; chats, with a --chat-template that does so",
        [{"text": "<|endoftext|>one two"}, {"text": "one two"}], "-t opened", ["-t opened"],
        [{"text": "<|endoftext|>one two"}] * 2,
    ),
    Found(
        "missing-bos", "begin their text or ids with {token}; chats, with a --chat-template that does so",
        [{"input_ids": [0, 6, 7, 2], "labels": [-100, -100, 7, 2]}, {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}],
        "-t opened", ["-t opened --chat-template opened.jinja"], [chat("Q", "A")],
    ),
    Found(
        "eos-not-in-generation-config", "--eos-token '{}', or {}", [{"text": "one two"}], "-t stopping",
        ["-t stopping --eos-token '<|endoftext|>'", "-t listed"],
    ),
    Found("eos-not-in-generation-config", "", [chat("Q", "A")], "-t stopping", ["-t listed"]),
    Found("no-trained-end", "--eos-token '{}'", [chat("Q", "A")], "--chat-template endless.jinja",
          [f"--chat-template endless.jinja --eos-token '{END}'"]),
    Found(
        "no-trained-end", "", [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], "", [""],
        [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}],
    ),
    Found(
        "tokens-added",
        "train without --lora, add embed_tokens and lm_head to its target, or choose a --chat-template of known tokens",
        [chat("Q", "A")], "--chat-template llama-3", ["--chat-template chatml"],
    ),
    Found(
        "message-swallowed",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
        [begun("developer")], "--chat-template undeveloped.jinja",
        ["--chat-template plain.jinja", "--chat-template undeveloped.jinja --map-role developer=system"],
    ),
    Found(
        "message-swallowed",
        "another --chat-template, --map-role developer=system where it is a developer's,"
        " or put the text into the first user message",
        [begun("system")], "--chat-template deaf.jinja", ["--chat-template deaf.jinja"], [chat("Be kind.\n\nQ", "A")],
    ),
    Found(
        "reasoning-swallowed", "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
        [THINKING], "--chat-template forgetful.jinja", ["--chat-template thinking.jinja"],
    ),
    Found(
        "reasoning-swallowed", "--train-on last-assistant, one example a turn, or a --chat-template that writes reasoning",
        [THINKING], "--chat-template forgetful.jinja", ["--chat-template forgetful.jinja --train-on last-assistant"],
        [{"messages": THINKING["messages"][:2]}, THINKING],
    ),
    Found(
        "outside-generation",
        "--chat-template with a copy whose `generation` and `endgeneration` tags are taken out: then the spans are derived",
        [chat("Q", "A", "Q2", "B")], "--chat-template sparing.jinja", ["--chat-template untagged.jinja"],
    ),
    Found(
        "tools-left-out", "--chat-template of a model that calls tools", [chat("Q", "A") | {"tools": [TOOL]}],
        "--chat-template plain.jinja", [""],
    ),
    Found(
        "prompt-parted", "a --chat-template whose turns begin as its generation prompt does", [chat("Q", "A")],
        "--chat-template opening.jinja", ["--chat-template plain.jinja"],
    ),
    Found(
        "control-token-in-data", "nothing; --trust-control-tokens lets it count", [chat(f"What is {END}?", "A")], "",
        ["--trust-control-tokens"],
    ),
    Found(
        "control-token-in-answer", "clean the rows, and leave out --trust-control-tokens", [chat("Q", f"A{END} b")],
        "--trust-control-tokens", [""], [chat("Q", "A b")],
    ),
    Found("repeated-marker", "--instruction-template", [TWO], "--response-template '### A:'", [MARKED]),
    Found(
        "masked-as-trl", "--mask-mode default", [TWO, ASKED_TWICE], f"{MARKED} --mask-mode trl-0.7.10",
        [f"{MARKED} --mask-mode default"],
    ),
]  # fmt: skip


def write_tokenizers() -> None:
    for name, facts, stops in (
        ("opened", {"bos_token": "<|endoftext|>"}, None),
        ("stopping", {}, [0]),
        ("listed", {}, [0, 2]),
    ):
        shutil.copytree(TOKENIZER, name)
        config = json.loads(Path(name, "tokenizer_config.json").read_text(encoding="utf-8"))
        Path(name, "tokenizer_config.json").write_text(json.dumps(config | facts), encoding="utf-8")
        if stops:
            Path(name, "generation_config.json").write_text(
                json.dumps({"eos_token_id": stops}), encoding="utf-8"
            )
    for name, text in TEMPLATES.items():
        Path(f"{name}.jinja").write_text(text, encoding="utf-8")


def prepare(rows: list[Row], flags: str, output: str = "set") -> int:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = [] if "-t " in flags else ["-t", str(TOKENIZER)]
    return main(["prepare", "rows.jsonl", "-o", output, "--workers", "1", *base, *shlex.split(flags)])


@pytest.mark.parametrize("case", FOUND, ids=[f"{case.code}-{number}" for number, case in enumerate(FOUND)])
def test_who_follows_the_audit_has_the_finding_no_more(
    case: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizers()
    assert prepare(case.rows, case.flags) == 0
    before = {finding.code: finding for finding in audit("set")}
    for piece in case.advice.split("{token}" if "{token}" in case.advice else "{}"):
        assert piece in before[case.code].fix
    if not case.advice:  # no command, and none that would be wrong
        assert "--" not in before[case.code].fix
    for number, flags in enumerate(case.followed):
        assert prepare(case.then or case.rows, flags, f"then{number}") == 0
        after = {
            finding.code
            for finding in audit(f"then{number}")
            if finding.severity == "defect" or finding.code == case.code
        }
        assert after <= before.keys() - {case.code}, flags


# ------------------------------------------------------------------------------------------- building


CHATS = [chat("Q", "A")]


def stopped(*_: Any) -> None:
    raise SftError("stopped.")


def begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished set behind."""
    with monkeypatch.context() as patch:
        patch.setattr(Build, "finish", stopped)
        assert prepare(CHATS, "") == 1


def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(CHATS, "") == 0


def damaged(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def damage(monkeypatch: pytest.MonkeyPatch) -> None:
        (finished if name.startswith("set/") else begin)(monkeypatch)
        Path(name).write_text("{", encoding="utf-8")

    return damage


def mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    Path("set").mkdir()
    monkeypatch.setattr(
        "os.path.ismount", lambda place: Path(place).name == "set" and Path(place).resolve().parent == here
    )


BUILT: dict[str, list[tuple[Callable[[pytest.MonkeyPatch], None], str, list[tuple[str, str]]]]] = {
    "choose another -o, or replace the set with --overwrite.": [
        (finished, "--max-length 64", [("--max-length 64", "other"), ("--max-length 64 --overwrite", "set")])
    ],
    "replace the set with --overwrite, or choose another -o.": [
        (damaged("set/manifest.json"), "", [("", "other"), ("--overwrite", "set")])
    ],
    "run with the settings it was begun with, or start anew with --overwrite.": [
        (begin, "--max-length 64", [("", "set")]), (begin, "--max-length 64", [("--max-length 64 --overwrite", "set")]),
    ],
    "start anew with --overwrite.": [
        (damaged("set.partial/plan.json"), "", [("--overwrite", "set")]),
        (damaged("set.partial/slices/00000.json"), "", [("--overwrite", "set")]),
    ],
    "-o {}": [(mounted, "", [("", "set/set")])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("advice", "number"), [(advice, n) for advice, cases in BUILT.items() for n in range(len(cases))]
)
def test_who_follows_advice_on_the_output_has_the_set(
    advice: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    state, flags, followed = BUILT[advice][number]
    state(monkeypatch)
    capsys.readouterr()
    assert prepare(CHATS, flags) in (2, 4)
    assert f"Fix: {advice.replace('{}', 'set/set')}" in capsys.readouterr().err
    for more, output in followed:
        assert prepare(CHATS, more, output) == 0
        assert [len(list(row.documents())) for row in sftdata.open(output)] == [1]


SAME_COMMAND = "repeat the command that began it; it goes on there."


def test_an_unfinished_set_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(monkeypatch)
    assert main(["stats", "set"]) == 2
    assert f"Fix: {SAME_COMMAND}" in capsys.readouterr().err
    finished(monkeypatch)
    assert "Resuming: 1/1 slices complete" in capsys.readouterr().err
    assert main(["stats", "set"]) == 0


# ------------------------------------------------------------------------------------------- looking


# What is wrong, what the advice says to run, and how that ends.
SHOWN: dict[str, tuple[str, str, int]] = {
    "--row with one of these.": ("inspect set --row 9", "inspect set --row 0", 0),
    "--example with one of these.": ("inspect set --example 9", "inspect set --example 0", 0),
    "name another file with --html.": ("inspect set --html set/manifest.json/page.html", "inspect set --html page.html", 0),
    "name the folder that `sftdata prepare -o` wrote.": ("stats sat", "stats set", 0),
    "leave -t out.": ("audit set -t {}", "audit set", 0),
    "sftdata preview {} -t TOKENIZER, or, if they are token ids, -t TOKENIZER here.": (
        "audit ids.jsonl", "audit ids.jsonl -t {}", 0
    ),
    "name their tokenizer: -t TOKENIZER.": ("audit ids.jsonl --split train", "audit ids.jsonl --split train -t {}", 0),
    "see above, or audit without --strict.": ("audit raw --strict", "audit raw", 0),
    "--response-template '### Assistant:'": (
        "resolve talk.jsonl -t {}", "resolve talk.jsonl -t {} --response-template '### Assistant:'", 0
    ),
    "see `sftdata preview` for the reasons.": (
        "resolve rows.jsonl -t {} --response-template x --chat-template refusing.jinja",
        "preview rows.jsonl -t {} --chat-template refusing.jinja", 0,
    ),
    "see `{} {}--help`.": ("stats a b", "stats --help", 0),
    "`sftdata explain` lists them all.": ("explain zzz", "explain", 0),
    "`sftdata stats` counts the rows that were left out.": ("inspect short --example 1", "stats short", 0),
    "run `sftdata verify`, or repeat the command that made the set, with --overwrite.": ("audit hurt --json", "verify hurt", 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tokenizers()
        assert prepare(CHATS, "--chat-template endless.jinja", "raw") == 0
        assert prepare(CHATS, "") == 0
        Path("talk.jsonl").write_text(
            json.dumps({"text": "### Human: Q ### Assistant: A"}) + "\n", encoding="utf-8"
        )
        assert prepare([*CHATS, LONG], "--overlong drop --max-length 32", "short") == 0
        Path("refusing.jinja").write_text("{{ raise_exception('never') }}", encoding="utf-8")
        shutil.copytree("set", "hurt")
        Path("ids.jsonl").write_text(json.dumps({"input_ids": [5, 6, 2]}) + "\n", encoding="utf-8")
        Path("hurt/counted.jsonl").write_text("{", encoding="utf-8")
    return folder


@pytest.mark.parametrize("advice", SHOWN)
def test_who_follows_advice_on_what_is_shown_sees_it(
    advice: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    wrong, right = (shlex.split(command.format(TOKENIZER)) for command in SHOWN[advice][:2])
    assert main(wrong) in (2, 3, 4)
    said = advice.replace("{} {}", "sftdata stats ").replace("{}", wrong[1])
    assert f"Fix: {said}" in capsys.readouterr().err
    assert main(right) == SHOWN[advice][2]


# --------------------------------------------------------------------------------------------------- damage

# What `verify` advises of a set of which this file is damaged.
DAMAGED = {
    "restore the file, or repeat the command that made the set, with --overwrite.": "shard-00000.arrow",
    "repeat the command that made the set, with --overwrite.": "manifest.json",
}


@pytest.mark.parametrize("advice", DAMAGED)
def test_a_damaged_set_that_is_prepared_again_as_advised_is_whole(
    advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizers()
    assert prepare(CHATS, "") == 0
    path = Path("set", DAMAGED[advice])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # of the same size: the set still looks up to date
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", "set"]) == 4
    said = capsys.readouterr()
    assert f"Fix: {advice}" in said.out + said.err
    assert prepare(CHATS, "--overwrite") == 0
    assert main(["verify", "set"]) == 0
