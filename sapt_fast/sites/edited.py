"""A layer whose output is replaced where an edit acts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.codebook import Codebook, Found
from sapt_fast.routing.forward import Prompt
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.output import AtOutput

__all__ = ["REPLACEMENTS", "AtPrompts", "EditedOutput", "Trial"]

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


class AtPrompts(AtOutput):
    """The base class of modules that decide something about each prompt, or act by such a decision.

    Args:
        path: the layer's path.
        prompts: where the prompts of the running forward end.
        pooling: "last" or "mean" of the prompt's tokens, by which a layer looks up.
        each_forward: whether to look up again in every forward, by its last token.
        in_decoder: whether the layer is in the decoder of an encoder-decoder model.
    """

    listens = False

    def __init__(
        self, path: str, prompts: Prompts, pooling: str, each_forward: bool, in_decoder: bool
    ) -> None:
        super().__init__()
        self.path = path
        self.prompts = prompts
        self.pooling = pooling
        self.each_forward = each_forward
        self.in_decoder = in_decoder

    def prompt_of(self, x: Tensor) -> Prompt:
        """Returns the prompts of the rows of x [B, T, D]."""
        if self.each_forward and self.prompts.is_free:
            last = torch.full(x.shape[:1], x.shape[1] - 1, device=x.device)
            return Prompt(torch.zeros_like(last), last, x.shape[1], 0, None, {}, copies=1)
        return self.prompts.of_layer(x, self.in_decoder)

    def require_tokens(self, x: Any) -> Tensor:
        """Returns x; raises RuntimeError if it is not [B, T, width]."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(
                f"{self.path}: got {got}, expected [B, T, width]; choose another layer by "
                "target_modules"
            )
        return x

    def query(self, x: Tensor, prompt: Prompt) -> Tensor:
        """Returns what the prompts are looked up by, [B, D], given x [B, T, D]."""
        if prompt.query is not None:
            return prompt.query.to(x.device)
        if self.pooling == "last":
            return at_token(x.detach(), prompt.last)
        if prompt.start > 0:
            raise RuntimeError(
                f"past_key_values: got {prompt.start} tokens before a prompt whose edits are "
                "looked up by the mean of its tokens (keys='mean'): give the whole prompt"
            )
        place = torch.arange(x.shape[1], device=x.device)[None]
        inside = (place >= prompt.first[:, None]) & (place <= prompt.last[:, None])
        kept = torch.where(inside[..., None], x.detach().float(), 0.0)
        return kept.sum(1) / inside.sum(1, keepdim=True)

    def decide(
        self, tokens: int, prompt: Prompt, found: Found, edits: Tensor, hits: Tensor
    ) -> Tensor:
        """Keeps what was found for the prompts that end in this forward, and returns it.

        Args:
            tokens: T.
            prompt: the prompts.
            found: the nearest row of each prompt.
            edits: [N] int64, the edit of each row.
            hits: [N] int64, to which the prompts are added on which a row acts.

        Returns:
            The edits [B], -1 for none; for a prompt that ended earlier, what was found then.
        """
        now = (prompt.last >= 0) & (prompt.last < tokens)
        at = found.row.clamp(min=0)
        chosen = torch.where(found.acts, edits[at], -1)
        before = prompt.decided.get(self.path)
        before = torch.full_like(chosen, -1) if before is None else before.to(chosen.device)
        if prompt.copies > 0:
            first = torch.arange(len(at), device=at.device) % prompt.copies == 0
            counted = found.acts & now & first & (chosen != before)
            hits.index_add_(0, at, counted.long())
        prompt.decided[self.path] = decided = torch.where(now, chosen, before)
        return decided


