"""Rows that grow task by task in one piece of memory, where what is frozen never moves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident
from sapt_fast.pools.sharding import is_partitioned, whole


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
