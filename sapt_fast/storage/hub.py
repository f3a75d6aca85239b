"""Downloads saved folders from the Hugging Face Hub, and uploads them."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from sapt_fast.storage.description import CONFIG_FILE, read_description, stated_files
from sapt_fast.storage.model_card import CARD_FILE, is_own_card

__all__ = ["downloaded", "is_hub_id", "upload"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights of a base model, and states of a Trainer, that a repository may have beside the tasks.
_OTHER_FILES = ["model.safetensors", "model-?????-of-?????.safetensors", "*.bin", "*.pt", "*.pth"]


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Returns whether a name has the form of a repository's, `owner/name`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def downloaded(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads a repository into the cache, unless it is there, and returns its folder.

    Weights of a base model are not downloaded.

    Args:
        repo_id: `owner/name`.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: if the repository or revision does not exist or cannot be read, or
            there is no connection and the cache does not contain it.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            ignore_patterns=_OTHER_FILES,
        )
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise FileNotFoundError(
            f"{repo_id!r}: no such folder, and not found on the Hugging Face Hub{at}. Check the "
            "name; for a private repository pass token=, or log in. "
            f"({type(error).__name__}: {reason})"
        ) from error
    return Path(folder)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Uploads a saved folder as one commit, and returns the address of the commit.

    Files of tasks that an earlier upload contains and the folder does not are deleted. A README.md
    in the repository is replaced only if it is an unedited model card of sapt_fast.
    """
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = _remote(api, repo_id, CARD_FILE, revision)
    config = _remote(api, repo_id, CONFIG_FILE, revision)
    old = [] if config is None else stated_files(read_description(config))
    commit: Any = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=[glob.escape(name) for name in old],
        ignore_patterns=None if card is None or is_own_card(card) else [CARD_FILE],
    )
    return str(commit.pr_url if create_pr else commit.commit_url)


def _remote(api: Any, repo_id: str, name: str, revision: str | None) -> Path | None:
    """Returns a file of a repository, downloaded; None if it has none."""
    try:
        return Path(api.hf_hub_download(repo_id, name, revision=revision))
    except EntryNotFoundError:
        return None
