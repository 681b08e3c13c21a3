from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sftdata.encode.engine import check_engine, choose_engine, hard_texts, load_encoder
from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.errors import UsageError
from tests.encoders import EVERY, NO_GIGATOKEN, encoder, resolved
from tests.made_tokenizers import MADE

TEXTS = [
    "Hi there", "  two  spaces\n\n\tx\r\n", "<s>[INST] x [/INST] y</s>[INST] q", "e\u0301 日本 👩‍👩‍👧 \x00", "",
    "<|user|>\nHi<|end|>\n<|assistant|>\n ok<|end|>\n<|endoftext|>", "<|im_start|>user\nx<|im_end|>\n",
]  # fmt: skip


def automatic(folder: Path) -> object:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ValueError:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(made_data: Path, tmp_path: Path) -> Path:
    """A tokenizer to write into."""
    return shutil.copytree(made_data / "tokenizers" / "made-bytes", tmp_path / "small")


@pytest.mark.parametrize(("space", "merge"), [("x", "h x"), (" ", ["h", " "])], ids=["text", "pairs"])
def test_merges_are_saved_as_text_unless_a_token_holds_a_space(
    cache: Path, tmp_path: Path, space: str, merge: object
) -> None:
    model = models.BPE({"h": 0, space: 1, f"h{space}": 2, "</s>": 3}, [("h", space)])
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["</s>"])
    (tmp_path / "own").mkdir()
    tokenizer.save(str(tmp_path / "own/tokenizer.json"))
    path = resolve_tokenizer(str(tmp_path / "own")).folder / "tokenizer.json"
    assert b"\n" not in path.read_bytes()
    assert json.loads(path.read_bytes())["model"]["merges"] == [merge]
    assert Tokenizer.from_file(str(path)).encode(f"h{space}").ids == [2]


@pytest.mark.parametrize("name", EVERY)
def test_ids_equal_the_reference_tokenizer_and_so_do_those_of_the_saved_folder(home: Path, name: str) -> None:
    known = resolved(home, name)
    source, saved = automatic(home / "tokenizers" / name), automatic(known.folder)
    ids, offsets = load_encoder(known, "tokenizers").encode(TEXTS)
    for index, text in enumerate(TEXTS):
        bare = source(text, add_special_tokens=False)["input_ids"]
        whole = source(text)["input_ids"]
        assert ids[offsets[index] : offsets[index + 1]].tolist() == bare
        assert [*known.prefix_ids, *bare, *known.suffix_ids] == whole == saved(text)["input_ids"]
    assert known.special_tokens.items() >= {k: str(v) for k, v in source.special_tokens_map.items()}.items()
    assert known.chat_template == source.chat_template == saved.chat_template


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_folder_knows_nothing_of_where_it_came_from(home: Path, name: str) -> None:
    folder = resolved(home, name).folder
    config = (folder / "tokenizer_config.json").read_text()
    assert str(home) not in config
    assert not {"auto_map", "is_local", "local_files_only"} & json.loads(config).keys()


@pytest.mark.parametrize("name", EVERY)
def test_gate_takes_gigatoken_exactly_where_it_loads(home: Path, name: str) -> None:
    engine, reason = choose_engine(resolved(home, name), "auto")
    assert engine == ("tokenizers" if name in NO_GIGATOKEN else "gigatoken")
    assert ("cannot read" in reason) == (name in NO_GIGATOKEN)


