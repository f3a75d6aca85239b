"""What the methods on images were to reach, and whether they did."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

Bar = Mapping[str, Mapping[str, Mapping[str, float]]]  # set, head, seed: accuracy
_OWN = {"emoji": 0.35, "mnist": 0.25}
_CLOSED = {"emoji": 0.50, "mnist": 0.47}
_ROUTED = {"emoji": 0.62, "mnist": 0.88}
_KNOWN = {"mnist": 0.95}


def bar_of(frozen: Mapping[str, Any]) -> Bar:
    """Returns the accuracies of the heads on the frozen mean patch of layer 9.

    Args:
        frozen: a result of `images_frozen.py`.
    """
    return {
        name: {
            head: {str(seed): run["accuracy"] for seed, run in by_seed.items()}
            for head, by_seed in found["features"]["mean.9"]["heads"].items()
        }
        for name, found in frozen["sets"].items()
    }


def targets(runs: Mapping[str, Any], bar: Bar) -> list[dict[str, Any]]:
    """Returns the rows of the targets whose runs are there; a value is a mean over their seeds.

    Args:
        runs: by set, method and seed.
        bar: of `bar_of`.
    """
    rows: list[tuple[str, float, float]] = []
    for name, by_method in runs.items():
        if l2p := by_method.get("L2P"):
            own = _accuracies(l2p, "own")
            best = max(("LDA", "ridge"), key=lambda head: _mean(_accuracies(l2p, head)))
            closed = _accuracies(l2p, best)
            rows.append((f"{name}: L2P, own head", _mean(own), _OWN[name]))
            gap = _over(own, bar[name]["sequential"])
            rows.append((f"{name}: L2P, own head, above sequential linear", gap, 0.15))
            least = min(closed[seed] - own[seed] for seed in own)
            rows.append((f"{name}: L2P, {best} above own head, in each seed", least, 0.0))
            rows.append((f"{name}: L2P, {best} head", _mean(closed), _CLOSED[name]))
            again = fmean(run["refitted"]["ridge"] for run in l2p.values())
            rows.append((f"{name}: L2P, ridge refitted on all images", again, _CLOSED[name]))
        if routed := by_method.get("LoRA per task, routed by LDA"):
            own = _accuracies(routed, "own")
            rows.append((f"{name}: LoRA routed by LDA", _mean(own), _ROUTED[name]))
            gap = _over(own, bar[name]["LDA"])
            rows.append((f"{name}: LoRA routed by LDA, above LDA alone", gap, -0.02))
            if name in _KNOWN:
                known = fmean(run["within the known task"] for run in routed.values())
                rows.append((f"{name}: LoRA within the known task", known, _KNOWN[name]))
    return [
        {"target": f"{text} >= {aim:g}", "value": value, "reached": value >= aim}
        for text, value, aim in rows
    ]


def _accuracies(by_seed: Mapping[str, Any], head: str) -> dict[str, float]:
    return {str(seed): run["accuracy"][head] for seed, run in by_seed.items()}


def _mean(values: Mapping[str, float]) -> float:
    return fmean(values.values())


def _over(values: Mapping[str, float], others: Mapping[str, float]) -> float:
    """Returns the mean difference over the seeds of `values`."""
    return fmean(value - others[seed] for seed, value in values.items())
