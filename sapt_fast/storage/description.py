"""sapt_config.json: what a saved folder holds, in which version, and digests of all of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sapt_fast.files.names import is_safe_name
from sapt_fast.files.reading import read_json
from sapt_fast.pools.sharding import is_sharded
from sapt_fast.storage.lora import LORA_FILES
from sapt_fast.storage.tensors import StoredFiles, digest_of_file, read_tensors
from sapt_fast.version import __version__

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "MODULES_FILE",
    "ROUTER_FILE",
    "STRATEGY_FILE",
    "check_description",
    "describe",
    "files_of_tasks",
    "is_sealed",
    "method_of",
    "read_description",
    "require_digest",
    "require_own_strategy",
    "require_sealed",
    "seal",
    "stated_files",
    "strategy_of",
    "write_sealed",
    "writes",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

CONFIG_FILE = "sapt_config.json"
ROUTER_FILE = "router.safetensors"
STRATEGY_FILE = "strategy.safetensors"
MODULES_FILE = "modules.safetensors"  # what was trained of the base model, and tasks' own modules

_FIELDS = frozenset({"format_version", "sapt_fast_version", "config", "tasks", "base_model"})
# Folders of earlier versions have none of these.
_SEALED_FIELDS = frozenset({"method", "strategy", "files", "digest"})
_OPTIONAL_FIELDS: frozenset[str] = frozenset()
# To store more of a task, name its field here; files of it are listed by `files_of_tasks`.
_OPTIONAL_TASK_FIELDS: frozenset[str] = frozenset()
# Strategies whose adapters earlier versions stored as those of SAPT, whose router they do not use.
_NOT_ROUTED = ("epi", "l2p", "olora", "progprompt")
# Those whose adapters its router does weigh.
_ROUTED = (
    *("sapt", "sapt_prompt", "seqlora", "joint", "replay", "generative_replay"),
    *("ewc", "lwf", "lfpt5", "single"),
)

_warned: set[str] = set()


def describe(
    method: str,
    config: Mapping[str, Any],
    tasks: list[dict[str, Any]],
    base_model: Mapping[str, Any],
    strategy: str | None,
) -> dict[str, Any]:
    """The content of sapt_config.json, which `seal` completes.

    Args:
        method: that chooses among the adapters.
        config: of the config's `to_dict`.
        tasks: name, and with LoRA rank and scaling, of each task in learning order.
        base_model: of `describe_base`.
        strategy: of the continual run that trained the tasks; None for none.
    """
    return {
        "format_version": FORMAT_VERSION,
        "sapt_fast_version": __version__,
        "method": method,
        "strategy": strategy,
        "config": config,
        "tasks": tasks,
        "base_model": base_model,
    }


def seal(description: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The text of sapt_config.json.

    Args:
        description: what `describe` returned.
        digests: SHA-256 of every other file, by its relative path.
    """
    content = json.loads(json.dumps({**description, "files": dict(digests)}, default=sorted))
    content.pop("digest", None)
    return json.dumps({**content, "digest": _digest(content)}, indent=2) + "\n"


def write_sealed(folder: Path, name: str, description: Mapping[str, Any]) -> None:
    """Writes a description, with the digests of the files that the folder holds by now."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}
    (folder / name).write_text(seal(description, digests), encoding="utf-8")


def writes(model: nn.Module, is_main_process: bool | None) -> bool:
    """Whether this process writes, as a caller says, or None for rank 0 of a sharded model."""
    if is_main_process is None:
        return not is_sharded(model) or torch.distributed.get_rank() == 0
    return is_main_process


def files_of_tasks(names: Collection[str]) -> list[str]:
    """Relative paths of the files that every folder of these tasks has, beside sapt_config.json."""
    return [ROUTER_FILE, *(f"{name}/{file}" for name in names for file in LORA_FILES)]


def read_description(path: Path) -> dict[str, Any]:
    """The content of a sapt_config.json.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or of a format that is not known.
    """
    return check_description(read_json(path), path)


def check_description(description: Any, path: Path) -> dict[str, Any]:
    """Raises ValueError unless this is the content of a sapt_config.json; digests are not checked.

    Returns:
        description.
    """
    version = description.get("format_version") if isinstance(description, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {str(version)[:40]}, expected {FORMAT_VERSION}"
        )
    fields = _FIELDS | _SEALED_FIELDS if _SEALED_FIELDS & set(description) else _FIELDS
    if not fields <= set(description) <= fields | _OPTIONAL_FIELDS:
        raise ValueError(f"{path}: fields {sorted(description)}, expected {sorted(fields)}")
    config = description["config"]
    adapter = config.get("adapter", "lora") if isinstance(config, dict) else None
    if is_sealed(description):
        _require_method(description, path)
    _require_tasks(description["tasks"], adapter == "prompt", path)
    return description


def is_sealed(description: Mapping[str, Any]) -> bool:
    """Whether a folder has digests, as those of earlier versions have not."""
    return "digest" in description


def method_of(description: Mapping[str, Any]) -> str:
    """The method that a folder names; of an earlier version's, the one that it must be of."""
    if is_sealed(description):
        return str(description["method"])
    return "sapt_prompt" if description["config"].get("adapter") == "prompt" else "sapt"


