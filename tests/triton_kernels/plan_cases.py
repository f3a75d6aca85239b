"""Compares the launches of plans with those of ordinary calls; prints one line for each case.

Runs in a process of its own, where Triton's launches end at a stub: see `host_path.stubbed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import host_path
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapt_fast.ops._dropout import Dropout
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.queries import QueryProjection, TaskProjections
from sapt_fast.triton_kernels import (
    mix_experts,
    mix_prompts,
    nearest_key,
    pool_tokens,
    route,
    topk_keys,
)
from sapt_fast.triton_kernels.blocks import gemm_variants, launchers, plans, replay, signatures
from sapt_fast.triton_kernels.blocks.gemm_variants import EXPAND_FIRST, FUSED
from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd


@dataclass
class Case:
    """Sizes of a call; `launches` are those of the forward and the backward, cuBLAS's included."""

    name: str
    launches: tuple[int, int]
    rows: int = 4
    samples: int = 4
    width: int = 256
    ranks: int = 60
    members: int = 2
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype | None = None
    weight: bool = True
    bias: bool = False
    train: tuple[int, ...] = (56, 60)
    through: bool = True
    shift: int = 0  # elements by which x is off its alignment
    same: bool = False  # all members are one
    unequal: bool = False  # each member has 16 ranks more than the one before
    route: Any = None
    drops: int = 0  # of dropout


NOT_COUNTED = 0, 0
CASES = [
    Case("decode", (3, 6)),
    Case("decode, one", (3, 5), members=1),
    Case("bias and no frozen gradients", (3, 6), bias=True, through=False),
    Case("without a base", (3, 6), weight=False),
    Case("float32", (5, 8), dtype=torch.float32),
    Case("float32 factors", (3, 6), factors=torch.float32),
    Case("cast factors", (3, 6), rows=65536, samples=8, width=128, factors=torch.float32),
    Case("descriptors", (3, 5), rows=256, samples=2),
    Case("many rows", (2, 5), rows=8192, samples=8, members=1),
    Case("rows per sample", (3, 5), rows=96, samples=32),
    Case("misaligned", (3, 6), shift=1),
    Case(
        "one of many rows",
        (2, 5),
        rows=8192,
        samples=8,
        width=1024,
        members=1,
        route=gemm_variants.FUSED,
    ),
    Case("two of many rows", (2, 5), rows=8192, samples=8, width=1024, route=FUSED),
    Case("two by cuBLAS", (4, 7), rows=8192, samples=8, width=1024, route=EXPAND_FIRST),
    Case("three of unequal ranks", (5, 15), members=3, unequal=True),
    Case("one tensor for all members", (3, 6), same=True),
    Case("cuBLAS", (5, 7), rows=128, route=EXPAND_FIRST),
    Case("many members", (8, 17), members=9, ranks=8, train=(4, 8)),
    Case("two ranges", (3, 7), train=(4, 8, 20, 24), through=False),
    Case("nothing trains", (3, 5), train=()),
    Case("dropout", (3, 6), drops=6554),
    Case("dropout, many rows", (2, 5), rows=8192, samples=8, width=1024, drops=6554, route=FUSED),
]


