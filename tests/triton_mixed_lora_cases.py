"""Inputs of the Triton kernels of `mixed_lora`, and what a loop over the adapters gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """Sizes and options of one call; `ranks` gives the adapters."""

    samples: int = 3
    rows: int = 14  # per sample
    i: int = 40
    o: int = 24
    ranks: tuple[int, ...] = (4, 0, 7)
    trainable: tuple[int, ...] = (2,)  # adapters
    weight: str = "plain"  # plain, transposed, strided, none
    bias: bool = True
    x: str = "plain"  # plain, sliced, transposed
    dy: str = "plain"  # plain, expanded, sliced
    lora_dtype: torch.dtype | None = None
    through_frozen: bool = True
    needs_x: bool = True
    needs_mixture: bool = True
    name: str = field(default="", compare=False)


CASES = [
    Case(name="mixed-ranks"),
    Case(ranks=(4,), trainable=(0,), name="one-adapter-of-rank-4"),
    Case(samples=1, rows=37, i=33, o=29, name="one-sample-odd-sizes"),
    Case(samples=1, rows=1, name="one-row"),
    Case(samples=23, rows=1, ranks=(4, 4, 9), name="per-token"),
    Case(samples=9, rows=3, name="many-samples-per-tile"),
    Case(samples=6, rows=8, name="two-samples-per-tile"),
    Case(samples=2, rows=16, ranks=(16, 16), trainable=(1,), name="aligned"),
    Case(samples=2, rows=45, i=48, o=64, ranks=(20, 4, 13), trainable=(1, 2), name="descriptors"),
    Case(samples=2, rows=33, i=32, o=40, weight="transposed", name="descriptors-transposed"),
    Case(samples=2, rows=5, i=288, o=544, ranks=(3, 2), trainable=(1,), name="split-reduction"),
    Case(samples=1, rows=530, i=32, o=32, ranks=(2, 6), trainable=(0, 1), name="split-rows"),
    Case(ranks=(9, 9, 9, 9), trainable=(0, 2), through_frozen=False, name="two-ranges-cut"),
    Case(ranks=(20, 30, 4), trainable=(2,), through_frozen=False, name="last-trains-cut"),
    Case(ranks=(20, 30, 4), through_frozen=False, needs_mixture=False, name="last-trains-cut-only"),
    Case(trainable=(), through_frozen=False, name="nothing-trains-cut"),
    Case(trainable=(), needs_mixture=False, name="input-only"),
    Case(trainable=(), needs_x=False, name="mixture-only"),
    Case(ranks=(20, 30, 4), needs_x=False, needs_mixture=False, name="factors-only"),
    Case(weight="none", bias=False, name="no-weight"),
    Case(weight="none", bias=False, trainable=(), through_frozen=False, name="no-weight-cut"),
    Case(weight="strided", x="transposed", dy="expanded", name="strided-operands"),
    Case(weight="transposed", x="sliced", dy="sliced", bias=False, name="views"),
    Case(lora_dtype=torch.float32, name="float32-factors"),
    Case(samples=2, rows=45, lora_dtype=torch.float32, name="float32-factors-descriptors"),
    Case(ranks=(0, 0), trainable=(), name="no-ranks"),
    Case(i=0, name="no-inputs"),
    Case(o=0, name="no-outputs"),
]


def viewed(t: Tensor, how: str) -> Tensor:
    """The values of `t` [rows, columns] under other strides."""
    if how == "transposed":
        return t.t().contiguous().t()
    if how == "sliced":
        wide = torch.full(
            (t.shape[0], t.shape[1] + 8), float("nan"), dtype=t.dtype, device=t.device
        )
        wide[:, :-8] = t
        return wide[:, :-8]
    if how == "strided":
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 0] = t
        return wide[..., 0]
    return t[:1, :1].expand_as(t) if how == "expanded" else t


def made_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(of).to(DEVICE)

    m, r = case.samples * case.rows, sum(case.ranks)
    lora_dtype = case.lora_dtype or dtype
    adapter = torch.repeat_interleave(torch.arange(len(case.ranks)), torch.tensor(case.ranks))
    scaling = torch.rand(len(case.ranks), generator=generator) + 0.5
    starts = [sum(case.ranks[:k]) for k in range(len(case.ranks))]
    weight = normal(case.o, case.i, scale=max(case.i, 1) ** -0.5)
    return {
        "x": viewed(normal(m, case.i), case.x),
        "weight": None if case.weight == "none" else viewed(weight, case.weight),
        "bias": normal(case.o) if case.bias else None,
        "lora_a": normal(r, case.i, scale=max(case.i, 1) ** -0.5, of=lora_dtype),
        "lora_b": normal(r, case.o, scale=max(r, 1) ** -0.5, of=lora_dtype),
        "mixture": torch.rand(case.samples, len(case.ranks), generator=generator).to(DEVICE),
        "row_adapter": adapter.int().to(DEVICE),
        "row_scale": scaling[adapter].to(DEVICE),
        "dy": viewed(normal(m, case.o), case.dy),
        "train_rows": [n for k in case.trainable for n in (starts[k], starts[k] + case.ranks[k])],
    }


def expected_values(case: Case, t: dict[str, Any], dtype: torch.dtype) -> list[Tensor | None]:
    """y, dx, d_mixture, d_a, d_b by autograd through a loop over the adapters, in `dtype`."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().to(dtype).requires_grad_()

    x, a, b = leaf(t["x"]), leaf(t["lora_a"]), leaf(t["lora_b"])
    mixture = t["mixture"].detach().to(dtype).requires_grad_()
    w = mixture.repeat_interleave(case.rows, 0)
    y = x.new_zeros(x.shape[0], case.o)
    if t["weight"] is not None:
        y = x @ t["weight"].to(dtype).t()
    start = 0
    for k, rank in enumerate(case.ranks):
        rows = slice(start, start + rank)
        start += rank
        if rank:
            source = x if case.through_frozen or k in case.trainable else x.detach()
            scale = t["row_scale"][rows][0].to(dtype)
            y = y + w[:, k, None] * scale * ((source @ a[rows].t()) @ b[rows])
    if t["bias"] is not None:
        y = y + t["bias"].to(dtype)
    dx, d_mixture = torch.zeros_like(x), torch.zeros_like(mixture)
    d_a = d_b = None
    if y.requires_grad:
        inputs = [x, mixture, a, b]
        grads = torch.autograd.grad(y, inputs, t["dy"].to(dtype), allow_unused=True)
        dx, d_mixture, d_a, d_b = (
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, inputs, strict=True)
        )
        ranges = list(zip(t["train_rows"][::2], t["train_rows"][1::2], strict=True))
        keep = [row for start, stop in ranges for row in range(start, stop)]
        d_a, d_b = (d_a[keep], d_b[keep]) if keep else (None, None)
    return [
        y.detach(),
        dx if case.needs_x else None,
        d_mixture if case.needs_mixture else None,
        d_a,
        d_b,
    ]
