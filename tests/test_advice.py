"""Advice is an interface too: followed to the letter, it gives the set that is meant, or it is no command.

Every text of the source that names a flag, a setting or a command is collected (tests/advice.py) and must have its place: a case
that follows it, the test that does so elsewhere, or (advice_choices.txt) why there is nothing to follow.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import sftdata
import sfttrain.cli
from sftdata.cli import build_app, main
from tests.advice import ROOT, collect
from tests.test_advice_on_sets import BUILT, DAMAGED, FOUND, SHOWN
from tests.test_advice_on_training import FOLLOWED_IN_TRAINING

TOKENIZER = ROOT / "examples/tokenizer"
Rows = list[dict[str, Any]]
ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CHAT: Rows = [{"messages": [ASKED, SAID]}]
TEXT: Rows = [{"text": "Q ### A: yes"}]
END = "<|im_end|>"


@dataclass(frozen=True)
class Case:
    """Advice, how it comes about, and what comes of it.

    Attributes:
        rows: the input.
        flags: what raises the advice.
        does: from the flags and the words of the advice to the flags of who follows it; else the flag that it names is added.
        trained: what the set then trains; None where it only has to be made.
        name: of the input file.
        then: the file that the command of the advice makes, which is prepared in its place.
    """

    rows: Rows | str | bytes
    flags: str
    trained: list[str] | None
    does: Callable[[list[str], str], list[str]] | None = None
    name: str = "rows.jsonl"
    then: str | None = None


def named(flags: list[str], advice: str) -> list[str]:
    """Add the first flag that the advice names, with its value."""
    words = shlex.split(advice.rstrip("."))
    at = next(index for index, word in enumerate(words) if word.startswith("--") or word == "-t")
    return [*flags, *(word.rstrip(",.") for word in words[at : at + 1 + (not words[at].endswith(","))])]


def without(flags: list[str], advice: str) -> list[str]:
    """Leave out the flag that the advice says to leave out, with its value."""
    flag = re.search(r"(?<![\w-])--?[a-z][a-z-]*", advice)
    assert flag
    at = flags.index(flag[0])
    return [*flags[:at], *flags[at + 2 :]]


def only(*more: str) -> Callable[[list[str], str], list[str]]:
    """Fill in what the advice leaves to the user, as COLUMN."""
    return lambda flags, advice: [*flags, *more]


def instead(flag: str, *more: str) -> Callable[[list[str], str], list[str]]:
    """Give a flag of the command another value."""
    return lambda flags, advice: [*without(flags, flag), *more]


# ------------------------------------------------------------------------------------------- followed here

FOLLOWED: dict[str, Case] = {
    "--packing none keeps each example as it is.": Case(CHAT, "--max-length 2000000000", [f"A{END}"], named),
    "leave --overlong out.": Case(CHAT, "--overlong drop --packing wrapped", [f"A{END}"], without),
    "leave --revision out.": Case(CHAT, "--revision main", [f"A{END}"], without),
    "leave --train-on out.": Case(TEXT, "--train-on all --response-template '### A:'", [f" yes{END}"], without),
    "--response-template '...'": Case(TEXT, "--mask-mode trl-0.7.10", None, only("--response-template", "### A:")),
    "give the template as token ids, as --response-template '[1, 2]'.": Case(
        [{"input_ids": [5, 6, 7, 8]}], "--response-template '### A:'", None,
        instead("--response-template", "--response-template", "[6]"),
    ),
    "leave it out, or choose another --chat-template.": Case(
        CHAT, "--set template_kwargs.qqq=1", [f"A{END}"], lambda flags, advice: flags[:-2]
    ),
    "--chat-template chatml (or another built-in name, a template file, or a tokenizer to clone it from).": Case(
        CHAT, "-t bare", [f"A{END}"], named
    ),
    "--map-role {}={}": Case(
        [{"messages": [ASKED, {"role": "asistant", "content": "A"}]}], "", [f"A{END}"], named
    ),
    "prepare such rows apart, with --format {}.": Case(
        [{"text": "T"}, *CHAT * 20], "--max-rejects 0", None, only("--max-rejects", "100%")
    ),
    "name them with --map, or choose another --format.": Case(
        [{"q": "Q", "a": "A"}], "--format question-answer", [f"A{END}"], only("--map", "question=q", "--map", "answer=a")
    ),
    "name columns, as --map question=COLUMN --map answer=COLUMN, or convert rows with --formatter module:function.": Case(
        [{"q": "Q", "a": "A"}], "", [f"A{END}"], only("--map", "question=q", "--map", "answer=a")
    ),
    "choose one, as with --map {}={}.": Case(
        [{"instruction": "Q", "output": "A"}] * 20 + [{"instruction": "Q", "output": "A", "response": "B"}],
        "--max-rejects 0 --format alpaca", None, named,
    ),
    "add it, or name its stand-in with --map {}=COLUMN.": Case(
        [{"prompt": "P", "completion": "C"}] * 20 + [{"prompt": "P", "reply": "C"}],
        "--max-rejects 0", None, only("--map", "completion=reply"),
    ),
    "did you mean --map {}={}?": Case(
        [{"question": "Q", "reply": "A"}], "--map answer=repli", [f"A{END}"], lambda flags, advice: named([], advice.rstrip("?"))
    ),
    "name the column that holds the answer, as --map answer=COLUMN, or add an answer to each row.": Case(
        [{"question": "Q", "said": "A"}], "", [f"A{END}"], only("--map", "answer=said")
    ),
    "give --chat-template, or take the tools column out.": Case(
        [{"question": "Q", "answer": "A", "tools": [{"name": "f"}]}], "-t bare", [f"A{END}"],
        only("--chat-template", str(TOKENIZER)),
    ),
    "give it one of these names, as with --map loss_mask=COLUMN, or take it out.": Case(
        [{"input_ids": [5, 6, 7, 8], "mine": [0, 0, 1, 1]}], "", None, only("--map", "loss_mask=mine")
    ),
    "split the row, or raise the limit with --set max_line_bytes=N.": Case(
        CHAT, "--set max_line_bytes=20", [f"A{END}"], only("--set", "max_line_bytes=2000")
    ),
    "round the weight, or keep it with --loss-weights.": Case(
        [{"messages": [ASKED, SAID | {"weight": 0.5}]}], "", [f"A{END}"], only("--loss-weights")
    ),
    "return more rows from the function of --formatter; None leaves one out.": Case(
        CHAT, "--formatter tests.test_advice:nothing", [f"A{END}"],
        instead("--formatter", "--formatter", "tests.test_advice:everything"),
    ),
    "a larger --max-length, or --overlong truncate-left, which keeps the ends.": Case(
        [{"prompt": "P " * 40, "completion": "C"}], "--max-length 12", None, only("--overlong", "truncate-left")
    ),
    "-t {}": Case(TEXT, "-t bare/tokenizer.json", None, lambda flags, advice: named([], advice)),
    "did you mean -t {}?": Case(TEXT, "-t bar", None, lambda flags, advice: named([], advice.rstrip("?"))),
    "--chat-template {}, or put its text into the first user message": Case(
        [{"messages": [{"role": "system", "content": "S"}, ASKED, SAID]}], "--chat-template strict.jinja", [f"A{END}"], named
    ),
    "--chat-template chatml, which takes any order, or merge these messages": Case(
        [{"messages": [ASKED, ASKED, SAID]}], "--chat-template strict.jinja", [f"A{END}"], named
    ),
    "--set max_length=2048": Case(CHAT, "--set max_length", [f"A{END}"], lambda flags, advice: shlex.split(advice)),
    "quote the value, as --set 'key=\"value\"'.": Case(
        CHAT, "--set eos_token=[x", None, lambda flags, advice: ["--set", f'eos_token="{END}"']
    ),
    "tr '\\r' '\\n' < {} > lines.txt": Case(
        "one\rtwo\r", "", None, lambda flags, advice: flags, "rows.txt", then="lines.txt"
    ),
    "take them out, as with jq -c '.{}[]' FILE > rows.jsonl.": Case(
        json.dumps({"data": CHAT * 2}), "", [f"A{END}"] * 2, lambda flags, advice: flags, "all.json", then="rows.jsonl"
    ),
    "convert the file to UTF-8, as with iconv -f latin1 -t utf-8.": Case(
'{"text": "A caf\u00e9"}\n'.encode("latin1"), "", [f" caf\u00e9{END}"],
        lambda flags, advice: flags, "old.jsonl", then="utf8.jsonl",
    ),
    "--eos-token TOKEN": Case([{"text": "T one"}], "-t endless", [f" one{END}"], only("--eos-token", END)),
    "write it as a string, or convert rows with --formatter module:function.": Case(
        [{"prompt": "P", "completion": "C"}] * 20 + [{"prompt": "P", "completion": 5}], "--max-rejects 0",
        [f"C{END}"] * 20 + [f"5{END}"], only("--formatter", "tests.test_advice:in_words"),
    ),
    "write it as --formatter my_rows:to_messages.": Case(
        CHAT, "--formatter my_rows", [f"A{END}"], instead("--formatter", "--formatter", "my_rows:to_messages")
    ),
    'write each row as {"messages": [...]} that ends in the answer, as with --formatter module:function.': Case(
        [{"prompt": [ASKED], "said": "A"}], "", [f"A{END}"], only("--formatter", "tests.test_advice:answered")
    ),
    "give both as text, or both as the token ids that `sftdata resolve` prints.": Case(
        [{"text": "### Q: ask ### A: yes"}], "--response-template '### A:' --instruction-template '[5, 6]'", [f" yes{END}"],
        instead("--instruction-template", "--instruction-template", "### Q:"),
    ),
    "take the ids that `sftdata resolve` prints for this data, or give the template as text.": Case(
        TEXT, "--response-template '[900]'", [f" yes{END}"], instead("--response-template", "--response-template", "### A:")
    ),
    "--trust-control-tokens, or take them out of the data": Case(
        [{"messages": [ASKED, {"role": "assistant", "content": "a<|im_start|>b"}]}], "--chat-template cutting.jinja",
        [f"b{END}"], named,
    ),
    "change the row to what the template accepts, or choose another with --chat-template": Case(
        CHAT, "--chat-template picky.jinja", [f"A{END}"], instead("--chat-template", "--chat-template", "strict.jinja")
    ),
    "--map-role {}=ROLE, where ROLE is system, user, assistant (trained) or tool": Case(
        [{"messages": [ASKED, {"role": "zorp", "content": "A"}]}], "", [f"A{END}"], only("--map-role", "zorp=assistant")
    ),
    "--map-role developer=system": Case(
        [{"messages": [{"role": "developer", "content": "D"}, ASKED, SAID]}], "--chat-template known.jinja", [f"A{END}"], named
    ),
    "--chat-template chatml": Case(
        [{"prompt": "P", "completion": "C"}] * 2000 + CHAT,
        "-t bare --max-rejects 0 --formatter tests.test_advice:everything", None, named,
    ),
    "--chat-template Qwen/Qwen2.5-0.5B-Instruct (or another tokenizer or file whose template writes tool calls),"
    " or take them out": Case(
        [{"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}],
        "--chat-template known.jinja", None, instead("--chat-template", "--chat-template", str(TOKENIZER)),
    ),
    "give a folder that holds tokenizer.json, or check the id, the connection and `hf auth login`.": Case(
        CHAT, "-t no/such", [f"A{END}"], instead("-t", "-t", str(TOKENIZER))
    ),
}  # fmt: skip


# Takes a user and an assistant by turns, and no one else.
STRICT = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "strict": STRICT,
    "picky": STRICT.replace(
        "{% endif %}", "{% endif %}{{ raise_exception('no') if message.content == 'Q' }}", 1
    ),
    "known": STRICT.replace(
        "(message.role == 'user') != (loop.index0 % 2 == 0)",
        "message.role in ('developer', 'tool') or message.tool_calls",
    ),
    "cutting": STRICT.replace("message.content +", "message.content.split('<|im_start|>')[-1] +"),
}


def write_materials() -> None:
    """Write tokenizers and templates that advice is asked with into the working folder."""
    whole = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name, missing in {"bare": ("chat_template",), "endless": ("eos_token", "pad_token")}.items():
        Path(name).mkdir()
        config = {key: value for key, value in whole.items() if key not in missing}
        Path(name, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        Path(name, "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    renamed = Path("endless/tokenizer.json")  # or its end of text would be found by name
    renamed.write_text(
        renamed.read_text(encoding="utf-8").replace("<|endoftext|>", "<|nothing|>"), encoding="utf-8"
    )
    for name, text in TEMPLATES.items():
        Path(f"{name}.jinja").write_text(text, encoding="utf-8")
    Path("my_rows.py").write_text("def to_messages(row):\n    return row\n", encoding="utf-8")


def text_of(rows: Rows | str) -> str:
    return rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)


def run_command(fix: str, case: Case) -> None:
    """Run the command of the advice in a shell, with the file that it is about in its place."""
    command = fix.rpartition("as with ")[2].rstrip(".").replace(" FILE", f" {case.name}")
    if ">" not in command:
        command += f" {case.name} > {case.then}"
    subprocess.run(command, shell=True, check=True)


def nothing(row: dict[str, Any]) -> None:
    return None


def everything(row: dict[str, Any]) -> dict[str, Any]:
    return row


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": str(row["completion"])}


def answered(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*row["prompt"], {"role": "assistant", "content": row["said"]}]}


def prepared(capsys: pytest.CaptureFixture[str], name: str, flags: list[str]) -> tuple[int, str]:
    base = [] if "-t" in flags else ["-t", str(TOKENIZER)]
    capsys.readouterr()
    code = main(["prepare", name, "-o", "set", "--workers", "1", *base, *flags])
    return code, capsys.readouterr().err


def trained_of(folder: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    documents = [document for row in sftdata.open(folder) for document in row.documents()]
    return [tokenizer.decode(one.labels[one.labels != -100]) for one in documents]


@pytest.mark.slow
@pytest.mark.parametrize("advice", FOLLOWED)
def test_advice_that_is_followed_gives_the_set_that_is_meant(
    advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = FOLLOWED[advice]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    write_materials()
    data = case.rows if isinstance(case.rows, bytes) else text_of(case.rows).encode()
    Path(case.name).write_bytes(data)
    flags = shlex.split(case.flags)
    code, said = prepared(capsys, case.name, flags)
    assert code in (2, 3), said
    fix = said.rpartition("Fix: ")[2].strip().split(" All are in")[0]
    shape = ".*".join(re.escape(part) for part in advice.rstrip(".").split("{}"))
    assert re.search(shape, fix), said
    if case.then:
        run_command(fix, case)
    code, said = prepared(capsys, case.then or case.name, (case.does or named)(flags, fix))
    assert code == 0, said
    if case.trained is not None:
        assert trained_of("set") == case.trained


# ------------------------------------------------------------------------------------------- followed in other tests

_ODD = "tests/unit/test_odd_values.py::test_what_is_odd_is_named_and_the_fix_gives_what_is_meant"
_EXPLAINED = "tests/unit/test_explain.py::test_what_a_page_or_a_message_names_by_a_code_is_explained_there"
_HINTS = "tests/integration/test_nothing_ignored.py::"
_RUN = "tests/integration/test_bad_input.py::test_the_fix_of_a_refused_run_works_where_the_run_was_refused"
_SETTINGS = "tests/unit/test_settings.py::test_another_tools_setting_is_answered_with_ours"
_SPLITS = "tests/unit/test_splits.py::test_the_advice_on_splits_gives_the_right_rows"
_CONVERTED = (
    "tests/unit/test_tokenizer.py::test_a_sentencepiece_only_tokenizer_is_refused_with_a_fix_that_works"
)
_COLUMNS = "tests/unit/test_columnwise.py::test_a_table_by_columns_is_named_and_the_advice_gives_its_rows"
_KERNELS = "tests/unit/test_train_kernels.py::"
_COMPILED = "tests/unit/test_train_compiled.py::"
_OF_VIEWS = "tests/integration/test_views_of_views.py::"
_SLICES = "tests/integration/test_train_sequence.py::test_steps_and_weights_are_those_of_one_rank"
_BY_INDEX = "tests/integration/test_views_by_index.py::"
_BLAME = "tests/integration/test_blame.py::"
_REFUSED = "tests/integration/test_views_refuse.py::"
_VIEWS = "tests/integration/test_views_choice.py::test_advice_on_views_is_followed"
_SHARES = "tests/integration/test_train_shares.py::"
_GGUF = "tests/integration/test_train_gguf.py::"
_CHAT = "tests/integration/test_train_chat.py::test_what_cannot_be_talked_to_is_refused_in_one_line_whose_advice_works"
_ORDERED = (
    "tests/integration/test_views_order.py::test_what_cannot_be_ordered_is_refused_and_the_advice_followed"
)
_PICTURES = "tests/integration/test_pictures.py::test_advice_on_pictures_is_followed"
_PARTS = "tests/torture/test_parts.py"
_DRAWN = "tests/integration/test_train_pictures.py"
ELSEWHERE: dict[str, str] = {
    "hf auth login, or set HF_TOKEN to a token that may write.": (
        "tests/integration/test_push_hub.py::test_another_set_and_no_right_to_write_are_one_line"
    ),
    "make the view with --write, and push that.": (
        "tests/integration/test_store_sets.py::test_a_view_by_index_is_pushed_where_its_base_is"
    ),
    "# A view of what was selected. Make it: sftdata view THIS_FILE -o {}\\n{}": (
        "tests/unit/test_browse.py::test_a_query_selects_the_documents_that_the_view_of_its_recipe_holds"
    ),
    "another one, or leave --port out.": (
        "tests/unit/test_browse_server.py::test_a_port_in_use_is_refused_with_another_way"
    ),
    "save the documents as a list for --drop, or take the filter away.": (
        "tests/unit/test_browse.py::test_a_list_of_a_selection_is_what_drop_takes_out"
    ),
    "raise {}, in gigabytes, or --set window=N for N shards.": (
        "tests/integration/test_train_remote.py::test_a_window_larger_than_the_cache_is_refused"
    ),
    "restore the file, or prepare the set again with --overwrite.": f"{_DRAWN}::test_a_changed_picture_is_named_by_a_worker",
    "prepare with --check-pixels, which leaves such rows out.": f"{_DRAWN}::test_broken_pixels_are_left_out_by_check_pixels",
    "raise {}, in gigabytes, or make the view with --write where the sets lie.": (
        "tests/integration/test_remote_sets.py::test_a_view_of_more_than_the_cache_holds_is_refused"
    ),
    "as --part 1/8, which is the first of eight.": f"{_PARTS}::test_parts_in_any_order_make_the_set",
    "leave --workers out.": "tests/integration/test_scale.py::test_a_node_that_is_killed_takes_one_slice_with_it",
    "name the part, as --part 1/8.": f"{_PARTS}::test_parts_in_any_order_make_the_set",
    "export {}=N, the number of parts, or name the part, as --part 1/8.": (
        f"{_PARTS}::test_auto_reads_what_schedulers_say"
    ),
    "the last part, or the command without --part, finishes the set": (
        f"{_PARTS}::test_the_plain_command_finishes_what_parts_began"
    ),
    "--to datasets": (
        "tests/integration/test_pictures_out.py::test_a_set_goes_to_a_dataset_with_its_pictures"
    ),
    "prepare it without --loss-weights.": (
        "tests/integration/test_pictures_out.py::test_other_targets_have_no_place_for_pictures_and_a_lost_one_is_named"
    ),
    "--overlong truncate (or drop), or a larger --max-length.": (
        "tests/integration/test_pictures_views.py::test_what_cuts_pictures_is_refused_and_what_cannot_go_together"
    ),
    "--drop FILE, with the line {} in it.": (
        "tests/integration/test_pictures_views.py::test_a_text_that_holds_the_image_token_does_not_join_pictures"
    ),
    "--processor FOLDER": _PICTURES,
    "--processor FOLDER, of the model's processor; or leave out rows with pictures.": _PICTURES,
    "--images DIR": _PICTURES,
    "--map images={}": _PICTURES,
    "write paths that start from a folder above all pictures, and name that: --images DIR": _PICTURES,
    "--images DIR, of a folder below which the pictures are; or leave the row out.": (
        "tests/integration/test_pictures.py::test_a_public_file_makes_a_set_or_is_refused_with_a_fix_that_works"
    ),
    "--packing bfd": _PICTURES,
    "--overlong truncate": _PICTURES,
    "a larger --max-length, or a smaller --max-pixels.": _PICTURES,
    "give a larger --max-pixels, from {} on.": _PICTURES,
    "restore the picture, or prepare the set anew; with --embed-images a set holds its pictures.": (
        "tests/integration/test_pictures.py::test_a_set_moves_with_its_pictures_and_alone_where_it_embeds_them"
    ),
    "put their folder back there, or prepare the set anew, with --images DIR where it is now; with --embed-images a set"
    " holds its pictures.": (
        "tests/integration/test_pictures.py::test_a_set_moves_with_its_pictures_and_alone_where_it_embeds_them"
    ),
    "prepare the sets with --embed-images.": (
        "tests/integration/test_pictures_stored.py::test_pictures_by_path_are_embedded_or_refused"
    ),
    "--embed-images": "tests/integration/test_pictures_stored.py::test_pictures_by_path_are_embedded_or_refused",
    "--write copies them.": (
        "tests/integration/test_chosen_stored.py::test_a_view_by_index_in_a_store_names_sets_in_stores_alone"
    ),
    "prepare it with --embed-images.": (
        "tests/integration/test_store_sets.py::test_a_set_that_embeds_its_pictures_is_pushed_with_them"
    ),
    "--to tinker, or prepare it without --loss-weights.": (
        "tests/integration/test_export.py::test_weights_go_where_they_can_be_carried"
    ),
    "leave --model out.": _CHAT,
    "no model is named; --model FOLDER or a Hub id, or --init-from-config FILE": (
        "tests/unit/test_settings.py::test_what_a_run_cannot_do_without_is_named_with_the_flag_that_gives_it"
    ),
    "--gguf f16, or --set SHARDS for GPTQ.": f"{_GGUF}test_what_cannot_be_exported_is_refused_in_one_line",
    "llama-server --jinja -m {}": f"{_GGUF}test_the_file_holds_the_model",
    "vllm serve {} --enable-lora --max-lora-rank {} --lora-modules {}={}": (
        f"{_GGUF}test_the_card_has_licences_settings_and_how_vllm_serves_the_model"
    ),
    "`sfttrain plan` says what a run would take, and trains nothing.": (
        "tests/integration/test_train_words.py::test_a_dry_run_is_the_plan"
    ),
    "{} {}. Wrote {}. Look at them, then: sftdata prepare {} && sfttrain run -c {}": (
        "tests/integration/test_init_from.py::test_what_is_written_prepares_and_trains"
    ),
    "leave --sample out.": (
        "tests/integration/test_train_samples.py"
        "::test_a_file_that_is_not_there_and_a_set_without_a_tokenizer_are_refused_before_the_model_is_loaded"
    ),
    "leave --system out.": "tests/integration/test_train_chat.py::test_a_model_without_chat_template_goes_on_with_a_text",
    "name the folder that `sfttrain run` or `sfttrain merge` wrote.": _CHAT,
    "leave --prompt out, and type it.": _CHAT,
    "--max-new-tokens of at least 1, and --temperature of at least 0.": _CHAT,
    "--passes {}{}.": f"{_SHARES}test_a_bound_on_passes_is_held_and_its_advice_works",
    ", or --max-steps {}{}": f"{_SHARES}test_a_bound_on_passes_is_held_and_its_advice_works",
    "--new-leg and a higher max_steps train it on with these sets": (
        f"{_SHARES}test_other_data_needs_a_new_leg_and_acts_in_it"
    ),
    "--new-leg to go on with these sets from here, ": f"{_SHARES}test_other_data_needs_a_new_leg_and_acts_in_it",
    "the shares are met to {} only, since whole rows are taken, and these are long or few; `sftdata view --mix` makes a set that"
    " meets them by documents": f"{_SHARES}test_a_share_that_rows_are_too_coarse_for_is_met_by_a_view",
    "--drop": f"{_BLAME}test_a_list_for_drop_leaves_out_these_lines_and_no_others",
    "--step with one of these.": f"{_BLAME}test_a_step_that_was_not_logged_is_refused",
    "leave -o out.": f"{_BLAME}test_of_a_step_that_trained_nothing_no_list_is_made",
    "name the folder where it lies now: `--sets DIR`.": f"{_BLAME}test_runs_and_sets_are_found_where_they_were_moved",
    "{} {} {}; if the set was moved, `--sets DIR` names them.": (
        f"{_BLAME}test_documents_of_an_earlier_leg_whose_set_is_gone_are_counted_and_the_others_are_named"
    ),
    "train with `sfttrain run ... --log-documents`.": (
        "tests/integration/test_train_views.py::test_a_run_that_logged_nothing_is_blamed_once_it_does"
    ),
    "leave it out of the launch, and set sequence_parallel={}.": _SLICES,
    "torchrun --nproc-per-node {} -m sfttrain run ...": _SLICES,
    "set kernels=liger.": f"{_KERNELS}test_kernels_are_on_this_model_and_on_no_other",
    "Liger's kernels come without its loss now; set kernels=liger": f"{_KERNELS}test_liger_is_no_loss_any_more",
    "liger_kernel is not installed: pip install 'sftdata[gpu]'": f"{_KERNELS}test_what_cannot_be_used_is_named",
    "set compile=layers.": f"{_COMPILED}test_auto_compiles_layers_on_a_gpu_where_the_run_is_long_enough",
    "set compile=none.": f"{_COMPILED}test_auto_compiles_layers_on_a_gpu_where_the_run_is_long_enough",
    "jq -c '. as $all | ([.[]][0] | keys_unsorted[]) as $i | $all | map_values(.[$i])' FILE": _COLUMNS,
    "jq -c '. as $all | range([.[]][0] | length) as $i | $all | map_values(.[$i])' FILE": _COLUMNS,
    "jq -c '.columns as $names | .data[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add' FILE": _COLUMNS,
    "jq -c '.[]' FILE": _COLUMNS,
    "--formatter rows:fix, with a file rows.py that holds: def fix(row): return {}": _ODD,
    "keep the others: {}; or, where {} says nothing about the answer, name the format with --format.": (
        "tests/unit/test_odd_values.py::test_an_answer_that_is_not_wanted_is_never_trained"
    ),
    "--map messages=chosen.": _ODD,
    "name that one: -t TOKENIZER": (
        "tests/integration/test_audit_of_others.py"
        "::test_ids_of_another_tokenizer_are_named_and_nothing_is_said_of_what_they_would_mean"
    ),
    "; and leave --map out": "tests/unit/test_odd_values.py::test_turns_under_a_mapped_column_are_named_as_they_are_in_the_data",
    "--map completion=chosen.": _ODD,
    "--map text=chosen --response-template {} --instruction-template {}": _ODD,
    "if {} is the answer: --map answer={}.": _ODD,
    "--response-template {} --instruction-template {}": (
        f"{_HINTS}test_turns_in_running_text_are_hinted_at_with_flags_that_train_the_answers"
    ),
    "{}: {}; --kind conversation renders them with it, --kind completion says that raw text is meant.": (
        f"{_HINTS}test_raw_prompts_are_said_to_be_raw_with_the_way_to_the_template"
    ),
    "--kind conversation, where the model is to be asked in chats": (
        f"{_HINTS}test_raw_prompts_are_said_to_be_raw_with_the_way_to_the_template"
    ),
    "--format {}": "tests/unit/test_detect.py::test_two_readings_are_refused_with_the_flags_that_choose",
    "--map {}={}": "tests/unit/test_detect.py::test_two_readings_are_refused_with_the_flags_that_choose",
    "name it once; --mix NAME=SHARE with --passes 2 repeats documents.": _VIEWS,
    "name it once; --mix NAME=SHARE with --passes 2 repeats rows.": (
        "tests/unit/test_planning.py::test_the_same_row_is_repeated_by_a_mixture_as_the_advice_on_doubles_says"
    ),
    "--pack-over view.": _VIEWS,
    "name the config.json of a transformer, or leave --model out.": _ORDERED,
    "fewer ranks or rows in --steps-for, or a smaller --max-length.": _ORDERED,
    "--packing bfd, or leave --pad-to-multiple-of out.": _ORDERED,
    "--max-length {}.": _ORDERED,
    "leave --seed out.": f"{_REFUSED}test_a_setting_without_effect_is_refused",
    "leave --{} out, or --epochs.": (
        "tests/integration/test_views_epochs.py::test_what_cannot_be_had_anew_is_refused"
    ),
    "choose another -o, or replace it by a set that stands alone: --write --overwrite.": (
        f"{_BY_INDEX}test_a_view_must_not_lie_in_or_replace_what_holds_its_tokens"
    ),
    "repeat the command that made the set, with --overwrite.": f"{_BY_INDEX}test_a_base_that_is_another_set_is_refused",
    "run the same `sftdata view` with the path it has now.": (
        f"{_BY_INDEX}test_a_base_that_is_gone_is_refused_and_found_again"
    ),
    "{}the same `sftdata view` with --overwrite.": f"{_OF_VIEWS}test_views_are_made_again_from_the_lowest_on",
    "a larger --max-length.": f"{_REFUSED}test_a_view_that_trains_nothing_is_refused",
    "a larger --max-length, or another --overlong": f"{_REFUSED}test_advice_on_an_empty_view_is_followed",
    "choose another share for --eval": f"{_REFUSED}test_advice_on_an_empty_view_is_followed",
    "# Settings of a view. Make it: sftdata view THIS_FILE.\\n": (
        "tests/integration/test_views_choice.py::test_a_recipe_is_written_checked_and_run"
    ),
    "give --total in {}, or --mix-by {}.": _VIEWS,
    "finish it with the command it was begun with, or start anew with --overwrite.": (
        "tests/integration/test_prepare_chosen.py::test_an_unfinished_set_of_all_documents_is_not_discarded"
    ),
    "--like": "tests/integration/test_set_as_input.py::test_a_set_beside_files_is_joined_to_theirs",
    "--set": "tests/integration/test_set_as_input.py::test_the_fix_is_the_view_that_is_meant",
    "--write": "tests/integration/test_set_as_input.py::test_the_fix_is_the_view_that_is_meant",
    "sftdata inspect {}": "tests/integration/test_set_as_input.py::test_a_set_is_shown_by_what_shows_sets",
    "give the list again: --drop FILE.": "tests/integration/test_like.py::test_views_are_repeated_on_other_sets",
    "name each set again: --exclude SET.": (
        "tests/integration/test_like.py::test_a_set_that_cannot_be_repeated_is_refused_by_name"
    ),
    "name the folder of a model, its config.json, or a set made with --steps-for.": (
        "tests/integration/test_like.py::test_steps_are_dealt_again_by_the_cost_that_they_had"
    ),
    "prepare the inputs like that set, then: sftdata view NEW_SET -o OUT --like {}": (
        "tests/integration/test_like.py::test_a_set_that_cannot_be_repeated_is_refused_by_name"
    ),
    "write it to a file, and name it with --formatter module:function.": (
        "tests/integration/test_like.py::test_a_formatter_is_repeated_where_its_code_is_the_same"
    ),
    "--formatter {} takes the code as it is now.": (
        "tests/integration/test_like.py::test_a_formatter_is_repeated_where_its_code_is_the_same"
    ),
    "take it out of --exclude, or out of the sets.": (
        "tests/integration/test_views_named.py::test_what_a_set_is_excluded_from_is_not_itself"
    ),
    "take it out of --mix, or loosen the filters.": _VIEWS,
    "--passes {}, or a smaller --total.": _VIEWS,
    "see `sftdata stats` for sources.": _VIEWS,
    "run the same command again, with --overwrite to discard what was begun.": (
        "tests/integration/test_views_choice.py::test_a_base_that_is_replaced_meanwhile_is_refused"
    ),
    "--overlong truncate (or truncate-left, split, drop), or a larger --max-length.": _RUN,
    "--overlong truncate, or a larger --max-length.": _RUN,
    ", or go on without them: --max-rejects {}": _RUN,
    "switch turns on in the data (weight, train); where none is switched off, --train-on all.": _RUN,
    "add the answer, name its role with --map-role ROLE=assistant, or --train-on all.": _RUN,
    "--model": _SETTINGS,
    "--lora": _SETTINGS,
    "As --set template_kwargs.enable_thinking=false.": _SETTINGS,
    'convert it once: pip install sentencepiece protobuf tiktoken && python -c "from transformers import AutoTokenizer as A;'
    " A.from_pretrained('{}').save_pretrained('converted')\" && use -t converted": _CONVERTED,
    "iconv -f UTF-16{} -t UTF-8 {} > utf8-{}": (
        "tests/unit/test_source.py::test_utf16_is_refused_with_the_command_that_converts_it"
    ),
    "choose with --split, as --split {}": _SPLITS,
    " or --split {}": _SPLITS,
    "as --split {}, or a part of it: --split '{}[:95%]'.": _SPLITS,
    "--eos-token with one of these.": (
        "tests/unit/test_tokenizer.py::test_an_end_token_that_the_tokenizer_lacks_is_one_of_those_it_names"
    ),
    "assistant, last-assistant or all; a weight beside a message counts with --loss-weights.": _SETTINGS,
    "; sftdata explain {}": _EXPLAINED,
    "sftdata explain {} says more.": _EXPLAINED,
    "{}{}. All are in {}/{}; sftdata explain {}.": _EXPLAINED,
}


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_what_is_followed_elsewhere_is_a_test_that_there_is(place: str) -> None:
    path, _, name = place.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- nothing to follow

# Advice that names a command without saying all of it: what to choose depends on what the user has or means.
CHOICES = set((ROOT / "tests/advice_choices.txt").read_text(encoding="utf-8").splitlines())


FOLLOWED_ON_SETS = {case.advice for case in FOUND} | {*BUILT, *SHOWN, *DAMAGED}


def test_every_piece_of_advice_has_its_place() -> None:
    known = {*FOLLOWED, *FOLLOWED_ON_SETS, *FOLLOWED_IN_TRAINING, *ELSEWHERE, *CHOICES}
    advice = {**collect("sftdata"), **collect("sfttrain")}
    assert {
        text: place
        for text, place in advice.items()
        if text.replace("\n", "\\n") not in known and text not in known
    } == {}


def test_nothing_is_listed_or_followed_that_is_no_longer_said() -> None:
    advice = {text.replace("\n", "\\n") for text in (*collect("sftdata"), *collect("sfttrain"))}
    listed = {line for line in CHOICES if line and not line.startswith("# ")}
    assert listed - advice == set()
    assert listed & {*FOLLOWED, *FOLLOWED_ON_SETS, *FOLLOWED_IN_TRAINING, *ELSEWHERE} == set()
    assert {*FOLLOWED, *FOLLOWED_ON_SETS, *FOLLOWED_IN_TRAINING, *ELSEWHERE} - advice - {"", "{fix}"} == set()


def options(app: Any, *path: str) -> set[str]:
    """Return every flag of a program."""
    found = {flag for one in app.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}
    for command in getattr(app, "commands", {}).values():
        found |= options(command)
    return found


def test_advice_names_only_flags_and_commands_that_there_are() -> None:
    ours, trainers = get_command(build_app()), get_command(sfttrain.cli.app)
    known = options(ours) | options(trainers) | {"--help", "--debug", "--nproc-per-node"}
    commands = {"sftdata": set(ours.commands), "sfttrain": {*trainers.commands}}  # type: ignore[attr-defined]
    for text, place in {**collect("sftdata"), **collect("sfttrain")}.items():
        if place.endswith(("settings.py", "cli/__init__.py", "stats.py", "report.py")) or text.startswith(
            ("{}/--no-", "accelerate ", "vllm serve ", "llama-server ")
        ):
            continue
        for flag in re.findall(r"(?<![\w{-])--[a-z][a-z-]*", text):
            assert flag in known, (place, text)
        for program, command in re.findall(r"`?\b(sftdata|sfttrain) ([a-z]+)", text):
            assert command in commands[program], (place, text)
