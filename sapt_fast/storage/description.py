"""sapt_config.json: the format version, the content of a saved folder, and digests of its files."""

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
    "require_file_digest",
    "require_own_digest",
    "require_own_strategy",
    "require_sealed",
    "seal",
    "stated_files",
    "stored_as_sapt",
    "strategy_of",
    "write_sealed",
    "writes",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

CONFIG_FILE = "sapt_config.json"
ROUTER_FILE = "router.safetensors"
STRATEGY_FILE = "strategy.safetensors"
MODULES_FILE = "modules.safetensors"  # trained tensors of the base model, and tasks' own modules

_FIELDS = frozenset({"format_version", "sapt_fast_version", "config", "tasks", "base_model"})
# Folders of earlier versions have none of these.
_SEALED_FIELDS = frozenset({"method", "strategy", "files", "digest"})
_OPTIONAL_FIELDS: frozenset[str] = frozenset()
# To store more of a task, add its field here; `files_of_tasks` lists the files of a task.
_OPTIONAL_TASK_FIELDS: frozenset[str] = frozenset()
# Strategies without SAPT's router, whose adapters earlier versions stored as SAPT's, or whose own
# way to choose adapters or to predict is only known to a run.
_NOT_ROUTED = (
    *("epi", "l2p", "olora", "progprompt", "coda", "dualprompt"),
    *("ncm", "lda", "ridge", "lda_experts", "inflora", "gainlora", "sd_lora"),
)
# Strategies that use SAPT's router.
_ROUTED = (
    *("sapt", "sapt_prompt", "seqlora", "joint", "replay", "generative_replay"),
    *("ewc", "lwf", "lfpt5", "single", "head"),
)

_ADVICE = "Restore it from a backup"

_warned: set[str] = set()


def describe(
    method: str,
    config: Mapping[str, Any],
    tasks: list[dict[str, Any]],
    base_model: Mapping[str, Any],
    strategy: str | None,
) -> dict[str, Any]:
    """Returns the content of sapt_config.json without digests, which `seal` adds.

    Args:
        method: the method's name.
        config: the return value of the config's `to_dict`.
        tasks: for each task in learning order, its name and, for LoRA, its rank and scaling.
        base_model: the return value of `describe_base`.
        strategy: the strategy of the continual run that trained the tasks, or None.
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
    """Returns the text of sapt_config.json, with digests.

    Args:
        description: the return value of `describe`.
        digests: SHA-256 of every other file, by its relative path.
    """
    content = json.loads(json.dumps({**description, "files": dict(digests)}, default=sorted))
    content.pop("digest", None)
    return json.dumps({**content, "digest": _digest(content)}, indent=2) + "\n"


def write_sealed(folder: Path, name: str, description: Mapping[str, Any]) -> None:
    """Writes a description, with the digests of the files that the folder contains now."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}
    (folder / name).write_text(seal(description, digests), encoding="utf-8")


def writes(model: nn.Module, is_main_process: bool | None) -> bool:
    """Returns whether this process writes: `is_main_process` if it is given.

    If it is None, all processes write, but only rank 0 of a sharded model.
    """
    if is_main_process is None:
        return not is_sharded(model) or torch.distributed.get_rank() == 0
    return is_main_process


def files_of_tasks(names: Collection[str]) -> list[str]:
    """Returns relative paths of the files that a folder of tasks has besides sapt_config.json."""
    return [ROUTER_FILE, *(f"{name}/{file}" for name in names for file in LORA_FILES)]


def read_description(path: Path) -> dict[str, Any]:
    """Reads a sapt_config.json.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged or has an unknown format version.
    """
    return check_description(read_json(path), path)


def check_description(description: Any, path: Path) -> dict[str, Any]:
    """Checks the content of a sapt_config.json, except its digests.

    Args:
        description: the parsed content.
        path: the file, for messages.

    Returns:
        description.

    Raises:
        ValueError: if a field is missing, unknown or has a wrong type.
        ValueError: if the format version is unknown.
    """
    require_version(description, FORMAT_VERSION, path)
    fields = _FIELDS | _SEALED_FIELDS if _SEALED_FIELDS & set(description) else _FIELDS
    if not fields <= set(description) <= fields | _OPTIONAL_FIELDS:
        raise ValueError(f"{path}: got fields {sorted(description)}, expected {sorted(fields)}")
    config = description["config"]
    adapter = config.get("adapter", "lora") if isinstance(config, dict) else None
    if is_sealed(description):
        _require_method(description, path)
    _require_tasks(description["tasks"], adapter == "prompt", path)
    return description


def require_version(description: Any, version: int, path: Path) -> None:
    """Raises ValueError unless the parsed content of a file has this format version."""
    given = description.get("format_version") if isinstance(description, dict) else None
    if type(given) is not int or given != version:
        raise ValueError(f"{path}: format_version: got {str(given)[:40]}, expected {version}")


def require_fields(description: Any, version: int, fields: Collection[str], path: Path) -> None:
    """Raises ValueError unless the parsed content of a file has this version and these fields."""
    require_version(description, version, path)
    if set(description) != set(fields):
        raise ValueError(f"{path}: got fields {sorted(description)}, expected {sorted(fields)}")


def is_sealed(description: Mapping[str, Any]) -> bool:
    """Returns whether a folder has digests; those of earlier versions have none."""
    return "digest" in description


def method_of(description: Mapping[str, Any]) -> str:
    """Returns the method of a folder; earlier versions did not store it, but had only these two."""
    if is_sealed(description):
        return str(description["method"])
    return "sapt_prompt" if description["config"].get("adapter") == "prompt" else "sapt"


