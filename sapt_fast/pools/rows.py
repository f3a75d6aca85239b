"""Rows that grow task by task in one buffer, so that the rows of all tasks are one matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident
from sapt_fast.pools.sharding import is_partitioned, whole


class RowStack(Resident):
    """The rows of all tasks, concatenated in one buffer.

    There are two parameters: `frozen`, the rows of earlier tasks, and `trainable`, those of the
    newest one. Both are views of one buffer. So all rows are one contiguous matrix for the kernels,
    and a new task only writes its own rows. When the buffer is full, its size doubles.

    - If `.to()` or a load moves the parameters, they are moved back into one buffer at once.
    - If `p.data = ...` moves them, this happens when the next forward starts or reads the rows
      outside of a compiled graph. In a model compiled as a whole it does not happen: call
      `realign` of its pools, or write the values in place with `p.copy_`.
    - If other tensors replace them for some time (`torch.func.functional_call`, FSDP, ZeRO-3),
      these are not moved. Each read then copies R x width numbers.

    Args:
        width: number of columns.
        reserve: number of rows to preallocate.
        device, dtype: of the rows.
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
        """Freezes all rows and adds trainable ones.

        The previous `trainable` leaves the module with a copy of its rows and without a gradient,
        so an optimizer that still contains it cannot change the frozen rows.

        Args:
            rows: number of rows to add.
            fill: writes the values of the new rows [rows, width] in place.

        Returns:
            The new `trainable`, [rows, width].

        Raises:
            RuntimeError: if other tensors have replaced the parameters.
        """
        self._require_own_parts()
        start = len(self)
        if start + rows > self._memory.shape[0]:
            self._move(max(2 * self._memory.shape[0], start + rows))
        fresh = self._memory[start : start + rows]
        fill(fresh)
        self._release_trainable()
        self.frozen.data = self._memory[:start]
        self.trainable = nn.Parameter(fresh)
        self._note_rows()
        return self.trainable

    @torch.no_grad()
    @torch.inference_mode(False)
    def selection(self, rows: Sequence[int], last: int, *, same: bool) -> Callable[[], None]:
        """Prepares to keep only some rows, in another order; changes nothing yet.

        Args:
            rows: indices of the rows to keep, in their new order.
            last: how many of them, at the end, are those of the newest task.
            same: whether these are the rows that train now, so that `trainable` stays the same
                parameter. If not, it leaves the module as in `append`.

        Returns:
            A function that makes the change.

        Raises:
            RuntimeError: if other tensors have replaced the parameters.
        """
        self._require_own_parts()
        size, first = len(rows), len(rows) - last
        memory = torch.empty_like(self._memory)
        memory[:size] = self._memory[torch.tensor(rows, dtype=torch.int64, device=memory.device)]

        def change() -> None:
            trains = self.trainable.requires_grad and size > 0
            if not same:
                self._release_trainable()
                self.trainable = nn.Parameter(memory[first:size], requires_grad=trains)
            self._memory = memory
            self.frozen.data = memory[:first]
            self.trainable.data = memory[first:size]
            self._note_rows()

        return change

    def _release_trainable(self) -> None:
        """Gives the parameter that trained a copy of its rows, before another replaces it."""
        self.trainable.requires_grad_(False)
        self.trainable.grad = None
        self.trainable.data = self.trainable.data.clone()

    def _require_own_parts(self) -> None:
        """Puts the rows in place; raises RuntimeError if other tensors are the parameters."""
        if self._was_replaced():
            self._move(self._memory.shape[0])
        if not self._has_own_parts():
            raise RuntimeError(
                "a task cannot be added, deleted or moved, because other tensors have replaced the "
                "pool's parameters (functional_call, FSDP, ZeRO-3 or an assignment): do it before "
                "that. If the model is sharded, save it, load_pretrained into a new one, change "
                "the tasks, and shard that one"
            )
        self._realign()

    def rows(self) -> Tensor:
        """Returns all rows [R, width] without gradient, which share memory with the parameters.

        If the parameters are sharded, returns a copy; all processes have to call this together.
        """
        # Runs in every layer and forward: four comparisons, no module attributes.
        if not torch.compiler.is_compiling():
            if not self._has_own_parts():
                self._require_present()
                return torch.cat([whole(self.frozen), whole(self.trainable)])
            frozen, trainable = self._own
            if (frozen.data_ptr(), trainable.data_ptr()) != self._addresses:
                self._realign()
        return self._rows

    def joined(self) -> Tensor:
        """Returns all rows [R, width]; `trainable` receives its gradient through them."""
        if torch.is_grad_enabled() and self.trainable.requires_grad:
            return torch.cat([self.frozen, self.trainable])
        return self.rows()

    def _has_own_parts(self) -> bool:
        parts, own = self._parameters, self._own
        if is_partitioned(own[1]):
            return False
        return parts["frozen"] is own[0] and parts["trainable"] is own[1]

    def _was_replaced(self) -> bool:
        """Returns whether other parameters have replaced ours for good, as accelerate does."""
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
        """Raises RuntimeError if accelerate has offloaded the rows."""
        if self.trainable.is_meta and not self._memory.is_meta:
            raise RuntimeError(
                "the adapters cannot be read, because accelerate offloaded them with their block "
                "(preload_module_classes): dispatch the model without it, or before patch"
            )

    def realign(self) -> None:
        """Moves rows back into one buffer if they were moved; ignores replaced parameters."""
        if torch.compiler.is_compiling():
            return
        if self._has_own_parts():
            self.rows()
        else:
            self._require_present()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Saves the parameters with separate storages, which share the same memory.

        Some savers drop or refuse tensors that share storage.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or not self._has_own_parts() or self._memory.is_meta:
            return
        for name in ("frozen", "trainable"):
            rows = destination[prefix + name]
            start = rows.storage_offset() * rows.element_size()
            memory = rows.untyped_storage()[start : start + rows.nbytes]
            destination[prefix + name] = rows.new_empty(0).set_(memory, 0, rows.shape)

    # A compiled forward does not check the addresses, so every function that moves them realigns.

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
        """Moves the parameters into one buffer after `.to()`, a deep copy or an assigned load."""
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
