"""L2P: every input selects prompts from one pool by their keys.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022. This file has the handle of
text models; `sapt_fast.methods.l2p_images` has that of image models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.base import Handle
from sapt_fast.methods.concatenated import ConcatenatedHandle
from sapt_fast.methods.l2p_choice import PromptChoice, fill_prompts
from sapt_fast.methods.l2p_config import L2PConfig
from sapt_fast.methods.task_config import require
from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.sites.embeddings import PlacesRouting
from sapt_fast.sites.image_embeddings import reads_images
from sapt_fast.sites.report import PatchReport

__all__ = ["L2PConfig", "L2pConfig", "L2pHandle"]

L2pConfig = L2PConfig  # the earlier name


class L2pHandle(PromptChoice, ConcatenatedHandle):
    """`model.l2p` of a text model: a pool of M prompts, of which each input uses N.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    s are the N keys nearest to the query, by cosine distance g(q, k) = 1 - cos(q, k). Training
    selects by g(q, k_m) h_m instead, where h_m is the fraction of past tasks' selections that
    chose prompt m (frequency-diversified selection). Prediction selects by g. The numbers of the
    defaults are those of the PyTorch port. `L2PConfig` has other choices by name.

    The paper is about images. For text, this class differs in three points:

    - the query is the pooled input embedding, frozen, instead of a vision model's [CLS];
    - the model's own head predicts;
    - `count_picks` counts the selections of a task's inputs once the task has ended.

    For an image model, `sapt_fast.patch` makes `model.l2p` a
    `sapt_fast.methods.l2p_images.L2PImageHandle`.

    `attention` contains the indices [B, N] of the selected prompts.

    Attributes:
        prompt_keys: [M, D], in the embedding's dtype.
        picked: [M] int64, how often past tasks selected each prompt.
        centre: [D], subtracted from queries; zeros unless `centre_queries`.
        begun: the number of tasks that have begun.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone(), sapt_fast.L2PConfig(prompts=6, top=2))
        >>> model.l2p.grow("first")
        >>> ids = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> loss = model(ids, labels=ids).loss + model.l2p.key_loss(ids)
        >>> model.l2p.attention.shape
        torch.Size([2, 2])
    """

    Config = L2PConfig
    method = "l2p"
    attribute = "l2p"

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        table = model.get_input_embeddings().weight
        self.init_choice(table.shape[1], self._device, config.adapter_dtype(table.dtype))
        pool = ConcatenatedPrompts(self.prompts.rows, config.length, self._top)
        self.routing = PlacesRouting(model, self.signal, self._has_tasks, self._top, pool)

    @classmethod
    def of_model(cls, model: Any) -> type[Handle]:
        """Returns the class of the handle for a model of texts, or of images."""
        if not reads_images(model):
            return cls
        from sapt_fast.methods.l2p_images import L2PImageHandle

        return L2PImageHandle

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the modules that read prompts.

        Raises:
            ValueError: if the config has fields for images.
        """
        for name, text in (("layer", 0), ("query_layer", None), ("query_pooling", None)):
            require(getattr(config, name) == text, name, getattr(config, name), f"{text} for text")
        require(config.head != "prompts", "head", config.head, "'model' or None for text")
        start = config.prompt_start
        require(start != "patches", "prompt_start", start, "another start for text")
        return super().sites(model, config)

    def _top(self) -> int:
        top: int = self.config.top
        return top

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Creates the pool for the first task; later tasks train the same pool.

        Args:
            name: the task's name; the first one names the pool.
            optimizer: gets the pool's parameters for the first task. With `task_prompts`, it loses
                its state of prompts and keys: its momentum would move those of earlier tasks.

        Raises:
            ValueError: as `TaskHandle.add_task`.
            ValueError: with `task_prompts`, if the pool has no prompts left.
        """
        self.require_room()
        if not self.tasks:
            super().add_task(name, optimizer)
        else:
            rows = self.prompts.rows
            self.begin(rows, optimizer)

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`PromptHandle.put_task`, of the one pool that there is."""
        if self.tasks:
            raise ValueError(f"name: got {name!r}, expected none: all tasks train one pool")
        super().put_task(name, adapters, key, modules)

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the indices [B, N] int64 of the prompts that inputs select."""
        return self.pick(self._query(**inputs), self._model.training)[1]

    def key_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss's second term, which moves selected keys towards their queries.

        It is 0 if the choice does not depend on keys.

        Args:
            input_ids, attention_mask, labels: [B, T], as passed to the model.
        """
        query = self._query(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return self.pull(self.pick(query, True)[0])

    @torch.no_grad()
    def start_from(self, batches: Any) -> None:
        """Sets what the config takes from inputs of the first task: the centre and the keys.

        Call it once, after the first task has begun and before it trains.

        Args:
            batches: iterable of (ids [B, T], mask [B, T]) of prompts, as in `count_picks`.

        Raises:
            RuntimeError: if it is not the first task, or the values have been set.
            ValueError: if there are too few inputs.
        """
        self.start_keys(torch.cat([self.prompt_keys[:0], *self._queries_of(batches)]))

    def _queries_of(self, batches: Any) -> Iterable[Tensor]:
        for ids, mask in batches:
            yield self._query(input_ids=ids, attention_mask=mask)

    @torch.no_grad()
    def _query(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        pooled = self._pooled(input_ids, inputs_embeds, attention_mask, labels)
        return pooled.to(self.prompt_keys.dtype)

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the keys [M, D], the counts [M], the centre [D] and the progress."""
        return self.choice_state(
            (held or {}).get(f"{self.attribute}.prompt_keys", self.prompt_keys)
        )

    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets what `state` returned."""
        self.restore_choice(state)

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless there are one pool, and what `state` returns."""
        if tasks != 1:
            raise ValueError(f"{source}: got {tasks} pools of prompts, expected one")
        width = model.get_input_embeddings().weight.shape[1]
        cls.require_choice(config, width, state, source)

    @torch.no_grad()
    def _add_adapters(self) -> None:
        super()._add_adapters()
        fill_prompts(self.prompts.rows.rows(), self.config.prompt_start)

    def _add_key(self) -> None:
        super()._add_key()
        self.new_keys()

    def _task_added(self, name: str) -> None:
        super()._task_added(name)
        self.begun = 1
        self.prompt_keys.requires_grad_(self.trains_keys)
