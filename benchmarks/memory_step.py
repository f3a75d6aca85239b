"""One training step of a bank of rank-1 experts: ours and the usual ways to store so many rows.

Every kind computes the same sum over the k experts of each token and changes them by Adam:

- ours: `ExpertBank` with `RowAdam`;
- dense: two `nn.Embedding` with AdamW;
- sparse: two `nn.Embedding(sparse=True)` with SparseAdam;
- reverse_index: the algorithm of Meta's memory layers (arXiv 2412.09764): the pairs (token, expert)
  are sorted by expert, their gradients summed by segments and written into a dense gradient, for
  AdamW. This is our own code in plain torch.

Run as a script it measures time and memory of one kind in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import measure
import torch
from torch import Tensor, nn

from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_optimizers import RowAdam

KINDS = ("ours", "dense", "sparse", "reverse_index")
COPIES = {"dense": 4, "sparse": 3, "reverse_index": 4}  # of the tables: values, moments, gradient
LR = 0.03
_BATCHES = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and a batch; the defaults are those of SmolLM2-135M.

    Attributes:
        width: of the layer's inputs and outputs.
        hidden: of the layer's MLP.
        key_width: D.
        k: experts of each prompt.
        sequences, tokens: of the batch.
    """

    width: int = 576
    hidden: int = 1536
    key_width: int = 64
    k: int = 16
    sequences: int = 8
    tokens: int = 128


@dataclass
class Training:
    """A bank in training.

    Attributes:
        step: runs one step on (x [M, W], target [M, W], index [M, k], weights [M, k]).
        rows: returns A and B of experts [U], each [U, W].
        optimizer_bytes: returns the bytes of the optimizer's state.
    """

    step: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    optimizer_bytes: Callable[[], int]


def training(kind: str, experts: int, sizes: Sizes, *, eps: float = 1e-8) -> Training:
    """Makes a bank that begins with the start values of `ExpertBank`, seed 0."""
    bank = ExpertBank(experts, 1, sizes.width, sizes.width)
    return _ours(bank, eps) if kind == "ours" else _embeddings(kind, bank, eps)


def _loss(delta: Tensor, target: Tensor) -> Tensor:
    return (delta - target).square().sum() / target.shape[0]


def _ours(bank: ExpertBank, eps: float) -> Training:
    optimizer = RowAdam(bank, lr=LR, eps=eps)

    def step(x: Tensor, target: Tensor, index: Tensor, weights: Tensor) -> None:
        ids = index.unique()
        a, b = bank.training_rows(ids)
        _loss(bank.mix(x, index, weights), target).backward()
        optimizer.step(ids, (a.grad, b.grad))

    def rows(ids: Tensor) -> tuple[Tensor, Tensor]:
        a, b = bank.rows(ids)
        return a[:, 0], b[:, 0]

    return Training(step, rows, lambda: optimizer.state_bytes)


