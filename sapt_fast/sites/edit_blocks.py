"""Layers that look up the block of each prompt, and layers to which the block is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapt_fast.ops import mix_experts
from sapt_fast.pools.clusters import Clusters
from sapt_fast.pools.codebook import Exact, resize
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.edited import AtPrompts, replaced_tokens, tokens_behind

__all__ = ["BlockOutput", "Blocks", "KeyOutput"]


class KeyOutput(AtPrompts):
    """Looks up each prompt in clusters by the layer's output, which it does not change.

    Args:
        path, prompts, pooling, in_decoder: as in `AtPrompts`.
        clusters: the points of the edits.

    Attributes:
        recording: whether the layer sets `recorded` and decides nothing, in a thread that makes
            edits.
        recorded: [B, D], what the prompts were looked up by.
    """

    def __init__(
        self, path: str, clusters: Clusters, prompts: Prompts, pooling: str, in_decoder: bool
    ) -> None:
        super().__init__(path, prompts, pooling, each_forward=False, in_decoder=in_decoder)
        self.clusters = clusters
        self.recording = False
        self.recorded: Tensor | None = None

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, D] as it is."""
        output = self.require_tokens(output)
        prompt = self.prompt_of(output)
        if self.recording and not self.prompts.is_free:
            self.recorded = self.query(output, prompt)
            return output
        clusters, edits = self.clusters, prompt.decided.get(self.path)
        if prompt.is_read and len(clusters):
            found = clusters.find(self.query(output, prompt))
            edits = self.decide(output.shape[1], prompt, found, clusters.edits, clusters.hits)
        if edits is not None:
            prompt.decided[_blocks_of(self.path)] = clusters.blocks_of(edits)
        return output


def _blocks_of(path: str) -> str:
    """The name under which the layer at a path leaves the block of each prompt, in each forward."""
    return f"{path}:blocks"


class Blocks(Exact):
    """The LoRA blocks of one layer.

    Args:
        r: the rank of a block.
        widths: I and O of the layer.
        device: of the buffers.

    Attributes:
        a: [N, r, I] float32.
        b: [N, r, O] float32.
    """

    a: Tensor
    b: Tensor

    def __init__(self, r: int, widths: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("a", torch.empty(0, r, widths[0], device=device))
        self.register_buffer("b", torch.empty(0, r, widths[1], device=device))

    def __len__(self) -> int:
        return self.a.shape[0]

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds a block: a [r, I], b [r, O]."""
        self.a = torch.cat([self.a, a.detach()[None].to(self.a)])
        self.b = torch.cat([self.b, b.detach()[None].to(self.b)])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, set())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BlockOutput(AtPrompts):
    """Adds the block that another layer has found for each prompt.

        y' = y + s B_k A_k x

    Args:
        path, prompts, in_decoder: as in `AtPrompts`.
        blocks: the blocks of this layer.
        key_path: the path of the layer that looks up.
        replacement: "generation" or "replace_all", the tokens on which blocks act.
        scaling: s.

    Attributes:
        trial: (a [r, I], b [r, O]), a block that acts on every row in a thread that makes edits;
            None: those found.
    """

    def __init__(
        self,
        path: str,
        blocks: Blocks,
        prompts: Prompts,
        key_path: str,
        replacement: str,
        scaling: float,
        in_decoder: bool,
    ) -> None:
        super().__init__(path, prompts, "last", each_forward=False, in_decoder=in_decoder)
        self.blocks = blocks
        self.key_path = key_path
        self.replacement = replacement
        self.scaling = scaling
        self.trial: tuple[Tensor, Tensor] | None = None

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, O] with the blocks; the other rows keep their bits."""
        x = self.require_tokens(args[0] if args else None)
        self.require_tokens(output)
        prompt = self.prompt_of(x)
        where = replaced_tokens(self.replacement, tokens_behind(output, prompt))
        if self.trial is not None and not self.prompts.is_free:
            bank_a, bank_b = (factor[None] for factor in self.trial)
            chosen = torch.zeros_like(prompt.last)
        else:
            found = prompt.decided.get(_blocks_of(self.key_path))
            if found is None:
                return output
            bank_a, bank_b = self.blocks.a, self.blocks.b
            chosen = found.to(x.device)
            if chosen.device.type == "cpu" and not (chosen >= 0).any():
                return output
        where = where & (chosen >= 0)[:, None]
        index = torch.where(where, chosen[:, None], -1).flatten()[:, None]  # [B T, 1]
        weights = torch.ones(index.shape, device=x.device)
        flat = x.reshape(-1, x.shape[-1])
        delta = mix_experts(flat, bank_a, bank_b, index, weights, scaling=self.scaling)
        changed = output + delta.view_as(output).to(output.dtype)
        return torch.where(where[..., None], changed, output)
