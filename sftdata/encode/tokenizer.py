"""Resolve a tokenizer once into plain files and facts, so that no later step needs transformers.

    resolve_tokenizer("org/model") ── cached? ──> ResolvedTokenizer (a folder, and what is known about it)
                                   └─ else ────> a child process runs AutoTokenizer and fills the cache

The child keeps transformers (and torch, which it would pull in) out of this process; see `autotokenizer.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgspec

from sftdata.errors import SftError, UsageError, nearest
from sftdata.output import cache_folder
from sftdata.vocabulary import TokenLayout
from sftdata.wording import shell_quote

CACHE_FORMAT = 3
FACTS_FILE = "resolved.json"
FOLDER_NAME = "tokenizer"
LENGTHS_FILE = "byte_lengths.npy"
# What a tokenizer is read from; weights beside it are neither hashed nor downloaded.
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*",
)  # fmt: skip
FAST_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in the text before anything else happens, with the flags of the match."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


@dataclass(frozen=True, slots=True)
class ResolvedTokenizer:
    """Everything later stages need of a tokenizer; small and picklable: workers load the files of `folder`.

    Attributes:
        name: folder or Hub id, as the user gave it.
        folder: a complete tokenizer folder, free of the machine's paths; becomes SET/tokenizer.
        sha256: of its tokenizer.json.
        special_tokens: the named special tokens that chat templates see (`bos_token`, `eos_token`, ...).
        bos_id, eos_id, pad_id: None where the tokenizer names none.
        chat_template: the default template.
        stop_tokens: what ends generation: the EOS token and those of generation_config.json.
        model_max_length: tokens; 2**31 - 1 where the tokenizer says nothing.
        vocab_size: largest id + 1.
        prefix_ids, suffix_ids: what `tokenizer(text)` writes around a text (Llama: BOS before; T5: EOS
            after).
        tokens_added: tokens that were asked for and that the tokenizer did not have: the model must be
            resized.
        layout: where its tokens lie in the text; the byte lengths that go with it are in `lengths_file`.
        notes: what was guessed or replaced, one sentence each.
    """

    name: str
    folder: Path
    sha256: str
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    eos_token: str | None
    chat_template: str | None
    stop_tokens: tuple[str, ...]
    model_max_length: int
    vocab_size: int
    added_tokens: tuple[AddedToken, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    tokens_added: tuple[tuple[str, int], ...]
    layout: TokenLayout
    notes: tuple[str, ...]

    @property
    def chat_template_sha256(self) -> str | None:
        """Hash of the default template; None where there is none."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    @property
    def lengths_file(self) -> Path:
        """NumPy file: int64[vocab_size], source bytes per token."""
        return self.folder.parent / LENGTHS_FILE

    def require_files(self) -> None:
        """Refuse to go on without the files.

        Raises:
            SftError: the cache was emptied since the tokenizer was resolved.
        """
        if not (self.folder / "tokenizer.json").is_file():
            what = f"{self.folder}: gone; the cache of tokenizers was emptied in mid-run."
            raise SftError(what, "run the same command again; what is finished is kept.")

    @property
    def by_mark(self) -> tuple[list[str], list[str]]:
        """The added tokens that are marked `special: true` or have a name (`bos_token`), and the others."""
        named = set(self.special_tokens.values())
        special = [token.content for token in self.added_tokens if token.special or token.content in named]
        return special, [token.content for token in self.added_tokens if token.content not in {*special}]

    @property
    def filler_id(self) -> int:
        """Id that fills the end of packed rows; never trained, whatever it is."""
        return next(pad for pad in (self.pad_id, self.eos_id, 0) if pad is not None)

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """What ends a raw text: the reference's suffix where it holds EOS, else EOS; empty without EOS."""
        if self.eos_id is None or self.eos_id in self.suffix_ids:
            return self.suffix_ids
        return (self.eos_id,)


class Request(TypedDict):
    """What the child process is asked for; see `resolve_tokenizer`."""

    source: str
    add_tokens: list[str]
    chat_template: str | None
    eos_token: str | None


