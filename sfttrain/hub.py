"""Push a finished model to the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from sftdata.errors import UsageError


def check_hub(repository: str) -> None:
    """Refuse now what could only fail once the run is done.

    Raises:
        UsageError: the name is no repository, the machine is told to stay offline, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if repository.count("/") != 1:
        raise UsageError(f"push_to_hub={repository}: is no repository of the Hub.", "name it as user/model.")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UsageError(f"push_to_hub={repository}: HF_HUB_OFFLINE is set.", "unset it, or leave push_to_hub out.")
    if get_token() is None:
        raise UsageError(f"push_to_hub={repository}: nobody is logged in.", "hf auth login, or set HF_TOKEN.")


def push(folder: Path, repository: str) -> str:
    """Upload a finished model, without checkpoints and logs of the run; return its address.

    Raises:
        UsageError: the Hub refuses; the model stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=["checkpoint-*/*", "*.partial/*"])
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{folder}: is finished; pushing it failed: {reason}", f"hf upload {repository} {folder}") from None
    return str(address)
