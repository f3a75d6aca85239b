"""SAPT-Prompt: SAPT with a prompt per task instead of a LoRA."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sapt_fast.devices import execution_device
from sapt_fast.methods.sapt import SaptHandle
from sapt_fast.methods.sapt_router import router_shapes
from sapt_fast.pools.prompts import PromptPool
from sapt_fast.pools.rows import RowStack
from sapt_fast.sites.embeddings import PromptRouting, prompt_place
from sapt_fast.sites.find import require_placement
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import token_embedding
from sapt_fast.sites.warm import run_backward
from sapt_fast.storage.prompt import PromptFiles, outer_layers
from sapt_fast.storage.task_saving import stacked_rows
from sapt_fast.storage.tasks import AdapterFiles, Expected


class PromptHandle(SaptHandle):
    """`SaptHandle` of a model with `SaptConfig(adapter="prompt")`.

    Every input's mixture of prompts is inserted before its embeddings (SAPT-Prompt, ACL 2024); no
    layer changes. Masks, position ids, labels and logits keep the length of the tokens.

    Attributes:
        prompts: the pool, K prompts [P, D].

    Args:
        model: an encoder-decoder or decoder-only language model; it is not changed.
        config: the `SaptConfig` of the prompts and the router.
        report: the return value of `sites`.

    Raises:
        ValueError: if the model does not support prompts.

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

    method = "sapt_prompt"
    attribute = "sapt"
    site = "embeddings"
    adapter_files: ClassVar[AdapterFiles] = PromptFiles()

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        embedding = model.get_input_embeddings()
        self.prompts = PromptPool(
            config.prompt_length,
            embedding.weight.shape[1],
            reserve=config.reserve_tasks,
            device=execution_device(embedding),
            dtype=config.adapter_dtype(embedding.weight.dtype),
        )
        self.routing = PromptRouting(model, self.signal, self._has_tasks, self._count, self.prompts)

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the modules that read prompts; their layers stay as they are."""
        require_placement(model)
        places = [prompt_place(model)]
        if model.config.is_encoder_decoder:
            places.append(model.get_decoder())  # its cross-attention sees the prompt
        paths = [next(n for n, m in model.named_modules() if m is place) for place in places]
        return PatchReport(prompted=paths)

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a task as `restore_task` does, without checking the name.

        Args:
            name, key, modules: as in `restore_task`.
            adapters: the prompt [P, D].

        Raises:
            ValueError: as `restore_task`, except for the name.
        """
        self.prompts.require_fits(adapters)
        self.task_modules.require_fits(modules)
        self.router.add_key(key)
        self.prompts.add(adapters)
        self.task_modules.add(modules)
        self._task_added(name)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Empty: no layer is patched."""
        return {}

    def _run_mixture(self, weights: Tensor, ids: Tensor) -> None:
        embedding = self._model.get_input_embeddings()
        run_backward(lambda: [self.prompts(weights, embedding, ids)], [weights])

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Raises ValueError: prompts are inputs, not weights, so they cannot be merged."""
        raise ValueError("merge: not available for prompts; they are inputs, not weights")

    @torch.no_grad()
    def _add_adapters(self) -> None:
        """Adds a prompt of random rows of the vocabulary (SAPT, ACL 2024)."""
        embedding = self._model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        vocabulary = getattr(self._model.config.get_text_config(), "vocab_size", rows)
        ids = torch.randint(min(vocabulary, rows), (1, self.config.prompt_length))
        self.prompts.add(embedding(ids.to(execution_device(embedding)))[0])

    def _growing(self) -> Iterator[nn.Parameter]:
        yield from (self.prompts.rows.trainable, self.router.keys.trainable)
        yield from self.task_modules.newest()

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        yield self.prompts.rows, [self.prompts.length] * len(self.tasks)
        yield from super()._rows()

    # --- on disk ---

    @classmethod
    def expected(cls, model: Any, config: Any, report: PatchReport) -> Expected:
        """Returns what a saved folder of this method with this config must contain."""
        router = router_shapes(token_embedding(model).weight.shape[1], config)
        return Expected(config, cls.adapter_files, [], outer_layers(model), router)

    def adapters(self, state: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Returns the prompt [P, D] of each task; sharded tensors are gathered."""
        rows = stacked_rows(f"{self.attribute}.prompts.rows", self.prompts.rows, state)
        return list(rows.reshape(len(self.tasks), -1, rows.shape[1]))

    def set_adapter(self, index: int, adapter: Any) -> None:
        """Copies the values of a stored prompt into that of task `index`."""
        self.prompts.prompt(index).copy_(adapter)

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """Returns the mixture of the prompts by `weights` [K]: one prompt [P, D]."""
        if shared or self.task_modules.paths:
            raise ValueError(
                f"export_adapter: not possible, because PEFT's prompt tuning cannot store modules "
                f"that were trained with the prompts ({[*shared][:3]} or modules of tasks); use "
                "save_pretrained"
            )
        prompts = torch.stack([self.prompts.prompt(k) for k in range(len(weights))]).to("cpu")
        return torch.einsum("k,kpd->pd", weights.double(), prompts.double()).to(prompts.dtype)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"
