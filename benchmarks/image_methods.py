"""The methods of `images.py`, through the library's handles, on states that are kept on disk.

The trained blocks are the sixth to ninth of the ViT (5 to 8). What lies below them does not change,
so the images are the states before block 5: the model's embeddings give those back. Queries are the
mean patch after block 8 of the model without prompts or adapters, computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.continual.closed_form import LinearHead

FIRST, LAST = 5, 9  # blocks [FIRST, LAST)
TOP, LENGTH, PROMPTS = 4, 5, 10
_LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "query_layer": LAST - FIRST,
    "query_pooling": "mean",
    "modules_to_save": ["classifier"],
}


class KeptEmbeddings(Dinov2Embeddings):
    """Embeddings whose images [B, T, 16, D / 16] are the states [B, T, D] of a lower layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.position_embeddings = None  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor, bool_masked_pos: Any = None) -> Tensor:
        return pixel_values.flatten(2)


def as_images(states: Tensor) -> Tensor:
    """Returns states [N, T, D] as images [N, T, 16, D / 16]."""
    return states.unflatten(2, (16, -1))


@cache
def _whole(folder: Path) -> Dinov2Model:
    return Dinov2Model.from_pretrained(folder)


def upper_model(folder: Path, tokens: int, classes: int) -> Any:
    """Returns blocks 5 to 8 with a head of zeros; the last norm has no learned scale.

    Args:
        folder: of a `Dinov2Model`.
        tokens: T of the states.
        classes: C.
    """
    whole = _whole(folder)
    config: Any = Dinov2Config(**whole.config.to_dict())
    config.num_hidden_layers = LAST - FIRST
    config.num_channels, config.num_labels = tokens, classes
    config.image_size = config.patch_size = (16, config.hidden_size // 16)
    model: Any = Dinov2ForImageClassification(config)
    model.dinov2.embeddings = KeptEmbeddings(config)
    model.dinov2.encoder.layer = deepcopy(whole.encoder.layer[FIRST:LAST])
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Rows:
    """Images of one or several tasks.

    Attributes:
        images: [N, T, 16, D / 16].
        queries: [N, D].
        labels: [N] int64.
        told: [N] int64, the task of each image, if the method is told; None if it is not.
    """

    images: Tensor
    queries: Tensor
    labels: Tensor
    told: Tensor | None = None

    def at(self, places: Tensor) -> Rows:
        """Returns the rows at places [n], or under a mask [N]."""
        told = None if self.told is None else self.told[places]
        return Rows(self.images[places], self.queries[places], self.labels[places], told)

    def __len__(self) -> int:
        return len(self.labels)


class Method:
    """What a method does before, in and after a task. This one trains the head alone.

    Args:
        model: of `upper_model`.
        tasks: the number of tasks.
    """

    together = False  # learns all tasks at once
    handle: Any = None

    def __init__(self, model: Any, tasks: int) -> None:
        self.model = model
        self.patch(tasks)
        model.classifier.requires_grad_(True)  # "modules_to_save" has done so, if there is a method

    def patch(self, tasks: int) -> None:
        """Patches the model."""

    def begin(self, number: int, rows: Rows) -> None:
        """Begins a task with these training images."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns what trains beside the head."""
        if self.handle is None:
            return []
        head = {id(parameter) for parameter in self.model.classifier.parameters()}
        return [p for p in self.handle.trainable_parameters() if id(p) not in head]

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        """Returns the context of a forward."""
        return nullcontext()

    def weights(self, rows: Rows) -> Tensor | None:
        """Returns the mixture that is passed to the model; None for the method's own."""
        return None

    def loss(self, rows: Rows) -> Tensor | float:
        """Returns what the method adds to the loss of a batch, after its forward."""
        return 0.0

    def end(self, rows: Rows) -> None:
        """Ends a task."""

    def logits(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Returns the logits [B, C] of a forward, and what the head read for them."""
        read: list[Tensor] = []
        hook = self.model.classifier.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        weights = self.weights(rows)
        given = {} if weights is None else {"mixture": weights}
        with self.running(rows):
            logits: Tensor = self.model(pixel_values=rows.images, **given).logits
        hook.remove()
        return logits, read[-1]


class L2p(Method):
    """L2P with 10 prompts of 5 rows, 4 an image; `options` override the config's fields."""

    options: ClassVar[dict[str, Any]] = {}

    def patch(self, tasks: int) -> None:
        fields: dict[str, Any] = {
            "prompts": PROMPTS,
            "top": TOP,
            "length": LENGTH,
            "strength": 0.5,
            "diversified": False,
            "centre_queries": True,
            "keys_start": "queries",
            "prompt_start": "normal",
            "query_layer": LAST - FIRST,
            "query_pooling": "mean",
        }
        sapt_fast.patch(self.model, sapt_fast.L2PConfig(**{**fields, **self.options}))
        self.handle = self.model.l2p

    def begin(self, number: int, rows: Rows) -> None:
        self.handle.grow(f"task{number}")
        if number == 0 and self.handle.config.needs_start:
            with self.handle.queries(rows.queries):
                self.handle.start_from([rows.images])

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.handle.queries(rows.queries)
        return context

    def loss(self, rows: Rows) -> Tensor | float:
        loss: Tensor = self.handle.key_loss()
        return loss

    def end(self, rows: Rows) -> None:
        with self.handle.queries(rows.queries):
            self.handle.count_picks([rows.images])


class L2pPenalty(L2p):
    """L2P that prefers, while it trains, prompts which past tasks chose less often."""

    options: ClassVar = {"diversified": True}


class L2pRandom(L2p):
    """L2P whose choice is drawn anew in each forward."""

    options: ClassVar = {"choice": "random", "centre_queries": False, "keys_start": "uniform"}


class OnePrompt(L2p):
    """One prompt of as many rows as L2P gives an image, for all images."""

    options: ClassVar = {
        "prompts": 1,
        "top": 1,
        "length": TOP * LENGTH,
        "choice": "fixed",
        "centre_queries": False,
        "keys_start": "uniform",
    }


class _Prefixes(Method):
    """Methods with prefixes of attention layers."""

    def begin(self, number: int, rows: Rows) -> None:
        self.handle.grow(f"task{number}")

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.handle.queries(rows.queries)
        return context

    def loss(self, rows: Rows) -> Tensor | float:
        with self.running(rows):
            loss: Tensor = self.handle.key_loss(rows.images)
        return loss


class Coda(_Prefixes):
    """CODA-Prompt: 4 components a task, of 8 rows, in all trained blocks."""

    def patch(self, tasks: int) -> None:
        config = sapt_fast.CodaConfig(
            pool=4 * tasks,
            n_tasks=tasks,
            length=8,
            layers=list(range(LAST - FIRST)),
            query_layer=LAST - FIRST,
            query_pooling="mean",
            modules_to_save=["classifier"],
        )
        sapt_fast.patch(self.model, config)
        self.handle = self.model.coda


class DualPrompt(_Prefixes):
    """DualPrompt: 5 general rows in block 5, 10 rows of the task in blocks 6 and 7."""

    def patch(self, tasks: int) -> None:
        config = sapt_fast.DualPromptConfig(
            g_length=5,
            e_length=10,
            g_layers=[0],
            e_layers=[1, 2],
            query_layer=LAST - FIRST,
            query_pooling="mean",
            modules_to_save=["classifier"],
        )
        sapt_fast.patch(self.model, config)
        self.handle = self.model.dualprompt


class LoraInSequence(Method):
    """One LoRA on q and v of the trained blocks, which every task trains."""

    def patch(self, tasks: int) -> None:
        sapt_fast.patch(self.model, SaptConfig(**_LORA))
        self.handle = self.model.sapt

    def begin(self, number: int, rows: Rows) -> None:
        if number == 0:
            self.handle.add_task("all")

    def weights(self, rows: Rows) -> Tensor | None:
        return torch.ones(1, 1)


class Joint(LoraInSequence):
    """One LoRA and the head, trained on all tasks at once."""

    together = True


class Sapt(Method):
    """SAPT: a LoRA and a key a task; a tenth of each task's images keep the routing in place."""

    kept: list[tuple[Rows, Tensor]]

    def patch(self, tasks: int) -> None:
        fields = {**_LORA, "key_init": "mean_query", "kl_ratio": 0.5}
        sapt_fast.patch(self.model, SaptConfig(**fields))
        self.handle, self.kept = self.model.sapt, []

    def begin(self, number: int, rows: Rows) -> None:
        self.handle.add_task(f"task{number}")
        self.handle.init_key(pixel_values=rows.images)

    def loss(self, rows: Rows) -> Tensor | float:
        terms = [
            self.handle.reflection_loss(target=target, pixel_values=kept.images)
            for kept, target in self.kept
        ]
        return self.handle.config.kl_ratio * torch.stack(terms).sum() if terms else 0.0

    @torch.no_grad()
    def end(self, rows: Rows) -> None:
        target = self.handle.route(pixel_values=rows.images).mean(0)
        self.kept.append((rows.at(torch.randperm(len(rows))[: -(-len(rows) // 10)]), target))


class LdaExperts(Method):
    """One LoRA a task; at test time that of the task which LDA on the queries finds likeliest.

    Attributes:
        lda: the head on the queries of the tasks so far.
        owner: [C], the task of each class.
    """

    lda: LinearHead
    owner: Tensor

    def patch(self, tasks: int) -> None:
        sapt_fast.patch(self.model, SaptConfig(**_LORA))
        self.handle = self.model.sapt

    def begin(self, number: int, rows: Rows) -> None:
        self.handle.add_task(f"task{number}")

    def task_of(self, rows: Rows) -> Tensor:
        """Returns the task [B] whose classes together are likeliest."""
        if rows.told is not None:
            return rows.told
        scores = self.lda(rows.queries)
        count = len(self.handle.tasks)
        logs = [
            scores.masked_fill(self.owner != task, -torch.inf).logsumexp(1) for task in range(count)
        ]
        return torch.stack(logs, 1).argmax(1)

    def weights(self, rows: Rows) -> Tensor | None:
        count = len(self.handle.tasks)
        newest = torch.tensor([count - 1])
        return F.one_hot(newest if self.model.training else self.task_of(rows), count).float()

    def logits(self, rows: Rows) -> tuple[Tensor, Tensor]:
        logits, read = super().logits(rows)
        if not self.model.training:  # among the task's own classes
            own = self.owner == self.task_of(rows)[:, None]
            logits = logits.masked_fill(~own, -torch.inf)
        return logits, read


METHODS: dict[str, Callable[[Any, int], Method]] = {
    "fine-tuned head": Method,
    "L2P": L2p,
    "LoRA per task, routed by LDA": LdaExperts,
    "LoRA in sequence": LoraInSequence,
    "SAPT": Sapt,
    "one shared prompt": OnePrompt,
    "CODA-Prompt": Coda,
    "DualPrompt": DualPrompt,
    "L2P, penalty": L2pPenalty,
    "joint": Joint,
    "L2P, random choice": L2pRandom,
}