def test_gate_sees_one_wrong_id(made_data: Path) -> None:
    known = resolved(made_data, "made-bytes")
    right, wrong = load_encoder(known, "tokenizers"), load_encoder(known, "tokenizers")
    encode = wrong.encode

    def lies(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = encode(texts)
        return np.where(np.arange(len(ids)) == len(ids) // 2, ids + 1, ids), offsets

    assert check_engine(right, wrong, hard_texts(known))
    wrong.encode = lies
    assert not check_engine(right, wrong, hard_texts(known))


@pytest.mark.parametrize("name", ["t5-small", "made-unigram"])
def test_gigatoken_by_name_is_refused_where_it_cannot_serve(home: Path, name: str) -> None:
    with pytest.raises(UsageError, match='gigatoken cannot read .* Fix: engine="auto"'):
        choose_engine(resolved(home, name), "gigatoken")


def test_facts_of_made_tokenizers(made_data: Path) -> None:
    turns, prepend, unigram, plain, strips = (
        resolved(made_data, f"made-{name}") for name in ("turns", "prepend", "unigram", "bytes", "strips")
    )
    assert turns.prefix_ids == (turns.bos_id,)
    assert (turns.suffix_ids, turns.closing_ids) == ((), (turns.eos_id,))
    assert (prepend.prefix_ids, prepend.eos_token) == ((prepend.bos_id,), "</s>")
    assert (unigram.prefix_ids, unigram.suffix_ids, unigram.closing_ids) == ((), (1,), (1,))
    assert (plain.bos_id, plain.eos_token, plain.stop_tokens) == (None, "<|im_end|>", ("<|im_end|>",))
    assert plain.pad_id not in (None, plain.eos_id)
    added = {token.content: token for token in (*strips.added_tokens, *turns.added_tokens)}
    assert {name for name, token in added.items() if token.rstrip} == {
        *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<both>"),
    }
    assert {name for name, token in added.items() if token.lstrip} == {"<mask>", "<both>"}
    assert not added["<｜User｜>"].special
    assert added["<｜end▁of▁sentence｜>"].special


def test_facts_of_real_tokenizers(shared_data: Path) -> None:
    llama, mistral, t5 = (
        resolved(shared_data, name) for name in ("llama-3.2-instruct", "mistral-7b-instruct", "t5-small")
    )
    assert llama.stop_tokens == ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    assert (llama.prefix_ids, llama.suffix_ids, llama.closing_ids) == ((128000,), (), (128009,))
    assert (mistral.prefix_ids, mistral.model_max_length) == ((1,), 2**31 - 1)
    assert (t5.prefix_ids, t5.suffix_ids, t5.closing_ids) == ((), (1,), (1,))
    qwen = resolved(shared_data, "qwen2.5-instruct")
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id) == (None, 151645, 151643)
    phi = resolved(shared_data, "phi-3-mini")
    assert {token.content for token in phi.added_tokens if token.rstrip} >= {"<|end|>", "<|user|>", "</s>"}


def test_an_end_token_is_picked_only_where_it_is_obvious_and_said(shared_data: Path) -> None:
    gpt2 = resolved(shared_data, "gpt2")
    assert (gpt2.eos_id, gpt2.eos_token) == (50256, "<|endoftext|>")
    assert "names no end token" in gpt2.notes[0]
    assert resolved(shared_data, "qwen3").notes == ()


def _with_config(made_data: Path, folder: Path, name: str, **changes: object) -> str:
    """Copy a made tokenizer with other settings; None takes one out."""
    shutil.copytree(made_data / "tokenizers" / name, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(folder)


def test_code_that_a_tokenizer_brings_is_never_run(made_data: Path, tmp_path: Path, cache: Path) -> None:
    trap = tmp_path / "ran"
    source = _with_config(
        made_data, tmp_path / "theirs", "made-bytes", auto_map={"AutoTokenizer": ["theirs.Theirs", None]},
        tokenizer_class="Theirs",
    )  # fmt: skip
    (tmp_path / "theirs" / "theirs.py").write_text(f"open({str(trap)!r}, 'w')\nclass Theirs: pass\n")
    found = resolve_tokenizer(source)
    assert not trap.exists()
    assert "is never done" in found.notes[0]
    ours = Tokenizer.from_file(str(made_data / "tokenizers" / "made-bytes" / "tokenizer.json"))
    assert (
        Tokenizer.from_file(str(found.folder / "tokenizer.json")).encode("Hi there").ids
        == ours.encode("Hi there").ids
    )


@pytest.mark.parametrize(
    ("name", "eos", "note"),
    [
        ("made-bytes", "<|endoftext|>", "<|endoftext|> is used"),
        ("made-strips", None, "cannot be closed without --eos-token"),
    ],
)
def test_an_end_token_is_picked_only_where_one_alone_is_obvious(
    name: str, eos: str | None, note: str, made_data: Path, tmp_path: Path, cache: Path
) -> None:
    found = resolve_tokenizer(_with_config(made_data, tmp_path / name, name, eos_token=None))
    assert found.eos_token == eos
    assert note in found.notes[0]


def test_remote_code_is_never_run_and_the_replacement_is_said(shared_data: Path) -> None:
    assert "is never done" in resolved(shared_data, "minicpm3-4b").notes[0]


@pytest.mark.parametrize("name", ["llama-3.2-instruct", "made-strips"])
def test_a_resolved_tokenizer_is_small_and_picklable(home: Path, name: str) -> None:
    known = resolved(home, name)
    data = pickle.dumps(known)
    assert pickle.loads(data) == known
    assert len(data) < 50_000


def test_resolving_imports_neither_torch_nor_transformers_here(made_data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sftdata.encode.tokenizer import resolve_tokenizer as r; "
        f"r({str(made_data / 'tokenizers' / 'made-bytes')!r}); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'gigatoken'} & sys.modules.keys()"
    )
    env = {**os.environ, "SFTDATA_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.slow
def test_the_cache_follows_content_not_names_or_times(small: Path, cache: Path, tmp_path: Path) -> None:
    first = resolve_tokenizer(str(small))
    shutil.copytree(small, tmp_path / "copy")
    assert resolve_tokenizer(str(tmp_path / "copy")).folder == first.folder
    config = json.loads((small / "tokenizer_config.json").read_text())
    (small / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    changed = resolve_tokenizer(str(small))
    assert (changed.model_max_length, changed.folder) != (first.model_max_length, first.folder)
    assert changed.model_max_length == 77
    assert [path.name for path in (cache / "tokenizers").iterdir() if path.name.startswith(".draft")] == []


def test_tokens_end_token_and_template_can_be_given(small: Path, cache: Path) -> None:
    known = resolve_tokenizer(
        str(small),
        add_tokens=["<|new|>", "<|im_start|>"],
        chat_template="{{ eos_token }}",
        eos_token="<|new|>",
    )
    new = resolve_tokenizer(str(small)).vocab_size
    assert known.tokens_added == (("<|new|>", new),)
    assert (known.eos_id, known.vocab_size, known.chat_template) == (new, new + 1, "{{ eos_token }}")
    ids, _ = load_encoder(known, "tokenizers").encode(["a<|new|>"])
    assert ids.tolist()[-1] == new
    saved = automatic(known.folder)
    assert (saved.eos_token, saved.chat_template, saved("a<|new|>")["input_ids"]) == (
        "<|new|>",
        "{{ eos_token }}",
        ids.tolist(),
    )


def test_a_hub_id_goes_through_the_hub_cache(small: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(small, repo / "snapshots" / ("a" * 40))
    code = "from sftdata.encode.tokenizer import resolve_tokenizer as r; t = r('org/tiny'); print(t.name, t.eos_token)"
    env = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "SFTDATA_CACHE": str(tmp_path / "c"),
    }
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.split() == ["org/tiny", "<|im_end|>"], done.stderr


def refused(name: str, **settings: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve_tokenizer(name, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "Fix: " in message
    return message


def test_a_sentencepiece_only_tokenizer_is_refused_with_a_fix_that_works(
    shared_data: Path, tmp_path: Path, cache: Path
) -> None:
    folder = shared_data / "tokenizers" / "yi-chat-spm-only"
    message = refused(str(folder))
    assert "tokenizer.model but no tokenizer.json" in message
    code = message.split('python -c "')[1].split('" && use tokenizer="converted"')[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert resolve_tokenizer(str(tmp_path / "converted")).eos_token == "<|endoftext|>"


@pytest.mark.slow
def test_an_end_token_that_the_tokenizer_lacks_is_one_of_those_it_names(small: Path, cache: Path) -> None:
    said = refused(str(small), eos_token="<|nope|>")
    assert "has no token '<|nope|>'" in said
    named = said.partition("special tokens: ")[2].partition(".")[0].split(", ")
    assert said.endswith("eos_token with one of these.")
    for token in named:
        assert resolve_tokenizer(str(small), eos_token=token).eos_token == token


def test_what_is_no_tokenizer_is_refused_in_one_line(small: Path, cache: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(str(tmp_path / "nowhere"))
    assert refused(str(small / "tokenizer.json")).endswith(f'Fix: tokenizer="{small}"')
    (tmp_path / "chats.jsonl").touch()
    assert refused(str(tmp_path / "chats.jsonl")).endswith(
        "Fix: check the path, or give a Hub id such as org/model."
    )
    (tmp_path / "empty").mkdir()
    assert "found nothing, expected tokenizer.json" in refused(str(tmp_path / "empty"))
    assert "nor to be had from the Hub" in refused("no-such-org/no-such-tokenizer")
    (small / "tokenizer.json").write_text('{"model": ')
    assert "does not load" in refused(str(small))


@pytest.mark.parametrize("name", ["minimind", *MADE])
def test_both_engines_give_the_same_arrays(home: Path, name: str) -> None:
    fast, oracle = encoder(home, name), encoder(home, name, "tokenizers")
    for texts in ([], [""], TEXTS):
        (ids, offsets), (expected_ids, expected_offsets) = fast.encode(texts), oracle.encode(texts)
        assert ids.dtype == expected_ids.dtype == np.int32
        assert ids.tolist() == expected_ids.tolist()
        assert offsets.tolist() == expected_offsets.tolist()
