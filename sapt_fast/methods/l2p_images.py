"""L2P on images: every image selects prompts from one pool by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.images import ImageHandle
from sapt_fast.methods.l2p_choice import PromptChoice, fill_prompts
from sapt_fast.methods.l2p_config import L2PConfig
from sapt_fast.methods.task_config import require
from sapt_fast.pools.own import Own
from sapt_fast.pools.prompts import ConcatenatedPrompts, PromptPool
from sapt_fast.sites.features import bare
from sapt_fast.sites.find import require_placement
from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.image_prompts import ImagePromptRouting
from sapt_fast.sites.image_queries import ImageQueries
from sapt_fast.sites.modules import find_modules
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.warm import run_backward

__all__ = ["L2PImageHandle"]


class L2PImageHandle(PromptChoice, ImageHandle):
    """`model.l2p` of an image model: a pool of M prompts, of which each image uses N.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    s are the N keys nearest to the query q, which the frozen model computes without prompts. The
    prompts are put behind CLS before encoder layer `layer`, with CLS's position embedding. The
    classifier reads the mean of the prompts' outputs (`head="prompts"`), and trains. Outputs have
    the shapes of the model without prompts.

    `attention` contains the indices [B, N] of the selected prompts.

    Attributes:
        prompts: the pool, one stack of M * L_p rows.
        prompt_keys: [M, D].
        picked: [M] int64, how often past tasks selected each prompt.
        centre: [D], subtracted from queries; zeros unless `centre_queries`.
        begun: the number of tasks that have begun.
        routing: the selection of the running forward.

    Args:
        model: a model with one vision tower that `vision_parts` knows.
        config: the `L2PConfig`.
        report: the return value of `sites`.

    Raises:
        ValueError: if the config does not fit the model.

    Example:
        >>> import sapt_fast, torch, transformers
        >>> config = transformers.ViTConfig(
        ...     image_size=16, patch_size=8, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2, num_labels=3)
        >>> model = transformers.ViTForImageClassification(config)
        >>> model = sapt_fast.patch(model, sapt_fast.L2PConfig(prompts=6, top=2))
        >>> model.l2p.grow("first")
        >>> images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
        >>> loss = model(images, labels=labels).loss + model.l2p.key_loss()
        >>> model.l2p.attention.shape
        torch.Size([4, 2])
    """

    Config = L2PConfig
    method = "l2p_images"
    attribute = "l2p"
    site = "embeddings"
    routing: ImagePromptRouting

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        parts = self._parts
        weight = next(parts.embeddings.parameters())
        dtype = config.adapter_dtype(weight.dtype)
        self.prompts = PromptPool(
            config.prompt_length, parts.width, reserve=1, device=weight.device, dtype=dtype
        )
        self.init_choice(self._queries.width, weight.device, dtype)
        self.routing = ImagePromptRouting(
            model,
            self._route,
            self._has_tasks,
            self._top,
            ConcatenatedPrompts(self.prompts.rows, config.length, self._top),
            parts,
            config.layer,
            parts.classifier is not None and config.head != "model",
        )
        if config.query_layer is not None and config.query_layer <= config.layer:
            self.routing.of_layer = config.query_layer, self._of_layer

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the encoder layer before which prompts enter.

        Raises:
            ValueError: if the model has no supported vision tower, or the config does not fit it.
        """
        require_placement(model)
        parts = vision_parts(model)
        layers = len(parts.layers)
        expected = f"0 to {layers - 1}: the model has {layers} encoder layers"
        require(config.layer < layers, "layer", config.layer, expected)
        without = config.head != "prompts" or parts.classifier is not None
        reason = f"'model' or None: {type(model).__name__} has no linear classifier"
        require(without, "head", config.head, reason)
        tokens = "False for images: there are no random tokens to standardise by"
        require(not config.standardize_query, "standardize_query", True, tokens)
        ImageQueries(model, config.query_layer, config.query_pooling)  # raises if it cannot query
        find_modules(model, config.modules_to_save or (), ())  # raises if there is no such module
        return PatchReport(prompted=[f"{parts.layers_path()}.{config.layer}"])

    # --- queries and choice ---

    @property
    def query_width(self) -> int:
        """D of the queries, which is that of the keys."""
        return self.prompt_keys.shape[1]

    def set_query_width(self, width: int) -> None:
        """Prepares keys for queries [B, width]; there is no task yet."""
        keys = self.prompt_keys
        self.prompt_keys = nn.Parameter(keys.new_empty(0, width), requires_grad=False)
        self.centre = self.centre.new_zeros(width)

    def look_up_by(self, encoder: nn.Module) -> None:
        """As `ImageHandle.look_up_by`; then no layer of this model gives the queries."""
        super().look_up_by(encoder)
        self.routing.of_layer = None

    def signal(self, **inputs: Any) -> Tensor:
        """Returns the indices [B, N] int64 of the prompts that images select.

        Args:
            **inputs: pixel_values and interpolate_pos_encoding, as passed to the model.
        """
        images = inputs.get("pixel_values")
        return self._picked(self.query(images, inputs.get("interpolate_pos_encoding")))[1]

    def _route(
        self, pixel_values: Any = None, interpolate_pos_encoding: bool | None = None
    ) -> Tensor | None:
        """As `signal`; None if a layer of the running forward will give the query."""
        if self._reads_running_layer():
            self._parts.require_images(pixel_values, bool(interpolate_pos_encoding))
            return None
        return self._noted(self.query(pixel_values, interpolate_pos_encoding))

    def _reads_running_layer(self) -> bool:
        """Whether the running forward's own low layers compute what the frozen model would."""
        if self.routing.of_layer is None or self.routing.queries is not None:
            return False
        self._queries.require_frozen()
        alone = sum(isinstance(child, Own) for child in self._model.children()) == 1
        return alone and not (self._model.training and self._parts.has_dropout())

    def _of_layer(self, hidden: Tensor) -> Tensor:
        return self._noted(self._queries.pooled(hidden))

    def _noted(self, query: Tensor) -> Tensor:
        """Returns the prompts of the running forward, whose cosines `key_loss` reads."""
        self.routing.cosines, index = self._picked(query)
        return index

    def _picked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.pick(query.to(self.prompt_keys.dtype), self._model.training)

    def key_loss(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """Returns the loss's second term, which moves selected keys towards their queries.

        It is 0 if the choice does not depend on keys.

        Args:
            pixel_values, interpolate_pos_encoding: as passed to the model. None: of this thread's
                last forward, whose queries and choice are used.

        Raises:
            RuntimeError: if there was no such forward, it was given its prompts, or it ran without
                gradients and they are enabled now.
        """
        if pixel_values is not None:
            query = self.query(pixel_values, interpolate_pos_encoding)
            return self.pull(self.pick(query.to(self.prompt_keys.dtype), True)[0])
        if not self.config.looks_up:
            return self.prompt_keys.new_zeros(())
        return self.pull(self.last_cosines(self.trains_keys))

    @torch.no_grad()
    def start_from(self, batches: Any) -> None:
        """Sets what the config takes from images of the first task: centre, keys, prompts.

        Call it once, after the first task has begun and before it trains.

        Args:
            batches: iterable of pixel_values [B, C, H, W], or of tuples that begin with them, as in
                `count_picks`.

        Raises:
            RuntimeError: if it is not the first task, or the values have been set.
            ValueError: if there are too few images.
        """
        batches = [_images_in(batch) for batch in batches]
        queries = torch.cat([self.prompt_keys[:0], *self._queries_of(batches)])
        self.start_keys(queries)
        if self.config.prompt_start == "patches":
            patches = torch.cat([self._patches(images) for images in batches]).flatten(0, 1).float()
            rows, position = self.prompts.rows.rows(), self._parts.cls_position()
            noise = torch.randn(rows.shape, device=patches.device)
            values = patches.mean(0) + noise * patches.std(0, correction=0)
            rows.copy_(values if position is None else values - position.float())

    def _patches(self, images: Tensor) -> Tensor:
        """Returns what the layer reads behind which prompts enter, [B, patches, D]."""
        parts, layer = self._parts, self.config.layer
        if layer:
            hidden = ImageQueries(self._model, layer).hidden(images)
        else:
            weight = next(parts.embeddings.parameters())
            embeddings = bare(parts.embeddings)  # without dropout
            hidden = embeddings(parts.require_images(images).to(weight.dtype))
        return hidden[:, parts.prefix :]

    def _queries_of(self, batches: Any) -> Iterable[Tensor]:
        for batch in batches:
            yield self.query(_images_in(batch)).to(self.prompt_keys.dtype)

    @property
    def _device(self) -> torch.device:
        return self.prompt_keys.device

    def run_layers(self, samples: int, tokens: int) -> None:
        """Chooses and gathers prompts for queries of zeros, for `warmup`."""
        query = self.prompt_keys.new_zeros(samples, self.prompt_keys.shape[1])

        def run() -> list[Tensor]:
            cosines, index = self.pick(query, torch.is_grad_enabled())
            return [cosines, self.routing.pool.chosen(index)]

        run_backward(run, [self.prompt_keys, self.prompts.rows.trainable])

    # --- tasks ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Begins a task. The first creates the pool and its keys; all tasks train them.

        Args:
            name: the task's name, unique.
            optimizer: gets the pool's parameters for the first task. With `task_prompts`, it loses
                its state of prompts and keys: its momentum would move those of earlier tasks.

        Raises:
            ValueError: if the name is not valid, or another task has it.
            ValueError: with `task_prompts`, if the pool has no prompts left.

        Nothing has changed after an error.
        """
        self._require_new(name)
        self.require_room()
        fresh = not self.tasks
        if fresh:
            self._new_pool()
        rows = self.prompts.rows
        self.begin(rows, optimizer)
        self._tasks.append(name)
        self.routing.weights = self.routing.cosines = None
        if fresh and optimizer is not None:
            trained = [p for p in (rows.trainable, self.prompt_keys) if p.requires_grad]
            optimizer.param_groups[0]["params"] += trained

    def _new_pool(self) -> None:
        rows = self.prompts.rows
        with torch.no_grad():
            self.prompts.add(torch.zeros(self.config.prompt_length, rows.width))
            fill_prompts(rows.rows(), self.config.prompt_start or "uniform")
        self.new_keys()
        self.prompt_keys.requires_grad_(self.trains_keys)

    def _top(self) -> int:
        top: int = self.config.top
        return top

    # --- places ---

    def attach(self, path: str) -> None:
        """Does nothing: no layer changes."""

    def detach(self, path: str) -> None:
        """Does nothing: no layer has changed."""

    # --- saving ---

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the prompts, the keys, the counts, the centre and the progress."""
        return {"prompts": self.prompts.rows.rows(), **self.choice_state(self.prompt_keys.data)}

    def own_shapes(self, tasks: int, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `own_tensors` for queries [B, width]."""
        prompts = (self.config.prompt_length, self.prompts.rows.width)
        return {"prompts": prompts, **self.choice_shapes(self.config, width)}

    def require_own_values(self, own: Mapping[str, Tensor], tasks: int) -> None:
        """Raises ValueError unless keys, counts and progress can be those of these tasks."""
        self.require_choice(self.config, own["keys"].shape[1], own, "tensors")
        if own["progress"][0] != tasks:
            raise ValueError(f"tensors: got progress {own['progress'].tolist()} of {tasks} tasks")

    def begin_stored(self, tasks: list[str], own: Mapping[str, Tensor]) -> None:
        """Creates the pool of a saved folder's tasks."""
        self._new_pool()
        self._tasks.extend(tasks)

    def set_own(self, own: Mapping[str, Tensor]) -> None:
        """Sets prompts, keys, counts and centre to stored values."""
        self.prompts.rows.rows().copy_(own["prompts"])
        self.restore_choice(own)


def _images_in(batch: Any) -> Any:
    return batch if isinstance(batch, Tensor) else batch[0]
