"""Which experts and keys facts take, and which facts are trained together."""

import torch

from sapt_fast.methods.memory.groups import packed, parts_of
from sapt_fast.pools.fact_table import FactTable


def test_experts_are_spread():
    table = FactTable(2, 5, torch.device("cpu"))
    experts = table.choose_experts(3)  # the fifth expert is left over
    assert experts.tolist() == [[0, 1], [2, 3], [4, 0]]
    table.add(torch.arange(3), table.free_keys(3), experts)
    assert table.sharing().tolist() == [True, False, True]
    assert table.remove(torch.tensor([0])).tolist() == [1]
    assert table.free_keys(2).tolist() == [0, 3]
    assert table.facts_at(torch.tensor([0, 1, 2, 9, -1])).tolist() == [-1, 1, 2, -1, -1]


def test_facts_are_spread_over_processes():
    table = FactTable(4, 1001, torch.device("cpu"), spread=True)
    experts, keys = table.choose_experts(200), table.free_keys(200)
    for rows in (experts.flatten(), keys):
        assert rows.unique().numel() == rows.numel()
        shares = torch.bincount(rows // 251, minlength=4) / rows.numel()
        assert shares.min() > 0.22
    assert (experts.diff(dim=1) == 1).all()  # of one process, up to the boundaries
    table.add(torch.arange(200), keys, experts)
    assert not torch.isin(table.free_keys(801), keys).any()


def test_groups_share_nothing():
    experts = torch.tensor([[0, 1], [2, 3], [1, 4], [5, 6], [4, 7], [8, 9]])
    assert parts_of(experts) == [[0, 2, 4], [1], [3], [5]]
    assert packed(parts_of(experts), 2) == [[0, 2, 4], [1, 3], [5]]
