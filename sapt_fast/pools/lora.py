"""The pool of LoRA adapters of one linear layer, stacked for one pass over all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from sapt_fast.devices import Resident
from sapt_fast.ops import transforms
from sapt_fast.ops._dropout import drawn
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import RankTable, rank_table
from sapt_fast.pools.own import Own
from sapt_fast.pools.rows import RowStack

Adapter = tuple[Tensor, Tensor, float]  # A [r, in_features], B [r, out_features], alpha / r

# Far larger than any useful scaling; its product with an adapter's weights fits in float32.
MOST_SCALING = 2.0**30


def is_scaling(value: Any) -> bool:
    """Returns whether a value can be the scaling (alpha / r) of an adapter: at most 2**30."""
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
        a: the stacked A, [R, in_features].
        b: the stacked B, transposed, [R, out_features].
        ranks: rank of each adapter, in learning order; 0 if a task does not adapt this layer.
        scaling: alpha / r of each adapter. Only `add` and `reorder` change ranks and scaling.
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
            rank: r; 0 for no adapter in this layer.
            scaling: alpha / r.
            weights: A [r, in_features] and B [r, out_features] to copy; None for an adapter that
                does not change the output yet (A Kaiming-uniform, B zero).

        Raises:
            ValueError: if a shape does not fit; nothing has changed then.
            ValueError: if the scaling is above 2**30; nothing has changed then.
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
        self._set_ranks((*self.ranks, rank), (*self.scaling, float(scaling)))

    def reorder(self, order: Sequence[int]) -> None:
        """Sets ranks and scaling after the rows of the adapters `order` were selected."""
        ranks = tuple(self.ranks[k] for k in order)
        self._set_ranks(ranks, tuple(self.scaling[k] for k in order))

    def _set_ranks(self, ranks: tuple[int, ...], scaling: tuple[float, ...]) -> None:
        self.ranks, self.scaling = ranks, scaling
        self._tables.clear()
        rows = self.a.trainable
        self._table(rows.device, torch.promote_types(rows.dtype, torch.float32))

    def require_fits(self, rank: int, weights: tuple[Tensor, Tensor], scaling: float = 1.0) -> None:
        """Raises ValueError unless the shapes of A and B and the scaling are valid.

        Args:
            rank: r.
            weights: A [r, in_features] and B [r, out_features].
            scaling: alpha / r, at most 2**30.
        """
        require_scaling(scaling)
        for name, given, stack in zip("AB", weights, (self.a, self.b), strict=True):
            if tuple(given.shape) != (rank, stack.width):
                raise ValueError(
                    f"weights: got {name} of shape {tuple(given.shape)}, expected "
                    f"[{rank}, {stack.width}]"
                )

    def realign(self) -> None:
        """Moves rows whose parameters were moved back into one buffer, for compiled layers."""
        self.a.realign()
        self.b.realign()

    def adapter(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns A [r, in_features] and B [r, out_features] of one adapter, views of the pool."""
        start = sum(self.ranks[:index])
        rows = slice(start, start + self.ranks[index])
        return self.a.rows()[rows], self.b.rows()[rows]

    def scaled(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of a static mixture `A^T B`, on the CPU.

        Args:
            weights: [K], in learning order.

        Returns:
            A [R, in_features], and B [R, out_features] times weight and scaling.
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
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> Tensor:
        """Computes `ops.mixed_lora_linear` with this pool.

        Args:
            x: [..., in_features], rows grouped by sample.
            weight: the layer's weight [out_features, in_features]; None to compute only the
                mixture of the adapters.
            bias: the layer's bias [out_features], or what is added to each row of x,
                [rows, out_features]; or None.
            mixture: [S, K]; S divides the number of rows of x.
            grad_through_frozen, dropout_p, backend: as in `ops.mixed_lora_linear`.

        Returns:
            [..., out_features].
        """
        given = self.projection(x, weight, bias, grad_through_frozen)
        dropout = drawn(dropout_p, x, 1)
        return mix(x, mixture, [given], grad_through_frozen, backend, dropout)[0]

    def projection(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_through_frozen: bool
    ) -> PooledProjection:
        """Returns this pool with its layer's weight and bias, for `ops.mixed_lora.mix`."""
        # Runs in every layer and forward, so each module attribute is read once.
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
                # A caller's own tensors, any of which may train.
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
            # Tensors created while a graph is traced are invalid outside of it.
            traced = torch.compiler.is_compiling() or detect_fake_mode() is not None
            if not traced and not transforms.active():
                self._tables[device, dtype] = table
        return table

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


def _stands_in(rows: Tensor) -> bool:
    """Returns whether a caller's tensor replaces frozen rows and requires a gradient."""
    return type(rows) is Tensor and rows.requires_grad