def _require_method(description: Mapping[str, Any], path: Path) -> None:
    method, strategy = description["method"], description["strategy"]
    if not isinstance(method, str):
        raise ValueError(f"{path}: method is {method!r}, expected a name")
    if strategy is not None and not isinstance(strategy, str):
        raise ValueError(f"{path}: strategy is {strategy!r}, expected a name or null")
    files = description["files"]
    if not isinstance(files, dict) or not all(isinstance(x, str) for x in files.values()):
        raise ValueError(f"{path}: files: expected a digest of each file")


def _require_tasks(tasks: Any, prompts: bool, path: Path) -> None:
    fields = {"name"} if prompts else {"name", "rank", "scaling"}
    if not isinstance(tasks, list) or any(
        not isinstance(task, dict)
        or not fields <= set(task) <= fields | _OPTIONAL_TASK_FIELDS
        or not isinstance(task["name"], str)
        for task in tasks
    ):
        raise ValueError(f"{path}: tasks: expected a list of objects with {sorted(fields)}")
    names = [task["name"] for task in tasks]
    distinct = set(names)
    for name in names:
        if not is_safe_name(name):
            raise ValueError(f"{path}: tasks: {name!r} is no folder name")
        if name not in distinct:
            raise ValueError(f"{path}: tasks: {name!r} stands twice in {names}")
        distinct.remove(name)
    if not names:
        raise ValueError(f"{path}: tasks: got none")


# --- whose predictions ---


def strategy_of(description: Mapping[str, Any], folder: Path) -> str | None:
    """The continual strategy that trained the tasks of a folder; None for none.

    What earlier versions wrote does not say; then the run around it does, or what else it holds.

    Raises:
        ValueError: if that run is damaged.
    """
    if is_sealed(description):
        strategy: str | None = description["strategy"]
        return strategy
    run = folder.parent.parent / "run.json"
    if folder.parent.name == "checkpoints" and run.is_file():
        try:
            named = read_json(run)["settings"]["strategy"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{run}: is damaged: it names no strategy") from error
        return str(named)
    if (folder / STRATEGY_FILE).is_file():
        names = read_tensors(folder / STRATEGY_FILE)[0].keys()
        known = {"epi": "scatter", "l2p": "picked"}
        return next((strategy for strategy, name in known.items() if name in names), None)
    return None


def require_own_strategy(description: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if a folder holds, as SAPT's, adapters that SAPT's router never weighed.

    Earlier versions wrote such folders in continual runs.
    """
    if method_of(description) not in ("sapt", "sapt_prompt"):
        return
    strategy = strategy_of(description, folder)
    if strategy is not None and strategy not in _ROUTED + _NOT_ROUTED:
        raise ValueError(
            f"{folder}: strategy is {strategy!r}, which this version of sapt_fast does not have "
            f"(it has {', '.join(sorted(_ROUTED + _NOT_ROUTED))}); load it with the version that "
            "wrote it, or upgrade"
        )
    if strategy in _NOT_ROUTED:
        raise ValueError(
            f"{folder}: holds the adapters of a continual run with strategy {strategy!r}, which "
            "chooses among them in its own way: SAPT's router was not trained, and its weights "
            "would be wrong. To score the run use `sapt-fast eval RUN` or "
            "sapt_fast.continual.run.loop.evaluate_run; to use one task's adapter load its folder "
            "with peft.PeftModel.from_pretrained"
        )


# --- digests ---


def require_sealed(description: Mapping[str, Any], files: StoredFiles) -> None:
    """Raises ValueError unless all files are as they were saved.

    A folder of an earlier version has no digests: a warning is logged, once for each folder.
    """
    source = files.folder / CONFIG_FILE
    if not is_sealed(description):
        if str(files.folder) not in _warned:
            _warned.add(str(files.folder))
            logger.warning(
                "%s: saved by an earlier version without digests, so damage to it cannot be "
                "noticed; save it again to add them", files.folder,
            )  # fmt: skip
        return
    advice = (
        "Take it from a backup; if you changed it on purpose, call "
        f"sapt_fast.storage.task_saving.renew_digests({str(files.folder)!r})"
    )
    require_digest(description, files, stated_files(description), source, advice)


def require_digest(
    description: Mapping[str, Any],
    files: StoredFiles,
    expected: Collection[str],
    source: Path,
    advice: str = "Take it from a backup",
) -> None:
    """Raises ValueError unless a description and its files have the digests that it states.

    Args:
        description: the content of the file `source`.
        files: that were taken.
        expected: the files that must have a digest.
        source: for messages.
        advice: what to do then.
    """
    content = {name: value for name, value in description.items() if name != "digest"}
    if description["digest"] != _digest(content):
        raise ValueError(
            f"{source}: its content is not that of its digest: it was damaged or edited by hand. "
            + advice
        )
    odd = sorted(set(expected) ^ set(description["files"]))
    if odd:
        raise ValueError(f"{source}: files: expected a digest of each file, {odd[0]!r} is odd")
    for name, digest in description["files"].items():
        if files.digests[name] != digest:
            raise ValueError(
                f"{files.folder / name}: its SHA-256 is not the one in {source.name}: it was "
                f"damaged, edited by hand or taken from another folder. {advice}"
            )


def stated_files(description: Mapping[str, Any]) -> list[str]:
    """Relative paths of the files that a folder must have beside sapt_config.json."""
    names = files_of_tasks([task["name"] for task in description["tasks"]])
    optional = (STRATEGY_FILE, MODULES_FILE)
    return names + [name for name in optional if name in description.get("files", ())]


def _digest(content: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # 1e999 is JSON, and no number
        return ""
    return sha256(text.encode()).hexdigest()
