"""EPI: each task has a private adapter; each input uses the adapter of the nearest Gaussian.

Wang et al., "Rehearsal-free Continual Language Learning via Efficient Parameter Isolation", ACL
2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.methods.sapt import SaptHandle
from sapt_fast.methods.sapt_router import tokens_of_prompt
from sapt_fast.methods.task_config import TaskConfig, require
from sapt_fast.sites.towers import token_embedding

__all__ = ["EpiConfig", "EpiHandle"]


@dataclass
class EpiConfig(TaskConfig["EpiHandle"]):
    """Shape and placement of the adapters; the fields of the router have no effect."""

    shrinkage: float = field(
        default=0.1, metadata={"help": "Weight of the identity in the covariance, in (0, 1]."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A prompt of weight zero would still change the features of the backbone.
        expected = "'lora': features are computed without adapters"
        require(self.adapter == "lora", "adapter", self.adapter, expected)
        require(0 < self.shrinkage <= 1, "shrinkage", self.shrinkage, "a number in (0, 1]")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "epi"


class EpiHandle(SaptHandle):
    """`SaptHandle` that uses one task's adapter for each input, chosen without parameters.

    Each learned task is a Gaussian over features of the frozen backbone. All tasks share one
    covariance. An input uses the adapter of the task at the smallest Mahalanobis distance:

        argmin_k (h(x) - mu_k)^T Sigma^-1 (h(x) - mu_k)

    The paper leaves two details open. Our choices:

    - h is the mean of the last hidden states over the prompt's tokens, without any adapter. The
      hidden states are the encoder's, if the model has an encoder.
    - Sigma is the within-task covariance of all examples, mixed with `shrinkage` times the identity
      of equal trace, because there may be fewer examples than features.

    `fit` ends a task. Until then its adapter is used for every input.

    Attributes:
        means: [K, D] float64, of the fitted tasks.
        scatter: [D, D] float64, summed over examples around the mean of their task.
        rows: scalar int64, the number of examples.
    """

    Config = EpiConfig
    method = "epi"
    trains_router = False
    means: Tensor
    scatter: Tensor
    rows: Tensor
    _precision: Tensor | None

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        inside = set(self._backbone().modules())
        copied = [p for p in self.task_modules.paths if model.get_submodule(p) in inside]
        if copied:
            raise ValueError(
                f"modules_to_save: {copied[0]} is in the backbone by whose features tasks are told "
                "apart, so tasks cannot have copies of it; use modules_per_task=False"
            )
        self.restore_state({})

    @classmethod
    def sites(cls, model: Any, config: Any) -> Any:
        """As `SaptHandle.sites`, of models that read tokens."""
        token_embedding(model)
        return super().sites(model, config)

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns one-hot weights [B, K], or [1, K] while the newest task is being learned."""
        count = len(self.tasks)
        if len(self.means) < count:
            newest = torch.tensor([count - 1], device=self._device)
            return F.one_hot(newest, count).float()
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("input_ids: got None, expected [B, T]: they decide the task")
        given = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if given is None else given
        chosen = tokens_of_prompt(self._model, given, inputs.get("labels"))
        mask = mask if chosen is None else mask * chosen
        return F.one_hot(self.distances(self.features(ids, mask)).argmin(1), count).float()

    def distances(self, features: Tensor) -> Tensor:
        """Returns squared Mahalanobis distances [B, K] of features [B, D] to the tasks' means."""
        precision, device = self._precision, features.device
        if precision is None or precision.device != device:  # no buffers: they stay float64
            parts = (self.means, self.scatter, self.rows)
            self.means, self.scatter, self.rows = (part.to(device) for part in parts)
            covariance = self.scatter / self.rows
            scale = covariance.diagonal().mean()
            # With one example per task the covariance is zero, so the nearest mean is chosen.
            spherical = torch.where(scale > 0, scale, 1.0) * torch.eye(
                len(covariance), dtype=covariance.dtype, device=covariance.device
            )
            share = self.config.shrinkage
            precision = torch.linalg.inv((1 - share) * covariance + share * spherical)
            self._precision = precision
        gaps = features.double()[:, None] - self.means
        return torch.einsum("bkd,de,bke->bk", gaps, precision, gaps)

    @torch.no_grad()
    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns h(x) [B, D] of prompts [B, T], padded on either side."""
        ids, mask = _padded_right(input_ids, attention_mask)
        none = torch.zeros(len(self.tasks), device=ids.device)
        with self.routing.apart(), self.fixed(none):
            hidden = self._backbone()(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return (hidden.float() * weight).sum(1) / weight.sum(1)

    def _backbone(self) -> Any:
        model = self._model
        return model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fits the Gaussian of the newest task to its inputs.

        Args:
            batches: (ids [B, T], mask [B, T]) of prompts.

        Raises:
            RuntimeError: if the tasks that have a Gaussian are not those before the newest one, or
                the model is in training mode, where dropout would change the features.
        """
        if self._model.training:
            raise RuntimeError("fit: the model is in training mode: call model.eval() first")
        if len(self.means) != len(self.tasks) - 1:
            raise RuntimeError(
                f"fit: got {len(self.means)} Gaussians and the tasks {self.tasks}, expected one "
                "for each task but the newest: call it once after each task"
            )
        features = torch.cat([self.features(*batch) for batch in batches]).double()
        mean = features.mean(0)
        gaps = features - mean
        self.scatter = gaps.T @ gaps + (self.scatter.to(mean) if len(self.means) else 0.0)
        self.means = torch.cat([self.means.to(mean).reshape(-1, len(mean)), mean[None]])
        self.rows = self.rows.to(mean.device) + len(features)
        self._precision = None

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the Gaussians: means [K, D], scatter [D, D] and count."""
        return {"means": self.means, "scatter": self.scatter, "count": self.rows}

    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the Gaussians from what `state` returned."""
        empty = torch.zeros(0, dtype=torch.float64)
        self.means = state.get("means", empty).to(self._device)
        self.scatter = state.get("scatter", empty).to(self._device)
        self.rows = state.get("count", torch.zeros((), dtype=torch.int64)).to(self._device)
        self._precision = None

    def _require_order(self, order: Sequence[int]) -> None:
        """Raises ValueError if a task without a Gaussian is not the last one."""
        fitted = [k < len(self.means) for k in order]
        if not all(fitted[:-1]):
            raise ValueError(
                f"names: {self.tasks[-1]!r} has no Gaussian yet, so it must stay the last task; "
                "call fit first"
            )

    def _selected(self, order: Sequence[int], *, same: bool) -> None:
        """Selects the means too. The covariance keeps what a deleted task's inputs added to it."""
        super()._selected(order, same=same)
        kept = [k for k in order if k < len(self.means)]
        if kept:
            self.means = self.means[kept]
        else:
            self.restore_state({})

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless the state contains Gaussians of one width."""
        got = {name: state[name] for name in ("means", "scatter", "count") if name in state}
        shapes = {name: tuple(tensor.shape) for name, tensor in got.items()}
        first, last = (*shapes.get("means", ()), 0, 0)[:2]
        known = {"means": (first, last), "scatter": (last, last), "count": ()}
        none = {"means": (0,), "scatter": (0,), "count": ()}  # no task has ended
        fits = shapes == none or (shapes == known and 1 <= first <= tasks and got["count"] > 0)
        if not fits or any(got[n].dtype != torch.float64 for n in ("means", "scatter")):
            raise ValueError(
                f"{source}: got {_described(got)}, expected means [K, D] of at most {tasks} tasks "
                "and scatter [D, D], both float64, and a positive count"
            )


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} of shape {tuple(t.shape)}" for name, t in tensors.items()}


def _padded_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [B, T'] with the padding on the right, whichever side it was on."""
    seen = attention_mask.bool()
    order = (~seen).to(torch.int8).argsort(dim=1, stable=True)
    if not torch.compiler.is_compiling():  # where no size may depend on values
        order = order[:, : max(1, int(seen.sum(1).max()))]
    return input_ids.gather(1, order), seen.gather(1, order).to(attention_mask.dtype)
