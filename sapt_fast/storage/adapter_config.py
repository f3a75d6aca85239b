"""Checks that PEFT reads the same adapter from adapter_config.json as sapt_fast loads."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = ["require_lora_config", "require_prompt_config"]

# Fields that do not change what PEFT computes.
_NO_MATTER = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "megatron_core", "qalora_group_size", "loftq_config", "runtime_config"),
    }
)
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "peft_type": None}
# A pattern for one layer, or for all whose path ends with it: PEFT and we write no others.
_PATH = re.compile(r"\^?[\w.\-]+\$?")


def require_lora_config(
    path: Path,
    values: Any,
    adapters: Mapping[str, tuple[int, float]],
    modules: Collection[str],
    *,
    transposed: bool,
    dropout: float,
    expected: Mapping[str, Any] | None = None,
    sealed: bool = False,
) -> None:
    """Raises ValueError if PEFT would compute something else from this config than we do.

    Args:
        path: the file, for messages.
        values: its parsed content.
        adapters: (rank, scaling) by the path of each layer that has an adapter.
        modules: paths of all modules of the model, without ours.
        transposed: whether a layer stores its weight as [in, out] (GPT-2's Conv1D).
        dropout: the dropout rate on the adapters' inputs.
        expected: further fields that must have these values.
        sealed: whether the file is known to be as `save_pretrained` wrote it; then fields that
            this version of sapt_fast does not know may have any value.
    """
    fixed = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": dropout,
        "init_lora_weights": True,
        **(expected or {}),
    }
    own = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    _require_fixed(path, values, fixed, own, sealed)
    _require_scalings(path, values, adapters)
    _require_targets(path, values.get("target_modules"), set(adapters), modules)


def require_prompt_config(
    path: Path, values: Any, length: int, width: int, *, sealed: bool = False
) -> None:
    """Raises ValueError if PEFT would compute something else from this config than we do.

    Args:
        path, values, sealed: as in `require_lora_config`.
        length: P, the number of rows of the prompt.
        width: D, the width of its rows.
    """
    fixed = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    # Only PEFT's other prompt methods read these.
    own = ("num_attention_heads", "num_layers", "tokenizer_name_or_path", "tokenizer_kwargs")
    _require_fixed(path, values, fixed, own, sealed)


def _require_fixed(
    path: Path, values: Any, fixed: Mapping[str, Any], own: Collection[str], sealed: bool
) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected an object")
    for name, wanted in fixed.items():
        got = values.get(name, _absent(name, wanted))
        if type(got) in (int, float) and type(wanted) in (int, float):
            same = got == wanted
        else:
            same = type(got) is type(wanted) and got == wanted
        if not same:
            raise _disagrees(path, name, got, wanted)
    for name, value in values.items():
        if name in fixed or name in own or name in _NO_MATTER or not value or sealed:
            continue
        raise ValueError(
            f"{path}: {name}: got {_shown(value)}, expected none: PEFT might compute something "
            "other than the adapter that sapt_config.json describes"
        )


def _absent(name: str, wanted: Any) -> Any:
    """Returns PEFT's value of a field that a file lacks."""
    if name in ("bias", "init_lora_weights", "prompt_tuning_init"):
        return wanted  # their defaults
    return {"fan_in_fan_out": False, "lora_dropout": 0.0}.get(name)


def _require_scalings(
    path: Path, values: Mapping[str, Any], adapters: Mapping[str, tuple[int, float]]
) -> None:
    ranks = _Pattern(path, values, "r", "rank_pattern")
    alphas = _Pattern(path, values, "lora_alpha", "alpha_pattern")
    rooted = values.get("use_rslora", False)
    if not isinstance(rooted, bool):
        raise _disagrees(path, "use_rslora", rooted, "true or false")
    for layer, (rank, scaling) in adapters.items():
        r, alpha = ranks.of(layer), alphas.of(layer)
        if r != rank:
            raise ValueError(
                f"{path}: {ranks.names}: got rank {_shown(r)} for {layer}, expected {rank}, as in "
                "sapt_config.json and the weights"
            )
        try:
            found = alpha / (math.sqrt(r) if rooted else r)
        except (OverflowError, ZeroDivisionError):
            found = math.inf
        if not math.isclose(found, scaling, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(
                f"{path}: {alphas.names} {_shown(alpha)}, rank {r} and use_rslora {rooted}: got "
                f"scaling {found:g} for {layer}, expected {scaling:g}, as in sapt_config.json"
            )


class _Pattern:
    """A number for each layer: a default, and others by the ends of paths, as PEFT reads them."""

    def __init__(self, path: Path, values: Mapping[str, Any], name: str, pattern: str) -> None:
        self.names = f"{name} and {pattern}"
        self.default = values.get(name, _DEFAULTS[name])
        given = values.get(pattern) or {}
        if not isinstance(given, dict):
            raise _disagrees(path, pattern, given, "an object")
        self.whole: dict[str, tuple[int, Any]] = {}
        self.ends: list[tuple[int, str, Any]] = []
        for number in (self.default, *given.values()):
            if type(number) not in (int, float) or not abs(number) < 1e30:
                raise _disagrees(path, self.names, number, "plausible numbers")
        for place, (key, number) in enumerate(given.items()):
            if not _PATH.fullmatch(key):
                raise _disagrees(path, pattern, key, "paths of layers")
            end = key.removesuffix("$")
            if end.startswith("^"):
                self.whole.setdefault(end[1:], (place, number))
            else:
                self.ends.append((place, end, number))

    def of(self, layer: str) -> Any:
        """Returns the number of a layer: as in PEFT, the first pattern that matches."""
        found = [self.whole[layer]] if layer in self.whole else []
        found += [(n, x) for n, end, x in self.ends if layer == end or layer.endswith("." + end)]
        return min(found, key=lambda entry: entry[0])[1] if found else self.default


def _require_targets(
    path: Path, targets: Any, layers: Collection[str], modules: Collection[str]
) -> None:
    listed = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not listed:
        raise _disagrees(path, "target_modules", targets, "a list of names")
    names = set(targets)
    shortest = {name.rpartition(".")[2] for name in names}
    found = {
        module
        for module in modules
        if module.rpartition(".")[2] in shortest and _is_named(module, names)
    }
    if found != set(layers):
        odd = sorted(found ^ set(layers))
        where = "selects" if odd[0] in found else "does not select"
        raise ValueError(
            f"{path}: target_modules: got {_shown(targets)}, which {where} {odd[0]} (and "
            f"{len(odd) - 1} more), unlike sapt_config.json and the weights"
        )


def _is_named(module: str, names: Collection[str]) -> bool:
    """Returns whether a path or one of its ends is among names."""
    while module not in names:
        _, dot, module = module.partition(".")
        if not dot:
            return False
    return True


def _disagrees(path: Path, name: str, got: Any, expected: Any) -> ValueError:
    return ValueError(
        f"{path}: {name}: got {_shown(got)}, expected {_shown(expected)}, as in sapt_config.json "
        "and the weights: PEFT would compute something else from this folder than sapt_fast"
    )


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else f"{str(value)[:60]}"
    return text if len(text) <= 80 else f"{text[:60]}..."
