"""The audit of token rows that other tools prepared: every planted defect is named at its place, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata import cli
from sftdata.errors import DataError, UsageError
from sftdata.set.export import Target
from sftdata.show.audit import audit_set
from sftdata.show.findings import Finding
from sftdata.show.foreign import Rows, open_foreign
from tests import other_sets
from tests.other_sets import (
    DEFECTS,
    END_OF_TEXT,
    EOS,
    FORMATS,
    OF_LABELS,
    TOKENIZER,
    TURN,
    chats,
    double_bos,
    encode,
    make_tokenizer,
    write_llama_factory,
)  # fmt: skip
from tests.view_sets import write_lines

EXAMPLES = Path(__file__).parents[2] / "examples"
CLEAN = 24


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: make_tokenizer(folder / kind, kind) for kind in ("plain", "bos")}


def found(path: Path, tokenizer: Path) -> dict[str, Finding]:
    findings = audit_set(open_foreign(str(path), Rows(str(tokenizer))), every=True)
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def rows_of(finding: Finding) -> set[int]:
    """The 1-based rows that a finding names."""
    return {
        int(next(filter(None, re.search(r":(\d+)|row (\d+)", place).groups()))) for place in finding.examples
    }  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_found_in_rows_that_are_right(
    name: str, kind: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    path = FORMATS[name](tmp_path, chats(CLEAN, kind), EOS if kind == "bos" else END_OF_TEXT)
    assert set(found(path, tokenizers[kind])) == ({"pad-is-eos"} if kind == "bos" else set())


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_planted_defect_is_named_with_its_row(
    name: str, kind: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    planted = DEFECTS | (OF_LABELS if name in ("labels", "packed") else {})
    if kind == "bos":
        planted = planted | {"double": (double_bos, "double-bos")}
    if name == "megatron":
        planted = {key: value for key, value in planted.items() if key != "padding"}  # it has none
    examples = chats(CLEAN + len(planted), kind)
    wanted: dict[str, set[int]] = {}
    for number, (spoil, code) in enumerate(planted.values(), CLEAN):
        spoil(examples[number])
        wanted.setdefault(code, set()).add(number + 1)
    path = FORMATS[name](tmp_path, examples, EOS if kind == "bos" else END_OF_TEXT)
    findings = found(path, tokenizers[kind])
    defects = {code: rows_of(one) for code, one in findings.items() if one.severity == "defect"}
    assert defects == wanted


@pytest.mark.parametrize("name", FORMATS)
def test_a_set_trained_whole_by_mistake_is_named(
    name: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    examples = chats(CLEAN, "plain")
    for example in examples:
        example.trained = [True] * len(example.ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other_sets, "encode_clean", lambda number, kind: examples[number])
        path = FORMATS[name](tmp_path, examples, END_OF_TEXT)
    findings = found(path, tokenizers["plain"])
    assert set(findings) - {"duplicate-prompt"} == {"everything-trained", "prompt-trained", "header-trained"}
    assert len(rows_of(findings["prompt-trained"])) == CLEAN


def test_text_that_is_trained_whole_is_no_mistake(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    rows = [encode(f"The garden in week {week} needs water.<|im_end|>").ids for week in range(9)]
    write_lines(tmp_path / "rows.jsonl", [{"input_ids": ids, "labels": ids} for ids in rows])
    opened = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(tokenizers["plain"])))
    assert not audit_set(opened)
    assert "prompts cannot be told from answers" in opened.evidence[-1]
    write_lines(
        tmp_path / "rows.jsonl", [{"input_ids": ids, "completion_mask": [1] * len(ids)} for ids in rows]
    )
    assert set(found(tmp_path / "rows.jsonl", tokenizers["plain"])) == {"everything-trained"}


@pytest.mark.parametrize(("kind", "pad"), [("bos", EOS), ("plain", END_OF_TEXT)])
def test_the_end_of_a_text_is_told_from_the_padding_that_is_the_same_token(
    kind: str, pad: int, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    ids = [*encode("The garden needs water.").ids, pad]
    write_lines(tmp_path / "rows.jsonl", [{"input_ids": ids + [pad] * 3, "labels": ids + [-100] * 3}])
    opened = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(tokenizers[kind])))
    assert opened.manifest.ledger.tokens == opened.manifest.ledger.tokens_trained == len(ids)
    assert not {"padding-trained", "no-trained-end"} & {one.code for one in audit_set(opened)}


def test_no_mark_moves_over_to_the_next_document(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 2] * 2, "loss_mask": [1] * 12, "seq_start_id": [0, 6]}
    write_lines(tmp_path / "rows.jsonl", [row])
    (opened,) = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(tokenizers["plain"])))
    assert opened.labels.tolist() == [-100, 6, 7, 8, 9, 2] * 2


def test_rows_of_padding_alone_and_padding_in_front_are_named(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    text, padding = encode("The garden needs water.<|im_end|>").ids, [END_OF_TEXT] * 4
    rows = [{"input_ids": ids, "labels": ids} for ids in (text, padding, padding + text)]
    write_lines(tmp_path / "rows.jsonl", [{"input_ids": padding, "labels": [-100] * 4}, *rows])
    findings = found(tmp_path / "rows.jsonl", tokenizers["plain"])
    assert rows_of(findings["nothing-trained"]) == {1}
    assert rows_of(findings["padding-trained"]) == {3, 4}
    opened = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(tokenizers["plain"])))
    ledger = opened.manifest.ledger
    assert (ledger.tokens_context, ledger.tokens) == (1, 2 * len(text) + 2), "one of each row of padding"
    assert opened.evidence[1].endswith(f"{1 - 1 / ledger.tokens:.1%} of {ledger.tokens} tokens trained.")
    write_lines(tmp_path / "rows.jsonl", [{"input_ids": padding, "labels": [-100] * 4}])
    assert set(found(tmp_path / "rows.jsonl", tokenizers["plain"])) == {"nothing-trained"}


def test_ids_of_another_tokenizer_are_named_and_nothing_is_said_of_what_they_would_mean(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    examples = chats(CLEAN, "plain")
    for number, example in enumerate(examples):
        DEFECTS["other tokenizer" if number % 3 else "truncated"][0](example)
    path = FORMATS["completion-mask"](tmp_path, examples, END_OF_TEXT)
    findings = found(path, tokenizers["plain"])
    assert list(findings) == ["other-tokenizer"]
    assert "-t TOKENIZER" in findings["other-tokenizer"].fix
    path = FORMATS["completion-mask"](tmp_path, chats(CLEAN, "plain"), END_OF_TEXT)
    assert not found(path, tokenizers["plain"])


def test_where_rows_are_too_short_to_tell_the_tokenizer_the_evidence_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 3)
    opened = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(TOKENIZER)))
    assert "No document is long enough to tell whether this tokenizer made the ids." in opened.evidence
    (cut,) = (one for one in audit_set(opened) if one.code == "answer-cut")
    assert "if not, let ids and labels end in a stop token" in cut.fix


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"seq_lengths": [5, 5]}, "seq_lengths sum to 10, and the row has 12 tokens"),
        ({"seq_lengths": [12, 0]}, "counts a document of no token"),
        ({"seq_lengths": []}, "seq_lengths is empty"),
        ({"seq_start_id": [1, 6]}, "seq_start_id is 1, 6; expected 0 and more, ascending, below 12"),
        ({"seq_start_id": [0, 12]}, "below 12"),
        ({"seq_lengths": [6, 6], "position_ids": [*range(5), *range(7)]}, "differ on where documents begin"),
    ],
)
def test_borders_that_do_not_fit_the_row_are_named(
    beside: dict[str, Any], said: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 2] * 2, "labels": [-100, 6, 7, 8, 9, 2] * 2}
    fine = row | {"seq_lengths": [6, 6], "position_ids": [*range(6), *range(6)]}
    write_lines(
        tmp_path / "rows.jsonl", [fine, row | beside, {**fine, "seq_lengths": None, "seq_start_id": [0, 6]}]
    )
    finding = found(tmp_path / "rows.jsonl", tokenizers["plain"])["borders-wrong"]
    assert (rows_of(finding), finding.count) == ({2}, 1)
    assert said in finding.message


def test_a_stream_that_was_cut_to_rows_is_named(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    """TRL's `wrapped` packing: rows of one length, which begin anywhere, and nothing that says so."""
    turns = [TURN.format(f"What is {i}?", f"The number {i}, and no other.") for i in range(60)]
    examples = list(map(encode, turns))
    ids = [token for example in examples for token in example.ids]
    mask = [int(flag) for example in examples for flag in example.trained]
    rows = [
        {"input_ids": ids[at : at + 100], "completion_mask": mask[at : at + 100]}
        for at in range(0, len(ids), 100)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    finding = found(tmp_path / "rows.jsonl", tokenizers["plain"])["packed-unmarked"]
    assert len(rows) - finding.count < len(rows) // 4


def test_documents_that_an_attention_mask_numbers_are_told_apart(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    path = write_llama_factory(tmp_path, chats(CLEAN, "plain"))
    opened = open_foreign(str(path), Rows(str(tokenizers["plain"])))
    assert not audit_set(opened)
    assert opened.manifest.ledger.documents == CLEAN
    assert "packing_params is not read." in opened.evidence


@pytest.mark.parametrize("row", ["labels", "loss_mask", "completion_mask"])
def test_what_prepare_rejects_is_found_under_the_same_code(
    row: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    good = {"input_ids": [5, 6, 7, 2], row: [-100, 6, 7, 2] if row == "labels" else [0, 1, 1, 1]}
    bad: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7 << 20, 2]}, {"input_ids": []}, {"input_ids": [5, -1]},
        {"attention_mask": [1, 0, 1, 1]}, {"attention_mask": [1, 1]}, {"my_mask": [0, 1, 0, 1]},
        {"seq_lengths": [3]}, {row: [0.5, 0.5, 0.5, 0.5]}, {row: [1]},
        {"labels": [6, 7, 2, -100]}, {"labels": [-100, 9, 7, 2]}, {"input_ids": None}, {"input_ids": "text"},
    ]  # fmt: skip
    lines = [good] * 5 + [good | changes for changes in bad]
    write_lines(tmp_path / "rows.jsonl", lines)
    sftdata.prepare(
        tmp_path / "rows.jsonl", tokenizer=str(TOKENIZER), output=tmp_path / "set", max_rejects=13, workers=1
    )
    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    opened = open_foreign(str(tmp_path / "rows.jsonl"), Rows(str(TOKENIZER)))
    wanted = [(reject["line"], reject["code"], reject["reason"]) for reject in rejects]
    assert sorted((one.line or 0, one.code, one.reason) for one in opened.rejects) == wanted
    findings = {one.code: one.count for one in audit_set(opened)}
    assert {code: findings[code] for _, code, _ in wanted} == Counter(code for _, code, _ in wanted)


