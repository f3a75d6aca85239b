"""What was edited: the tokens of each edit's prompt and target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.pools.codebook import resize
from sapt_fast.pools.own import Own

__all__ = ["EditLog", "Text"]

Text = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a prompt and of its target


class EditLog(Own, nn.Module):
    """The prompts and targets of the edits that are there, as buffers, so that they are saved.

    Attributes:
        edits: [E] int64, ascending, the edits' numbers.
        next_edit: [] int64, the number of the next edit.
        prompts, targets: [sum of T_e] int64, the tokens of all edits one after the other.
        prompt_lengths, target_lengths: [E] int64, T_e of each.
    """

    edits: Tensor
    next_edit: Tensor
    prompts: Tensor
    prompt_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("edits", "prompts", "prompt_lengths", "targets", "target_lengths"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        self.register_buffer("next_edit", torch.zeros((), dtype=torch.int64))
        self._texts: list[Text] | None = []

    def __len__(self) -> int:
        return self.edits.shape[0]

    def texts(self) -> list[Text]:
        """Returns prompt and target of each edit."""
        if self._texts is None:
            self._texts = self._split()
        return [*self._texts]

    def _split(self) -> list[Text]:
        prompts, targets = (
            [tuple(t.tolist()) for t in flat.split(lengths.tolist())] if len(self) else []
            for flat, lengths in (
                (self.prompts, self.prompt_lengths),
                (self.targets, self.target_lengths),
            )
        )
        return list(zip(prompts, targets, strict=True))

    def add(self, prompts: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Adds edits, and returns their numbers [M] int64."""
        before, first = self.texts(), int(self.next_edit)
        edits = torch.arange(first, first + len(prompts), device=self.edits.device)
        self.edits = torch.cat([self.edits, edits])
        self.next_edit = self.next_edit + len(prompts)
        self.prompts, self.prompt_lengths = _joined(self.prompts, self.prompt_lengths, prompts)
        self.targets, self.target_lengths = _joined(self.targets, self.target_lengths, targets)
        new = zip(prompts, targets, strict=True)
        self._texts = before + [(tuple(p.tolist()), tuple(t.tolist())) for p, t in new]
        return edits

    def remove(self, edit: int) -> None:
        """Removes an edit."""
        kept = self.edits != edit
        for name in ("prompt", "target"):
            lengths = getattr(self, f"{name}_lengths")
            tokens = getattr(self, f"{name}s")
            setattr(self, f"{name}s", tokens[kept.repeat_interleave(lengths)])
            setattr(self, f"{name}_lengths", lengths[kept])
        self.edits = self.edits[kept]
        self._texts = None

    def require_consistent(self) -> None:
        """Raises ValueError unless lengths, tokens and numbers fit each other."""
        count = len(self)
        parts = (self.prompts, self.prompt_lengths), (self.targets, self.target_lengths)
        for flat, lengths in parts:
            if lengths.shape != (count,) or (lengths < 1).any() or lengths.sum() != len(flat):
                raise ValueError(f"log: got lengths that do not sum to {len(flat)} tokens")
        if (self.edits.diff() <= 0).any() or (count and self.next_edit <= self.edits[-1]):
            raise ValueError("log: got edits that do not ascend to next_edit")

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, set())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._texts = None


def _joined(flat: Tensor, lengths: Tensor, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    new = [text.to(flat.device) for text in texts]
    counts = torch.tensor([len(text) for text in texts], dtype=torch.int64, device=flat.device)
    return torch.cat([flat, *new]), torch.cat([lengths, counts])
