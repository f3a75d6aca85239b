"""Layers to whose output experts of a memory are added, and how these are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.ops import mix_experts
from sapt_fast.ops._common import compute_dtype, without_autocast
from sapt_fast.pools.codebook import Exact
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.fact_table import FactTable
from sapt_fast.pools.selections import Selection
from sapt_fast.routing.forward import Prompt
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.edited import AtPrompts, replaced_tokens, tokens_behind

__all__ = ["GATES", "FactLookup", "KeyLookup", "Lookup", "MemoryOutput"]

GATES = ("softmax", "sigmoid", "relu")
_ROUNDING = 5e-7  # of 1 - q k in float32: such a query is the key, also if another key is the same
Decided = Mapping[str, Tensor]  # tensors [B, ...] about the prompts


def gated(scores: Tensor, gate: str) -> Tensor:
    """Returns the weights of experts with these scores [..., k]; see `MomeConfig.gate`."""
    if gate == "softmax":
        return scores.softmax(-1)
    weights = scores.sigmoid() if gate == "sigmoid" else scores.relu()
    return weights / scores.shape[-1]


class Lookup(Exact):
    """The base class of modules that find the experts of queries.

    Args:
        index: the keys (a `pools.key_index.base.KeyIndex`).
        gate: one of `GATES`.
        threshold: the least best score at which experts act; None: they always do.
        table: the facts that are memorised.
    """

    def __init__(self, index: Any, gate: str, threshold: float | None, table: FactTable) -> None:
        super().__init__()
        self.index = index
        self.gate = gate
        self.threshold = threshold
        self.table = table

    def decide(self, query: Tensor) -> dict[str, Tensor]:
        """Returns what is found for queries [B, C], tensors [B, ...] that a cache can carry."""
        raise NotImplementedError

    def experts_of(self, decided: Decided) -> tuple[Tensor, Tensor]:
        """Returns the experts [B, K], -1 for none, and their weights [B, K]."""
        return decided["experts"], decided["weights"]

    def require_consistent(self, facts: Tensor) -> None:
        """Raises ValueError unless the table fits these facts [F] int64."""
        self.table.require_consistent(facts, self.index.num_keys)

    def _acts(self, best: Tensor) -> Tensor:
        """Returns whether the best scores [M] are large enough; NaN is not."""
        return best > float("-inf") if self.threshold is None else best >= self.threshold


class FactLookup(Lookup):
    """Finds the fact whose key is nearest; all its experts have that key.

    Args:
        index, gate, threshold, table: as in `Lookup`.
        ratio: the largest distance to the nearest key, as a share of that to the second; None: any.
    """

    def __init__(
        self,
        index: Any,
        gate: str,
        threshold: float | None,
        table: FactTable,
        ratio: float | None = None,
    ) -> None:
        super().__init__(index, gate, threshold, table)
        self.ratio = ratio

    def decide(self, query: Tensor) -> dict[str, Tensor]:
        """Returns the fact [B] of each query, -1 for none, and the score [B] of the nearest."""
        scores, keys = self.index.search(query, 1 if self.ratio is None else 2)
        best, fact = scores[:, 0], self.table.facts_at(keys[:, 0])
        acts = self._acts(best)
        if self.ratio is not None:  # keys and queries have the length 1: |q - k|^2 = 2 - 2 q k
            near, second = (1 - scores).clamp(min=0).unbind(1)
            acts = acts & ((near <= self.ratio**2 * second) | (near <= _ROUNDING))
        return {"fact": torch.where(acts, fact, -1), "score": best}

    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Returns score and number, [B], of the fact nearest to each query [B, C]; -1 for none."""
        scores, keys = self.index.search(query, 1)
        return scores[:, 0], self.table.facts_at(keys[:, 0])

    def experts_of(self, decided: Decided) -> tuple[Tensor, Tensor]:
        """Returns experts and weights [B, K] of the facts; -1 for facts that are gone."""
        if "experts" in decided:
            return decided["experts"], decided["weights"]
        experts = self.table.experts_of(decided["fact"])
        return experts, self.weights_of(decided["score"])

    def weights_of(self, scores: Tensor) -> Tensor:
        """Returns the weights [B, K] of a fact's experts, given the score [B] of their key."""
        width = self.table.experts.shape[1]
        return gated(scores[:, None].expand(-1, width), self.gate)

    def require_consistent(self, facts: Tensor) -> None:
        """Raises ValueError unless each fact has a key."""
        super().require_consistent(facts)
        self.index.require_rows(self.table.keys)


class KeyLookup(Lookup):
    """Finds the k best keys of each head's query; each expert has a key of its own.

        q_h = normalize(W_h x)

    Args:
        index, gate, threshold, table: as in `Lookup`.
        k: experts of a head.
        heads: H.
        features: C, the width of x.

    Attributes:
        projection: W, [H, D, C] float32.
    """

    projection: Tensor

    def __init__(
        self,
        index: Any,
        gate: str,
        threshold: float | None,
        table: FactTable,
        k: int,
        heads: int,
        features: int,
    ) -> None:
        super().__init__(index, gate, threshold, table)
        self.k = k
        shape = (heads, index.width, features)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=generator) / features**0.5
        self.register_buffer("projection", start.to(table.facts.device))

    def decide(self, query: Tensor) -> dict[str, Tensor]:
        """Returns the experts [B, H k] of x [B, C], -1 for none, and their weights [B, H k]."""
        scores, experts = self.search(query)
        return dict(zip(("experts", "weights"), self.weighted(scores, experts), strict=True))

    def queries(self, x: Tensor) -> Tensor:
        """Returns q, [B, H, D] float32, of x [B, C]."""
        with without_autocast(x.device):
            q = torch.einsum("bc,hdc->bhd", x.float(), self.projection)
        return nn.functional.normalize(q, dim=-1)

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores and keys, [B, H, k], of x [B, C]."""
        q = self.queries(x)
        scores, keys = self.index.search(q.flatten(0, 1), self.k)
        shape = (*q.shape[:2], self.k)
        return scores.view(shape), keys.view(shape)

    def weighted(self, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns experts and weights, [B, H k], of scores and keys [B, H, k]."""
        acts = self._acts(scores[..., 0])[..., None]
        weights = gated(scores, self.gate) / scores.shape[1]
        return torch.where(acts, keys, -1).flatten(1), weights.flatten(1)


class _Held:
    """The experts of prompts in a cache, for all tokens that follow.

    A copy is empty, so that copied and pickled caches have no table of experts.

    Args:
        decided: what was decided about the prompts.
        of: version of the bank, and dtype that it computes in.
        chosen: the experts [B, K], -1 for none, or the bank's selection of them.
        weights: [B, K].
        acts: [B, 1, 1] bool, whether a prompt has experts; None: all have.
    """

    def __init__(
        self,
        decided: tuple[Tensor, ...] = (),
        of: Any = None,
        chosen: Tensor | Selection | None = None,
        weights: Tensor | None = None,
        acts: Tensor | None = None,
    ) -> None:
        self.decided, self.of = decided, of
        self.chosen, self.weights, self.acts = chosen, weights, acts

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, ()


class MemoryOutput(AtPrompts):
    """Adds the experts that are found for each prompt, or for each token.

        y' = y + s sum_j g_j B_j A_j x,  j the experts found

    Args:
        path, prompts, in_decoder: as in `AtPrompts`.
        lookup: finds experts; layers may share it.
        bank: the experts (an `ExpertBank`, or `ShardedExperts`); layers may share it.
        scaling: s.
        replacement: "generation" or "replace_all", the tokens on which experts act.
        per_token: whether each token looks up by the layer's input, instead of each prompt.
        decides: whether this layer looks up; if not, one that runs earlier has.

    Attributes:
        chosen: experts and weights [B, T, K] of each call in a thread that trains; None: none does.
    """

    def __init__(
        self,
        path: str,
        prompts: Prompts,
        in_decoder: bool,
        lookup: Lookup,
        bank: Any,
        scaling: float,
        replacement: str,
        per_token: bool,
        decides: bool,
    ) -> None:
        super().__init__(path, prompts, "last", each_forward=False, in_decoder=in_decoder)
        # Not submodules: they are the handle's.
        object.__setattr__(self, "lookup", lookup)
        object.__setattr__(self, "bank", bank)
        self.scaling = scaling
        self.replacement = replacement
        self.per_token = per_token
        self.decides = decides
        self.chosen: list[tuple[Tensor, Tensor]] | None = None

    lookup: Any
    bank: Any

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the output [B, T, O] with the experts; the other rows keep their bits."""
        x = self.require_tokens(args[0] if args else None)
        self.require_tokens(output)
        prompt = self.prompt_of(x)
        if self._is_behind(prompt):
            return self._behind_prompts(output, x, prompt)
        where = replaced_tokens(self.replacement, tokens_behind(output, prompt))  # [B, T]
        # Other processes may need this one for their experts, and a graph has no branches.
        skips = where.device.type == "cpu" and isinstance(self.bank, ExpertBank)
        skips = skips and not torch.compiler.is_compiling()
        if skips and not where.any():
            return output
        found = self._of_tokens(x, where) if self.per_token else self._of_prompts(x, prompt)
        if found is None:
            return output
        index, weights = found  # [B, 1 or T, K]
        where = where & (index >= 0).any(-1)
        if skips and not where.any():
            return output
        index = torch.where(where[..., None], index, -1)  # [B, T, K]
        weights = weights.expand(index.shape)
        if self.chosen is not None and not self.prompts.is_free:
            self.chosen.append((index, weights))
        flat = (t.flatten(0, 1) for t in (x, index, weights))
        delta = self.bank.mix(*flat, self.scaling)
        changed = output + delta.view_as(output).to(output.dtype)
        return torch.where(where[..., None], changed, output)

    def _is_behind(self, prompt: Prompt) -> bool:
        """Whether all tokens follow prompts that are read: in generation, not when run again."""
        behind = not prompt.is_read and prompt.copies > 0 and self.replacement == "generation"
        return behind and not self.per_token and not torch.compiler.is_compiling()

    def _behind_prompts(self, output: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        """As `at_output`: experts are found in the first of the forwards that follow a prompt."""
        name, kept = f"{self.prompts.name}:", f"held by {self.path}"
        decided = tuple(t for key, t in prompt.decided.items() if key.startswith(name))
        of = self.bank.version, compute_dtype(x)
        held: Any = prompt.decided.get(kept, _Held())
        same = len(held.decided) == len(decided) and all(map(is_, held.decided, decided))
        if not same or held.of != of:
            prompt.decided[kept] = held = self._found_once(decided, of, x, prompt)
        if held.chosen is None:
            return output
        chosen, weights = held.chosen, held.weights
        index = chosen.at if isinstance(chosen, Selection) else chosen  # [B, K]
        if x.shape[1] > 1:
            index, weights = (t.repeat_interleave(x.shape[1], 0) for t in (index, weights))
        x = x.flatten(0, 1)
        if isinstance(chosen, Selection):
            delta = mix_experts(x, chosen.a, chosen.b, index, weights, scaling=self.scaling)
        else:
            delta = self.bank.mix(x, index, weights, self.scaling)
        changed = output + delta.view_as(output).to(output.dtype)
        return changed if held.acts is None else torch.where(held.acts, changed, output)

    def _found_once(self, decided: tuple[Tensor, ...], of: Any, x: Tensor, prompt: Prompt) -> _Held:
        found = self._of_prompts(x, prompt)
        if found is None:
            return _Held(decided, of)
        index, weights = (t[:, 0] for t in found)
        acts = (index >= 0).any(1)[:, None, None]
        if not isinstance(self.bank, ExpertBank):  # others need this process for their experts
            return _Held(decided, of, index, weights, acts)
        if acts.device.type == "cpu" and not acts.any():
            return _Held(decided, of)
        everywhere = acts.device.type == "cpu" and bool(acts.all())
        chosen = self.bank.select(index, of[1])
        return _Held(decided, of, chosen, weights, None if everywhere else acts)

    def _of_tokens(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Returns experts and weights [B, T, K]; -1 at tokens that are not in `where` [B, T]."""
        found = self.lookup.decide(x.detach()[where])
        shape = (*where.shape, found["experts"].shape[1])
        index = torch.full(shape, -1, device=x.device)
        weights = torch.zeros(shape, device=x.device)
        index[where], weights[where] = found["experts"], found["weights"]
        return index, weights

    def _of_prompts(self, x: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor] | None:
        """Returns experts and weights [B, 1, K]; None if nothing was decided."""
        name = f"{self.prompts.name}:"
        given = not self.prompts.is_free and f"{name}experts" in prompt.decided
        if self.decides and prompt.is_read and not given:
            if prompt.query is None:
                raise RuntimeError(
                    f"{self.path}: a prompt is looked up by its tokens: call the model itself with "
                    "input_ids"
                )
            now = (prompt.last >= 0) & (prompt.last < x.shape[1])
            for key, new in self.lookup.decide(prompt.query.to(x.device)).items():
                old = prompt.decided.get(name + key)
                if old is None:
                    old = torch.full_like(new, -1)
                at = now.view(-1, *[1] * (new.dim() - 1))
                prompt.decided[name + key] = torch.where(at, new, old.to(x.device))
        decided = {
            key.removeprefix(name): value.to(x.device)
            for key, value in prompt.decided.items()
            if key.startswith(name)
        }
        if not decided:
            return None
        experts, weights = self.lookup.experts_of(decided)
        return experts[:, None], weights[:, None]