class EditedOutput(AtPrompts):
    """Looks up each prompt in a codebook, and replaces the layer's output where an edit acts.

    Args:
        path, prompts, pooling, each_forward, in_decoder: as in `AtPrompts`.
        codebook: keys, radii and values.
        replacement: one of `REPLACEMENTS`, as in `methods.grace.GraceConfig`.

    Attributes:
        trial: what acts in place of the codebook in a thread that makes edits; None: the codebook.
    """

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
        super().__init__(path, prompts, pooling, each_forward, in_decoder)
        self.codebook = codebook
        self.replacement = replacement
        self.trial: Trial | None = None

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, O] with the values of the edits that act.

        Raises:
            RuntimeError: if input or output is not [B, T, width], or no forward of the model runs.
        """
        x = self.require_tokens(args[0] if args else None)
        self.require_tokens(output)
        prompt = self.prompt_of(x)
        if self.trial is not None and not self.prompts.is_free:
            if self.trial.records:
                require_first(self.trial.query, self.path)
                self.trial.query = self.query(x, prompt)
                self.trial.output = at_token(output, prompt.last).detach()
            if self.trial.values is None:
                return output
            behind = tokens_behind(output, prompt)
            where = replaced_tokens(self.replacement, behind)
            values = _at_tokens(self.trial.values, behind)
            return torch.where(where[..., None], values.to(output.dtype), output)
        edits, book = self._decided(x, prompt), self.codebook
        if edits is None or len(book) == 0:
            return output
        rows = book.rows_of(edits)
        acts = rows >= 0
        if acts.device.type == "cpu" and not acts.any():
            return output
        behind = tokens_behind(output, prompt)
        where = acts[:, None] & replaced_tokens(self.replacement, behind)
        tokens = behind if self.replacement == "per_token" else behind[:, :1]
        values = book.values_at(rows.clamp(min=0), tokens)
        return torch.where(where[..., None], values.to(output.dtype), output)

    def _decided(self, x: Tensor, prompt: Prompt) -> Tensor | None:
        """Returns the edit [B] of each row, -1 for none; None if nothing was decided."""
        if not prompt.is_read or len(self.codebook) == 0:
            return prompt.decided.get(self.path)
        book = self.codebook
        found = book.find(self.query(x, prompt))
        return self.decide(x.shape[1], prompt, found, book.edits, book.hits)


def _at_tokens(values: Tensor, behind: Tensor) -> Tensor:
    """Returns values [B, V, O] at tokens, by `tokens_behind` [B, T]: [B, T or 1, O]."""
    if values.shape[1] == 1:
        return values
    index = behind.clamp(0, values.shape[1] - 1)[..., None]
    return values.gather(1, index.expand(-1, -1, values.shape[2]))


def require_first(recorded: Tensor | None, path: str) -> None:
    """Raises RuntimeError if a layer has recorded something in this forward already."""
    if recorded is not None:
        raise RuntimeError(
            f"{path}: the layer is called several times in a forward, so that what it looks up "
            "differs from call to call; choose another layer by target_modules"
        )


def tokens_behind(x: Tensor, prompt: Prompt) -> Tensor:
    """Returns how many tokens each token of x [B, T, D] is behind its prompt's last one, [B, T]."""
    return torch.arange(x.shape[1], device=x.device) - prompt.last[:, None]


def replaced_tokens(replacement: str, behind: Tensor) -> Tensor:
    """Returns at which tokens an edit acts, [B, T] bool.

    Args:
        replacement: one of `REPLACEMENTS`.
        behind: the result of `tokens_behind`.
    """
    if replacement in ("generation", "per_token"):
        return behind >= 0
    if replacement == "replace_last":
        return behind == 0
    if replacement == "replace_prompt":
        return behind < 0
    return torch.ones_like(behind, dtype=torch.bool)


def at_token(x: Tensor, place: Tensor) -> Tensor:
    """Returns x [B, T, D] at one token of each row, [B, D]; the nearest one if it is not there."""
    index = place.clamp(0, x.shape[1] - 1)[:, None, None].expand(-1, 1, x.shape[2])
    return x.gather(1, index).squeeze(1)
