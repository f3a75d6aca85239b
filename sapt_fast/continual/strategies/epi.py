"""EPI: a private adapter for each task; the nearest Gaussian tells which task an input is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.workbench import Workbench

__all__ = ["Epi", "EpiOptions"]


@dataclass(frozen=True)
class EpiOptions:
    """Options of `Epi`."""

    shrinkage: float = field(
        default=0.1, metadata={"help": "Share of the identity in the covariance, in (0, 1]."}
    )

    def __post_init__(self) -> None:
        require(0 < self.shrinkage <= 1, "shrinkage", self.shrinkage, "a share in (0, 1]")


class Epi(Strategy):
    """Efficient parameter isolation (Wang et al., EPI, ACL 2023): L = CE of a private adapter.

    Which adapter answers is told without parameters: each task is a Gaussian over features of the
    frozen backbone, with a covariance common to all tasks, and the input goes to

        argmin_k (h(x) - mu_k)^T Sigma^-1 (h(x) - mu_k),  the least Mahalanobis distance.

    Left open and chosen here: h is the mean over the prompt's tokens of the last hidden states (of
    the encoder, where there is one) without any adapter; Sigma is the pooled within-task
    covariance of all training rows, mixed with `shrinkage` times the identity of equal trace,
    since there may be fewer rows than features.
    """

    Options = EpiOptions
    routes = True
    _means: Tensor  # [K, D] of the tasks learned
    _scatter: Tensor  # [D, D], summed over rows around the mean of their task
    _count: Tensor  # of rows
    _precision: Tensor | None

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        kind = settings.sapt.adapter
        # A prompt is there even with weight zero, so features would not be the backbone's own.
        require(kind == "lora", "adapter", kind, "'lora', without which the features are taken")

    def __init__(self, bench: Workbench, options: EpiOptions) -> None:
        super().__init__(bench, options)
        self.load_state({})

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.model.sapt.add_task(task.name)
        self.freeze_router()

    def mixture(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        count = len(self.model.sapt.tasks)
        if len(self._means) < count:  # the newest task is being learned
            newest = torch.tensor([count - 1], device=input_ids.device)
            return F.one_hot(newest, count).float()
        nearest = self.distances(self.features(input_ids, attention_mask)).argmin(1)
        return F.one_hot(nearest, count).float()

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances [B, K] of features [B, D] to the tasks' means."""
        if self._precision is None:
            covariance = self._scatter / self._count
            scale = covariance.diagonal().mean()
            # With one row for each task nothing varies, and the nearest mean is the answer.
            spherical = torch.where(scale > 0, scale, 1.0) * torch.eye(
                len(covariance), dtype=covariance.dtype, device=covariance.device
            )
            share = self.options.shrinkage
            self._precision = torch.linalg.inv((1 - share) * covariance + share * spherical)
        gaps = features.double()[:, None] - self._means
        return torch.einsum("bkd,de,bke->bk", gaps, self._precision, gaps)

    @torch.no_grad()
    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """h(x) [B, D] of prompts [B, T], padded on either side."""
        model = self.model
        rows = [row[seen.bool()].tolist() for row, seen in zip(input_ids, attention_mask)]  # noqa: B905
        ids, mask = self.bench.pad(rows)
        backbone = model.get_encoder() if self.bench.kind == "seq2seq" else model.base_model
        none = torch.zeros(len(model.sapt.tasks), device=ids.device)
        with model.sapt.fixed(none), self.bench.settings.autocast(ids.device):
            hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return (hidden.float() * weight).sum(1) / weight.sum(1)

    def end_task(self, task: TaskData) -> None:
        self.model.eval()
        inputs, size = self.bench.inputs(task.train), self.bench.settings.eval_batch_size
        starts = range(0, len(inputs), size)
        batches = (self.bench.pad(inputs[start : start + size]) for start in starts)
        features = torch.cat([self.features(*batch) for batch in batches]).double()
        mean = features.mean(0)
        gaps = features - mean
        self._scatter = gaps.T @ gaps + (self._scatter if len(self._means) else 0.0)
        self._means = torch.cat([self._means.to(mean).reshape(-1, len(mean)), mean[None]])
        self._count = self._count + len(features)
        self._precision = None

    def state(self) -> dict[str, Tensor]:
        return {"means": self._means, "scatter": self._scatter, "count": self._count}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        device = self.bench.device
        empty = torch.zeros(0, dtype=torch.float64)
        self._means = state.get("means", empty).to(device)
        self._scatter = state.get("scatter", empty).to(device)
        self._count = state.get("count", torch.zeros((), dtype=torch.int64)).to(device)
        self._precision = None
