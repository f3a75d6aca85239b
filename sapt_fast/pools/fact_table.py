"""Which experts and which key belong to each fact of a memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.codebook import Exact, resize, rows_of

__all__ = ["FactTable"]

_GOLDEN = 0.6180339887  # multiples of it are spread evenly over the numbers modulo 1


class FactTable(Exact):
    """One row for each fact.

    Args:
        experts: K, how many experts a fact has.
        num_experts: N.
        device: of the buffers.
        spread: whether new facts are spread evenly over all experts and keys, for tables that are
            divided by rows over processes, however many these are. Else the first ones are taken.

    Attributes:
        facts: [F] int64, ascending, the facts' numbers.
        keys: [F] int64, the row of each fact's key in the index.
        experts: [F, K] int64, the experts of each fact, each once; -1 for none.
    """

    facts: Tensor
    keys: Tensor
    experts: Tensor

    def __init__(
        self, experts: int, num_experts: int, device: torch.device, spread: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.spread = spread
        empty: Any = partial(torch.empty, dtype=torch.int64, device=device)
        self.register_buffer("facts", empty(0))
        self.register_buffer("keys", empty(0))
        self.register_buffer("experts", empty(0, experts))
        self._owners: Tensor | None = None

    def __len__(self) -> int:
        return self.facts.shape[0]

    # --- look-up ---

    def rows_of(self, facts: Tensor) -> Tensor:
        """Returns the rows [M] of facts [M]; -1 for -1 and for facts that are gone."""
        return rows_of(self.facts, facts)

    def experts_of(self, facts: Tensor) -> Tensor:
        """Returns the experts [M, K] of facts [M]; -1 for -1 and for facts that are gone."""
        rows = self.rows_of(facts)
        if len(self) == 0:
            return rows[:, None].expand(-1, self.experts.shape[1])
        return torch.where((rows >= 0)[:, None], self.experts[rows.clamp(min=0)], -1)

    def facts_at(self, keys: Tensor) -> Tensor:
        """Returns the facts [M] whose keys are in these rows of the index [M]; -1 for -1."""
        if len(self) == 0:
            return torch.full_like(keys, -1)
        if self._owners is None:
            owners = torch.full((int(self.keys.max()) + 1,), -1, device=self.facts.device)
            self._owners = owners.index_copy(0, self.keys, self.facts)
        inside = (keys >= 0) & (keys < len(self._owners))
        return torch.where(inside, self._owners[keys.clamp(0, len(self._owners) - 1)], -1)

    def uses(self, experts: Tensor | None = None) -> Tensor:
        """Returns how many facts have each expert, [N] int64; the facts of `experts` [M, K]."""
        experts = self.experts if experts is None else experts
        return torch.bincount(experts[experts >= 0], minlength=self.num_experts)

    def sharing(self) -> Tensor:
        """Returns whether each fact has an expert that another one has, [F] bool."""
        return ((self.uses()[self.experts] > 1) & (self.experts >= 0)).any(1)

    # --- changes ---

    def choose_experts(self, count: int, held: Tensor | None = None) -> Tensor:
        """Returns the experts [count, K] of new facts: the least used ones, of those the first.

        Args:
            count: how many facts are new.
            held: the facts [M] that stay. The experts of others count as free, but are taken last.
                None: all stay.
        """
        width, uses = self.experts.shape[1], self.uses()
        stays = slice(None) if held is None else torch.isin(self.facts, held)
        kept = self.uses(self.experts[stays])
        chosen = []
        while count > 0:
            together = min(count, self.num_experts // width)  # that do not share experts
            order = self._order(width)
            order = order[uses[order].argsort(stable=True)]
            order = order[kept[order].argsort(stable=True)][: together * width]
            uses[order] += 1
            kept[order] += 1
            chosen.append(order.view(together, width))
            count -= together
        return torch.cat(chosen) if chosen else self.experts[:0]

    def free_keys(self, count: int) -> Tensor:
        """Returns the first rows of the index without a key, [count] int64."""
        size = len(self) + count
        first = self._order(1)[:size] if self.spread else torch.arange(size).to(self.keys)
        return first[~torch.isin(first, self.keys)][:count]

    def _order(self, together: int) -> Tensor:
        """Returns all numbers, in the order in which facts take them.

        Spread, `together` neighbours at a time are taken from all over the table.
        """
        numbers = torch.arange(self.num_experts, device=self.facts.device)
        if not self.spread:
            return numbers
        blocks = self.num_experts // together
        step = max(1, round(blocks * _GOLDEN))
        while math.gcd(step, blocks) > 1:
            step += 1
        whole = numbers[: blocks * together].view(blocks, together)
        first = whole[numbers[:blocks] * step % blocks].flatten()
        return torch.cat([first, numbers[len(first) :]])

    def add(self, facts: Tensor, keys: Tensor, experts: Tensor) -> None:
        """Adds facts [M], greater than those that are there, with their keys and experts."""
        self._set(
            torch.cat([self.facts, facts]),
            torch.cat([self.keys, keys]),
            torch.cat([self.experts, experts]),
        )

    def remove(self, facts: Tensor) -> Tensor:
        """Removes facts [M]; returns the experts that no fact has any more, ascending."""
        gone = torch.isin(self.facts, facts)
        given_up = self.experts[gone].unique()
        self._set(self.facts[~gone], self.keys[~gone], self.experts[~gone])
        return given_up[(given_up >= 0) & (self.uses()[given_up] == 0)]

    def require_consistent(self, facts: Tensor, num_keys: int) -> None:
        """Raises ValueError unless there is one row for each of these facts, within the sizes."""
        shapes = {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        if not torch.equal(self.facts.cpu(), facts.cpu()):
            raise ValueError(f"facts: got {shapes}, expected one row for each of {len(facts)}")
        if {shape[0] for shape in shapes.values()} != {len(self)}:
            raise ValueError(f"facts: got {shapes}, expected one row for each fact")
        for name, values, least, most in (
            ("keys", self.keys, 0, num_keys),
            ("experts", self.experts, -1, self.num_experts),
        ):
            if values.numel() and (values.min() < least or values.max() >= most):
                raise ValueError(
                    f"{name}: got {int(values.min())} to {int(values.max())}, expected {least} to "
                    f"{most - 1}"
                )
        if len(self.keys.unique()) != len(self):
            raise ValueError("keys: got a row of the index for several facts, expected one each")

    def _set(self, facts: Tensor, keys: Tensor, experts: Tensor) -> None:
        self.facts, self.keys, self.experts = facts, keys, experts
        self._owners = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, set())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._owners = None
