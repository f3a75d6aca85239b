"""Prompts in place of LoRA: the handle of a model whose tasks are prompts."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import execution_device
from sapt_fast.handle import SaptHandle
from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.pools.prompts import PromptPool
from sapt_fast.sites.embeddings import PromptRouting, prompt_place
from sapt_fast.sites.report import PatchReport


class PromptHandle(SaptHandle):
    """`SaptHandle` of a model with `SaptConfig(adapter="prompt")`.

    Every input's mixture of prompts is written before its embeddings (SAPT-Prompt, ACL 2024); no
    layer changes. Masks, position ids, labels and logits stay as long as the tokens.

    Attributes:
        prompts: the pool, K prompts [P, D].

    Args:
        model: an encoder-decoder or decoder-only language model; nothing in it changes.
        config: of the prompts and the router.

    Raises:
        ValueError: the model cannot take prompts.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> config = sapt_fast.SaptConfig(adapter="prompt", prompt_length=5)
        >>> model = sapt_fast.patch(load_backbone(), config)
        >>> model.sapt.add_task("first")
        >>> ids = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> out = model(ids, labels=ids)
        >>> out.encoder_last_hidden_state.shape[1], model.sapt.attention.shape
        (8, torch.Size([2, 1]))
    """

    def __init__(self, model: Any, config: SaptConfig) -> None:
        places = [prompt_place(model)]
        if model.config.is_encoder_decoder:
            places.append(model.get_decoder())  # its cross-attention sees the prompt
        paths = [next(n for n, m in model.named_modules() if m is place) for place in places]
        super().__init__(model, config, PatchReport(prompted=paths))
        embedding = model.get_input_embeddings()
        self.prompts = PromptPool(
            config.prompt_length,
            embedding.weight.shape[1],
            reserve=config.reserve_tasks,
            device=execution_device(embedding),
            dtype=config.adapter_dtype(embedding.weight.dtype),
        )
        self.routing = PromptRouting(model, self._route, self._has_tasks, self._count, self.prompts)

    def put_task(
        self,
        name: str,
        adapters: Tensor,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`restore_task` whatever the name; adapters is the prompt [P, D]."""
        self.prompts.require_fits(adapters)
        self.task_modules.require_fits(modules)
        self.router.add_key(key)
        self.prompts.add(adapters)
        self.task_modules.add(modules)
        self._task_added(name)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """None: the layers are the model's own."""
        return {}

    @torch.no_grad()
    def _add_adapters(self) -> None:
        """A prompt of random rows of the vocabulary (SAPT, ACL 2024)."""
        embedding = self._model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        vocabulary = getattr(self._model.config.get_text_config(), "vocab_size", rows)
        ids = torch.randint(min(vocabulary, rows), (1, self.config.prompt_length))
        self.prompts.add(embedding(ids.to(execution_device(embedding)))[0])

    def _growing(self) -> Iterator[nn.Parameter]:
        yield from (self.prompts.rows.trainable, self.router.keys.trainable)
        yield from self.task_modules.newest()

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"