class Products(TorchDispatchMode):
    """Adds torch's products to the launches."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func._schema.name:
            self.launches.append((func._schema.name, (), (*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


def drawn(case: Case) -> tuple[Tensor, Tensor, list[Projection], list[Tensor]]:
    """x, mixture, the projections and a gradient of each, in memory of their own."""

    def new(*shape: int, dtype: torch.dtype = case.dtype, shift: int = 0) -> Tensor:
        count = int(torch.tensor(shape).prod())
        return torch.ones(count + shift, dtype=dtype)[shift:].view(shape)

    factors = case.factors or case.dtype
    made = []
    for i in range(case.members):
        ranks = case.ranks + 16 * i * case.unequal
        made.append(
            Projection(
                new(case.width, case.width) if case.weight else None,
                new(case.width) if case.bias else None,
                new(ranks, case.width, dtype=factors),
                new(ranks, case.width, dtype=factors),
                torch.zeros(ranks, dtype=torch.int32),
                torch.ones(ranks),
            )
        )
    projections = [made[0]] * case.members if case.same else made
    x = new(case.rows, case.width, shift=case.shift)
    dys = [new(case.rows, case.width) for _ in projections]
    return x, torch.ones(case.samples, 3), projections, dys


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in tensors_of(part)]


class Comparison:
    """Where the plan has what the ordinary call has, by the start of the memory there."""

    def __init__(self, inputs: list[Tensor], allocated: list[tuple[int, int]]) -> None:
        self.inputs = {t.data_ptr() for t in inputs}
        self.allocated = allocated  # address and bytes of what the plan allocated
        self.starts: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.descriptors: list[tuple[int, int]] = []

    def pointer(self, ordinary: Tensor, planned: int) -> None:
        address = ordinary.data_ptr()
        if address in self.inputs:
            assert planned == address
            return
        storage = ordinary.untyped_storage()
        start = planned - (address - storage.data_ptr())
        assert self.starts.setdefault(storage.data_ptr(), start) == start
        self.sizes[start] = storage.nbytes()

    def argument(self, ordinary: Any, planned: Any) -> None:
        if isinstance(ordinary, Tensor):
            if isinstance(planned, Tensor):
                assert ordinary.shape == planned.shape
                assert ordinary.stride() == planned.stride()
                assert ordinary.dtype == planned.dtype
                planned = planned.data_ptr()
            self.pointer(ordinary, planned)
        elif isinstance(ordinary, host_path.Filled):
            assert ordinary.fields == planned.fields
            self.descriptors.append((ordinary.address, planned.address))
        elif isinstance(ordinary, (tuple, list)):
            assert len(ordinary) == len(planned)
            for pair in zip(ordinary, planned, strict=True):
                self.argument(*pair)
        else:
            assert type(ordinary) is type(planned)
            assert ordinary == planned, (ordinary, planned)

    def finish(self) -> None:
        """Nothing overlaps, and all of it is memory that the plan allocated."""
        assert len(set(self.starts.values())) == len(self.starts)
        spans = sorted((start, start + size) for start, size in self.sizes.items())
        for (_, stop), (start, _) in pairwise(spans):
            assert stop <= start
        for start, stop in spans:
            assert any(a <= start and stop <= a + size for a, size in self.allocated)
        for ordinary, planned in self.descriptors:  # of tensors that kernels get as pointers too
            if ordinary in self.inputs:
                assert planned == ordinary
            else:
                start = max(start for start in self.starts if start <= ordinary)
                assert planned - self.starts[start] == ordinary - start


def watched(call: Callable[[], Any], launches: list[Any]) -> tuple[Any, list[Any], list[Tensor]]:
    """Results, launches and the plan's allocations of a call."""
    launches.clear()
    allocated: list[Tensor] = []
    run = replay.Plan.run

    def watching(plan: replay.Plan, *args: Any) -> Any:
        def allocate(*given: Any) -> Tensor:
            allocated.append(plan.allocate(*given))
            return allocated[-1]

        def keeping(each: replay.Derived) -> replay.Derived:
            def make(*given: Any) -> Tensor:
                allocated.append(each.function(*given))
                return allocated[-1]

            return each._replace(function=make)

        derived = [keeping(each) for each in plan.derived]
        return run(plan._replace(allocate=allocate, derived=derived), *args)

    replay.Plan.run = watching
    try:
        with Products(launches):
            results = call()
    finally:
        replay.Plan.run = run
    return results, list(launches), allocated


def compare(call: Callable[[], Any], inputs: list[Tensor], launches: list[Any]) -> bool:
    """Whether the third call took a plan; raises AssertionError where it differs from the first."""
    plans.forget()
    want, ordinary, _kept = watched(call, launches)
    watched(call, launches)
    got, planned, allocated = watched(call, launches)
    assert [(name, grid) for name, grid, _ in planned] == [(n, grid) for n, grid, _ in ordinary]
    if not allocated:
        return False
    spans = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in allocated]
    comparison = Comparison(inputs, spans)
    for (_, _, first), (_, _, second) in zip(ordinary, planned, strict=True):
        comparison.argument(first, second)
    comparison.argument(tuple(want), tuple(got))
    comparison.finish()
    kernels = [args for name, _, args in planned if "mm" not in name]
    return not any(isinstance(t, Tensor) for args in kernels for t in args)


