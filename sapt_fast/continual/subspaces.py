"""The subspaces that inputs of earlier tasks span, which gradient projection keeps updates off.

Saha et al., "Gradient Projection Memory for Continual Learning", ICLR 2021. As in DualGPM (Liang
and Li, "Adaptive Plasticity Improvement for Continual Learning", CVPR 2023), a subspace or its
complement is stored, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Moment", "Subspace", "gathered_moments", "grown", "leading_directions", "of_one_length"]

# Shares of the energy below this are rounding: a basis is stored in float32.
_LEAST_SHARE = 1e-12


class Subspace(NamedTuple):
    """A subspace of R^D.

    Attributes:
        basis: [D, k] float32, orthonormal columns.
        complement: whether the basis spans the subspace's complement.
    """

    basis: Tensor
    complement: bool = False

    def off(self, rows: Tensor) -> Tensor:
        """Returns rows [n, D] without their component in the subspace, in their dtype."""
        basis = self.basis.to(rows)  # dtype and device
        inside = (rows @ basis) @ basis.T
        return inside if self.complement else rows - inside

    def copy_to(self, device: torch.device) -> Subspace:
        """Returns a copy in its own memory on a device."""
        basis = torch.empty(self.basis.shape, dtype=self.basis.dtype, device=device)
        return Subspace(basis.copy_(self.basis), self.complement)


def leading_directions(moment: Tensor, count: int, kept: Subspace | None) -> Tensor:
    """Returns the directions off a subspace in which inputs are largest.

    They are the leading left singular vectors of (I - P) M, where P projects to the subspace.

    Args:
        moment: M [D, D], the mean of x x^T over inputs x.
        count: r.
        kept: the subspace; None for the empty one.

    Returns:
        [r, D] float64, on the CPU: orthonormal rows, largest first. Rows for which the inputs have
        no direction left are zero.

    Raises:
        ValueError: if M has non-finite values.
    """
    vectors, shares = _remaining(moment, kept)
    rows = moment.new_zeros(count, len(moment), dtype=torch.float64, device="cpu")
    found = min(count, int((shares > _LEAST_SHARE).sum()))
    rows[:found] = _orthonormal(vectors[:, :found], kept).T
    return rows


def grown(kept: Subspace | None, moment: Tensor, threshold: float) -> Subspace:
    """Returns a subspace that also contains the main directions of further inputs.

    Directions are added, those of the largest share first, while the subspace has less than
    `threshold` of the energy |M|^2 of the inputs. To an empty subspace, directions are added while
    the share with the next one is below `threshold`, and at least one. With a threshold of 1, all
    directions are added that are more than rounding: a sum of shares may reach 1 before the last.

    Args:
        kept: the subspace; None for the empty one.
        moment: M [D, D], the mean of x x^T over inputs x.
        threshold: in (0, 1].

    Returns:
        The subspace, on the CPU.

    Raises:
        ValueError: if M has non-finite values.
    """
    vectors, shares = _remaining(moment, kept)
    before = (1 - shares.sum() if kept is not None else 0.0) + shares.cumsum(0)
    if kept is not None:
        before = before - shares
    added = int((before < threshold).sum()) if threshold < 1 else len(shares)
    added = min(added if kept is not None else max(added, 1), int((shares > _LEAST_SHARE).sum()))
    new = _orthonormal(vectors[:, :added], kept)
    if kept is None:
        return _smaller(new)
    if not added:
        return kept
    basis = kept.basis.double().cpu()
    if not kept.complement:
        return _smaller(torch.cat([basis, new], dim=1))
    # What is left of the complement: its part off the new directions.
    left, _, _ = torch.linalg.svd(basis - new @ (new.T @ basis), full_matrices=False)
    return Subspace(left[:, : basis.shape[1] - added].float().contiguous(), complement=True)


def _remaining(moment: Tensor, kept: Subspace | None) -> tuple[Tensor, Tensor]:
    """Returns left singular vectors [D, D] of (I - P) M, and each one's share [D] of |M|^2."""
    whole = moment.cpu().double()
    if not whole.isfinite().all():
        raise ValueError(
            "moment: got non-finite values, expected finite inputs of layers and gates; if the "
            "training has diverged, use a smaller learning_rate"
        )
    rest = whole if kept is None else kept.off(whole.T).T
    vectors, values, _ = torch.linalg.svd(rest)
    total = whole.square().sum()
    return vectors, torch.where(total > 0, values.square() / total, 0.0)


def _orthonormal(vectors: Tensor, kept: Subspace | None) -> Tensor:
    """Returns columns [D, n] that are orthonormal, and orthogonal to a subspace up to rounding."""
    if kept is None or not vectors.shape[1]:
        return vectors
    # Singular vectors of small values are orthogonal only as far as the stored basis is exact.
    exact, triangle = torch.linalg.qr(kept.off(vectors.T).T)
    return torch.where(triangle.diagonal() < 0, -exact, exact)


def _smaller(basis: Tensor) -> Subspace:
    """Returns the span of columns [D, k], by its complement if that has the smaller dimension."""
    width, size = basis.shape
    if size <= width / 2:
        return Subspace(basis.float().contiguous())
    whole, _ = torch.linalg.qr(basis, mode="complete")
    return Subspace(whole[:, size:].float().contiguous(), complement=True)


class Moment:
    """The mean of x x^T over vectors x."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Adds vectors [..., D]."""
        x = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            product = x.T @ x
        self._total = product if self._total is None else self._total + product
        self._count += len(x)

    def mean(self) -> Tensor | None:
        """Returns the mean [D, D] float32; None if there were no vectors."""
        return self._total / self._count if self._total is not None and self._count else None


@contextmanager
def gathered_moments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A context that gathers the second moments of layers' inputs.

    Args:
        layers: by name; their first argument is x [..., D].

    Yields:
        A dict that has the mean of x x^T, [D, D] float32, by name, once the context has ended;
        without the layers that were not called.
    """
    found: dict[str, Tensor] = {}
    moments = {name: Moment() for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, own=moments[name]: own.add(args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: moment.mean() for name, moment in moments.items()}
    found.update({name: mean for name, mean in means.items() if mean is not None})


def of_one_length(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Yields batches of encoded examples that need no padding.

    Args:
        rows: with `input_ids` and `labels`.
        size: the largest batch.
    """

    def lengths(row: Any) -> tuple[int, int]:
        return len(row["input_ids"]), len(row["labels"])

    batch: list[Any] = []
    for row in sorted(rows, key=lengths):
        if batch and (len(batch) == size or lengths(row) != lengths(batch[0])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
