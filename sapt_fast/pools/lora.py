"""The adapter pool: storage that grows task by task and never moves what is frozen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from sapt_fast.devices import Resident
from sapt_fast.ops import transforms
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import RankTable, rank_table
from sapt_fast.pools.sharding import is_partitioned, whole

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


class RowStack(Resident):
    """The rows of all tasks of one kind, one after the other in one piece of memory.

    Two parameters cover the rows: `frozen`, those of earlier tasks, and `trainable`, those of the
    newest one. Both are views of one buffer with room to spare, so the whole stack is a single
    contiguous matrix for the kernels and a new task only writes its own rows. Beyond the reserved
    room the buffer doubles.

    Parameters that `.to()` or a load moved are put back side by side at once; those that
    `p.data = ...` moved, when a forward next starts or reads them outside of a compiled graph.
    Tensors that stand in for a while (`torch.func.functional_call`, FSDP, ZeRO-3) are left alone
    and read through a copy, R x width numbers for each read. A model compiled as a whole notices
    neither: after `p.data = ...` call `realign` of its pools, or write the values in place with
    `p.copy_`.

    Args:
        width: columns of a row.
        reserve: rows to make room for.
    """

    frozen: nn.Parameter
    trainable: nn.Parameter

    def __init__(
        self, width: int, reserve: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.width = width
        self._memory = torch.empty(max(reserve, 1), width, device=device, dtype=dtype)
        self.frozen = nn.Parameter(self._memory[:0], requires_grad=False)
        self.trainable = nn.Parameter(self._memory[:0], requires_grad=False)
        self._note_rows()

    def __len__(self) -> int:
        return self.frozen.shape[0] + self.trainable.shape[0]

    @torch.no_grad()
    def append(self, rows: int, fill: Callable[[Tensor], object]) -> nn.Parameter:
        """Freezes what is there and adds `rows` trainable rows, written by `fill` in place.

        The parameter that trained before leaves the module with a copy of its rows and without a
        gradient, so an optimizer that still holds it cannot reach the frozen ones.

        Raises:
            RuntimeError: other tensors stand in for the parameters.
        """
        if self._was_replaced():
            self._move(self._memory.shape[0])
        if not self._has_own_parts():
            raise RuntimeError(
                "the pool's parameters were replaced by other tensors (functional_call, FSDP, "
                "ZeRO-3 or an assignment): add tasks while they are in place; with a sharded "
                "model, save it, load_pretrained into a new one, add the task and shard that"
            )
        self._realign()
        start = len(self)
        if start + rows > self._memory.shape[0]:
            self._move(max(2 * self._memory.shape[0], start + rows))
        fresh = self._memory[start : start + rows]
        fill(fresh)
        self.trainable.requires_grad_(False)
        self.trainable.grad = None
        self.trainable.data = self.trainable.data.clone()
        self.frozen.data = self._memory[:start]
        self.trainable = nn.Parameter(fresh)
        self._note_rows()
        return self.trainable

    def rows(self) -> Tensor:
        """All rows, [R, width], without gradient; shares memory with the two parameters.

        Of parameters that are sharded just then, a copy; all processes have to read it together.
        """
        # Every layer comes through here in every forward: four comparisons, no module attributes.
        if not torch.compiler.is_compiling():
            if not self._has_own_parts():
                self._require_present()
                return torch.cat([whole(self.frozen), whole(self.trainable)])
            frozen, trainable = self._own
            if (frozen.data_ptr(), trainable.data_ptr()) != self._addresses:
                self._realign()
        return self._rows

    def _has_own_parts(self) -> bool:
        parts, own = self._parameters, self._own
        if is_partitioned(own[1]):
            return False
        return parts["frozen"] is own[0] and parts["trainable"] is own[1]

    def _was_replaced(self) -> bool:
        """Whether other parameters took the place of ours for good, as accelerate moves a block."""
        kept = self._memory.is_meta
        return not self._has_own_parts() and all(
            type(part) is nn.Parameter and not is_partitioned(part) and part.is_meta == kept
            for part in (self.frozen, self.trainable)
        )

    def _return(self, hook: Any) -> None:
        super()._return(hook)
        if self._was_replaced():
            self._move(self._memory.shape[0])

    def _require_present(self) -> None:
        """Raises RuntimeError if accelerate offloads the rows, as a block's hook does."""
        if self.trainable.is_meta and not self._memory.is_meta:
            raise RuntimeError(
                "accelerate offloaded the adapters with the block that they are in "
                "(preload_module_classes): dispatch the model without it, or before patch"
            )

    def realign(self) -> None:
        """Puts moved rows back side by side; leaves alone what others put in their place."""
        if torch.compiler.is_compiling():
            return
        if self._has_own_parts():
            self.rows()
        else:
            self._require_present()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The parameters, each with a storage of its own.

        Savers drop or refuse what shares storage with another tensor. The memory is the same.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or not self._has_own_parts() or self._memory.is_meta:
            return
        for name in ("frozen", "trainable"):
            rows = destination[prefix + name]
            start = rows.storage_offset() * rows.element_size()
            memory = rows.untyped_storage()[start : start + rows.nbytes]
            destination[prefix + name] = rows.new_empty(0).set_(memory, 0, rows.shape)

    # A compiled forward does not look where the parameters are, so whatever moves them realigns.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowStack":
        own = self._has_own_parts()
        super()._apply(fn, recurse)
        if own:
            self._realign()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        own = self._has_own_parts()
        super()._load_from_state_dict(*args, **kwargs)
        if own:
            self._realign()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._realign()

    def _realign(self) -> None:
        """Puts the parameters back side by side after `.to()`, a deep copy or an assigned load."""
        start = self._memory.data_ptr()
        offset = self.frozen.numel() * self._memory.element_size()
        for part, address in ((self.frozen, start), (self.trainable, start + offset)):
            moved = part.numel() > 0 and part.data_ptr() != address
            if moved or part.dtype != self._memory.dtype or part.device != self._memory.device:
                self._move(self._memory.shape[0])
                return
        self._note_rows()

    def _note_rows(self) -> None:
        self._own = self.frozen, self.trainable
        self._rows = self._memory[: len(self)]
        self._addresses = self.frozen.data_ptr(), self.trainable.data_ptr()

    @torch.inference_mode(False)
    def _move(self, capacity: int) -> None:
        size, first = len(self), self.frozen.shape[0]
        dtype = torch.promote_types(self.frozen.dtype, self.trainable.dtype)
        memory = torch.empty(capacity, self.width, device=self.trainable.device, dtype=dtype)
        memory[:first] = self.frozen.data
        memory[first:size] = self.trainable.data
        self._memory = memory
        self.frozen.data = memory[:first]
        self.trainable.data = memory[first:size]
        self._note_rows()

    def extra_repr(self) -> str:
        frozen, trainable = self.frozen.shape[0], self.trainable.shape[0]
        return f"frozen={frozen}, trainable={trainable}, width={self.width}"


class AdapterPool(Resident):
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
