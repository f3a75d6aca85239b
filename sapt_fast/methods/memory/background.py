"""How often experts are used by data that is not memorised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.codebook import Exact, resize
from sapt_fast.pools.slot_choice import SlotUse

__all__ = ["BackgroundUse"]


class BackgroundUse(Exact):
    """The counts of a `SlotUse`, saved with a memory.

    Args:
        num_experts: N.
        device: of the buffers.

    Attributes:
        ids, counts, batches: as `SlotUse.state_dict` returns them.
    """

    ids: Tensor
    counts: Tensor
    batches: Tensor

    def __init__(self, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name, value in SlotUse(num_experts, device).state_dict().items():
            self.register_buffer(name, value.to(device))

    def count(self, batches: list[Tensor]) -> None:
        """Replaces the counts by those of batches, each of any shape of experts; -1 for none."""
        use = SlotUse(self.num_experts, self.ids.device)
        for index in batches:
            use.add(index)
        for name, value in use.state_dict().items():
            setattr(self, name, value.to(self.ids.device))

    def slots(self) -> SlotUse:
        """Returns what chooses experts by these counts.

        Raises:
            RuntimeError: if nothing is counted.
        """
        if not self.batches:
            raise RuntimeError("slots: no use of experts is counted; call model.mome.fit_router")
        return self._slots()

    def _slots(self) -> SlotUse:
        use = SlotUse(self.num_experts, self.ids.device)
        use.load_state_dict(dict(self.named_buffers()))
        return use

    def require_consistent(self) -> None:
        """Raises ValueError unless the counts fit each other and the number of experts."""
        try:
            self._slots()
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"use: {error}") from None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, {"ids", "counts"})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
