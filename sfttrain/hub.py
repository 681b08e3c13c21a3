"""Push a finished model to the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from sftdata.errors import UsageError


def check_hub(repository: str) -> None:
    """Refuse before the run what could only fail after it.

    Raises:
        UsageError: the name is no repository, the machine is told to stay offline, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"push_to_hub={repository}: {str(error).split('.')[0]}.", "name it as user/model.") from None
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
