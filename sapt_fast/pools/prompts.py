"""The pool of prompts: one for each task, all of one length, grown as the LoRA pool is."""

from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident
from sapt_fast.ops.mix_prompts import mix_prompts, mix_prompts_with_tokens
from sapt_fast.pools.lora import RowStack


class PromptPool(Resident):
    """All prompts of one model.

    Args:
        length: P, the rows of each prompt.
        width: D, of the input embeddings.
        reserve: prompts to make room for; beyond it the memory doubles.

    Attributes:
        rows: of all prompts, in learning order, [K * P, D].
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        reserve: int = 16,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.rows = RowStack(
            width,
            reserve * length,
            device=torch.device(device or "cpu"),
            dtype=dtype or torch.get_default_dtype(),
        )

    def __len__(self) -> int:
        return len(self.rows) // self.length

    def add(self, prompt: Tensor) -> None:
        """Adds a trainable prompt and freezes the others.

        Args:
            prompt: [P, D] to copy.

        Raises:
            ValueError: the shape does not fit; nothing has changed.
        """
        self.require_fits(prompt)
        self.rows.append(self.length, lambda rows: rows.copy_(prompt))

    def require_fits(self, prompt: Tensor) -> None:
        """Raises ValueError unless a prompt is [P, D]."""
        expected = (self.length, self.rows.width)
        if tuple(prompt.shape) != expected:
            raise ValueError(
                f"prompt: got shape {tuple(prompt.shape)}, expected {list(expected)}: "
                "prompt_length rows as wide as the input embeddings"
            )

    def realign(self) -> None:
        """Puts rows back in place whose parameters were moved, for a model that is compiled."""
        self.rows.realign()

    def prompt(self, index: int) -> Tensor:
        """[P, D], one prompt without gradient, a view of the pool."""
        return self.rows.rows()[index * self.length : (index + 1) * self.length]

    def forward(
        self,
        mixture: Tensor,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """`ops.mix_prompts` over this pool: [B, P + T, D].

        Args:
            mixture: [B, K].
            embedding: of the input ids.
            input_ids: [B, T]; or inputs_embeds [B, T, D].
        """
        prompts = self._stacked()
        # The model's own hook may have moved the pool since the weights were computed.
        mixture = mixture.to(prompts.device)
        if inputs_embeds is None and input_ids is not None and _is_plain(embedding):
            table: Any = embedding.weight
            return mix_prompts_with_tokens(prompts, mixture, input_ids, table, backend=backend)
        embeds = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return mix_prompts(prompts, mixture, embeds, backend=backend)

    def _stacked(self) -> Tensor:
        """[K, P, D], through which the newest receives its gradient."""
        newest = self.rows.trainable
        if torch.is_grad_enabled() and newest.requires_grad:
            rows = torch.cat([self.rows.frozen, newest])
        else:
            rows = self.rows.rows()
        return rows.view(-1, self.length, self.rows.width)

    def extra_repr(self) -> str:
        return f"prompts={len(self)}, length={self.length}"


def _is_plain(embedding: nn.Module) -> bool:
    """Whether looking rows up in its weight is all that calling it would do."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and type(embedding.weight) is nn.Parameter
        and "forward" not in vars(embedding)
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )
