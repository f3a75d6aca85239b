"""What prompts are looked up by in a memory: the mean of a low layer, centred and projected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sapt_fast.ops._common import without_autocast
from sapt_fast.pools.codebook import Exact, resize
from sapt_fast.sites.features import HiddenMean, PrincipalComponents

__all__ = ["MemoryRouter"]

_BATCH = 32


class MemoryRouter(Exact):
    """Computes q(x) = normalize((f(x) - m) V^T), f the mean of a prompt's low hidden states.

    Args:
        device: of the buffers.

    Attributes:
        mean: m, [W] float32; no numbers before `fit`.
        components: V, [C, W] float32.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0, device=device))
        self.register_buffer("components", torch.empty(0, 0, device=device))

    @property
    def is_fitted(self) -> bool:
        """Whether there are components."""
        return len(self.components) > 0

    @torch.no_grad()
    def fit(
        self, features: HiddenMean, texts: Sequence[Tensor], count: int, whitening: float
    ) -> None:
        """Computes m and V of the tokens [T_n] of prompts; errors as `PrincipalComponents.fit`.

        Args:
            features: computes f.
            texts: tokens of the prompts.
            count: C.
            whitening: each row of V is divided by its deviation to this power.
        """
        with without_autocast(self.mean.device):
            parts = [features(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
            vectors = torch.cat(parts)
            found = PrincipalComponents.fit(vectors, count)
            deviations = found(vectors).std(0)
        self.mean = found.mean.to(self.mean.device)
        self.components = found.components / deviations[:, None] ** whitening

    @torch.no_grad()
    def query(self, features: HiddenMean, texts: Sequence[Tensor]) -> Tensor:
        """Returns q, [B, C] float32, for the tokens [T_b] of each prompt."""
        with without_autocast(self.mean.device):
            components = PrincipalComponents(self.mean, self.components)
            return normalize(components(features(texts)), dim=1)

    def require_consistent(self, width: int) -> None:
        """Raises ValueError unless the buffers fit each other and hidden states of `width`."""
        shapes = tuple(self.mean.shape), tuple(self.components.shape)
        if self.is_fitted and shapes != ((width,), (len(self.components), width)):
            raise ValueError(f"router: got shapes {shapes}, expected [{width}] and [C, {width}]")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, {"mean", "components"})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
