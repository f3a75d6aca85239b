"""L2P: every input picks prompts from one pool, by keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step, prompt_mask
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.strategies.prompts import Concatenated, prompt_config
from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.ops import topk_keys

__all__ = ["L2p", "L2pOptions"]


@dataclass(frozen=True)
class L2pOptions:
    """Options of `L2p`."""

    prompts: int = field(default=10, metadata={"help": "M, the prompts of the pool."})
    top: int = field(default=5, metadata={"help": "N, the prompts that an input gets."})
    length: int = field(default=5, metadata={"help": "L_p, the rows of a prompt."})
    strength: float = field(default=0.1, metadata={"help": "lambda, which draws keys to queries."})
    diversified: bool = field(
        default=True, metadata={"help": "In training, pass over prompts that past tasks used."}
    )

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "prompts", self.prompts, "at least 1")
        require(1 <= self.top <= self.prompts, "top", self.top, f"1 to {self.prompts} (prompts)")
        require(self.length >= 1, "length", self.length, "at least 1")
        require(self.strength >= 0, "strength", self.strength, "at least 0")


class L2p(Strategy):
    """Learning to prompt (Wang et al., CVPR 2022), for text.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    s are the N keys nearest to the query, by cosine distance g(q, k) = 1 - cos(q, k). Training
    picks by g(q, k_m) h_m instead, h_m being the share of prompt m in all that past tasks picked
    (frequency-diversified selection); the answer is by g alone. All prompts and keys train in
    every task, and the defaults are those of the PyTorch port.

    Chosen here: the query is the pooled input embedding of SAPT's router (`pooling` and
    `standardize_query` of the config), which is frozen, in place of a vision model's [CLS]; the
    model's own head answers; h counts what the training rows of a task pick when it has ended;
    each input has prompts of its own, without a vote of the batch.
    """

    Options = L2pOptions
    options: L2pOptions
    _layout: Concatenated
    _picked: Tensor  # [M] int64, how often past tasks picked each prompt

    def configure(self, config: SaptConfig) -> SaptConfig:
        return prompt_config(config, prompt_length=self.options.prompts * self.options.length)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        sapt, device = self.model.sapt, self.bench.device
        self._layout = Concatenated(self.model, self.options.length)
        none = torch.zeros(self.options.prompts, dtype=torch.int64)
        self._picked = state.get("picked", none).to(device)
        sapt.prompt_keys = None
        if "keys" in state:
            sapt.prompt_keys = nn.Parameter(state["keys"].to(device), requires_grad=False)

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        sapt = self.model.sapt
        if not sapt.tasks:
            sapt.add_task("prompts")
            embedding = self.model.get_input_embeddings().weight
            keys = torch.empty(self.options.prompts, embedding.shape[1]).uniform_(-1, 1)
            sapt.prompt_keys = nn.Parameter(keys.to(embedding))
        self.freeze_router()
        sapt.prompt_keys.requires_grad_(True)

    def mixture(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        _, self._layout.index = self.pick(input_ids, attention_mask, self.model.training)
        return torch.ones(1, 1, device=input_ids.device)

    def objective(self, step: Step) -> Tensor:
        mask = prompt_mask(step.batch, self.bench.causal)
        similarity, _ = self.pick(step.batch["input_ids"], mask, True)
        return step.loss - self.options.strength * similarity.sum(1).mean()

    def pick(self, input_ids: Tensor, mask: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Cosines [B, N] and places [B, N] of the prompts that inputs [B, T] get."""
        sapt, top = self.model.sapt, self.options.top
        with torch.no_grad():
            query = sapt.router.pool(self.model.get_input_embeddings(), input_ids, None, mask)
        keys = sapt.prompt_keys
        if not (training and self.options.diversified and self._picked.any()):
            return topk_keys(query, keys, top, metric="cosine")
        cosines, places = topk_keys(query, keys, len(keys), metric="cosine")
        share = self._picked / self._picked.sum()
        # Stable: among prompts that were never picked the nearest come first.
        order = ((1 - cosines) * share[places]).argsort(dim=1, stable=True)[:, :top]
        return cosines.gather(1, order), places.gather(1, order)

    @torch.no_grad()
    def end_task(self, task: TaskData) -> None:
        inputs, size = self.bench.inputs(task.train), self.bench.settings.eval_batch_size
        picked = torch.zeros_like(self._picked)
        for start in range(0, len(inputs), size):
            _, places = self.pick(*self.bench.pad(inputs[start : start + size]), True)
            picked += torch.bincount(places.flatten(), minlength=len(picked))
        self._picked = self._picked + picked

    def state(self) -> dict[str, Tensor]:
        return {"picked": self._picked, "keys": self.model.sapt.prompt_keys}
