"""Push a finished model to the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from sftdata.errors import UsageError
from sfttrain.output import SETTINGS_NAME

_UPLOADED = (
    "README.md", SETTINGS_NAME, "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "vocab*",
    "merges.txt", "*.py",
)  # fmt: skip
_NAMING = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
)  # may name where it came from


def check_hub(repository: str) -> None:
    """Refuse now what could only fail once the run is done.

    Raises:
        UsageError: the name is no repository, the machine is told to stay offline, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if repository.count("/") != 1:
        raise UsageError(f"push_to_hub={repository}: is no repository of the Hub.", "name it as user/model.")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UsageError(
            f"push_to_hub={repository}: HF_HUB_OFFLINE is set.", "unset it, or leave push_to_hub out."
        )
    if get_token() is None:
        raise UsageError(f"push_to_hub={repository}: nobody is logged in.", "hf auth login, or set HF_TOKEN.")


def push(folder: Path, repository: str) -> str:
    """Upload a finished model: what inference reads, its card and its settings, with names in place of local paths.

    Logs, reports and checkpoints stay here; so does what else the folder holds.

    Returns:
        Its address.

    Raises:
        UsageError: the Hub refuses; the model stays where it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    files = [CommitOperationAdd(name, content) for name, content in uploads(folder).items()]
    try:
        address = api.create_repo(repository, exist_ok=True, private=True)
        api.create_commit(repository, files, commit_message="Upload a model trained by sfttrain")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"{folder}: is finished; pushing it failed: {reason}", "run the same command again."
        ) from None
    return str(address)


def uploads(folder: Path) -> dict[str, Path | bytes]:
    """Return what is uploaded of a run's folder, by its name there: files as they are, and texts without local paths."""
    found: dict[str, Path | bytes] = {}
    for path in sorted({path for pattern in _UPLOADED for path in folder.glob(pattern) if path.is_file()}):
        found[path.name] = path
        if path.name == SETTINGS_NAME:
            plain = yaml.safe_load(path.read_text("utf-8"))
            found[path.name] = yaml.safe_dump(without_places(plain), sort_keys=False).encode()
        elif path.name in _NAMING:
            content = json.loads(path.read_text("utf-8"))
            plain = without_places(content)
            if plain != content:
                found[path.name] = (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def without_places(content: Any) -> Any:
    """Return settings with the last part of each local path in its place."""
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    return named(content) if isinstance(content, str) and is_place(content) else content


def is_place(text: str) -> bool:
    """Say whether a text is a path of this machine; `name/model` is one of the Hub unless such a folder is here."""
    return text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(text).exists())


def named(text: str) -> str:
    """Return what a path is called, without where it lies; the name of a model on the Hub is left whole."""
    return Path(text).resolve().name if is_place(text) else text
