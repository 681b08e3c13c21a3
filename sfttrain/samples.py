"""Answers to a few held rows at each evaluation, in the log, and in the report beside what was meant.

They are greedy, short, and take nothing from the run: neither its random numbers nor the weights.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftdata.errors import DataError, UsageError
from sftdata.output import counted
from sfttrain.chat import Chat
from sfttrain.device import sharded
from sfttrain.progress import LOG_NAME, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST = 20  # rows
TOKENS = 256  # of an answer, at most
_EXPECTED = '{"messages": [...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True, slots=True)
class Sample:
    """What is asked, a conversation or a text, and the answer that was meant, if any."""

    asked: list[dict[str, str]] | str
    reference: str | None

    @property
    def prompt(self) -> str:
        """What is asked, for a reader."""
        if isinstance(self.asked, str):
            return self.asked
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.asked)


def read_samples(path: Path, talks: bool) -> list[Sample]:
    """Read rows of JSON lines: conversations, whose last answer is the reference, or prompts.

    Args:
        path: of the file.
        talks: whether the tokenizer has a chat template.

    Raises:
        UsageError: it holds none or too many, or a row that cannot be asked.
    """
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        what = f"--sample {path}: cannot be read ({error})."
        raise UsageError(what, "name a file of JSON lines.") from None
    if not 1 <= len(lines) <= MOST:
        fix = (
            f"head -n {MOST} {shlex.quote(str(path))} > few.jsonl" if lines else f"write rows as {_EXPECTED}."
        )
        raise UsageError(f"--sample {path}: {counted(len(lines), 'row')}; expected 1 to {MOST}.", fix)
    return [_parse(f"--sample {path}: line {number}", line, talks) for number, line in enumerate(lines, 1)]


def _parse(place: str, line: str, talks: bool) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: is no JSON ({error}).", f"write rows as {_EXPECTED}.") from None
    found = _sample(row) if isinstance(row, dict) else None
    if found is None:
        raise UsageError(f"{place}: holds no question.", f"write rows as {_EXPECTED}, texts throughout.")
    if isinstance(found.asked, list) and not talks:
        what = f"{place}: holds messages, and the set has no chat template."
        raise UsageError(what, "give prompts as texts.")
    return found


def _sample(row: Mapping[str, object]) -> Sample | None:
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        completion = row.get("completion")
        return Sample(messages, completion if isinstance(completion, str) else None)
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return None
    ends = messages[-1:] if messages and messages[-1]["role"] == "assistant" else row.get("completion")
    asked = messages[:-1] if ends == messages[-1:] else messages
    answers = ends if isinstance(ends, list) and all(map(_is_message, ends)) else []
    reference = ends if isinstance(ends, str) else answers[0]["content"] if answers else None
    return Sample(asked, reference) if asked else None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


class Samples(TrainerCallback):
    """Answer the rows of a file, and append question, reference and answer to the log.

    Args:
        path: of the file.
        tokenizer: folder of the set's tokenizer.
        run: folder of the run.
        args: of transformers' Trainer.

    Raises:
        UsageError: the rows cannot be asked, or the weights of the model are spread over processes.
    """

    def __init__(self, path: Path, tokenizer: Path | None, run: Path, args: TrainingArguments) -> None:
        from transformers import AutoTokenizer

        if tokenizer is None:
            raise UsageError(f"--sample {path}: the set brings no tokenizer.", "leave --sample out.")
        if sharded(args):
            what = f"--sample {path}: no process holds the whole model, which FSDP or DeepSpeed spreads."
            raise UsageError(what, "leave --sample out; `sfttrain chat` asks the finished model.")
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._samples = read_samples(path, bool(self._tokenizer.chat_template))
        self._log = run / LOG_NAME

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: PreTrainedModel | None = None, **_: object,
    ) -> None:  # fmt: skip
        """Answer, once for all the sets that are evaluated at this step."""
        self._write(state, cast("PreTrainedModel", model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: PreTrainedModel | None = None, **_: object,
    ) -> None:  # fmt: skip
        """Answer with the model that the run leaves, unless its last step was evaluated."""
        if not control.should_training_stop or state.global_step >= state.max_steps:
            self._write(state, cast("PreTrainedModel", model))

    def _write(self, state: TrainerState, model: PreTrainedModel) -> None:
        if not state.is_world_process_zero or self._answered(state.global_step):
            return
        with _generating(model):
            chat = Chat(model, self._tokenizer, max_new_tokens=TOKENS)
            said = [_answer(chat, sample) for sample in self._samples]
        rows = [
            {"prompt": sample.prompt, "reference": sample.reference, "answer": answer}
            for sample, answer in zip(self._samples, said, strict=True)
        ]
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "samples": rows}, ensure_ascii=False) + "\n")

    def _answered(self, step: int) -> bool:
        """Say whether the log has answers at a step; those of other sets, or of a run that was killed."""
        lines = (line for _, line in read_lines(self._log) if line["step"] == step)
        return any(isinstance(line.get("samples"), list) for line in lines)


def _answer(chat: Chat, sample: Sample) -> str:
    try:
        return chat.answer(sample.asked)
    except DataError as error:  # too long for the model, or refused by the template
        return f"({error})"


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that is trained answer: token by token, in attention that knows a cache, uncompiled."""
    unwrap = getattr(model, "get_base_model", None)
    inner = cast("PreTrainedModel", model if unwrap is None else unwrap())
    training, attention = model.training, inner.config._attn_implementation
    model.eval()
    inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        inner.set_attn_implementation(attention)
        model.train(training)
