"""The pool of prompts: one per task, all of the same length, which grows like the LoRA pool."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident
from sapt_fast.ops.mix_prompts import mix_prompts, mix_prompts_with_tokens
from sapt_fast.pools.own import Own
from sapt_fast.pools.rows import RowStack


class PromptPool(Own, Resident):
    """All prompts of one model.

    Args:
        length: P, the number of rows of each prompt.
        width: D, the width of the input embeddings.
        reserve: number of prompts to preallocate; the memory doubles when full.
        device: of the prompts; None for the CPU.
        dtype: of the prompts; None for torch's default.

    Attributes:
        rows: the rows of all prompts, [K * P, D], in learning order.
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
            ValueError: if the shape does not fit; nothing has changed then.
        """
        self.require_fits(prompt)
        self.rows.append(self.length, lambda rows: rows.copy_(prompt))

    def require_fits(self, prompt: Tensor) -> None:
        """Raises ValueError unless a prompt is [P, D]."""
        expected = (self.length, self.rows.width)
        if tuple(prompt.shape) != expected:
            raise ValueError(
                f"prompt: got shape {tuple(prompt.shape)}, expected {list(expected)}: "
                "[prompt_length, width of the input embeddings]"
            )

    def realign(self) -> None:
        """Moves rows whose parameters were moved back into one buffer, for a compiled model."""
        self.rows.realign()

    def prompt(self, index: int) -> Tensor:
        """Returns one prompt [P, D] without gradient, as a view of the pool."""
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
        """Inserts each input's mixture of prompts before its embeddings (`ops.mix_prompts`).

        Args:
            mixture: [B, K].
            embedding: the model's input embedding.
            input_ids: [B, T]; None with inputs_embeds.
            inputs_embeds: [B, T, D], used if not None.
            backend: as in `ops.mix_prompts`.

        Returns:
            [B, P + T, D].
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
        """Returns all prompts [K, P, D]; the newest receives its gradient through them."""
        return self.rows.joined().view(-1, self.length, self.rows.width)

    def extra_repr(self) -> str:
        return f"prompts={len(self)}, length={self.length}"


class ConcatenatedPrompts:
    """Concatenates prompts before the embeddings, while `PromptPool` mixes them.

    Args:
        stack: the rows of all prompts, [R, D].
        rows: the number of rows of one prompt.
        count: returns N, the number of prompts of an input.
    """

    def __init__(self, stack: RowStack, rows: int, count: Callable[[], int]) -> None:
        self.stack, self.rows, self.count = stack, rows, count

    @property
    def length(self) -> int:
        """The number of rows that are inserted before an input."""
        return self.count() * self.rows

    @property
    def total(self) -> int:
        """How many prompts there are."""
        return len(self.stack) // self.rows

    def realign(self) -> None:
        """Moves rows whose parameters were moved back into one buffer."""
        self.stack.realign()

    def __call__(
        self,
        index: Tensor,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Inserts each input's prompts before its embeddings.

        Args:
            index: [B, N] int64, the indices of the prompts.
            embedding: the model's input embedding.
            input_ids: [B, T]; None with inputs_embeds.
            inputs_embeds: [B, T, D], used if not None.

        Returns:
            [B, N * rows + T, D].
        """
        embeds = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        prompts = self.chosen(index)
        if len(prompts) == 1:  # the same for all inputs: a mixture of one prompt
            return mix_prompts(prompts, prompts.new_ones(len(embeds), 1), embeds)
        return torch.cat([prompts.to(embeds.dtype), embeds], 1)

    def chosen(self, index: Tensor) -> Tensor:
        """Returns the rows of prompts, one after the other.

        Args:
            index: [B, N] int64, the indices of the prompts.

        Returns:
            [B, N * rows, D]; [1, N * rows, D] if all rows of the index are one.
        """
        stacked = self.stack.joined()
        if index.stride(0) == 0:  # one row for all
            index = index[:1]
        return stacked.view(-1, self.rows, stacked.shape[1])[index].flatten(1, 2)


def _is_plain(embedding: nn.Module) -> bool:
    """Returns whether calling the embedding only looks up rows of its weight."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and type(embedding.weight) is nn.Parameter
        and "forward" not in vars(embedding)
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )
