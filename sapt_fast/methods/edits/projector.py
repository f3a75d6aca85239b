"""Keys by a trained projection, for which paraphrases are near and other questions far.

The idea of a projection that is trained by contrast against paraphrase failure is that of PENME,
"Resolving Lexical Bias in Model Editing" (arXiv 2408.11843). The loss is the supervised
contrastive one of Khosla et al., NeurIPS 2020.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapt_fast.methods.edits.keys import features_of
from sapt_fast.ops._common import without_autocast
from sapt_fast.storage.tensors import read_tensors, require_finite, write_tensors

__all__ = ["ProjectedKeys"]

_GROUPS, _OTHERS = 64, 128  # of a training step, so that its cost does not grow with the data


class ProjectedKeys:
    """Looks up prompts by a linear map of features, trained on groups of paraphrases.

        k(x) = normalize(W (f(x) - m) / s)

        loss = - mean_i mean_p log( exp(k_i k_p / tau) / sum_{a != i} exp(k_i k_a / tau) )

    i are the prompts of all groups, p the others of i's group, a all prompts of a training step.
    f is any function of prompts, such as `SentenceKeys` or `HiddenKeys(...).features`. m is the
    mean of the features of all prompts that are given, s the mean length of f(x) - m. W [C, D]
    starts with random orthonormal rows. The map is linear: one with a hidden layer fits the prompts
    that are given, and paraphrases of others worse.

    Radii are distances between vectors of length 1. Training moves the given paraphrases together:
    choose the radius on groups that were not given. A map of hidden states learns the wordings that
    it is given; for other wordings use the features of a sentence encoder.

    Args:
        features: returns one vector per prompt, [B, D], for the tokens [T_b] of each.
        width: C, at most D.
        steps: of Adam.
        learning_rate: Adam's.
        temperature: tau.
        seed: of W and of the groups that each step draws.

    Attributes:
        weight: W / s, [C, D] float32; None before `fit` or `load`.
        mean: m, [D] float32; None before.
        loss: that of the last step; None before `fit`.

    Raises:
        ValueError: if a number does not fit.

    Example:
        >>> import torch
        >>> from sapt_fast.methods.edits.projector import ProjectedKeys
        >>> def counts(texts):  # how often each of eight tokens occurs
        ...     return torch.stack([torch.bincount(text, minlength=8).float() for text in texts])
        >>> keys = ProjectedKeys(counts, width=4, steps=50)
        >>> keys = keys.fit([[[1, 2], [2, 1, 7]], [[3, 4], [4, 3, 7]]], others=[[1, 4], [3, 2]])
        >>> a, b, c = keys([torch.tensor(tokens) for tokens in ([1, 2], [2, 1, 7], [1, 4])])
        >>> bool((a - b).norm() < (a - c).norm())
        True
    """

    def __init__(
        self,
        features: Callable[[list[Tensor]], Tensor],
        width: int = 64,
        *,
        steps: int = 200,
        learning_rate: float = 1e-3,
        temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, count in (("width", width), ("steps", steps)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name}: got {count!r}, expected an integer, at least 1")
        for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, expected a positive number")
        self.features = features
        self.width = width
        self.steps = steps
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.seed = seed
        self.weight: Tensor | None = None
        self.mean: Tensor | None = None
        self.loss: float | None = None

    def fit(self, groups: Sequence[Sequence[Any]], others: Sequence[Any] = ()) -> ProjectedKeys:
        """Trains the map, and returns itself. Nothing has changed after an error.

        Args:
            groups: groups of prompts (tokens) that ask the same. Those of other groups ask
                something else. Fit before the first edit: another fit makes other keys.
            others: prompts that ask something else than every group and each other, best in similar
                words.

        Raises:
            ValueError: if there are fewer than two groups, or a group has fewer than two prompts.
            ValueError: if a prompt is in two groups, or in a group and in `others`.
            ValueError: if a feature is not finite, or the width is larger than that of features.
            FloatingPointError: if the loss is not finite.
        """
        if len(groups) < 2:
            raise ValueError(f"groups: got {len(groups)}, expected at least two groups to contrast")
        for place, group in enumerate(groups):
            if len(group) < 2:
                raise ValueError(
                    f"groups[{place}]: got {len(group)} prompts, expected at least two that ask "
                    "the same; give a single prompt in `others`"
                )
        prompts = [prompt for group in groups for prompt in group] + [*others]
        counts = torch.tensor([len(group) for group in groups])
        labels = torch.cat(
            [torch.arange(len(groups)).repeat_interleave(counts), torch.full((len(others),), -1)]
        )
        _require_distinct(prompts, labels)
        vectors = features_of(self.features, prompts).cpu()
        self._require_fit(vectors)
        without = without_autocast(vectors.device)
        with torch.inference_mode(False), torch.enable_grad(), without:
            mean = vectors.mean(0)
            centred = vectors.clone() - mean
            scale = centred.norm(dim=1).mean().clamp(min=torch.finfo(torch.float32).tiny)
            weight, loss = self._train(centred / scale, labels)
        self.weight, self.mean, self.loss = weight / scale, mean, loss
        return self

    def _require_fit(self, vectors: Tensor) -> None:
        wrong = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"features: got NaN or infinity for prompt {wrong[0]} (counted through all "
                "groups), expected finite numbers"
            )
        if self.width > vectors.shape[1]:
            raise ValueError(
                f"width: got {self.width}, expected at most {vectors.shape[1]}, that of features"
            )

    def _train(self, vectors: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """Returns W and the last loss, given vectors [N, D] and their groups [N], -1 for none."""
        draws = torch.Generator().manual_seed(self.seed)
        start = torch.randn(vectors.shape[1], self.width, generator=draws)
        weight = torch.linalg.qr(start)[0].T.contiguous().requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=self.learning_rate)
        loss = float("nan")
        for step in range(self.steps):
            chosen = _drawn(labels, draws)
            value = self._loss(F.normalize(vectors[chosen] @ weight.T, dim=1), labels[chosen])
            loss = float(value.detach())
            if not value.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss} after {step} steps: expected a finite one; use a smaller "
                    "learning_rate"
                )
            (weight.grad,) = torch.autograd.grad(value, [weight])
            optimizer.step()
        return weight.detach(), loss

    def _loss(self, keys: Tensor, labels: Tensor) -> Tensor:
        """The contrastive loss of keys [N, C] of groups [N]."""
        itself = torch.eye(len(keys), dtype=torch.bool)
        scores = (keys @ keys.T / self.temperature).masked_fill(itself, float("-inf"))
        logs = scores - scores.logsumexp(1, keepdim=True)
        same = (labels[:, None] == labels[None]) & ~itself
        anchors = labels >= 0
        sums = torch.where(same, logs, 0.0).sum(1)[anchors]
        return -(sums / same.sum(1)[anchors]).mean()

    @torch.no_grad()
    def __call__(self, texts: list[Tensor]) -> Tensor:
        """Returns [B, C] float32 of length 1, for the tokens [T_b] of each prompt.

        Raises:
            RuntimeError: before `fit` or `load`.
            ValueError: if the features have another width than those of `fit`.
        """
        weight, mean = self._trained()
        vectors = self.features(texts).float()
        if vectors.shape[-1] != len(mean):
            raise ValueError(f"features: got width {vectors.shape[-1]}, expected {len(mean)}")
        centred = vectors - mean.to(vectors.device)
        with without_autocast(vectors.device):
            return F.normalize(centred @ weight.to(vectors.device).T, dim=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the map to a safetensors file; the features are not saved.

        Raises:
            RuntimeError: before `fit` or `load`.
            OSError: if the file cannot be written.
        """
        weight, mean = self._trained()
        write_tensors(Path(path), {"weight": weight, "mean": mean}, {"keys": "projected"})

    def load(self, path: str | os.PathLike[str]) -> ProjectedKeys:
        """Reads what `save` wrote, and returns itself.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, not of `save`, not finite, or of another width.
        """
        tensors, about = read_tensors(Path(path))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        width = shapes.get("mean", (0,))
        expected = {"weight": (self.width, *width), "mean": width}
        if about.get("keys") != "projected" or shapes != expected or len(width) != 1:
            raise ValueError(
                f"{path}: got {about.get('keys')} keys of shapes {shapes}, expected projected keys "
                f"with weight [{self.width}, D] and mean [D]"
            )
        require_finite(path, tensors)
        self.weight, self.mean = tensors["weight"].float(), tensors["mean"].float()
        return self

    def _trained(self) -> tuple[Tensor, Tensor]:
        if self.weight is None or self.mean is None:
            raise RuntimeError("ProjectedKeys: the map is not trained; call fit(groups) or load")
        return self.weight, self.mean


def _require_distinct(prompts: Sequence[Any], labels: Tensor) -> None:
    """Raises ValueError if a prompt is given as one that asks something else than itself."""
    groups: dict[tuple[int, ...], int] = {}
    for prompt, label in zip(prompts, labels.tolist(), strict=True):
        tokens = tuple(torch.as_tensor(prompt).tolist())
        if groups.setdefault(tokens, label) != label:
            raise ValueError(
                f"groups: got the prompt {[*tokens]} in two places that ask different things"
            )


def _drawn(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Returns the places of the prompts of a training step: whole groups, and others."""
    count = int(labels.max()) + 1
    groups = torch.randperm(count, generator=draws)[:_GROUPS]
    others = (labels < 0).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=draws)[:_OTHERS]]
    return torch.cat([torch.isin(labels, groups).nonzero().flatten(), others])
