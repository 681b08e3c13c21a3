"""A finished model as GGUF, by llama.cpp's own converter, read back and compared; a Modelfile for Ollama."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sftdata.errors import IntegrityError, UsageError
from sftdata.output import local_output
from sfttrain.chat import ADAPTERS
from sfttrain.ollama import Message, learn_turns, modelfile
from sfttrain.process import Say
from sfttrain.refusals import require_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERTER, _READER = "convert_hf_to_gguf", "gguf"


def write_gguf(model: Path, output: Path, kind: str, say: Say) -> None:
    """Write a model as GGUF into a folder, with a Modelfile where Ollama can say its chat template.

    Args:
        model: folder, as `sfttrain run` and `merge` write it.
        kind: of the weights, as the converter names it: f16, bf16, q8_0, ...

    Raises:
        UsageError: adapters that are not merged, no converter, or a model that it refuses.
        IntegrityError: the file does not hold the vocabulary, the template or the end token of the model.
    """
    from transformers import AutoTokenizer

    local_output(output)
    if (model / ADAPTERS).is_file():
        fix = f"sfttrain merge {model} -o {model}-merged"
        raise UsageError(f"{model}: holds adapters; GGUF takes a whole model.", fix)
    if not (model / "config.json").is_file():
        what = "holds no model" if model.is_dir() else "no such folder"
        raise UsageError(
            f"{model}: {what}.", "name the folder that `sfttrain run` or `sfttrain merge` wrote."
        )
    for package in (_CONVERTER, _READER):
        require_package(package, "export --gguf", named=f"convert-hf-to-gguf {_READER}")
    output.mkdir(parents=True, exist_ok=True)
    path, partial_path = (output / f"{model.resolve().name}-{kind}{end}" for end in (".gguf", ".partial"))
    _convert(model, partial_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(model)
    fields = _read_back(partial_path, tokenizer)
    os.replace(partial_path, path)
    say(f"gguf        {path}, read back: vocabulary, chat template and end token are those of the model")
    _add_modelfile(path, model, tokenizer, fields, say)


def _convert(model: Path, path: Path, kind: str) -> None:
    """Run the converter.

    Raises:
        UsageError: it does not know the type, the architecture or the tokenizer.
    """
    options = [
        part for name, value in (("outfile", path), ("outtype", kind)) for part in (f"--{name}", value)
    ]
    command = [sys.executable, "-m", _CONVERTER, model, *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].rpartition("error: ")[2] if lines else f"exit code {done.returncode}"
        fix = "name one of these." if "outtype" in reason else f"serve the folder itself: vllm serve {model}"
        raise UsageError(f"{model}: llama.cpp's converter refuses it: {reason}.", fix)


def _read_back(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the fields of a file on its tokens, once they are those of a tokenizer."""
    reader = importlib.import_module(_READER).GGUFReader(path)
    fields = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }
    vocabulary = tokenizer.get_vocab()
    tokens = fields.get("ggml.tokens", [])
    wrong = [token for token, index in vocabulary.items() if index >= len(tokens) or tokens[index] != token]
    checks = {
        "vocabulary": not wrong,
        "chat template": fields.get("chat_template") == tokenizer.chat_template,
        "end token": fields.get("ggml.eos_token_id") == tokenizer.eos_token_id,
    }
    for what, same in checks.items():
        if not same:
            path.unlink()
            raise IntegrityError(
                f"{path}: its {what} is not that of the model.", "report it to the converter."
            )
    return fields


def _add_modelfile(
    path: Path, model: Path, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], say: Say
) -> None:
    """Write a Modelfile, and say what it does not carry over, or why there is none."""
    if not tokenizer.chat_template:
        say("modelfile   none, since the model has no chat template")
        return

    def render(messages: Sequence[Message], opened: bool) -> str:
        return cast(
            str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
        )

    turns, remarks = learn_turns(render)
    template = str(tokenizer.chat_template)
    if turns is None:
        reads = f"llama-server --jinja -m {path}"
        say(f"modelfile   none: {remarks[0]}; {reads} takes the template from the file")
        return
    bos = str(tokenizer.bos_token or "")
    if fields.get("ggml.add_bos_token", fields.get("ggml.model") == "llama"):
        if bos and not turns.first.startswith(bos):
            remarks.append(f"{bos}, which Ollama and llama.cpp write first and training did not")
        turns = turns.without(bos)
    remarks += [
        what
        for name, what in (
            ("tools", "tools"),
            ("strftime_now", "today's date, which stays that of the export"),
        )
        if name in template
    ]
    text = modelfile(path, turns, stop_texts(model, tokenizer))
    target = path.with_name("Modelfile")
    target.write_text(text, "utf-8")
    say(f"modelfile   {target}; then: ollama create NAME -f {target}")
    for remark in remarks:
        say(f"            not carried over: {remark}")


def stop_texts(model: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that end an answer, as text: of the generation config, and the tokenizer's."""
    from transformers import GenerationConfig

    ids: list[int] = []
    if (model / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(model).eos_token_id
        ids = [found] if isinstance(found, int) else list(found or [])
    known = [
        tokenizer.convert_ids_to_tokens(index)
        for index in (*ids, tokenizer.eos_token_id)
        if index is not None
    ]
    return [str(token) for token in dict.fromkeys(known) if token]
