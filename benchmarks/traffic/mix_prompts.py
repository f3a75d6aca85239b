"""Traffic of `mix_prompts`."""

from __future__ import annotations

from dataclasses import dataclass

from traffic.passes import INT64, Pass, Passes


@dataclass(frozen=True)
class Prompts:
    """Sizes of K prompts [P, D] mixed in front of B sequences of T embeddings."""

    b: int
    t: int
    d: int
    count: int
    length: int
    rows: int | None = None  # of the table that the ids name; None for embeddings as such
    itemsize: int = 2
    prompt_itemsize: int = 2

    @property
    def pool(self) -> int:
        """Bytes of all prompts."""
        return self.count * self.length * self.d * self.prompt_itemsize


def prompts_forward(c: Prompts) -> Passes:
    """A copy of B T D elements, or their gather, and 2 B K P D FLOPs for the mixture."""
    source = {"embeds": c.b * c.t * c.d * c.itemsize}
    if c.rows is not None:
        source = {"ids": INT64 * c.b * c.t, "table": c.rows * c.d * c.itemsize}
    return [
        Pass(
            "mix",
            {"prompts": c.pool, "mixture": 4 * c.b * c.count, **source},
            {"y": c.b * (c.length + c.t) * c.d * c.itemsize},
            2 * c.b * c.count * c.length * c.d,
        )
    ]


def prompts_backward(c: Prompts) -> Passes:
    """Two products with the first P rows of dy, 2 B K P D FLOPs each; the rest passes through."""
    dy = {"dy": c.b * c.length * c.d * c.itemsize}
    mixture, flops = 4 * c.b * c.count, 2 * c.b * c.count * c.length * c.d
    return [
        Pass("d_prompts", {**dy, "mixture": mixture}, {"d_prompts": c.pool}, flops),
        Pass("d_mixture", {**dy, "prompts": c.pool}, {"d_mixture": mixture}, flops),
    ]
