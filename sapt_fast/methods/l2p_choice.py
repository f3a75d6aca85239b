"""Which prompts of L2P's pool each input gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sapt_fast.methods.l2p_config import L2PConfig
from sapt_fast.ops import topk_keys
from sapt_fast.pools.rows import RowStack

__all__ = ["PromptChoice", "fill_prompts", "similarities", "votes"]


def fill_prompts(rows: Tensor, start: str | None) -> None:
    """Writes new values into the rows [R, D] of prompts; None and "patches" leave them."""
    if start == "normal":
        rows.normal_(std=0.02)
    elif start in ("uniform", "uniform01"):
        rows.uniform_(-1 if start == "uniform" else 0, 1)


def similarities(query: Tensor, keys: Tensor) -> Tensor:
    """Returns the cosines [B, M] of queries [B, D] and keys [M, D]."""
    cosines, places = topk_keys(query, keys, len(keys), metric="cosine")
    return cosines.gather(1, places.argsort(1))


def votes(index: Tensor, prompts: int) -> Tensor:
    """Returns the N prompts that most rows contain, most first, as the original code finds them.

    Args:
        index: [B, N] int64, what each input chose.
        prompts: M.

    Returns:
        [N] int64. Ties are broken as by `torch.unique(return_counts=True)` and `torch.topk`: the
        counts of chosen prompts in ascending order of the prompts, then zeros.
    """
    given = index.flatten()
    counts = given.new_zeros(prompts).scatter_add(0, given, torch.ones_like(given))
    chosen_first = (counts == 0).to(torch.uint8).argsort(stable=True)
    return chosen_first[counts[chosen_first].topk(index.shape[1])[1]]


class PromptChoice:
    """The keys of a pool of M prompts, and how queries choose N of them; a part of the handles.

        distance(q, m) = (1 - cos(q - c, k_m)) h_m

    h_m is the fraction of past tasks' choices that fell on prompt m, in training with
    `diversified`; else it is 1. c is 0 unless `centre_queries`.

    Attributes:
        prompt_keys: [M, D]; [0, D] before the first task.
        picked: [M] int64, how often past tasks chose each prompt.
        centre: c, [D].
        begun: the number of tasks that have begun.
        started: whether `start_from` has been called.
    """

    config: L2PConfig
    attribute: ClassVar[str]
    prompt_keys: nn.Parameter
    picked: Tensor
    centre: Tensor
    begun: int
    started: bool

    def _require_order(self, order: Sequence[int]) -> None:
        raise ValueError("tasks: all tasks of L2P train one pool, so none can be deleted or moved")

    def init_choice(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        """Adds the attributes to the handle, a module; width is D."""
        module: Any = self
        keys = torch.empty(0, width, device=device, dtype=dtype)
        module.prompt_keys = nn.Parameter(keys, requires_grad=False)
        picked = torch.zeros(self.config.prompts, dtype=torch.int64, device=device)
        module.register_buffer("picked", picked, persistent=False)  # `choice_state` has them
        centre = torch.zeros(width, device=device, dtype=dtype)
        module.register_buffer("centre", centre, persistent=False)
        self.begun, self.started = 0, False

    # --- choosing ---

    def pick(self, query: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Selects prompts for queries.

        Args:
            query: [B, D].
            training: whether to apply what the config says about training: the penalty on prompts
                of past tasks, or the prompts of the running task.

        Returns:
            Cosines [B, N] (zeros if the choice does not depend on keys), and the prompts' indices
            [B, N] int64.

        Raises:
            RuntimeError: if the config needs `start_from`, which has not been called.
        """
        self._require_started()
        config, keys, count = self.config, self.prompt_keys, len(query)
        if not config.looks_up:
            return query.new_zeros(count, config.top), self._without_keys(count, query.device)
        if config.centre_queries:
            query = query - self.centre
        if training and config.task_prompts:
            first, last = (self.begun - 1) * config.top, self.begun * config.top
            index = torch.arange(first, last, device=query.device).expand(count, -1)
            return similarities(query, keys[first:last]), index
        diversified = training and config.diversified
        if config.choice == "sample" and not diversified:
            return topk_keys(query, keys, config.top, metric="cosine")
        cosines, places = topk_keys(query, keys, len(keys), metric="cosine")
        if diversified:
            share = self.picked / self.picked.sum().clamp(min=1)
            # Stable: among prompts that were never selected, the nearest are first.
            order = ((1 - cosines) * share[places]).argsort(dim=1, stable=True)
            cosines, places = cosines.gather(1, order), places.gather(1, order)
        if config.choice == "sample":
            return cosines[:, : config.top], places[:, : config.top]
        chosen = votes(places[:, : config.top], config.prompts).expand(count, -1)
        return cosines.gather(1, places.argsort(1)).gather(1, chosen), chosen

    def _without_keys(self, count: int, device: torch.device) -> Tensor:
        config = self.config
        if config.choice == "fixed":
            return torch.arange(config.top, device=device).expand(count, -1)
        drawn = torch.rand(count, config.prompts, device=device)
        return drawn.argsort(dim=1)[:, : config.top]

    def pull(self, cosines: Tensor) -> Tensor:
        """Returns the loss's second term, a scalar, of the chosen keys' cosines [B, N]."""
        return -self.config.strength * cosines.sum() / max(len(cosines), 1)

    def count(self, queries: Iterable[Tensor], training: bool) -> Tensor:
        """Returns how often each prompt is chosen for queries [B, D] of each batch, [M] int64."""
        counts = torch.zeros_like(self.picked)
        for query in queries:
            index = self.pick(query, training)[1]
            counts += torch.bincount(index.flatten(), minlength=len(counts))
        return counts

    @torch.no_grad()
    def count_picks(self, batches: Any) -> None:
        """Ends a task: adds the selections of its inputs to `picked`.

        Args:
            batches: for text, iterable of (ids [B, T], mask [B, T]) of prompts; for images, of
                pixel_values [B, C, H, W], or of tuples that begin with them.
        """
        self.picked += self.count(self._queries_of(batches), True)

    @torch.no_grad()
    def histogram(self, batches: Any) -> Tensor:
        """Returns how often prediction selects each prompt for inputs, [M] int64.

        Args:
            batches: as in `count_picks`.
        """
        return self.count(self._queries_of(batches), False)

    def _queries_of(self, batches: Any) -> Iterable[Tensor]:
        """Yields the queries [B, D] of each batch."""
        raise NotImplementedError

    # --- tasks ---

    def require_room(self) -> None:
        """Raises ValueError if the pool has no prompts left for another task."""
        config, needed = self.config, (self.begun + 1) * self.config.top
        if config.task_prompts and needed > config.prompts:
            raise ValueError(
                f"name: got task {self.begun + 1} for a pool of {config.prompts} prompts, expected "
                f"at most {config.prompts // config.top} tasks: with task_prompts, each task has "
                f"{config.top} of its own"
            )

    def begin(self, rows: RowStack, optimizer: Any) -> None:
        """Counts a task that begins, and copies its prompts from the last task's, if so set.

        Args:
            rows: [M * L_p, D] of all prompts, which are written in place.
            optimizer: trains them; or None. With `task_prompts`, it loses its state of prompts and
                keys: its momentum would move those of earlier tasks.
        """
        self.begun += 1
        if not self.config.task_prompts or self.begun == 1:
            return
        size = self.config.top * self.config.length
        first = (self.begun - 1) * size
        if self.config.shared_pool_copy:
            with torch.no_grad():
                rows.rows()[first : first + size] = rows.rows()[first - size : first].clone()
        if optimizer is not None:
            for parameter in (rows.trainable, self.prompt_keys):
                optimizer.state.pop(parameter, None)

    def new_keys(self) -> None:
        """Initialises the keys, which train if they decide the choice."""
        keys = torch.empty(self.config.prompts, self.prompt_keys.shape[1])
        keys = keys.uniform_(0 if self.config.keys_start == "uniform01" else -1, 1)
        module: Any = self
        module.prompt_keys = nn.Parameter(keys.to(self.prompt_keys), requires_grad=False)

    @property
    def trains_keys(self) -> bool:
        """Whether keys receive a gradient: they decide the choice, and the loss pulls them."""
        return self.config.looks_up and self.config.strength > 0

    @torch.no_grad()
    def start_keys(self, queries: Tensor) -> None:
        """Sets the centre and the keys to what the config takes from queries [n, D].

        Raises:
            RuntimeError: if it is not the first task, or they have been set.
            ValueError: if there are fewer queries than keys, or they are not finite.
        """
        config = self.config
        if self.begun != 1 or self.started:
            begun = f"{self.begun} tasks begun" + (", after start_from" if self.started else "")
            raise RuntimeError(
                f"start_from: got a model with {begun}, expected one call for the first task: "
                "later ones would change what its prompts are chosen by"
            )
        needed = config.prompts if config.keys_start == "queries" else 1
        if len(queries) < needed:
            raise ValueError(f"batches: got {len(queries)} inputs, expected at least {needed}")
        if not queries.isfinite().all():
            raise ValueError("batches: got inputs whose queries are not finite")
        if config.centre_queries:
            self.centre.copy_(queries.double().mean(0))
        if config.keys_start == "queries":
            drawn = torch.randperm(len(queries))[: config.prompts].to(queries.device)
            self.prompt_keys.copy_(queries[drawn] - self.centre)
        self.started = True

    def _require_started(self) -> None:
        missing = [] if self.started else self.config.needs_start
        if missing and self.begun:
            raise RuntimeError(
                f"{missing[0]} takes values from inputs of the first task: call "
                f"model.{self.attribute}.start_from(batches) after the first task has begun"
            )

    # --- saving ---

    def choice_state(self, keys: Tensor) -> dict[str, Tensor]:
        """Returns what a saved folder contains; keys are the values of `prompt_keys`."""
        progress = torch.tensor([self.begun, int(self.started)])
        return {"picked": self.picked, "keys": keys, "centre": self.centre, "progress": progress}

    @torch.no_grad()
    def restore_choice(self, state: Mapping[str, Tensor]) -> None:
        """Sets what `choice_state` returned; earlier versions saved keys and counts alone."""
        self.picked.copy_(state["picked"])
        self.prompt_keys.data = state["keys"].to(self.prompt_keys)
        if "progress" in state:
            self.centre.copy_(state["centre"])
            begun, started = state["progress"].tolist()
            self.begun, self.started = begun, bool(started)

    @staticmethod
    def choice_shapes(config: L2PConfig, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `choice_state` for queries [B, width]."""
        count = config.prompts
        return {"picked": (count,), "keys": (count, width), "centre": (width,), "progress": (2,)}

    @classmethod
    def require_choice(
        cls, config: L2PConfig, width: int, state: Mapping[str, Tensor], source: object
    ) -> None:
        """Raises ValueError unless there are M keys, counts, a centre and the progress."""
        expected = cls.choice_shapes(config, width)
        if "progress" not in state and "centre" not in state:  # of an earlier version
            del expected["progress"], expected["centre"]
        got = {name: tuple(state[name].shape) for name in expected if name in state}
        if got != expected:
            raise ValueError(f"{source}: got shapes {got}, expected {expected}")
        keys, picked = state["keys"], state["picked"]
        if not keys.is_floating_point() or picked.dtype != torch.int64 or (picked < 0).any():
            raise ValueError(
                f"{source}: got keys of {keys.dtype} and picked of {picked.dtype}, expected floats "
                "and counts (int64, at least 0)"
            )
        if "progress" in state:
            centre, progress = state["centre"], state["progress"]
            if not centre.is_floating_point() or progress.dtype != torch.int64 or progress[0] < 1:
                raise ValueError(
                    f"{source}: got a centre of {centre.dtype} and progress {progress.tolist()}, "
                    "expected floats, and the number of tasks (at least 1) with 0 or 1"
                )
