"""Makes the banks and look-ups of a memory from its config."""

from __future__ import annotations

from typing import Any

import torch

from sapt_fast.methods.memory.config import MomeConfig
from sapt_fast.pools.collectives import Group
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.fact_table import FactTable
from sapt_fast.pools.key_index import key_index
from sapt_fast.pools.sharded_experts import RowShards, ShardedExperts
from sapt_fast.pools.sharded_index import ShardedIndex
from sapt_fast.sites.memory import FactLookup, KeyLookup, Lookup

__all__ = ["make_bank", "make_lookup", "make_shards"]

_KEY_WIDTH = 64  # of learned and product keys


def make_shards(config: MomeConfig) -> RowShards:
    """Returns which experts this process has: all, unless the memory is sharded.

    Raises:
        ValueError: if there are fewer experts than processes.
    """
    return RowShards(config.num_experts, Group(alone=not config.sharded))


def make_bank(
    config: MomeConfig,
    widths: tuple[int, int],
    device: torch.device,
    storage: str | None = None,
) -> ExpertBank | ShardedExperts:
    """Returns an empty bank for a layer with these widths of input and output.

    Args:
        config: of the memory.
        widths: I and O.
        device: where the bank computes.
        storage: overrides that of the config.
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype), "storage": storage or config.storage,
        "seed": config.seed, "device": device,
    }  # fmt: skip
    kind = ShardedExperts if config.sharded else ExpertBank
    return kind(config.num_experts, config.r, *widths, **options)


def make_lookup(config: MomeConfig, width: int, device: torch.device, shards: RowShards) -> Lookup:
    """Returns what finds experts for a layer with inputs of this width."""
    per_token = config.query == "token"
    table = FactTable(
        0 if per_token else config.experts_per_fact, config.num_experts, device, config.sharded
    )
    if config.keys == "facts":
        index: Any = key_index(config.index_kind, shards.count, config.components, device=device)
        index = ShardedIndex(index, shards) if config.sharded else index
        return FactLookup(index, config.gate, config.least_score, table, config.ratio)
    options = {"trainable": True} if config.keys == "learned" else {}
    index = key_index(config.index_kind, config.num_experts, _KEY_WIDTH, device=device, **options)
    index.requires_grad_(False)
    features = width if per_token else config.components
    return KeyLookup(
        index, config.gate, config.least_score, table, config.k, config.heads, features
    )
