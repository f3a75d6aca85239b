"""Classifiers in closed form on frozen features, from running statistics of the classes.

The statistics of rows that come task after task equal those of all rows at once, and so do the
heads: nothing is forgotten and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.checks import require_count, require_number

__all__ = ["ClassStatistics", "LinearHead"]

# A scatter below this share of the sum of squares is the rounding of means of equal rows.
_ROUNDING = 1e-28


class LinearHead:
    """A head of fixed weights: `features @ weight.T + bias`, in float64.

    Attributes:
        weight: `[C, D]` float64.
        bias: `[C]` float64, -inf for classes without rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the scores `[B, C]` of features `[B, D]`, float64, on the head's device.

        Classes without rows score -inf. No gradient reaches the features.

        Raises:
            ValueError: if the features have another shape or are not finite.
        """
        rows = _rows(features, self.weight.shape[1]).to(self.weight)
        return torch.addmm(self.bias, rows, self.weight.T)


class ClassStatistics:
    """Count and mean of the features of each class, and their scatter within classes, in float64.

    Updates and merges may come in any order: the statistics differ by rounding alone. Means and
    scatter are combined by the pairwise formulas of Chan, Golub and LeVeque (1979), which do not
    subtract large sums of squares from each other. Memory: `8 (D^2 + C D)` bytes.

    Args:
        features: D, the width of the features.
        classes: C, the number of classes, those of later tasks included.
        device: of the statistics and the heads; defaults to the CPU.

    Attributes:
        counts: `[C]` int64, rows seen of each class.
        means: `[C, D]` float64, 0 for classes without rows.
        scatter: `[D, D]` float64, the sum over rows of `(x - mean)(x - mean)^T`, where mean is that
            of the row's class.

    Raises:
        ValueError: if a size is not a whole number of at least 1.

    Example:
        >>> statistics = ClassStatistics(features=2, classes=3)
        >>> rows = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 1.0], [5.0, 3.0]])
        >>> statistics.update(rows, torch.tensor([0, 0, 2, 2]))
        >>> statistics.lda()(torch.tensor([[4.0, 2.0]])).argmax(1)
        tensor([2])
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    def __init__(
        self, features: int, classes: int, *, device: torch.device | str | None = None
    ) -> None:
        require_count("features", features)
        require_count("classes", classes)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.means = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds rows.

        Args:
            features: `[B, D]`, of any floating dtype and on any device; B may be 0.
            labels: `[B]` integers, the classes in `[0, C)`.

        Raises:
            ValueError: if a shape or dtype is another, a feature is not finite or its square
                overflows, or a label is out of range. The statistics are unchanged then.
        """
        classes, width = self.means.shape
        rows = _rows(features, width).to(self.means)
        labels = _labels(labels, len(rows), classes).to(self.means.device)
        members = F.one_hot(labels, classes)  # [B, C]; a product is deterministic on every device
        counts = members.sum(0)
        means = members.to(rows).T @ rows / counts.clamp(min=1)[:, None]
        rows = rows - means[labels]
        self._add(counts, means, rows.T @ rows)

    @torch.no_grad()
    def merge(self, other: ClassStatistics) -> None:
        """Adds the rows of other statistics, which stay as they are.

        Raises:
            ValueError: if their sizes are others. These statistics are unchanged then.
        """
        if other.means.shape != self.means.shape:
            raise ValueError(
                f"other: got means of shape {list(other.means.shape)}, expected "
                f"{list(self.means.shape)}"
            )
        device = self.means.device
        self._add(other.counts.to(device), other.means.to(device), other.scatter.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of `counts`, `means` and `scatter`."""
        return {name: getattr(self, name).clone() for name in ("counts", "means", "scatter")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the statistics by those of `state_dict`.

        Raises:
            ValueError: if names, shapes or dtypes are others, a value is not finite, or a count is
                negative. The statistics are unchanged then.
        """
        own = {name: getattr(self, name) for name in ("counts", "means", "scatter")}
        if set(state) != set(own):
            raise ValueError(f"state: got {sorted(state)}, expected {sorted(own)}")
        for name, value in state.items():
            if value.shape != own[name].shape or value.dtype != own[name].dtype:
                raise ValueError(
                    f"{name}: got {value.dtype} {list(value.shape)}, expected {own[name].dtype} "
                    f"{list(own[name].shape)}"
                )
            if not value.isfinite().all() or (name == "counts" and (value < 0).any()):
                raise ValueError(f"{name}: got negative counts, NaN or Inf, expected statistics")
        for name, value in state.items():
            setattr(self, name, value.detach().to(own[name].device, copy=True))

    def nearest_class_mean(self) -> LinearHead:
        """Returns the head that chooses the class whose mean has the least Euclidean distance.

        A score is minus half the squared distance, up to a term that all classes share:
        `x . mean - |mean|^2 / 2`.

        Raises:
            ValueError: if there are no rows.
        """
        self._require_rows()
        return self._head(self.means, -0.5 * self.means.square().sum(1))

    def lda(self, shrinkage: float = 0.3) -> LinearHead:
        """Returns the head of linear discriminant analysis, whose scores are log posteriors.

        The log posteriors lack a term that all classes share. The covariance S that the classes
        share is shrunk as in Ledoit and Wolf (2004), `(1 - shrinkage) S + shrinkage trace(S) / D I`
        with S the scatter divided by the number of rows. A class's prior is its share of the rows.
        These are the definitions of scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr")`.

        If no two rows of a class differ, there is no covariance: the head is then that of the
        nearest class mean.

        Args:
            shrinkage: in [0, 1].

        Raises:
            ValueError: if there are no rows, or the covariance is singular (with shrinkage 0 and
                fewer rows than features and classes together, for example).
        """
        require_number("shrinkage", shrinkage, most=1.0)
        rows, width = self._require_rows(), self.means.shape[1]
        trace = self.scatter.trace()
        if trace <= _ROUNDING * (self.counts.to(trace) @ self.means.square()).sum():
            return self.nearest_class_mean()
        covariance = self.scatter * ((1 - shrinkage) / rows)
        covariance.diagonal().add_(shrinkage * trace / (rows * width))
        full = shrinkage > 0 or rows - int((self.counts > 0).sum()) >= width
        weight = _solved(covariance, self.means, "shrinkage", shrinkage, full=full)
        priors = (self.counts.to(trace) / rows).log()
        return self._head(weight, priors - 0.5 * (weight * self.means).sum(1))

    def ridge(self, strength: float = 10.0) -> LinearHead:
        """Returns the head of ridge regression on the classes as one-hot targets.

        Minimises `|X W + b - Y|^2 + strength |W|^2` over all rows; the bias b is not penalised.

        Args:
            strength: of the penalty, at least 0. It is compared with the sum over rows, not the
                mean: the same strength weighs less with more rows.

        Raises:
            ValueError: if there are no rows, or the system is singular (with strength 0 and no
                more rows than features, for example).
        """
        require_number("strength", strength)
        rows, width = self._require_rows(), self.means.shape[1]
        counts = self.counts.to(self.means)
        shares = counts / rows
        mean = shares @ self.means  # [D], of all rows
        offsets = self.means - mean  # [C, D]
        weighted = counts[:, None] * offsets
        gram = self.scatter + weighted.T @ offsets
        gram.diagonal().add_(strength)
        weight = _solved(gram, weighted, "strength", strength, full=strength > 0 or rows > width)
        return self._head(weight, shares - weight @ mean)

    def _require_rows(self) -> int:
        """Returns the number of rows, of which there must be one."""
        rows = int(self.counts.sum())
        if not rows:
            raise ValueError("statistics: got no rows, expected at least one")
        return rows

    def _head(self, weight: Tensor, bias: Tensor) -> LinearHead:
        """Returns a head, in which classes without rows score -inf."""
        seen = self.counts > 0
        unseen = torch.full_like(bias, -torch.inf)
        return LinearHead(weight * seen[:, None], torch.where(seen, bias, unseen))

    def _add(self, counts: Tensor, means: Tensor, scatter: Tensor) -> None:
        total = self.counts + counts
        share = counts / total.clamp(min=1).to(torch.float64)  # [C]
        offsets = means - self.means
        scatter = self.scatter + scatter
        scatter += (offsets * (self.counts * share)[:, None]).T @ offsets
        if not scatter.isfinite().all():
            raise ValueError("features: got values whose squares overflow, expected smaller ones")
        self.means = self.means + offsets * share[:, None]
        self.counts, self.scatter = total, scatter


def _rows(features: Tensor, width: int) -> Tensor:
    """Returns features without gradient, after their checks."""
    if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
        raise ValueError(
            f"features: got {features.dtype} {list(features.shape)}, expected floats [B, {width}]"
        )
    features = features.detach()
    broken = (~features.isfinite()).any(1).nonzero()
    if len(broken):
        raise ValueError(f"features: got NaN or Inf in row {int(broken[0])}, expected finite rows")
    return features


def _labels(labels: Tensor, rows: int, classes: int) -> Tensor:
    """Returns labels as int64, after their checks."""
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (rows,) or not whole:
        raise ValueError(
            f"labels: got {labels.dtype} {list(labels.shape)}, expected integers [{rows}]"
        )
    labels = labels.to(torch.int64)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"labels: got {int(wrong[0])}, expected classes in [0, {classes})")
    return labels


def _solved(matrix: Tensor, rows: Tensor, name: str, value: Any, *, full: bool) -> Tensor:
    """Returns `rows @ inverse(matrix)` [C, D] of a symmetric positive definite matrix [D, D].

    Args:
        matrix: [D, D].
        rows: [C, D].
        name: the option that makes the matrix regular, for the message.
        value: of the option.
        full: whether there are enough rows for the matrix to be regular.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not full or failed:
        raise ValueError(f"{name}: got {value}, expected more: the covariance is singular")
    return torch.cholesky_solve(rows.T, factor).T
