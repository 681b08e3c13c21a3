"""Talking to a trained model: what it is fed is what it was trained on, and it stops where its set taught it to."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

import sftdata
import sfttrain
from sftdata.errors import DataError
from sfttrain import cli
from sfttrain.adapters import merge
from sfttrain.chat import Chat, open_chat
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
EXAMPLES = Path(__file__).parents[2] / "examples"
FITTED = {"max_steps": 90, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "save_strategy": "no"}


def _quietly(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    sftdata.prepare(
        EXAMPLES / "conversations.jsonl", tokenizer=EXAMPLES / "tokenizer", output=folder, max_length=256
    )
    return folder


@pytest.fixture(scope="module")
def fitted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its conversations by heart."""
    folder = tmp_path_factory.mktemp("runs") / "fitted"
    config = EXAMPLES / "tiny-model" / "config.json"
    train_in_process(shards, None, folder, FITTED, init_from_config=config)
    return folder


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    lines = (EXAMPLES / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def opened(fitted: Path) -> Chat:
    return open_chat(fitted, None, _quietly)


def _begin(chat: Chat, messages: list[dict[str, str]]) -> None:
    chat.messages = [message for message in messages[:1] if message["role"] == "system"]


@pytest.mark.feature("chat")
def test_python_opens_the_same_conversation_and_is_told_what_was_decided(
    fitted: Path, opened: Chat, conversations: list[list[dict[str, str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    system, question, answer = (message["content"] for message in conversations[0])
    notes = list[str]()
    chat = sfttrain.open_chat(fitted, system=system, on_note=notes.append)
    assert chat.ask(question) == answer
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    chat.restart()
    assert len(chat.messages) == 1
    assert capfd.readouterr() == ("", ""), "no bar of the library either"


@pytest.mark.feature("chat")
def test_a_model_says_what_it_was_taught_turn_after_turn_and_as_it_comes(
    opened: Chat, conversations: list[list[dict[str, str]]]
) -> None:
    right = 0
    longest = sorted(conversations, key=len)[-6:]
    assert len(longest[-1]) > 3, "several turns"
    for messages in longest:
        pieces = list[str]()
        _begin(opened, messages)
        for asked, answer in itertools.pairwise(messages):
            if asked["role"] == "user":
                said = opened.ask(asked["content"], pieces.append)
                assert "".join(pieces) == said
                assert opened.messages[-2:] == [asked, {"role": "assistant", "content": said}]
                right += said == answer["content"]
                pieces.clear()
                if said != answer["content"]:
                    break
    assert right >= 6


def test_a_model_is_fed_the_ids_that_it_was_trained_on(
    shards: Path,
    opened: Chat,
    conversations: list[list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: dict[int, list[int]] = {}
    for row in sftdata.open(shards):
        for document in row.documents():
            trained.setdefault(document.example_id, document.input_ids.tolist())
    fed: list[list[int]] = []

    def noted(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        fed.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(opened._model, "generate", noted)
    for example, messages in enumerate(conversations):
        if any(message["role"] == "tool" for message in messages):
            continue
        _begin(opened, messages)
        opened.ask(next(message["content"] for message in messages if message["role"] == "user"))
        assert trained[example][: len(fed[-1])] == fed[-1]
        assert len(trained[example]) > len(fed[-1])
    assert len(fed) > 30


def test_prompts_and_piped_lines_are_answered_on_standard_output(
    fitted: Path, conversations: list[list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    alone = [each for each in conversations if each[0]["role"] == "user"] or conversations
    system = ["--system", alone[0][0]["content"]] if alone[0][0]["role"] == "system" else []
    question = next(message["content"] for message in alone[0] if message["role"] == "user")
    assert cli.main(["chat", str(fitted), *system, "-p", question, "-p", "/new", "-p", question]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == said[1] != "", "asked anew it answers the same"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n\n/new\n{question}\n"))
    assert cli.main(["chat", str(fitted), *system]) == 0
    assert capsys.readouterr().out.splitlines() == said
    assert cli.main(["chat", str(fitted), *system, "-p", question, "--max-new-tokens", "2"]) == 0
    short = capsys.readouterr().out.strip()
    assert said[0].startswith(short)
    assert len(short) < len(said[0])


def test_temperature_draws_other_answers(fitted: Path) -> None:
    torch.manual_seed(0)
    chat = open_chat(fitted, None, _quietly, temperature=3.0, max_new_tokens=12)
    answers = set()
    for _ in range(4):
        chat.restart()
        answers.add(chat.ask("Hello"))
    assert len(answers) > 1


def test_adapters_and_what_they_are_merged_into_stop_where_their_set_taught_them(
    shards: Path, fitted: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in fitted.iterdir():
        if path.is_file():
            (base / path.name).write_bytes(path.read_bytes())
    stop = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    for name in ("generation_config.json", "config.json"):  # a base whose answers end otherwise
        changed = json.loads((base / name).read_text()) | {"eos_token_id": 5}
        (base / name).write_text(json.dumps(changed), encoding="utf-8")
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    train_in_process(shards, base, adapters, {**FITTED, "max_steps": 2, "learning_rate": 1e-5}, lora={"r": 2})
    merge(adapters, merged, say=_quietly)
    for folder in (adapters, merged):
        chat = open_chat(folder, None, _quietly)
        stops = chat._model.generation_config.eos_token_id
        assert stop in (stops if isinstance(stops, list) else [stops]), folder.name
        system = {
            "role": "system",
            "content": "You are a patient gardener. Answer in one or two plain sentences.",
        }
        chat.messages = [system]
        told = (
            "Water in the early morning, at the foot of the plant. Dry leaves stay healthier than wet ones."
        )
        assert chat.ask("When should I water tomatoes?") == told


def test_a_model_without_chat_template_goes_on_with_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = json.loads((EXAMPLES / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    model = tiny_llama(tmp_path / "model", vocabulary=len(vocabulary) + 64)
    for path in (EXAMPLES / "tokenizer").iterdir():
        content = path.read_bytes()
        if path.name == "tokenizer_config.json":
            plain = json.loads(content)
            plain.pop("chat_template", None)
            content = json.dumps(plain).encode()
        if not path.name.startswith("chat_template"):
            (model / path.name).write_bytes(content)
    assert cli.main(["chat", str(model), "-p", "Once upon a time", "--max-new-tokens", "4"]) == 0
    assert "no chat template: the model goes on with each text" in capsys.readouterr().err
    assert cli.main(["chat", str(model), "-p", "Once", "--system", "Be brief."]) == 2
    assert "Fix: leave --system out." in capsys.readouterr().err
    assert cli.main(["chat", str(model), "-p", "Once", "--max-new-tokens", "1"]) == 0


def test_a_conversation_too_long_for_the_model_is_said_and_not_begun(opened: Chat) -> None:
    opened.restart()
    room = opened._model.config.max_position_embeddings
    with pytest.raises(DataError, match=f"the model has room for {room:,}. Fix: /new starts another"):
        opened.ask("water " * (room + 1))
    assert opened.messages == []
    assert opened.ask("Hello")


@pytest.mark.parametrize(
    ("command", "said", "followed"),
    [
        (
            "{empty}",
            "holds no model. Fix: name the folder that `sfttrain run` or `sfttrain merge` wrote.",
            "",
        ),
        ("{bare}", "holds no tokenizer. Fix: name the folder that", ""),
        ("{fitted} --model other", "holds no adapters to put on it. Fix: leave --model out.", ""),
        ("{fitted} --max-new-tokens 0", "Fix: --max-new-tokens of at least 1", " --max-new-tokens 1"),
        ("{fitted} --temperature -1", "and --temperature of at least 0.", " --temperature 0"),
    ],
)
def test_what_cannot_be_talked_to_is_refused_in_one_line_whose_advice_works(
    command: str, said: str, followed: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    tiny_llama(tmp_path / "bare")
    places = {"empty": tmp_path / "empty", "bare": tmp_path / "bare", "fitted": fitted}
    assert cli.main(["chat", *command.format(**places).split(), "-p", "Hello"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert cli.main(["chat", str(fitted), *followed.split(), "-p", "Hello"]) == 0


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["chat", "nowhere", "--prompt", " "]) == 2
    assert "--prompt: found nothing; expected a message. Fix: leave --prompt out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("When should I water tomatoes?\n"))
    assert cli.main(["chat", str(fitted)]) == 0
    assert capsys.readouterr().out.strip()
