"""L2P: every input selects prompts from one pool by their keys.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, adapted to text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.concatenated import ConcatenatedConfig, ConcatenatedHandle
from sapt_fast.methods.task_config import require
from sapt_fast.ops import topk_keys
from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.sites.embeddings import PlacesRouting

__all__ = ["L2pConfig", "L2pHandle"]


@dataclass
class L2pConfig(ConcatenatedConfig["L2pHandle"]):
    """The pool of prompts, and how inputs pick from it.

    `pooling`, `standardize_query` and `mask_padding` apply to the query. The other fields of
    LoRA and of SAPT's router have no effect. `prompt_length` is derived: `prompts * length`.
    """

    prompts: int = field(default=10, metadata={"help": "M, number of prompts in the pool."})
    top: int = field(default=5, metadata={"help": "N, number of prompts per input."})
    length: int = field(default=5, metadata={"help": "L_p, number of rows of a prompt."})
    strength: float = field(
        default=0.1,
        metadata={"help": "lambda, weight of the loss that moves selected keys to their queries."},
    )
    diversified: bool = field(
        default=True,
        metadata={"help": "While training, prefer prompts that past tasks selected less often."},
    )

    def __post_init__(self) -> None:
        for name in ("prompts", "top", "length"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "an integer, at least 1")
        require(self.top <= self.prompts, "top", self.top, f"1 to {self.prompts} (prompts)")
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        self.prompt_length = self.prompts * self.length
        super().__post_init__()

    @property
    def method(self) -> str:
        """The name of the method."""
        return "l2p"


class L2pHandle(ConcatenatedHandle):
    """`model.l2p`: a pool of M prompts that all tasks train, and of which each input uses N.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    s are the N keys nearest to the query, by cosine distance g(q, k) = 1 - cos(q, k). Training
    selects by g(q, k_m) h_m instead, where h_m is the fraction of past tasks' selections that
    chose prompt m (frequency-diversified selection). Prediction selects by g. The defaults are
    those of the PyTorch port.

    The paper is about images. For text, this class differs in four points:

    - the query is the pooled input embedding, frozen, instead of a vision model's [CLS];
    - the model's own head predicts;
    - `count_picks` counts the selections of a task's inputs once the task has ended;
    - each input selects its own prompts; the batch does not vote.

    `attention` contains the indices [B, N] of the selected prompts.

    Attributes:
        prompt_keys: [M, D], in the embedding's dtype.
        picked: [M] int64, how often past tasks selected each prompt.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.l2p import L2pConfig
        >>> model = sapt_fast.patch(load_backbone(), L2pConfig(prompts=6, top=2))
        >>> model.l2p.grow("first")
        >>> ids = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> loss = model(ids, labels=ids).loss + model.l2p.key_loss(ids)
        >>> model.l2p.attention.shape
        torch.Size([2, 2])
    """

    Config = L2pConfig
    method = "l2p"
    attribute = "l2p"
    prompt_keys: nn.Parameter
    picked: Tensor

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        table = model.get_input_embeddings().weight
        dtype = config.adapter_dtype(table.dtype)
        keys = torch.empty(0, table.shape[1], device=self._device, dtype=dtype)
        self.prompt_keys = nn.Parameter(keys, requires_grad=False)
        picked = torch.zeros(config.prompts, dtype=torch.int64, device=self._device)
        self.register_buffer("picked", picked, persistent=False)  # `state` has it
        pool = ConcatenatedPrompts(self.prompts.rows, config.length, self._top)
        self.routing = PlacesRouting(model, self.signal, self._has_tasks, self._top, pool)

    def _top(self) -> int:
        top: int = self.config.top
        return top

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Creates the pool for the first task; later tasks train the same pool."""
        if not self.tasks:
            super().add_task(name, optimizer)

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

    def pick(self, query: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Selects prompts for queries.

        Args:
            query: [B, D].
            training: whether to apply frequency-diversified selection, if the config says so.

        Returns:
            Cosines [B, N], and the prompts' indices [B, N] int64.
        """
        keys, top = self.prompt_keys, self.config.top
        if not (training and self.config.diversified and self.picked.any()):
            return topk_keys(query, keys, top, metric="cosine")
        cosines, places = topk_keys(query, keys, len(keys), metric="cosine")
        share = self.picked / self.picked.sum()
        # Stable: among prompts that were never selected, the nearest are first.
        order = ((1 - cosines) * share[places]).argsort(dim=1, stable=True)[:, :top]
        return cosines.gather(1, order), places.gather(1, order)

    def key_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss's second term, which moves selected keys towards their queries.

        Args:
            input_ids, attention_mask, labels: [B, T], as passed to the model.
        """
        query = self._query(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return -self.config.strength * self.pick(query, True)[0].sum(1).mean()

    @torch.no_grad()
    def count_picks(self, batches: Any) -> None:
        """Ends a task: adds the selections of its inputs to `picked`.

        Args:
            batches: iterable of (ids [B, T], mask [B, T]) of prompts.
        """
        picked = torch.zeros_like(self.picked)
        for ids, mask in batches:
            _, places = self.pick(self._query(input_ids=ids, attention_mask=mask), True)
            picked += torch.bincount(places.flatten(), minlength=len(picked))
        self.picked += picked

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
        """Returns the keys [M, D], and how often each prompt was selected [M]."""
        keys = (held or {}).get(f"{self.attribute}.prompt_keys", self.prompt_keys)
        return {"picked": self.picked, "keys": keys}

    @torch.no_grad()
    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the keys and the counts from what `state` returned."""
        self.picked.copy_(state["picked"])
        self.prompt_keys.data = state["keys"].to(self.prompt_keys)

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless there are one pool, M keys and counts."""
        if tasks != 1:
            raise ValueError(f"{source}: got {tasks} pools of prompts, expected one")
        width = model.get_input_embeddings().weight.shape[1]
        expected = {"picked": (config.prompts,), "keys": (config.prompts, width)}
        got = {name: tuple(state[name].shape) for name in expected if name in state}
        if got != expected:
            raise ValueError(f"{source}: got shapes {got}, expected {expected}")
        keys, picked = state["keys"], state["picked"]
        if not keys.is_floating_point() or picked.dtype != torch.int64 or (picked < 0).any():
            raise ValueError(
                f"{source}: got keys of {keys.dtype} and picked of {picked.dtype}, expected floats "
                "and counts (int64, at least 0)"
            )

    def _add_key(self) -> None:
        super()._add_key()
        embedding = self._model.get_input_embeddings().weight
        keys = torch.empty(self.config.prompts, embedding.shape[1]).uniform_(-1, 1)
        self.prompt_keys = nn.Parameter(keys.to(self.prompt_keys))

    def _task_added(self, name: str) -> None:
        super()._task_added(name)
        self.prompt_keys.requires_grad_(True)
