"""The pool of LoRA adapters of one linear layer, stacked for one pass over all of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from sapt_fast.devices import Resident
from sapt_fast.ops import transforms
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import RankTable, rank_table
from sapt_fast.pools.own import Own
from sapt_fast.pools.rows import RowStack

Adapter = tuple[Tensor, Tensor, float]  # A [r, in_features], B [r, out_features], alpha / r

# Far above what trainings use; times the weights of an adapter it stays within float32.
MOST_SCALING = 2.0**30


def is_scaling(value: Any) -> bool:
    """Whether a value can be the scaling (alpha / r) of an adapter: finite, at most 2**30."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= MOST_SCALING


def require_scaling(scaling: float) -> None:
    """Raises ValueError unless `is_scaling`."""
    if not is_scaling(scaling):
        shown = str(scaling)[:40]
        raise ValueError(f"scaling: got {shown}, expected a number of at most {MOST_SCALING:g}")


class AdapterPool(Own, Resident):
    """All LoRA adapters of one linear layer.

    Attributes:
        a: the stack of A, [R, in_features]. b: of B, [R, out_features] (B as rows of rank).
        ranks: rank of each adapter, in learning order; 0 where a task leaves this layer alone.
        scaling: alpha / r of each adapter. Both grow by `add` alone.
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        reserve: int = 64,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device or "cpu")
        dtype = dtype or torch.get_default_dtype()
        self.a = RowStack(in_features, reserve, device=device, dtype=dtype)
        self.b = RowStack(out_features, reserve, device=device, dtype=dtype)
        self.ranks, self.scaling = (), ()
        self._tables: dict[tuple[torch.device, torch.dtype], RankTable] = {}

    def __len__(self) -> int:
        return len(self.ranks)

    def add(self, rank: int, scaling: float, weights: tuple[Tensor, Tensor] | None = None) -> None:
        """Adds a trainable adapter and freezes the others.

        Args:
            rank: r; 0 for none in this layer. scaling: alpha / r.
            weights: A [r, in_features] and B [r, out_features] to copy; None for an adapter that
                changes nothing yet (A Kaiming-uniform, B zero).

        Raises:
            ValueError: a shape does not fit, or the scaling is above 2**30; nothing has changed.
        """
        require_scaling(scaling)
        if weights is None:
            self.a.append(
                rank, lambda rows: nn.init.kaiming_uniform_(rows, a=5**0.5) if rank else rows
            )
            self.b.append(rank, nn.init.zeros_)
        else:
            self.require_fits(rank, weights, scaling)
            self.a.append(rank, lambda rows: rows.copy_(weights[0]))
            self.b.append(rank, lambda rows: rows.copy_(weights[1]))
        self.ranks += (rank,)
        self.scaling += (float(scaling),)
        self._tables.clear()
        rows = self.a.trainable
        self._table(rows.device, torch.promote_types(rows.dtype, torch.float32))

    def require_fits(self, rank: int, weights: tuple[Tensor, Tensor], scaling: float = 1.0) -> None:
        """Raises ValueError unless weights are A [rank, in_features] and B [rank, out_features],
        and the scaling is plausible."""
        require_scaling(scaling)
        for name, given, stack in zip("AB", weights, (self.a, self.b), strict=True):
            if tuple(given.shape) != (rank, stack.width):
                raise ValueError(
                    f"weights: got {name} of shape {tuple(given.shape)}, expected "
                    f"[{rank}, {stack.width}]"
                )

    def realign(self) -> None:
        """Puts rows back in place whose parameters were moved, for layers that are compiled."""
        self.a.realign()
        self.b.realign()

    def adapter(self, index: int) -> tuple[Tensor, Tensor]:
        """(A [r, in_features], B [r, out_features]) of one adapter, views of the pool."""
        start = sum(self.ranks[:index])
        rows = slice(start, start + self.ranks[index])
        return self.a.rows()[rows], self.b.rows()[rows]

    def scaled(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A [R, in_features], and B [R, out_features] times `weights` [K] and scaling, on the CPU.

        `A^T B` is the static mixture.
        """
        scale = weights.double() * torch.tensor(self.scaling, dtype=torch.float64)
        scale = scale.repeat_interleave(torch.tensor(self.ranks))
        b = self.b.rows().to("cpu")
        return self.a.rows().to("cpu"), (b.double() * scale[:, None]).to(b.dtype)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mixture: Tensor,
        *,
        grad_through_frozen: bool = True,
        backend: str | None = None,
    ) -> Tensor:
        """`ops.mixed_lora_linear` over this pool.

        Args:
            x: [..., in_features], rows grouped by sample.
            weight, bias: of the layer; weight None for the mixture alone.
            mixture: [S, K]; S divides the rows of x.
        """
        given = self.projection(x, weight, bias, grad_through_frozen)
        return mix(x, mixture, [given], grad_through_frozen, backend)[0]

    def projection(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_through_frozen: bool
    ) -> PooledProjection:
        """This pool with its layer's weight and bias, as `ops.mixed_lora.mix` takes them."""
        # Every layer comes through here in every forward: each module attribute is read once.
        rows_a, rows_b = self.a, self.b
        a, b = rows_a.trainable, rows_b.trainable
        frozen = rows_a.frozen
        first = frozen.shape[0]
        last = first + a.shape[0]
        tracked = transforms.active()
        trains = tracked or a.requires_grad or b.requires_grad
        # Rows not listed get no gradient and, without grad_through_frozen, pass none on to x.
        listed = last > first and (trains or not grad_through_frozen)
        parts_a: list[Tensor] = [a] if listed else []
        parts_b: list[Tensor] = [b] if listed else []
        rows = [first, last] if listed else []
        if first and grad_through_frozen and (tracked or torch.is_grad_enabled()):
            frozen_b = rows_b.frozen
            if tracked or _stands_in(frozen) or _stands_in(frozen_b):
                # A caller's own tensors, of whose kind it is not known what trains.
                parts_a, parts_b = [frozen, *parts_a], [frozen_b, *parts_b]
                rows = [0, first, *rows]
        table = self._table(x.device, torch.promote_types(x.dtype, torch.float32))
        projection = Projection(weight, bias, rows_a.rows(), rows_b.rows(), *table)
        return PooledProjection(projection, parts_a, parts_b, rows)

    def _table(self, device: torch.device, dtype: torch.dtype) -> RankTable:
        table = self._tables.get((device, dtype))
        if table is None:
            with torch.inference_mode(False):
                table = rank_table(self.ranks, self.scaling, device, dtype)
            # What is made while a graph is traced means nothing outside of it.
            traced = torch.compiler.is_compiling() or detect_fake_mode() is not None
            if not traced and not transforms.active():
                self._tables[device, dtype] = table
        return table

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


def _stands_in(rows: Tensor) -> bool:
    """Whether a caller's tensor takes the place of frozen rows and wants a gradient."""
    return type(rows) is Tensor and rows.requires_grad