def check(case: Case, launches: list[Any]) -> None:
    """Raises AssertionError where a plan's launches are not those of an ordinary call."""
    x, mixture, projections, dys = drawn(case)
    inputs = [x, mixture, *dys, *(t for p in projections for t in p if t is not None)]
    spans = [list(case.train)] * case.members
    dropout = None
    if case.drops:
        seeds = torch.zeros(case.members, 2, dtype=torch.int64)[:, :1].unbind()
        dropout = Dropout(case.drops, seeds)
        inputs += seeds

    def forward(keep_h: bool = True) -> Any:
        return mixed_lora_fwd(x, mixture, projections, keep_h, dropout)

    assert compare(forward, inputs, launches)
    counts = [len(launches)]
    assert compare(lambda: [y for y, _ in forward(False)], inputs, launches)
    hs = [h for _, h in forward()]

    def backward() -> Any:
        flags = True, True, case.through
        return mixed_lora_bwd(dys, x, mixture, projections, hs, spans, *flags, dropout)

    assert compare(backward, [*inputs, *hs], launches)
    counts.append(len(launches))
    assert tuple(counts) == case.launches, (case.name, counts)


def main() -> None:
    """Checks every case."""
    launches: list[Any] = []
    with host_path.stubbed(launches):
        for case in CASES:
            gemm_variants._forced = case.route
            check(case, launches)
            print(case.name, "ok")
        gemm_variants._forced = None
        other_ops(launches)
        benchmark(launches)
        never_stale(launches)