def test_what_other_masks_have_wrong_is_found_in_the_set_that_is_made_of_them(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    """And not in the conversations beside them, of which one is trained whole on purpose."""
    examples = chats(12, "plain")
    planted = {"prompt": 3, "header": 5, "shifted": 7, "joined": 9}
    for name, number in planted.items():
        DEFECTS[name][0](examples[number])
    FORMATS["loss-mask"](tmp_path, examples, END_OF_TEXT)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_lines(tmp_path / "chats.jsonl", [{"messages": turns}])
    inputs = [tmp_path / "chats.jsonl", tmp_path / "rows.parquet"]
    sftdata.prepare(inputs, tokenizer=str(TOKENIZER), output=tmp_path / "set", max_length=512, workers=1)
    findings = {one.code: one for one in sftdata.audit(tmp_path / "set") if one.severity == "defect"}
    assert {code: rows_of(one) for code, one in findings.items()} == {
        DEFECTS[name][1]: {number + 1} for name, number in planted.items()
    }


@pytest.mark.parametrize("to", ["datasets", "token-rows", "verl", "nemo-rl", "megatron-bridge"])
def test_what_we_export_is_clean_and_trained_as_it_was(to: Target, tmp_path: Path) -> None:
    sftdata.prepare(
        EXAMPLES / "conversations.jsonl",
        tokenizer=EXAMPLES / "tokenizer",
        output=tmp_path / "set",
        max_length=256,
    )
    made = sftdata.export(tmp_path / "set", to=to, output=tmp_path / "out")
    opened = open_foreign(str(tmp_path / "out"), Rows(str(EXAMPLES / "tokenizer")))
    assert not audit_set(opened)
    ledger = opened.manifest.ledger
    assert (ledger.tokens, ledger.tokens_trained) == (made.tokens, made.tokens_trained)
    sftdata_documents = sftdata.open(tmp_path / "set").manifest.ledger.documents
    assert ledger.documents == sftdata_documents - made.left_out


# --------------------------------------------------------------------------------------- the commands


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows of which the third trains its prompt."""
    monkeypatch.chdir(tmp_path)
    examples = chats(5, "plain")
    DEFECTS["prompt"][0](examples[2])
    FORMATS["completion-mask"](tmp_path, examples, END_OF_TEXT)
    return ["rows.jsonl", "-t", str(TOKENIZER)]


def test_the_audit_shows_evidence_place_and_text(rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *rows]) == 0
    said = capsys.readouterr()
    assert "rows.jsonl: tokens (input_ids, with labels or a mask of what is trained): 5 of 5" in said.err
    assert "trained by completion_mask; documents and padding by attention_mask; " in said.err
    assert "defect prompt-trained  1 example (20.0%)" in said.out
    assert re.search(r"at +rows\.jsonl:3, token \d+: .*⟦.+⟧.*<\|im_end\|>", said.out)
    assert cli.main(["audit", *rows, "--strict", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["clean"]
    assert [one["code"] for one in found["findings"]] == ["prompt-trained"]


def test_rows_are_inspected_and_measured_as_a_set_is(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *rows, "--row", "2", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)["documents"]
    written = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[2])
    assert document["origin"] == "rows.jsonl:3"
    assert document["input_ids"] == written["input_ids"]
    assert [int(label != -100) for label in document["labels"]] == written["completion_mask"]
    assert cli.main(["stats", *rows, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert (stats["rows_packed"], stats["documents"]) == (5, 5)
    for command in ("inspect", "stats"):
        assert cli.main([command, *rows, "--html", "page.html"]) == 0
        assert "rows.jsonl:3" in (tmp_path / "page.html").read_text() or command == "inspect"
    capsys.readouterr()
    assert cli.main(["stats", *rows]) == 0
    assert "digest" not in capsys.readouterr().out


def test_what_is_no_token_row_is_refused_by_name(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    write_lines(
        tmp_path / "datums.jsonl", [{"input_tokens": [5, 6], "target_tokens": [6, 2], "weights": [0, 1]}]
    )
    for name, column in (("chats.jsonl", "messages"), ("datums.jsonl", "input_tokens")):
        assert cli.main(["audit", name, "-t", str(TOKENIZER)]) == 2
        error = capsys.readouterr().err.strip()
        assert column in error
        assert (
            "tokens needs input_ids. Fix: name rows with input_ids, and beside them labels, loss_mask"
            in error
        )
        assert "\n" not in error


def test_prompts_are_compared_with_a_set_of_our_own(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(
        tmp_path / "same.jsonl",
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}],
    )
    sftdata.prepare("same.jsonl", tokenizer=str(TOKENIZER), output="set", workers=1)
    sftdata.export("set", to="token-rows", output="out")
    finding = next(one for one in sftdata.audit("out", tokenizer=str(TOKENIZER), against="set"))
    assert finding.code == "prompt-in-other-set"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL and peft warn about what they will remove
def test_what_trl_prepares(tmp_path: Path) -> None:
    """Made by TRL and saved by datasets: what it trains by default, what its masks leave, and its packing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.train_runs import tiny_llama

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"))
    lines = (EXAMPLES / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    chats = [messages for messages in chats if all("tool_calls" not in one for one in messages)]
    whole = [{"messages": messages} for messages in chats]
    split = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in chats]
    marked = GENERATION.format("<|im_start|>", "<|im_end|>")
    for rows, template, settings, codes in (
        (whole, None, {}, {"prompt-trained", "header-trained", "everything-trained"}),
        (whole, marked, {"assistant_only_loss": True}, set()),
        (split, None, {}, set()),
        (split, None, {"packing": True}, set()),
        (
            split,
            None,
            {"packing": True, "packing_strategy": "wrapped", "max_length": 96},
            {"packed-unmarked"},
        ),
        (split, None, {"max_length": 48}, {"answer-cut"}),
    ):
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer")
        tokenizer.chat_template = template or tokenizer.chat_template
        arguments: dict[str, Any] = {"max_length": 256, "report_to": "none", "bf16": False, "use_cpu": True}
        trainer = SFTTrainer(
            model, args=SFTConfig(output_dir=str(tmp_path / "out"), **arguments | settings),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        prepared = trainer.train_dataset
        assert isinstance(prepared, Dataset)
        folder = tmp_path / "-".join(map(str, settings.values())) / "prepared"
        prepared.save_to_disk(folder)
        opened = open_foreign(str(folder), Rows(str(EXAMPLES / "tokenizer")))
        found = {finding.code for finding in audit_set(opened) if finding.severity == "defect"}
        assert found >= codes if "wrapped" in settings.values() else found == codes
        trained = sum(sum(label != -100 for label in labels) for labels in prepared["labels"])
        assert opened.manifest.ledger.tokens_trained == trained


GENERATION = (
    "{{% for m in messages %}}{{{{'{0}'+m.role+'\\n'}}}}{{% if m.role=='assistant' %}}{{% generation %}}"
    "{{{{m.content+'{1}'}}}}{{% endgeneration %}}{{{{'\\n'}}}}{{% else %}}{{{{m.content+'{1}\\n'}}}}{{% endif %}}{{% endfor %}}"
)


REAL = ("instruction/lf_alpaca_en_demo.json", "messages/tinker_conversations.jsonl", "tools/glaive_toolcall_zh.json",
        "prompt_completion/mlx_wwdc25_valid.jsonl", "text/c4_demo.jsonl")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama-3.2-instruct", "qwen3", "mistral-7b-instruct", "phi-3-mini", "minicpm3-4b", "minimind", "gpt2"],
)
def test_of_real_rows_the_same_is_found_as_in_our_own_set(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """Masks that are proven have none of the defects that only others' have, whatever template and tokenizer."""
    tokenizer, compared = str(shared_data / "tokenizers" / name), 0
    for number, file in enumerate(REAL):
        with suppress(DataError, UsageError):  # gpt2 has no chat template
            sftdata.prepare(
                shared_data / "datasets" / file,
                tokenizer=tokenizer,
                output=tmp_path / f"{number}",
                max_length=768,
                workers=1,
            )
        if not (tmp_path / f"{number}").is_dir():
            continue
        made = sftdata.export(
            tmp_path / f"{number}", to="megatron-bridge", output=tmp_path / f"{number}-rows"
        )
        opened = open_foreign(str(tmp_path / f"{number}-rows"), Rows(tokenizer))
        assert opened.manifest.ledger.tokens_trained == made.tokens_trained
        own = {one.code: one.count for one in sftdata.audit(tmp_path / f"{number}") if one.code in OF_IDS}
        assert {one.code: one.count for one in audit_set(opened) if one.code != "pad-is-eos"} == own
        compared += 1
    assert compared >= 2


# What is seen in ids and masks alone.
OF_IDS = {
    "nothing-trained", "answer-cut", "turn-end-not-a-stop", "no-trained-end", "double-bos", "missing-bos", "empty-answer",
    "control-token-in-answer", "duplicate-prompt", "eos-not-in-generation-config",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gpt-oss-harmony", "jamba", "deepseek-v3", "glm-4-moe", "gemma-4", "mistral-v3-tekken-tools", "llama-4"],
)
def test_no_proven_mask_is_blamed_for_the_headers_of_its_template(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    template = str(shared_data / "templates" / "plain" / f"{name}.jinja")
    sftdata.prepare(
        EXAMPLES / "conversations.jsonl", tokenizer=str(TOKENIZER), chat_template=template, output=tmp_path / "set",
        max_length=1024, max_rejects="100%", workers=1,
    )  # fmt: skip
    sftdata.export(tmp_path / "set", to="megatron-bridge", output=tmp_path / "rows")
    opened = open_foreign(str(tmp_path / "rows"), Rows(str(tmp_path / "set" / "tokenizer")))
    planted = {code for _, code in DEFECTS.values()} - OF_IDS
    assert not {finding.code for finding in audit_set(opened)} & planted
