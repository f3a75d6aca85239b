"""How far prompts are from the keys of edits, and the radius or ratio that follows from it.

An edit acts on a prompt if its key is the nearest and not farther than a radius; with a ratio, if
the distance is at most that share of the distance to the second key. Which prompts that is needs no
generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast.editing.data import EditRow, Probe, Tokens
from sapt_fast.methods.edits.sites import default_targets

Keys = Callable[[list[Tensor]], Tensor]
RIGHT, WRONG, SAME = "paraphrases", "paraphrases, a wrong edit", "same country"
# What must not match, each with the same weight. Former capitals are left out: they are reported.
_FALSE = (SAME, "largest city", "near names", "other countries", "other questions")
_GRIDS = {"radius": (30, 81), "ratio": (30, 81)}  # in hundredths
_BATCH = 32


class Looked(NamedTuple):
    """What a look-up finds, [N] each: the nearest key, its distance, and that of the second."""

    row: Tensor
    first: Tensor
    second: Tensor


class OwnKeys:
    """GRACE's own keys: the input of the edited layer at the prompt's last token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layer = model.get_submodule(default_targets(model)[0])

    @torch.no_grad()
    def __call__(self, texts: list[Tensor]) -> Tensor:
        """Returns [B, D] for the tokens [T_b] of each prompt."""
        found: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1]))
        try:
            for text in texts:
                self.model.model(input_ids=text[None], use_cache=True)
        finally:
            hook.remove()
        return torch.stack(found)


class Distances:
    """The distances of all questions of a set of edits to the edits' keys.

    Args:
        keys: what prompts are looked up by.
        rows: the edits.
        probes: prompts that no edit may change.
    """

    def __init__(self, keys: Keys, rows: Sequence[EditRow], probes: Sequence[Probe]) -> None:
        self._keys = keys
        self._edits = self._encode([row.prompt for row in rows])
        asked = [(text, place) for place, row in enumerate(rows) for text in row.paraphrases]
        self._right = torch.tensor([place for _, place in asked])
        self.found = {RIGHT: self._look_up([text for text, _ in asked])}
        self.found[SAME] = self._look_up([p.prompt for row in rows for p in row.locality])
        for group in dict.fromkeys(probe.group for probe in probes):
            self.found[str(group)] = self._look_up([p.prompt for p in probes if p.group == group])

    def shares(self, limit: str, value: float) -> dict[str, float]:
        """Returns the share of the prompts of each group on which an edit acts."""
        shares = {}
        for group, looked in self.found.items():
            most = looked.second * value if limit == "ratio" else value
            acts = looked.first <= most
            if group == RIGHT:
                right = looked.row == self._right
                shares[RIGHT] = _mean(acts & right)
                shares[WRONG] = _mean(acts & ~right)
            else:
                shares[group] = _mean(acts)
        return shares

    def choose(self, limit: str) -> dict[str, Any]:
        """Returns the value that tells paraphrases best from what must not match.

        The score is the share of paraphrases matched less the mean share of the groups that must
        not match. Of equal scores, the middle one is taken.
        """
        if limit == "radius" and float(self.found[RIGHT].first.median()) > 2:  # not of length 1
            grid = torch.linspace(0, float(self.found[RIGHT].first.max()), 81)[1:].tolist()
        else:
            grid = [hundredth / 100 for hundredth in range(*_GRIDS[limit])]
        scores = {}
        for value in grid:
            shares = self.shares(limit, value)
            false = fmean([shares[group] for group in _FALSE if group in shares])
            scores[value] = shares[RIGHT] - false
        best = [value for value in grid if scores[value] >= max(scores.values()) - 1e-9]
        value = best[len(best) // 2]
        return {"value": value, "score": scores[value], "shares": self.shares(limit, value)}

    def quantiles(self) -> dict[str, dict[str, list[float]]]:
        """Returns the 5 %, 50 % and 95 % quantiles of distance and ratio, by group."""
        at = torch.tensor([0.05, 0.5, 0.95])
        found = {}
        for group, looked in self.found.items():
            kinds = {"distance": looked.first, "ratio": looked.first / looked.second}
            found[group] = {
                kind: [round(v, 3) for v in values.quantile(at).tolist()]
                for kind, values in kinds.items()
            }
        return found

    def _look_up(self, prompts: Sequence[Tokens]) -> Looked:
        distances = torch.cdist(
            self._encode(prompts), self._edits, compute_mode="donot_use_mm_for_euclid_dist"
        )
        two = distances.topk(2, largest=False)
        return Looked(two.indices[:, 0], two.values[:, 0], two.values[:, 1])

    def _encode(self, prompts: Sequence[Tokens]) -> Tensor:
        texts = [torch.tensor(prompt) for prompt in prompts]
        parts = [self._keys(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        return torch.cat(parts)


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the shares of each way to look up as lines of text."""
    return "\n".join(
        f"{name}: {shares['limit']} {shares['value']:.3f} "
        + ", ".join(f"{group} {share:.3f}" for group, share in shares["shares"].items())
        for name, shares in found.items()
    )
