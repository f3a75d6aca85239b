"""Divides facts into groups that can be trained one after another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["packed", "parts_of"]


def parts_of(experts: Tensor) -> list[list[int]]:
    """Returns the smallest parts of facts such that no two parts share an expert.

    Args:
        experts: [F, K] int64, those of each fact; -1 for none.

    Returns:
        The facts of each part, ascending; the parts in the order of their first facts.
    """
    parents = [*range(len(experts))]

    def root(fact: int) -> int:
        while parents[fact] != fact:
            parents[fact] = fact = parents[parents[fact]]
        return fact

    owners: dict[int, int] = {}
    for fact, row in enumerate(experts.tolist()):
        for expert in (number for number in row if number >= 0):
            first, second = sorted((root(fact), root(owners.setdefault(expert, fact))))
            parents[second] = first
    parts: dict[int, list[int]] = {}
    for fact in range(len(experts)):
        parts.setdefault(root(fact), []).append(fact)
    return [*parts.values()]


def packed(parts: Iterable[list[int]], size: int) -> list[list[int]]:
    """Joins neighbouring parts into groups of at most `size` facts; larger parts stay alone."""
    groups: list[list[int]] = []
    for part in parts:
        if groups and len(groups[-1]) + len(part) <= size:
            groups[-1] = groups[-1] + part
        else:
            groups.append(part)
    return groups
