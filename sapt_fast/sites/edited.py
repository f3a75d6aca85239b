"""A layer whose output is replaced where an edit acts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.codebook import Codebook
from sapt_fast.routing.forward import Prompt
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.output import AtOutput

__all__ = ["REPLACEMENTS", "EditedOutput", "Trial"]

REPLACEMENTS = ("generation", "per_token", "replace_last", "replace_prompt", "replace_all")


class Trial:
    """Values that act in place of the codebook's, while they are trained.

    Args:
        values: [B, T, O]; None: nothing acts.
        records: whether the layer sets the attributes.

    Attributes:
        query: [B, D], what the layer looked the prompts up by.
        output: [B, O], the layer's own output at the prompts' last tokens.
    """

    def __init__(self, values: Tensor | None, records: bool) -> None:
        self.values = values
        self.records = records
        self.query: Tensor | None = None
        self.output: Tensor | None = None


class EditedOutput(AtOutput):
    """Looks up each prompt in a codebook, and replaces the layer's output where an edit acts.

    Args:
        path: the layer's path.
        codebook: keys, radii and values.
        prompts: where the prompts of the running forward end.
        replacement: one of `REPLACEMENTS`, as in `methods.grace.GraceConfig`.
        pooling: "last" or "mean" of the prompt's tokens, the layer's input by which it looks up.
        each_forward: whether to look up again in every forward, by its last token.
        in_decoder: whether the layer is in the decoder of an encoder-decoder model.

    Attributes:
        trial: what acts in place of the codebook; None: the codebook.
        counting: whether prompts on which an edit acts are counted.
    """

    listens = False

    def __init__(
        self,
        path: str,
        codebook: Codebook,
        prompts: Prompts,
        replacement: str,
        pooling: str,
        each_forward: bool,
        in_decoder: bool,
    ) -> None:
        super().__init__()
        self.path = path
        self.codebook = codebook
        self.prompts = prompts
        self.replacement = replacement
        self.pooling = pooling
        self.each_forward = each_forward
        self.in_decoder = in_decoder
        self.trial: Trial | None = None
        self.counting = True

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, O] with the values of the edits that act.

        Raises:
            RuntimeError: if input or output is not [B, T, width], or no forward of the model runs.
        """
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() != 3 or output.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(
                f"{self.path}: got an input {got} and an output {tuple(output.shape)}, expected "
                "[B, T, width]; choose another layer by target_modules"
            )
        prompt = self._prompt(x)
        if self.trial is not None:
            if self.trial.records:
                self.trial.query = self._query(x, prompt)
                self.trial.output = _at(output, prompt.last).detach()
            if self.trial.values is None:
                return output
            everywhere = torch.ones_like(prompt.last, dtype=torch.bool)
            return self._replaced(output, self.trial.values, everywhere, prompt)
        edits = self._decided(x, prompt)
        if edits is None:
            return output
        rows = self.codebook.rows_of(edits)
        acts = rows >= 0
        if acts.device.type == "cpu" and not acts.any():
            return output
        return self._replaced(output, self.codebook.values[rows.clamp(min=0)], acts, prompt)

    def _prompt(self, x: Tensor) -> Prompt:
        if self.each_forward and self.prompts.is_free:
            last = torch.full(x.shape[:1], x.shape[1] - 1, device=x.device)
            return Prompt(torch.zeros_like(last), last, x.shape[1], 0, None, {})
        return self.prompts.of_rows(x.shape[0], x.device, self.in_decoder)

    def _decided(self, x: Tensor, prompt: Prompt) -> Tensor | None:
        """Returns the edit [B] of each row, -1 for none; None if nothing was decided."""
        before = prompt.decided.get(self.path)
        if not prompt.is_read or len(self.codebook) == 0:
            return before
        found = self.codebook.find(self._query(x, prompt))
        now = (prompt.last >= 0) & (prompt.last < x.shape[1])
        acts, at = found.acts & now, found.row.clamp(min=0)
        if self.counting:
            self.codebook.hits.index_add_(0, at, acts.long())
        if before is None:
            before = torch.full_like(at, -1)
        edits = torch.where(acts, self.codebook.edits[at], -1)
        prompt.decided[self.path] = decided = torch.where(now, edits, before.to(edits.device))
        return decided

    def _query(self, x: Tensor, prompt: Prompt) -> Tensor:
        """Returns what the prompts are looked up by, [B, D]."""
        if prompt.query is not None:
            return prompt.query.to(x.device)
        if self.pooling == "last":
            return _at(x, prompt.last).detach()
        if prompt.start > 0:
            raise RuntimeError(
                f"past_key_values: got {prompt.start} tokens before a prompt whose edits are "
                "looked up by the mean of its tokens (pooling='mean'): give the whole prompt"
            )
        place = torch.arange(x.shape[1], device=x.device)[None]
        inside = (place >= prompt.first[:, None]) & (place <= prompt.last[:, None])
        weights = inside.float() / inside.sum(1, keepdim=True)
        return (weights[:, None] @ x.detach().float()).squeeze(1)

    def _replaced(self, output: Tensor, values: Tensor, acts: Tensor, prompt: Prompt) -> Tensor:
        """Replaces the outputs of the rows on which an edit acts.

        Args:
            output: [B, T, O]; the other rows keep their bits.
            values: [B, V, O].
            acts: [B] bool.
            prompt: where the prompts end.
        """
        behind = torch.arange(output.shape[1], device=output.device) - prompt.last[:, None]  # [B,T]
        where = acts[:, None].expand_as(behind)
        if self.replacement in ("generation", "per_token"):
            where = where & (behind >= 0)
        elif self.replacement == "replace_last":
            where = where & (behind == 0)
        elif self.replacement == "replace_prompt":
            where = where & (behind < 0)
        if values.shape[1] > 1:
            index = behind.clamp(0, values.shape[1] - 1)[..., None]
            values = values.gather(1, index.expand(-1, -1, values.shape[2]))
        return torch.where(where[..., None], values.to(output.dtype), output)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """Returns x [B, T, D] at one token of each row, [B, D]; the nearest one if it is not there."""
    index = place.clamp(0, x.shape[1] - 1)[:, None, None].expand(-1, 1, x.shape[2])
    return x.gather(1, index).squeeze(1)