def other_ops(launches: list[Any]) -> None:
    """Calls of the ops whose forwards are planned too."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(*shape, dtype=dtype)

    pooled, keys = new(4, 64), new(15, 64)
    projection = QueryProjection(new(8, 64), new(64, 8), new(64), new(64))
    tasks = TaskProjections(new(15, 8, 64), new(15, 64, 8))
    prompts, mixture, embeds = new(15, 10, 64), new(4, 15, dtype=torch.float32), new(4, 7, 64)
    ids, mask = torch.ones(4, 700, dtype=torch.int64), torch.ones(4, 700, dtype=torch.bool)
    table, bank_a, bank_b = new(100, 64), new(20, 4, 64), new(20, 4, 96)
    index, weights = torch.ones(4, 2, dtype=torch.int64), new(4, 2, dtype=torch.float32)
    calls: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "scores": (
            lambda: [route.route_scores_fwd(pooled, keys, projection, 8.0)],
            [pooled, keys, *projection[:4]],
        ),
        "weights": (
            lambda: [route.route_fwd(pooled, keys, None, 8.0, 3, 0.1)],
            [pooled, keys],
        ),
        "weights per task": (
            lambda: [route.route_fwd(pooled, keys, tasks, 0.25, None, None, "abs_sigmoid")],
            [pooled, keys, *tasks],
        ),
        "weights of tokens": (
            lambda: [route.route_fwd(table, keys, None, 8.0, 2, None)],
            [table, keys],
        ),
        "prompts before embeddings": (
            lambda: [mix_prompts.mix_prompts_fwd(prompts, mixture, embeds, None)],
            [prompts, mixture, embeds],
        ),
        "prompts before tokens": (
            lambda: [mix_prompts.mix_prompts_fwd(prompts, mixture, table, ids)],
            [prompts, mixture, table, ids],
        ),
        "pooling": (
            lambda: pool_tokens.pool_tokens_fwd(ids, table, mask, "max", True),
            [ids, table, mask],
        ),
        "experts": (
            lambda: mix_experts.mix_experts_fwd(pooled, bank_a, bank_b, index, weights, 2.0),
            [pooled, bank_a, bank_b, index, weights],
        ),
    }
    few, of_few = torch.ones(512, 2, dtype=torch.int64), new(512, 2, dtype=torch.float32)
    rows, order = new(512, 64), torch.ones(1024, dtype=torch.int64)
    calls["crowded experts"] = (
        lambda: mix_experts.mix_experts_fwd(rows, bank_a, bank_b, few, of_few, 2.0, order),
        [rows, bank_a, bank_b, few, of_few, order],
    )
    radius = new(15, dtype=torch.float32)
    calls["nearest key"] = (
        lambda: nearest_key.nearest_key_fwd(pooled, keys, radius),
        [pooled, keys, radius],
    )
    many, queries = new(8192, 64), new(300, 64)
    # All scores; groups, in one tile of queries and in several.
    for some, of, k, metric in (
        (pooled, keys, 3, "cosine"),
        (pooled, many, 2, "l2"),
        (queries, many, 2, "l2"),
    ):
        calls[f"best keys of {len(some)} among {len(of)}"] = (
            lambda some=some, of=of, k=k, metric=metric: topk_keys.topk_keys_fwd(
                some, of, k, metric
            ),
            [some, of],
        )
    for name, (call, inputs) in calls.items():
        assert compare(call, inputs, launches), name
        print(name, "ok")


def benchmark(launches: list[Any]) -> None:
    """The calls that `host_path` times launch with plans what they launch without."""
    for training, members in product((False, True), (1, 2)):
        with torch.set_grad_enabled(training):
            call = host_path.ours(members, training)
            plans.forget()
            found = []
            for _ in range(3):
                launches.clear()
                call()
                found.append([*launches])
        ordinary, _, planned = found
        assert [(n, grid) for n, grid, _ in planned] == [(n, grid) for n, grid, _ in ordinary]
        for (name, _, first), (_, _, second) in zip(ordinary, planned, strict=True):
            assert not any(isinstance(value, Tensor) for value in second), name
            for before, after in zip(first, second, strict=True):
                if isinstance(before, Tensor):
                    assert isinstance(after, int), name
                elif not isinstance(before, tuple):
                    assert before is after or before == after, name
        print("benchmark", "train" if training else "no_grad", members, "ok")


def never_stale(launches: list[Any]) -> None:
    """A plan is for calls that differ in addresses alone, and for none that a profiler watches."""

    def took_plan(x: Tensor, mixture: Tensor, projections: list[Projection]) -> bool:
        _, found, _ = watched(lambda: mixed_lora_fwd(x, mixture, projections), launches)
        return not tensors_of(found[0][2])

    plans.forget()
    x, mixture, projections, _ = drawn(Case("first", NOT_COUNTED))
    assert [took_plan(x, mixture, projections) for _ in range(3)] == [False, False, True]
    assert took_plan(*drawn(Case("other memory", NOT_COUNTED))[:3])
    print("other memory ok")
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = lambda metadata: None  # noqa: E731 - taken off again
    hooks.add(hook)
    assert not took_plan(x, mixture, projections)
    hooks.remove(hook)
    assert took_plan(x, mixture, projections)
    print("hooks ok")
    known, launchers._KNOWN_PARAMETERS = launchers._KNOWN_PARAMETERS, ()
    plans.forget()
    assert [took_plan(x, mixture, projections) for _ in range(3)] == [False] * 3
    launchers._KNOWN_PARAMETERS = known
    plans.forget()
    assert [took_plan(x, mixture, projections) for _ in range(3)] == [False, False, True]
    print("a launcher that is not known ok")
    for module, name, value in (
        (signatures, "_compiled", None),
        (launchers, "_direct", lambda *_: None),
    ):
        before = getattr(module, name)
        setattr(module, name, value)
        check(CASES[0], launches)
        setattr(module, name, before)
        print("without", name, "ok")
    plans.forget()
    assert [took_plan(x, mixture, projections) for _ in range(3)] == [False, False, True]
    wide = torch.ones(2 * 256, 256, dtype=torch.bfloat16)
    others = {
        "more rows": drawn(Case("", NOT_COUNTED, rows=8))[:3],
        "other samples": drawn(Case("", NOT_COUNTED, samples=2))[:3],
        "other alignment": drawn(Case("", NOT_COUNTED, shift=1))[:3],
        "other ranks": drawn(Case("", NOT_COUNTED, ranks=56))[:3],
        "a bias": drawn(Case("", NOT_COUNTED, bias=True))[:3],
        "other strides": (x, mixture, [p._replace(weight=wide[::2]) for p in projections]),
        "aliases": (x, mixture, [projections[0]] * 2),
    }
    for name, arguments in others.items():
        assert not took_plan(*arguments), name
        print(name, "ok")


if __name__ == "__main__":
    main()
