"""Deletes, renames and reorders the tasks of a method with one part of its pools per task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.base import Handle, follow, require_held
from sapt_fast.pools.rows import RowStack

__all__ = ["OrderedTasks", "reordered_targets"]

logger = logging.getLogger(__name__)


class OrderedTasks(Handle):
    """The handles whose tasks can be deleted, renamed and reordered.

    A subclass defines `_rows`, `_growing` and `_selected`.
    """

    def rename_task(self, old: str, new: str) -> None:
        """Renames a task. Its adapter, its key and its place stay.

        The next `save_pretrained` writes it under the new name and deletes the old files.

        Args:
            old: the name of a task.
            new: its new name, valid as in `add_task`.

        Raises:
            ValueError: if no task is named `old`.
            ValueError: if `new` is not valid, or another task has this name.

        Nothing has changed after an error.
        """
        place = _place("old", old, self.tasks)
        require_folder_name("new: got", new, [name for name in self.tasks if name != old])
        self._tasks[place] = new
        self._renamed(old, new)

    def delete_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Deletes a task: its adapter, its key and its copies of modules.

        SAPT's router computes a softmax over the keys. So the weights of the other tasks keep
        their ratios: weight k becomes w_k / (1 - w_deleted). Targets change in the same way, those
        in `Replay` objects do not: make these again.

        If the newest task is deleted, the one before it trains from now on, as after
        `load_pretrained`. If the only task is deleted, the model computes what its base model does.

        Args:
            name: the name of a task.
            optimizer: needed only if the newest task is deleted. Then the parameters of the task
                before replace those of the deleted one, with fresh state. Otherwise the newest
                task's parameters and their optimizer state stay as they are.

        Raises:
            ValueError: if no task has this name.
            ValueError: if the newest task is deleted, and the optimizer contains none of its
                parameters.
            RuntimeError: if a mixture is merged into the base weights.
            RuntimeError: if this thread is inside `fixed`, with weights of the tasks before.
            RuntimeError: if the model is sharded.

        Nothing has changed after an error.
        """
        place = _place("name", name, self.tasks)
        self._select([k for k in range(len(self.tasks)) if k != place], optimizer)

    def reorder_tasks(
        self, names: Sequence[str], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Puts the tasks into another order, in which they count as learned.

        The outputs stay the same up to rounding, and the columns of weights are in the new order.
        The last task trains; the others are frozen.

        Args:
            names: the names of all tasks, in their new order.
            optimizer: needed only if another task becomes the last one, as in `delete_task`.

        Raises:
            ValueError: if names is not a permutation of `tasks`.
            ValueError, RuntimeError: as `delete_task`.

        Nothing has changed after an error.
        """
        if isinstance(names, str) or sorted(names) != sorted(self.tasks):
            raise ValueError(f"names: got {names!r}, expected a permutation of {self.tasks}")
        self._select([self.tasks.index(name) for name in names], optimizer)

    # --- what a subclass defines ---

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        """Yields each pool's rows, with the number of rows of each task."""
        raise NotImplementedError

    def _growing(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that training the next task replaces."""
        raise NotImplementedError

    def _require_order(self, order: Sequence[int]) -> None:
        """Raises ValueError if the method cannot keep exactly these tasks, in this order."""

    def _selected(self, order: Sequence[int], *, same: bool) -> None:
        """Selects what belongs to tasks besides the rows of `_rows` and the names.

        Args:
            order: indices of the tasks that are kept, in their new order.
            same: whether the task that trains is still the last one.
        """

    def _renamed(self, old: str, new: str) -> None:
        """Renames what has a task's name, besides `tasks`."""

    # --- both changes ---

    def _select(self, order: Sequence[int], optimizer: torch.optim.Optimizer | None = None) -> None:
        self.require_unmerged()
        self.require_own()
        if self.routing is not None and self.routing.pinned is not None:
            raise RuntimeError(
                f"the tasks cannot change inside model.{self.attribute}.fixed(weights), because "
                "its weights are those of the tasks before; leave the context first"
            )
        self._require_order(order)
        same = order[-1:] == [len(self.tasks) - 1]
        before = list(self._growing())
        if optimizer is not None and not same:
            require_held(optimizer, before)
        changes = [_selection(stack, counts, order, same) for stack, counts in self._rows()]
        for change in changes:
            change()
        self._selected(order, same=same)
        self._tasks[:] = [self._tasks[k] for k in order]
        if self.routing is not None:
            self.routing.weights = None
        if optimizer is not None and not same:
            follow(optimizer, before, list(self._growing()))


def reordered_targets(
    targets: Mapping[str, Tensor], names: Sequence[str], order: Sequence[int], sum_to_one: bool
) -> dict[str, Tensor]:
    """Returns the targets of the tasks that are kept, in their new order.

    A target contains the mean weights of the tasks up to its own. Those that are deleted, or come
    later in the new order, are left out. Weights that sum to 1 are normalised again. It is then the
    target of a softmax without them, up to the order of mean and normalisation.

    Args:
        targets: by task name, [1 + index].
        names: the tasks before.
        order: indices of the tasks that are kept, in their new order.
        sum_to_one: whether an input's weights sum to 1.

    Returns:
        By task name, [1 + new index]. A target whose weights are all left out is dropped, with a
        warning.
    """
    found = {}
    for place, k in enumerate(order):
        target = targets.get(names[k])
        if target is None:
            continue
        left = target.new_zeros(place + 1)
        for column, source in enumerate(order[: place + 1]):
            if source < len(target):
                left[column] = target[source]
        if sum_to_one:
            if not left.sum() > 0:
                logger.warning(
                    "targets: dropped that of %r, because it has no weight on the tasks up to it",
                    names[k],
                )
                continue
            left = left / left.sum()
        found[names[k]] = left
    return found


def _place(argument: str, name: str, tasks: Sequence[str]) -> int:
    if name not in tasks:
        raise ValueError(f"{argument}: got {name!r}, expected one of the tasks {list(tasks)}")
    return tasks.index(name)


def _selection(stack: RowStack, counts: Sequence[int], order: Sequence[int], same: bool) -> Any:
    """Prepares the selection of tasks in one stack, which has `counts[k]` rows of task k."""
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    rows: Iterable[int] = (row for k in order for row in range(ends[k] - counts[k], ends[k]))
    return stack.selection([*rows], counts[order[-1]] if order else 0, same=same)