def _require_method(description: Mapping[str, Any], path: Path) -> None:
    method, strategy = description["method"], description["strategy"]
    if not isinstance(method, str):
        raise ValueError(f"{path}: method: got {method!r}, expected a name")
    if strategy is not None and not isinstance(strategy, str):
        raise ValueError(f"{path}: strategy: got {strategy!r}, expected a name or null")
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
            raise ValueError(f"{path}: tasks: got {name!r}, expected a folder name")
        if name not in distinct:
            raise ValueError(f"{path}: tasks: got {name!r} twice, expected distinct names: {names}")
        distinct.remove(name)
    if not names:
        raise ValueError(f"{path}: tasks: got none, expected at least one")


# --- whose predictions ---


def strategy_of(description: Mapping[str, Any], folder: Path) -> str | None:
    """Returns the continual strategy that trained a folder's tasks; None if it was none.

    Folders of earlier versions do not store it. For these, it is read from the run that contains
    the folder, or recognised by the strategy's tensors.

    Raises:
        ValueError: if the run is damaged.
    """
    if is_sealed(description):
        strategy: str | None = description["strategy"]
        return strategy
    run = folder.parent.parent / "run.json"
    if folder.parent.name == "checkpoints" and run.is_file():
        try:
            named = read_json(run)["settings"]["strategy"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{run}: damaged, it has no strategy setting") from error
        return str(named)
    if (folder / STRATEGY_FILE).is_file():
        names = read_tensors(folder / STRATEGY_FILE)[0].keys()
        known = {"epi": "scatter", "l2p": "picked"}
        return next((strategy for strategy, name in known.items() if name in names), None)
    return None


def stored_as_sapt(description: Mapping[str, Any], folder: Path) -> str | None:
    """Returns the strategy whose adapters an earlier version stored as SAPT's; None if it is none.

    Such a strategy does not use SAPT's router.
    """
    if method_of(description) not in ("sapt", "sapt_prompt"):
        return None
    strategy = strategy_of(description, folder)
    return strategy if strategy in _NOT_ROUTED else None


def require_own_strategy(description: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if a folder stores adapters as SAPT's that do not use SAPT's router.

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
    if stored_as_sapt(description, folder) is not None:
        raise ValueError(
            f"{folder}: cannot be loaded as SAPT, because its adapters are of a continual run with "
            f"strategy {strategy!r}, which does not train SAPT's router. To score the run, use "
            "`sapt-fast eval RUN` or sapt_fast.continual.run.loop.evaluate_run. To use one task's "
            "adapter, load its folder with peft.PeftModel.from_pretrained"
        )


# --- digests ---


def require_sealed(description: Mapping[str, Any], files: StoredFiles) -> None:
    """Raises ValueError unless all files are as they were saved.

    Folders of earlier versions have no digests: they are not checked, and a warning is logged once
    per folder.
    """
    source = files.folder / CONFIG_FILE
    if not is_sealed(description):
        if str(files.folder) not in _warned:
            _warned.add(str(files.folder))
            logger.warning(
                "%s: saved by an earlier version without digests, so damage cannot be detected; "
                "save it again to add digests", files.folder,
            )  # fmt: skip
        return
    advice = (
        "Restore it from a backup; if you changed it on purpose, call "
        f"sapt_fast.storage.task_saving.renew_digests({str(files.folder)!r})"
    )
    require_digest(description, files, stated_files(description), source, advice)


def require_digest(
    description: Mapping[str, Any],
    files: StoredFiles,
    expected: Collection[str],
    source: Path,
    advice: str = _ADVICE,
) -> None:
    """Raises ValueError unless a description and its files match the stored digests.

    Args:
        description: the content of the file `source`.
        files: the files in memory.
        expected: names of the files that must have a digest.
        source: path of the description, for messages.
        advice: what the message recommends.
    """
    require_own_digest(description, expected, source, advice)
    for name in description["files"]:
        require_file_digest(description, files, name, source, advice)


def require_own_digest(
    description: Mapping[str, Any], expected: Collection[str], source: Path, advice: str = _ADVICE
) -> None:
    """As `require_digest`, without a look at the files."""
    content = {name: value for name, value in description.items() if name != "digest"}
    if description["digest"] != _digest(content):
        raise ValueError(
            f"{source}: its content does not match its digest: it was damaged or edited by hand. "
            + advice
        )
    odd = sorted(set(expected) ^ set(description["files"]))
    if odd:
        raise ValueError(
            f"{source}: files: expected a digest of each file, but {odd[0]!r} is missing or unknown"
        )


def require_file_digest(
    description: Mapping[str, Any],
    files: StoredFiles,
    name: str,
    source: Path,
    advice: str = _ADVICE,
) -> None:
    """As `require_digest`, for one file in memory."""
    expected, found = description["files"][name], files.digests[name]
    if found != expected:
        raise ValueError(
            f"{files.folder / name}: its SHA-256 does not match the one in {source.name}: it "
            f"was damaged, edited by hand or copied from another folder. {advice} "
            f"(got {found[:16]}..., expected {expected[:16]}...)"
        )


def stated_files(description: Mapping[str, Any]) -> list[str]:
    """Returns relative paths of the files that a folder must have besides sapt_config.json."""
    names = files_of_tasks([task["name"] for task in description["tasks"]])
    optional = (STRATEGY_FILE, MODULES_FILE)
    return names + [name for name in optional if name in description.get("files", ())]


def _digest(content: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # 1e999 is valid JSON, but infinite
        return ""
    return sha256(text.encode()).hexdigest()
