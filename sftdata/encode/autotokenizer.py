"""The child process behind `resolve_tokenizer`: the only place in sftdata that imports transformers.

Reads a request on stdin, writes a tokenizer folder and its facts into the folder named by the first argument.
It is a process of its own because transformers imports torch wherever it finds it (seconds, hundreds of
megabytes), and because hiding torch from transformers must not outlive this one use.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np

from sftdata.encode.tokenizer import FACTS_FILE, FOLDER_NAME, LENGTHS_FILE, Request
from sftdata.errors import UsageError
from sftdata.vocabulary import generation_stops, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

# Names of the end-of-text token, for tokenizers that come without a config.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
# A reload must give these the same ids; they hit prefix spaces, special tokens and their stripping.
PROBES = (
    "Hi there",
    "  a  b",
    "<s>[INST] x [/INST] y</s>[INST] q",
    "<|user|>\nHi<|end|>\n<|assistant|>\nok",
    "\n\n\tx\r\n",
    "e\u0301 日本",
)
# Where the tokenizer came from, not what it is: it would make equal tokenizers differ, or ask for code to be
# run.
ORIGIN_KEYS = ("auto_map", "is_local", "local_files_only", "name_or_path")
UNLIMITED = 2**31 - 1


def main() -> int:
    """Serve one request; if it cannot be met, print why as JSON and return the exit code of a usage error."""
    try:
        _resolve(json.load(sys.stdin), Path(sys.argv[1]))
    except UsageError as error:
        sys.stdout.write(json.dumps({"message": error.message, "fix": error.fix}) + "\n")
        return UsageError.exit_code
    return 0


def _resolve(request: Request, target: Path) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed": tokenizers need none of it
    notes: list[str] = []
    tokenizer = _load(request, notes)
    before = len(tokenizer)
    missing = [token for token in request["add_tokens"] if token not in tokenizer.get_added_vocab()]
    tokenizer.add_tokens([_special(token) for token in missing], special_tokens=True)
    _choose_eos(tokenizer, request["eos_token"], notes)
    if request["chat_template"] is not None:
        tokenizer.chat_template = request["chat_template"]
    folder = target / FOLDER_NAME
    _save(tokenizer, folder, Path(request["source"]))
    facts = _facts(tokenizer, folder, notes) | _places(folder, target)
    ids = tokenizer.get_vocab()
    facts["tokens_added"] = [
        (token, ids[token]) for token in request["add_tokens"] if ids.get(token, 0) >= before
    ]
    (target / FACTS_FILE).write_text(
        json.dumps(facts, ensure_ascii=False, indent=1, sort_keys=True), encoding="utf-8"
    )


def _load(request: Request, notes: list[str]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = request["source"]
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error) and "custom code" not in str(error):
                raise
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
            notes.append(
                "The tokenizer asks to run its own Python code, which is never done;"
                " its tokenizer.json is used as it is."
            )
    except Exception as error:  # report any load failure as one line: transformers raises what it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        what = f"does not load ({reason})."
        raise UsageError(what, "check it with AutoTokenizer.from_pretrained, or give another.") from error
    if not getattr(tokenizer, "is_fast", False):
        what = "has no fast form (tokenizer.json)."
        raise UsageError(what, "convert it once with transformers and save_pretrained.")
    return cast("PreTrainedTokenizerFast", tokenizer)


def _special(content: str) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(content, special=True, normalized=False)


def _choose_eos(tokenizer: PreTrainedTokenizerFast, eos_token: str | None, notes: list[str]) -> None:
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            known = ", ".join(tokenizer.all_special_tokens[:8]) or "none"
            what = f"has no token {eos_token!r}; its special tokens: {known}."
            raise UsageError(what, "--eos-token with one of these.")
        tokenizer.eos_token = eos_token
    elif tokenizer.eos_token is None:
        added = tokenizer.get_added_vocab()
        obvious = [token for token in END_OF_TEXT if token in added]
        if len(obvious) == 1:
            tokenizer.eos_token = obvious[0]
            notes.append(
                f"The tokenizer names no end token; {obvious[0]} is used. --eos-token chooses another."
            )
        else:
            notes.append("The tokenizer names no end token; texts cannot be closed without --eos-token.")


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path, source: Path) -> None:
    """Write a folder that any transformers 4 or 5 reads back with the same ids."""
    tokenizer.save_pretrained(folder)
    _compact(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ORIGIN_KEYS}
    # The model's own class rebuilds parts of the tokenizer when it loads (Mistral's comes back with other
    # ids).
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    _assert_same_ids(tokenizer, folder)


def _compact(path: Path) -> None:
    """Write tokenizer.json unindented, and merges as "a b": half the size, readable by tokenizers 0.19."""
    from tokenizers import Tokenizer

    whole = path.read_text(encoding="utf-8")
    spec = msgspec.json.decode(whole)
    merges = spec["model"].get("merges")
    if merges and all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        spec["model"]["merges"] = [" ".join(pair) for pair in merges]
    path.write_bytes(msgspec.json.encode(spec))
    if Tokenizer.from_file(str(path)).to_str() != Tokenizer.from_str(whole).to_str():
        raise RuntimeError(f"{path} reads back as another tokenizer")


def _assert_same_ids(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in PROBES:
        if tokenizer(text)["input_ids"] != again(text)["input_ids"]:
            raise RuntimeError(f"the saved tokenizer gives other ids for {text!r}")


def _facts(tokenizer: PreTrainedTokenizerFast, folder: Path, notes: list[str]) -> dict[str, object]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    flags = ("id", "content", "special", "lstrip", "rstrip", "normalized")
    prefix, suffix = _ends(tokenizer)
    named: Mapping[str, object] = tokenizer.special_tokens_map
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if len(templates) > 1:
        notes.append(f"The tokenizer has several chat templates: {', '.join(sorted(templates))}.")
    return {
        "sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "special_tokens": {key: str(value) for key, value in named.items() if not isinstance(value, list)},
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "eos_token": tokenizer.eos_token,
        "chat_template": templates.get("default") if templates else tokenizer.chat_template,
        "stop_tokens": _stop_tokens(tokenizer, folder),
        "model_max_length": int(min(tokenizer.model_max_length or UNLIMITED, UNLIMITED)),
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "added_tokens": [{flag: token[flag] for flag in flags} for token in backend["added_tokens"]],
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "notes": notes,
    }


def _places(folder: Path, target: Path) -> dict[str, object]:
    vocabulary = read_vocabulary(folder)
    np.save(target / LENGTHS_FILE, np.array(vocabulary.lengths(), np.int64))
    return {"layout": asdict(vocabulary.layout)}


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    # A tokenizer without an "a" starts at 0.
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _stop_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[str]:
    stops = [tokenizer.eos_token] if tokenizer.eos_token is not None else []
    for token_id in generation_stops(folder):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is not None and token not in stops:
            stops.append(token)
    return stops


if __name__ == "__main__":
    sys.exit(main())
