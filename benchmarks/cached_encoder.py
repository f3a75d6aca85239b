"""An encoder whose frozen lower layers run once for each text, to make experiments shorter.

Only the layers from `first` on may have adapters. A text's states below them are the same in every
run, so they are computed once, without dropout, and kept in bfloat16. Each text is computed alone:
its states do not depend on the batch, and a resumed script comes to the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BertModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from sapt_fast.continual.data.sources import Source
from sapt_fast.methods.base import handles

__all__ = ["CachedEncoder", "CachedSource", "upper_query_and_value"]

_KEPT = torch.bfloat16
_LOADED: dict[tuple[str, int], tuple[Any, Any]] = {}


class CachedEncoder(BertModel):
    """A BERT encoder that looks up the states below its layer `first`.

    Attributes:
        first: number of the first layer that runs in every forward.
        lower: by the token ids of a text, its states [T, D] before that layer.
    """

    first: int
    lower: dict[tuple[int, ...], Tensor]

    @classmethod
    def of(cls, model: BertModel, first: int) -> CachedEncoder:
        """Converts a model in place.

        Raises:
            ValueError: if the model does not have such a layer.
        """
        count = len(model.encoder.layer)
        if not 0 < first < count:
            raise ValueError(f"first: got {first}, expected 1 to {count - 1} for {count} layers")
        model.__class__ = cls
        model.first, model.lower = first, {}
        return model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Any:
        """Returns `last_hidden_state` [B, T, D].

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T], 1 for tokens.
            **others: None, or whether to return a dict.

        Raises:
            TypeError: if there are other inputs.
            ValueError: if the mask has a token after padding.
        """
        given = [
            name
            for name, value in others.items()
            if value is not None and not isinstance(value, bool)
        ]
        if given:
            raise TypeError(f"forward: got {given}, expected input_ids and attention_mask alone")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.states_below(input_ids, mask)
        seen = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=mask
        )
        for layer in self.encoder.layer[self.first :]:
            hidden = layer(hidden, seen)
        return BaseModelOutput(last_hidden_state=hidden)

    @torch.no_grad()
    def states_below(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the states [B, T, D] float32 before layer `first`; padding is zero."""
        dtype = self.embeddings.word_embeddings.weight.dtype
        states = torch.zeros(*input_ids.shape, self.config.hidden_size, dtype=dtype)
        counts = mask.sum(1, keepdim=True)
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < counts):
            raise ValueError("attention_mask: got a token after padding, expected right padding")
        lengths = counts[:, 0].tolist()
        for row, (ids, length) in enumerate(zip(input_ids, lengths, strict=True)):
            text = ids[:length]
            name = tuple(text.tolist())
            if name not in self.lower:
                self.lower[name] = self._computed(text)
            states[row, :length] = self.lower[name]
        return states

    def _computed(self, text: Tensor) -> Tensor:
        training = self.training
        self.eval()
        with torch.autocast("cpu", enabled=False):
            hidden = self.embeddings(text[None])
            for layer in self.encoder.layer[: self.first]:
                hidden = layer(hidden)
        self.train(training)
        return hidden[0].to(_KEPT)


@dataclass(frozen=True)
class CachedSource(Source):
    """A source whose encoder is a `CachedEncoder`.

    Attributes:
        first: number of the first layer that runs in every forward.
    """

    first: int = field(default=4)

    def load_model(self) -> tuple[Any, Any]:
        """Returns the model and its tokenizer, loaded once in a process with the states it has.

        Raises:
            RuntimeError: if the model is patched: an earlier run has not given it back.
        """
        place = (self.model, self.first)
        if place not in _LOADED:
            model, tokenizer = super().load_model()
            _LOADED[place] = CachedEncoder.of(model, self.first), tokenizer
        if handles(_LOADED[place][0]):
            raise RuntimeError("model: got a patched model, expected the base model")
        return _LOADED[place]


def upper_query_and_value(first: int, count: int = 6) -> str:
    """Returns `target_modules` for query and value of the layers from `first` on."""
    layers = "|".join(map(str, range(first, count)))
    return rf"encoder\.layer\.({layers})\.attention\.self\.(query|value)"