def resolve_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    add_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    eos_token: str | None = None,
) -> ResolvedTokenizer:
    """Resolve a tokenizer folder or Hub id as `AutoTokenizer.from_pretrained` reads it; cached by content.

    Args:
        name: folder that holds tokenizer.json, or Hub id.
        revision: branch, tag or commit of a Hub id.
        add_tokens: special tokens to add where missing (a chat template may need them).
        chat_template: text of a template that replaces the tokenizer's own.
        eos_token: token that replaces the tokenizer's own end token.

    Raises:
        UsageError: nothing there, not a tokenizer, or one that cannot be read without more software.
    """
    source = _source_folder(name, revision)
    _refuse_without_fast_files(name, source)
    request = Request(
        source=str(source), add_tokens=list(add_tokens), chat_template=chat_template, eos_token=eos_token
    )
    entry = cache_folder("tokenizers") / _cache_key(source, request)
    if not (entry / FACTS_FILE).is_file():
        _fill_cache(entry, request, name)
    return _load(entry, name)


def _source_folder(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        what = f"Tokenizer {name!r} is a file; expected a folder or a Hub id."
        beside = (folder.parent / "tokenizer.json").is_file()
        otherwise = "check the path, or give a Hub id such as org/model."
        fix = f"-t {shell_quote(folder.parent)}" if beside else otherwise
        raise UsageError(what, fix)
    if not _looks_like_hub_id(name):
        fix = _nearest(folder) or "check the path, or give a Hub id such as org/model."
        raise UsageError(f"Tokenizer folder {name!r} does not exist.", fix)
    return _hub_snapshot(name, revision)


def _nearest(folder: Path) -> str:
    """Return the fix for a mistyped folder, empty where no folder beside it is near."""
    beside = {path.name: path for path in folder.parent.glob("*") if path.is_dir()}
    near = nearest(folder.name, beside)
    return f"did you mean -t {shell_quote(beside[near])}?" if near else ""


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return (
        len(parts) <= 2
        and all(part and part[0] not in ".~" for part in parts)
        and not Path(name).is_absolute()
    )


def _hub_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:  # the Hub client's own errors derive from these two
        reason = " ".join(str(error).split(". ")[0].split())
        raise UsageError(
            f"Tokenizer {name!r} is neither a folder here nor to be had from the Hub"
            f" ({type(error).__name__}: {reason}).",
            _nearest(Path(name))
            or "give a folder that holds tokenizer.json,"
            " or check the id, the connection and `hf auth login`.",
        ) from None


def _refuse_without_fast_files(name: str, source: Path) -> None:
    files = sorted(path.name for path in source.iterdir())
    if any(file in files for file in FAST_FILES):
        return
    models = [file for file in files if file.endswith((".model", ".tiktoken"))]
    if models:
        # Conversion needs sentencepiece or tiktoken; doing it where they happen to be installed would make
        # ids depend on luck.
        raise UsageError(
            f"Tokenizer {name!r} holds {models[0]} but no tokenizer.json.",
            "convert it once: pip install sentencepiece protobuf tiktoken && python -c "
            '"from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{name}').save_pretrained('converted')\" && use -t converted",
        )
    found = ", ".join(files[:5]) or "nothing"
    what = f"{name!r} is not a tokenizer: found {found}, expected tokenizer.json."
    raise UsageError(what, "give the folder that holds it.")


# --------------------------------------------------------------------------------------------- cache


def _cache_key(source: Path, request: Request) -> str:
    settings = {key: value for key, value in request.items() if key != "source"}
    versions = [importlib.metadata.version(package) for package in ("transformers", "tokenizers")]
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, versions, settings]).encode())
    for path in sorted(set(_tokenizer_files(source))):
        digest.update(f"\0{path.relative_to(source)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _tokenizer_files(source: Path) -> Iterable[Path]:
    return (path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file())


def _fill_cache(entry: Path, request: Request, name: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=entry.parent))
    except OSError as error:
        what = f"Cache folder {entry.parent} cannot be written ({error.strerror})."
        raise UsageError(what, "set SFTDATA_CACHE.") from None
    try:
        _run_child(draft, request, name)
        try:
            draft.rename(entry)
        except OSError:
            if not (entry / FACTS_FILE).is_file():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _run_child(draft: Path, request: Request, name: str) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, "-m", "sftdata.encode.autotokenizer", str(draft)]
    child = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=env, check=False
    )
    if child.returncode == UsageError.exit_code:
        refusal = json.loads(child.stdout.splitlines()[-1])
        raise UsageError(f"Tokenizer {name!r} {refusal['message']}", refusal["fix"])
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"resolving tokenizer {name!r} failed: {last}")


def _load(entry: Path, name: str) -> ResolvedTokenizer:
    facts = json.loads((entry / FACTS_FILE).read_text(encoding="utf-8"))
    facts |= {"name": name, "folder": str(entry / FOLDER_NAME)}
    return msgspec.convert(facts, ResolvedTokenizer, dec_hook=lambda kind, value: kind(value))
