"""Talk to a trained model in the terminal: its own chat template and stop tokens, answers as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jinja2 import TemplateError
from torch import nn

from sftdata.errors import DataError, UsageError
from sftdata.output import counted
from sfttrain.adapters import load_adapted
from sfttrain.attention import auto_class
from sfttrain.process import Say, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW = "/new"
ADAPTERS = "adapter_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Chat:
    """A conversation with a model, or texts that it goes on with where it has no chat template.

    Args:
        model, tokenizer: of one folder.
        system: first message of every conversation.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.

    Attributes:
        messages: the conversation so far.
        talks: whether there is a chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None,
        max_new_tokens: int = 512, temperature: float = 0.0,
    ) -> None:  # fmt: skip
        self.talks = bool(tokenizer.chat_template)
        if system and not self.talks:
            raise UsageError(
                f"--system: {tokenizer.name_or_path} has no chat template, so no system message.",
                "leave --system out.",
            )
        self._model, self._tokenizer = model, tokenizer
        self._first = [{"role": "system", "content": system}] if system else []
        self._most, self._temperature = max_new_tokens, temperature
        self.messages = list(self._first)

    def restart(self) -> None:
        """Forget the conversation, the system message aside."""
        self.messages = list(self._first)

    def ask(self, text: str, show: Callable[[str], object] | None = None) -> str:
        """Return the answer to a message, or what the model makes of a text.

        Args:
            text: the message.
            show: receives the answer piece by piece as it is generated.

        Raises:
            DataError: the conversation leaves no room for an answer, or the template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self.answer(asked if self.talks else text, show)
        if self.talks:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def answer(self, asked: list[dict[str, str]] | str, show: Callable[[str], object] | None = None) -> str:
        """Return what the model makes of a conversation, or of a text as it stands.

        Raises:
            DataError: it leaves no room for an answer, or the template refuses it.
        """
        ids = self._ids(asked)
        most = min(self._most, self._room(len(ids)))
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {}
        with torch.no_grad():
            generate = cast(Callable[..., torch.Tensor], self._model.generate)
            generated = generate(
                input_ids=torch.tensor([ids], device=self._model.device),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=self._model.device),
                max_new_tokens=most,
                use_cache=True,  # which training turns off
                streamer=_streamer(self._tokenizer, show) if show else None,
                pad_token_id=self._tokenizer.pad_token_id or 0,  # one row has no padding; else it is noted
                **(sampling or {"do_sample": False}),
            )
        return cast(str, self._tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True))

    def _ids(self, asked: list[dict[str, str]] | str) -> list[int]:
        """Render and tokenize as `sftdata prepare` does."""
        if isinstance(asked, str):
            return cast(list[int], self._tokenizer(asked)["input_ids"])
        try:
            text = self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}.") from None
        return cast(list[int], self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _room(self, tokens: int) -> int:
        """Return how many tokens the model has room for after the conversation."""
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = self._most if longest is None else longest - tokens
        if room < 1:
            raise DataError(
                f"the conversation has {counted(tokens, 'token')}; the model has room for {longest:,}.",
                f"{NEW} starts another.",
            )
        return room


def open_chat(
    folder: Path, base: str | None, say: Say, *, system: str | None = None, max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> Chat:  # fmt: skip
    """Load a model, or adapters on their base, with the tokenizer beside it.

    Args:
        folder: of the model, as `sfttrain run` and `merge` write it, or of adapters.
        base: of adapters, where it is not the one that they name.
        say: told what was decided.

    Raises:
        UsageError: the folder holds no model or no tokenizer, or a setting cannot be used.
    """
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} --temperature {temperature}: nothing can be generated.",
            "--max-new-tokens of at least 1, and --temperature of at least 0.",
        )
    adapted = (folder / ADAPTERS).is_file()
    if base is not None and not adapted:
        raise UsageError(f"--model {base}: {folder} holds no adapters to put on it.", "leave --model out.")
    if not any((folder / name).is_file() for name in _TOKENIZER):
        what = "holds no tokenizer" if adapted or (folder / "config.json").is_file() else "holds no model"
        what = what if folder.is_dir() else "no such folder"
        raise UsageError(
            f"{folder}: {what}.", "name the folder that `sfttrain run` or `sfttrain merge` wrote."
        )
    model = _load(folder, base, say)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Chat(model, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


def _load(folder: Path, base: str | None, say: Say) -> PreTrainedModel:
    from transformers import AutoConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / ADAPTERS).is_file():
        adapted, dtype = load_adapted(folder, base, say)
        model = cast("PreTrainedModel", adapted)
        _take_stop_tokens(model, folder)
        nn.Module.to(model, dtype=dtype if device.type == "cuda" else torch.float32)
    else:
        try:
            kind = auto_class(AutoConfig.from_pretrained(folder))
            model = kind.from_pretrained(folder, dtype="auto", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder}: the model cannot be loaded: {reason_of(error)}") from None
    nn.Module.to(model, device).eval()
    return model


def _take_stop_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Let adapters stop where their set taught them to, not where their base does."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def talk(chat: Chat, say: Say, prompts: list[str] | None = None) -> None:
    """Answer the prompts, or else each line of standard input; print answers on standard output as they come.

    Ctrl-C breaks an answer off, which is then not part of the conversation; Ctrl-D ends it.
    """
    if not chat.talks:
        say("no chat template: the model goes on with each text")
    terminal = sys.stdin.isatty() and not prompts
    if terminal:
        say(f"{NEW} starts another conversation, Ctrl-C breaks an answer off, Ctrl-D ends")
    for text in prompts or _lines(terminal):
        if text.strip() == NEW:
            chat.restart()
        elif text.strip():
            try:
                chat.ask(text, lambda piece: print(piece, end="", flush=True))
            except DataError as error:
                if not terminal:
                    raise
                say(f"{error}")
            except KeyboardInterrupt:
                if not terminal:
                    raise
            print(flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    if terminal:
        import readline  # noqa: F401 -- gives `input` its history and its editing
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def _streamer(tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object]) -> object:
    """Return what `generate` gives tokens to; whole words are shown, so that no character is cut."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