def _embeddings(kind: str, bank: ExpertBank, eps: float) -> Training:
    shape = bank.num_experts, bank.in_features
    tables = [nn.Embedding(*shape, sparse=kind == "sparse", _weight=torch.zeros(shape))]
    tables.append(nn.Embedding(*shape, sparse=kind == "sparse", _weight=torch.zeros(shape)))
    with torch.no_grad():
        for ids in torch.arange(bank.num_experts).split(50_000):
            tables[0].weight[ids] = bank.rows(ids)[0][:, 0]
    parameters = [table.weight for table in tables]
    optimizer: torch.optim.Optimizer
    if kind == "sparse":
        optimizer = torch.optim.SparseAdam(parameters, lr=LR, eps=eps)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=LR, eps=eps, weight_decay=0.0)

    def mixed(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if kind == "reverse_index":
            h = Dots.apply(x, parameters[0], index)
            return Bag.apply(parameters[1], index, h * weights)
        h = torch.einsum("mi,mki->mk", x, tables[0](index))
        return torch.einsum("mk,mko->mo", h * weights, tables[1](index))

    def step(x: Tensor, target: Tensor, index: Tensor, weights: Tensor) -> None:
        _loss(mixed(x, index, weights), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state_bytes() -> int:
        states = (state.values() for state in optimizer.state.values())
        return sum(v.nbytes for v in itertools.chain(*states) if isinstance(v, Tensor))

    def rows(ids: Tensor) -> tuple[Tensor, Tensor]:
        return parameters[0].detach()[ids], parameters[1].detach()[ids]

    return Training(step, rows, state_bytes)


# --- the reverse index ---


def segment_sums(coefficients: Tensor, values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Returns a dense gradient [N, W]: the sums of coefficients[m, j] values[m] by index[m, j]."""
    experts, order = index.flatten().sort(stable=True)
    unique, counts = experts.unique_consecutive(return_counts=True)
    pairs = coefficients.flatten()[order, None] * values[order // index.shape[1]]
    out = values.new_zeros(rows, values.shape[1])
    out[unique] = torch.segment_reduce(pairs, "sum", lengths=counts)
    return out


class Dots(torch.autograd.Function):
    """x [M, W] times the rows of a table [N, W] at index [M, k]: [M, k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, index)
        return torch.einsum("mi,mki->mk", x, table[index])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, table, index = ctx.saved_tensors
        dx = torch.einsum("mk,mki->mi", d, table[index]) if ctx.needs_input_grad[0] else None
        return dx, segment_sums(d, x, index, table.shape[0]), None


class Bag(torch.autograd.Function):
    """The weighted sum of the rows of a table [N, W] at index [M, k]: [M, W]."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return torch.einsum("mk,mko->mo", weights, table[index])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        table, index, weights = ctx.saved_tensors
        d_weights = torch.einsum("mo,mko->mk", dy, table[index])
        return segment_sums(weights, dy, index, table.shape[0]), None, d_weights


# --- measured ---


def batches(experts: int, sizes: Sizes, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Draws batches in which each prompt has k experts of its own, for all of its tokens."""
    generator = torch.Generator().manual_seed(0)
    each, M = sizes.sequences * sizes.k, sizes.sequences * sizes.tokens
    found = []
    for chosen in torch.randperm(experts, generator=generator)[: count * each].split(each):
        ids = chosen.view(sizes.sequences, sizes.k)
        x, target = (torch.randn(M, sizes.width, generator=generator) for _ in range(2))
        weights = torch.full((M, sizes.k), 1 / sizes.k)
        found.append((x, target, ids.repeat_interleave(sizes.tokens, 0), weights))
    return found


def correctness(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Compares two steps of each kind with its optimizer in float64, all experts written out."""
    batch = batches(1024, sizes, 1)[0]
    ids, eps, found = batch[2].unique(), 0.1, {}
    for kind in KINDS:
        made = training(kind, 1024, sizes, eps=eps)
        exact = _exact_step(batch, made.rows(ids), kind == "sparse", eps)
        for _ in range(2):
            made.step(*batch)
        error = max(
            float((got - want).detach().abs().max())
            for got, want in zip(made.rows(ids), exact, strict=True)
        )
        found[f"step, {kind}"] = {"ok": error <= 1e-5 * LR, "error": error}
    return found


def _exact_step(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    start: tuple[Tensor, Tensor],
    sparse: bool,
    eps: float,
) -> list[Tensor]:
    """Returns A and B [U, W] after two steps; SparseAdam scales its eps with the step."""
    index = torch.searchsorted(batch[2].unique(), batch[2])
    x, target, weights = (batch[i].double() for i in (0, 1, 3))
    exact = [rows.double().clone().requires_grad_() for rows in start]
    optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(exact, lr=LR, eps=eps)
    for _ in range(2):
        optimizer.zero_grad()
        h = torch.einsum("mi,mki->mk", x, exact[0][index]) * weights
        _loss(torch.einsum("mk,mko->mo", h, exact[1][index]), target).backward()
        for rows in exact if sparse else ():
            rows.grad = rows.grad.to_sparse(1)
        optimizer.step()
    return exact


def measured(kind: str, experts: int, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time and memory of one kind; in a process that has done nothing else.

    Returns:
        "ms": quantiles of a step's time; "peak_bytes": the most memory of tables, optimizer and
        steps together, as the system counts it; "optimizer_bytes"; "touched": experts trained.
    """
    drawn = batches(experts, sizes, _BATCHES)
    training(kind, experts=256, sizes=sizes).step(*batches(256, sizes, 1)[0])  # loads the code
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory would serve what follows unseen
    before = measure.restart_peak()
    made = training(kind, experts, sizes)
    for batch in drawn:  # the state of all rows that these batches touch
        made.step(*batch)
    turns = itertools.cycle(drawn)
    step = {"step": lambda: made.step(*next(turns))}
    return {
        "kind": kind,
        "experts": experts,
        "ms": measure.interleaved_ms(step, "cpu", repeats=repeats, warmup=1)["step"],
        "peak_bytes": measure.resident("VmHWM") - before,
        "optimizer_bytes": made.optimizer_bytes(),
        "touched": torch.cat([batch[2] for batch in drawn]).unique().shape[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("experts", type=int)
    parser.add_argument("repeats", type=int)
    parser.add_argument("sizes", help="JSON of the fields of Sizes")
    options = parser.parse_args()
    sizes = Sizes(**json.loads(options.sizes))
    print(json.dumps(measured(options.kind, options.experts, sizes, options.repeats)))


def command(kind: str, experts: int, sizes: Sizes, repeats: int) -> list[str]:
    """Returns the script's arguments."""
    return [kind, str(experts), str(repeats), json.dumps(asdict(sizes))]


if __name__ == "__main__":
    main()
