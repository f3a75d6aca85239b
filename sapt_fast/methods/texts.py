"""Handles of methods whose queries are those of texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sapt_fast.devices import execution_device
from sapt_fast.methods.queried import QueryHandle
from sapt_fast.methods.sapt_router import padding_mask, pool_inputs, tokens_of_prompt
from sapt_fast.methods.task_config import require
from sapt_fast.sites.modules import heads
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import token_embedding

__all__ = ["TextHandle", "TextQueries"]


class TextQueries:
    """The mean input embeddings [B, D] of prompts, as `L2pHandle` takes them; without gradient.

    Padding does not count. Of a decoder-only model with labels, only the tokens before the answer
    count, so that a query in training is that of generation.

    Args:
        model: a transformers model with a table of token embeddings, which must be frozen.
    """

    encoder = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def width(self) -> int:
        """D."""
        width: int = token_embedding(self.model).weight.shape[1]
        return width

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
    ) -> Tensor:
        """Computes the queries, in float32 (float64 of float64 embeddings).

        Args:
            input_ids: [B, T]; or None.
            inputs_embeds: [B, T, D], used if not None.
            attention_mask, labels: [B, T], as passed to the model.

        Raises:
            ValueError: if both inputs are None, or the mask has another shape.
            RuntimeError: if the embeddings train.
        """
        embedding = token_embedding(self.model)
        if embedding.weight.requires_grad and not torch.compiler.is_compiling():
            raise RuntimeError(
                "model: the token embeddings require a gradient, but queries must not change while "
                "the model trains: freeze them"
            )
        device = execution_device(embedding)  # hooks may move the model's inputs only later
        input_ids, inputs_embeds, attention_mask, labels = (
            t.to(device) if isinstance(t, Tensor) else t
            for t in (input_ids, inputs_embeds, attention_mask, labels)
        )
        mask = padding_mask(attention_mask)
        chosen = tokens_of_prompt(self.model, attention_mask, labels)
        if chosen is not None:
            mask = chosen.to(torch.int64) if mask is None else chosen * mask
        pooled = pool_inputs(embedding, input_ids, inputs_embeds, mask, "mean")
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32))


class TextHandle(QueryHandle):
    """`QueryHandle` of a model of texts: the pooled input embeddings are the queries."""

    inputs = "texts"

    @classmethod
    def settled(cls, model: Any, config: Any) -> Any:
        """Returns the config, which trains and saves a classifier unless it names modules."""
        found = heads(model)
        if config.modules_to_save is not None or not found:
            return config
        return replace(config, modules_to_save=found)

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """As that of the method.

        Raises:
            ValueError: if the config has options that only images have; and as that of the method.
        """
        layer, pooling = config.query_layer, config.query_pooling
        require(layer is None, "query_layer", layer, "None for texts")
        require(pooling in (None, "mean"), "query_pooling", pooling, "'mean' or None for texts")
        token_embedding(model)  # raises if there is none
        return super().sites(model, config)

    def _new_queries(self) -> Any:
        return TextQueries(self._model)

    def query(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Returns the queries [B, D] of texts, by the frozen embeddings; no gradient.

        Args:
            input_ids: [B, T]; or None.
            attention_mask, labels: [B, T], as passed to the model.
            inputs_embeds: [B, T, D], in place of input_ids.

        Raises:
            ValueError: if there is no text, or the mask has another shape.
            ValueError: inside `queries`, if they are those of another number of texts.
            RuntimeError: if the embeddings train.
        """
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None:
            raise ValueError("input_ids: got None and no inputs_embeds, expected one of them")
        return self._queried(
            len(source),
            lambda: self._queries(input_ids, inputs_embeds, attention_mask, labels),
        )
