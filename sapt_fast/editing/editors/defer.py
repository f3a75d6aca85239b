"""Deferral: a small gate decides which prompts a copy of the layer answers.

The baseline "Defer" of Hartvigsen et al., NeurIPS 2023, section 3.1, after SERAC (Mitchell et al.,
2022). The gate is linear in the layer's input x at the prompt's last token and starts at torch's
defaults:

    g = sigmoid(w·x + b)
    y' = g·copy(x) + (1 - g)·layer(x)   in training
    y' = copy(x) if g >= 1/2, else layer(x)   otherwise

Gate and copy are trained on the edits of the batch. Our choices, where the released code differs:
the copy starts at the layer's own weights, not at random; it is applied to the prompt's last token
and all that follow, not to the whole text; and the gate decides once, at the prompt's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.editing.editors.base import MADE, Editor, Pair
from sapt_fast.editing.editors.training import TrainingOptions, texts_of, train
from sapt_fast.methods.edits.fitting import gives
from sapt_fast.methods.edits.sites import default_targets, in_decoder, widths_of
from sapt_fast.routing.forward import Prompt
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.edited import AtPrompts
from sapt_fast.sites.output import (
    attach_output,
    detach_output,
    find_outputs,
    listen,
    silence,
)

__all__ = ["DeferEditor", "Deferral"]

_SLOT = "sapt_defer"


class Deferral(AtPrompts):
    """The gate and the copy at one layer's output.

    Args:
        path: the layer's path.
        layer: the layer, a linear one.
        prompts: where the prompts of the running forward end.
        in_decoder: whether the layer is in the decoder of an encoder-decoder model.

    Attributes:
        trained: whether an edit has been made; before, the layer does not call this module.
        soft: whether the gate mixes, as in training, else it decides.
    """

    trained: Tensor

    def __init__(self, path: str, layer: nn.Module, prompts: Prompts, in_decoder: bool) -> None:
        super().__init__(path, prompts, "last", each_forward=False, in_decoder=in_decoder)
        width, out = widths_of(layer, path)
        own: Any = layer.weight
        self.gate = nn.Linear(width, 1, device=own.device)
        self.copy = nn.Linear(width, out, device=own.device)
        bias: Any = getattr(layer, "bias", None)
        with torch.no_grad():
            self.copy.weight.copy_(own.t() if hasattr(layer, "nf") else own)  # nf: Conv1D
            self.copy.bias.zero_() if bias is None else self.copy.bias.copy_(bias)
        self.register_buffer("trained", torch.tensor(False, device=own.device))
        self.soft = False

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, O], mixed with the copy's or replaced by it."""
        x = self.require_tokens(args[0] if args else None).float()
        prompt = self.prompt_of(x)
        share = prompt.decided.get(self.path)
        if prompt.is_read:
            gate = self.gate(self.query(x, prompt)).sigmoid()[:, 0]
            share = gate if self.soft else self._decided(gate, x.shape[1], prompt)
        if share is None:
            return output
        behind = torch.arange(x.shape[1], device=x.device) >= prompt.last[:, None]
        weight = (share.to(x)[:, None] * behind)[..., None]
        mixed = weight * self.copy(x) + (1 - weight) * output.float()
        return torch.where(weight > 0, mixed.to(output.dtype), output)

    def _decided(self, gate: Tensor, tokens: int, prompt: Prompt) -> Tensor:
        """Decides on the prompts that end within these tokens, and keeps what was decided, [B]."""
        now = (prompt.last >= 0) & (prompt.last < tokens)
        before = prompt.decided.get(self.path)
        before = torch.zeros_like(gate) if before is None else before.to(gate)
        prompt.decided[self.path] = decided = torch.where(now, (gate >= 0.5).to(gate), before)
        return decided


class DeferEditor(Editor):
    """Trains a gate and a copy of one layer on the edits of the batch."""

    Options = TrainingOptions

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        targets = options.target_modules
        targets = default_targets(model) if targets is None else targets
        found = find_outputs(model, targets).patched
        if len(found) != 1:
            raise ValueError(f"target_modules: got {len(found)} layers, expected one")
        self.path = found[0]
        self.prompts = Prompts(model, "defer", by_function=False)
        layer = model.get_submodule(self.path)
        self.deferral = Deferral(self.path, layer, self.prompts, in_decoder(model, self.path))
        attach_output(model, self.path, _SLOT, self.deferral)
        self.prompts.install()

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Trains gate and copy; after a loss that is not finite, they are as before."""
        texts = texts_of(self.model, pairs)
        before = {name: value.clone() for name, value in self.state().items()}
        self.deferral.trained.fill_(True)
        listen(self.model, self.path, _SLOT)
        parameters = [*self.deferral.parameters()]
        self.deferral.soft = True
        try:
            with self.prompts.given(texts.prompt):
                train(self.model, parameters, [texts], self.options, lowest=self.path)
        except FloatingPointError as error:
            self.restore(before, [])
            return [str(error)] * len(pairs)
        finally:
            self.deferral.soft = False
        with torch.no_grad(), self.prompts.given(texts.prompt._replace(decided={})):
            fits = gives(texts.whole(), texts.labels, 0.0).tolist()
        failed = f"does not fit after {self.options.steps} steps"
        return [MADE if fit else failed for fit in fits]

    def state(self) -> dict[str, Tensor]:
        """Returns gate and copy."""
        return {name: value.detach() for name, value in self.deferral.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores gate and copy."""
        try:
            self.deferral.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"tensors: {error}") from None
        change = listen if self.deferral.trained else silence
        change(self.model, self.path, _SLOT)

    def close(self) -> None:
        """Removes gate and copy."""
        self.prompts.remove()
        detach_output(self.model, self.path, _SLOT)
