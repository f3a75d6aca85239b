"""The bytes of `benchmarks/traffic` are those that the kernels move, tensor by tensor."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import pytest
import roofline
import torch
import triton
import triton.language as tl
from kernel_traffic import SCRATCH, Traffic, counted
from torch import Tensor
from traffic.keys import Search, nearest_key, topk_keys
from traffic.mix_experts import Experts, experts_backward, experts_forward
from traffic.mix_prompts import Prompts, prompts_backward, prompts_forward
from traffic.mixed_lora import (
    Member,
    MixedLora,
    base_linear,
    mixed_lora_backward,
    mixed_lora_forward,
    padded,
)
from traffic.passes import Device, Pass, bound, total_bytes, total_flops, total_seconds
from traffic.router import Router, head_forward, pool_backward, pool_forward

from sapt_fast.ops.mix_experts import pair_groups
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.route import QueryProjection
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.mix_prompts import mix_prompts_bwd, mix_prompts_fwd
from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd
from sapt_fast.triton_kernels.nearest_key import nearest_key_fwd
from sapt_fast.triton_kernels.pool_tokens import pool_tokens_bwd, pool_tokens_fwd
from sapt_fast.triton_kernels.route import route_fwd
from sapt_fast.triton_kernels.topk_keys import topk_keys_fwd

experts_kernels = import_module("sapt_fast.triton_kernels.mix_experts")

pytestmark = pytest.mark.skipif(
    not common.INTERPRETED, reason="accesses are seen in Triton's interpreter only"
)

Bound = dict[str, float]
"""Of some tensors: how often a pass may read it on average, as its tiles explain."""


@pytest.fixture(autouse=True)
def _one_multiprocessor(monkeypatch):
    """Nothing is split into parts, which the formulas leave out unless they name them."""
    torch.manual_seed(0)
    traits = common.DeviceTraits(capability=0, num_sms=1)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)


def _expected(passes: Iterable[Pass], named: dict[str, Tensor]) -> tuple[Counter, Counter]:
    """(reads, writes) of the kernels' passes by tensor, what is not named as scratch."""
    sides = Counter(), Counter()
    for p in passes:
        if not p.library:
            for side, sizes in zip(sides, (p.reads, p.writes), strict=True):
                for name, size in sizes.items():
                    side[name if name in named else SCRATCH] += size
    return tuple(Counter({n: b for n, b in side.items() if b}) for side in sides)


def _check(
    call: Callable[[], dict[str, Tensor | None]],
    inputs: dict[str, Tensor],
    passes: Iterable[Pass],
    rereads: Bound,
) -> Traffic:
    """Runs `call`, which returns its results by name, and compares its traffic with `passes`.

    Raises:
        AssertionError: they differ.
    """
    with counted() as recorder:
        results = call()
    named = {n: t for n, t in {**inputs, **results}.items() if t is not None}
    traffic = recorder.traffic(named)
    passes = list(passes)
    assert len(recorder.kernels) == sum(not p.library for p in passes)
    reads, writes = traffic.unique()
    expected_reads, expected_writes = _expected(passes, named)
    assert reads == dict(expected_reads)
    assert writes == dict(expected_writes)
    for name, most in rereads.items():
        assert traffic.reads[name].total <= most * traffic.reads[name].unique, name
    return traffic


# --- mixed LoRA --------------------------------------------------------------------------------

MIXED = {
    # 16-bit and more than 64 rows: tensor descriptors; else pointers.
    "one, descriptors": MixedLora(96, 40, 2, 5, (Member(48, 20, (16, 20)),), tile_rows=16),
    "two, descriptors": MixedLora(
        80, 40, 1, 5, (Member(48, 20, (16, 20)), Member(24, 35, (21, 35))), tile_rows=16
    ),
    "two, pointers": MixedLora(
        32, 33, 2, 3, (Member(41, 6, (4, 6), bias=True), Member(17, 18, (0, 18))), tile_rows=16
    ),
    "float32": MixedLora(32, 33, 2, 3, (Member(41, 6, (4, 6)),), 4, 4, tile_rows=16),
    "float32 factors": MixedLora(32, 40, 2, 3, (Member(48, 6, (0, 6)),), 2, 4, tile_rows=16),
}
ROUTES = {"fused": routes.FUSED, "expand first": routes.EXPAND_FIRST}
_DTYPE = {2: torch.float16, 4: torch.float32}


def _projections(c: MixedLora) -> tuple[list[Projection], dict[str, Tensor]]:
    dtype, factor_dtype = _DTYPE[c.itemsize], _DTYPE[c.factor_itemsize]
    projections, named = [], {}
    for j, m in enumerate(c.members):
        adapter = torch.arange(m.r, dtype=torch.int32) * c.adapters // m.r
        p = Projection(
            torch.randn(m.o, c.i).to(dtype),
            torch.randn(m.o).to(dtype) if m.bias else None,
            torch.randn(m.r, c.i).to(factor_dtype),
            torch.randn(m.r, m.o).to(factor_dtype),
            adapter,
            torch.rand(m.r),
        )
        projections.append(p)
        names = ("weight", "bias", "a", "b", "row_adapter", "row_scale")
        named |= {f"{name}{j}": t for name, t in zip(names, p, strict=True)}
    return projections, named


def _mixed_inputs(c: MixedLora):
    projections, named = _projections(c)
    x = torch.randn(c.m, c.i).to(_DTYPE[c.itemsize])
    mixture = torch.softmax(torch.randn(c.samples, c.adapters), -1)
    return x, mixture, projections, {"x": x, "mixture": mixture, **named}


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lora_forward(name, route):
    c = MIXED[name]
    x, mixture, projections, inputs = _mixed_inputs(c)

    def call():
        with routes.forced(ROUTES[route]):
            outputs = mixed_lora_fwd(x, mixture, projections)
        return {
            f"{n}{j}": t for j, pair in enumerate(outputs) for n, t in zip("yh", pair, strict=True)
        }

    # Tiles of 16 x 32: a row tile of x meets every tile of rank columns, and of columns of y.
    widths = [padded(m.r) for m in c.members]
    block = 16 if max(widths) <= 16 else 32
    meets = sum(_tiles(w, block) for w in widths)
    own = 1
    if route == "fused":
        meets += sum(_tiles(m.o, 32) for m in c.members)
        own += len(c.members)
    tiles_m = _tiles(c.m, 16)
    rereads: Bound = {"x": meets / own}
    for j, m in enumerate(c.members):
        rereads[f"a{j}"] = tiles_m * _tiles(m.r, block) * block / m.r
        rereads[f"b{j}"] = tiles_m
        if route == "fused":
            rereads[f"weight{j}"] = tiles_m
    _check(call, inputs, mixed_lora_forward(c, route), rereads)


@pytest.mark.parametrize("through_frozen", [True, False], ids=["all", "trained"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lora_backward(name, route, through_frozen):
    c = MIXED[name]
    x, mixture, projections, inputs = _mixed_inputs(c)
    hs = [h for _, h in mixed_lora_fwd(x, mixture, projections)]
    dys = [torch.randn(c.m, m.o).to(x.dtype) for m in c.members]
    inputs |= {f"h{j}": h for j, h in enumerate(hs)} | {f"dy{j}": d for j, d in enumerate(dys)}
    train = [list(m.train) for m in c.members]

    def call():
        with routes.forced(ROUTES[route]):
            dx, d_mixture, factors = mixed_lora_bwd(
                dys, x, mixture, projections, hs, train, True, True, through_frozen
            )
        grads = {
            f"{n}{j}": t
            for j, pair in enumerate(factors)
            for n, t in zip(("d_a", "d_b"), pair, strict=True)
        }
        return {"dx": dx, "d_mixture": d_mixture, **grads}

    # dy meets the tiles of rank columns, those of trained columns for dB, and those of dx.
    rereads: Bound = {"x": max(_tiles(m.window[1] - m.window[0], 16) for m in c.members)}
    for j, m in enumerate(c.members):
        rank = padded(m.r)
        block = 16 if rank <= 16 else 32
        meets, own = _tiles(rank, block) + _tiles(m.window[1] - m.window[0], 16), 2
        if route == "fused":
            meets, own = meets + _tiles(c.i, 32), 3
            rereads[f"weight{j}"] = _tiles(c.m, 16)
        rereads[f"dy{j}"] = meets / own
        rereads[f"h{j}"] = 1
    _check(call, inputs, mixed_lora_backward(c, route, through_frozen), rereads)


# --- router ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_pool_tokens(pooling, masked):
    b, t, d, vocabulary = 5, 13, 37, 23
    ids, table = torch.randint(0, vocabulary, (b, t)), torch.randn(vocabulary, d).half()
    mask = (torch.rand(b, t) > 0.3).long() if masked else None
    taken = ids if mask is None else ids[mask != 0]
    c = Router(
        b, t, d, vocabulary=vocabulary, distinct=taken.unique().numel(), kept=taken.numel(),
        masked=masked,
    )  # fmt: skip
    inputs = {"ids": ids, "table": table, **({"mask": mask} if masked else {})}
    keep = pooling == "max"

    def forward():
        return dict(
            zip(("pooled", "winner"), pool_tokens_fwd(ids, table, mask, pooling, keep), strict=True)
        )

    # The winners' ids are read once more, for a column each.
    _check(forward, inputs, pool_forward(c, keep), {"table": taken.numel() / c.rows})

    dy, winner = torch.randn(b, d).half(), forward()["winner"]
    inputs = {"dy": dy, **({"winner": winner} if keep else {})}
    places = None
    if keep:
        places = (winner.long() * d + torch.arange(d)).unique().numel()
    _check(
        lambda: {"d_table": pool_tokens_bwd(dy, ids, mask, winner, vocabulary, pooling)},
        inputs,
        pool_backward(c, pooling, places),
        # A sample's columns compare the winners of all samples; a token adds the row of its own.
        {"dy": b if keep else t},
    )


def _four_multiprocessors(monkeypatch):
    traits = common.DeviceTraits(capability=0, num_sms=4)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)


def test_pool_tokens_in_splits(monkeypatch):
    _four_multiprocessors(monkeypatch)
    ids, table = torch.randint(0, 9, (2, 29)), torch.randn(9, 12).half()
    c = Router(2, 29, 12, distinct=ids.unique().numel(), splits=4)
    for pooling, keep in (("mean", False), ("max", True)):

        def forward(pooling=pooling, keep=keep):
            pooled, winner = pool_tokens_fwd(ids, table, None, pooling, keep)
            return {"pooled": pooled, "winner": winner}

        passes = pool_forward(c, keep)
        _check(forward, {"ids": ids, "table": table}, passes, {"table": 2 * 29 / c.rows})


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("keys", [1, 15, 70])
def test_router_head(keys, top_k):
    b, d, hidden = 3, 37, 19
    c = Router(b, 1, d, hidden, keys)
    shapes = {"pooled": (b, d), "keys": (keys, d), "down": (hidden, d), "up": (d, hidden),
              "norm_weight": (d,), "norm_bias": (d,)}  # fmt: skip
    inputs = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    pooled, key_rows, *projection = inputs.values()

    def forward():
        projected = QueryProjection(*projection)
        return {"weights": route_fwd(pooled, key_rows, projected, 6.0, top_k, 0.01)}

    # The parameters are streamed once per sample, the pooled vector once per 16 rows of down.
    once_per_sample = dict.fromkeys(("down", "up", "norm_weight", "norm_bias", "keys"), b)
    rereads = {"pooled": _tiles(hidden, 16), **once_per_sample}
    ranked = top_k is not None and top_k < keys
    _check(forward, inputs, head_forward(c, ranked), rereads)


# --- prompts, keys, experts --------------------------------------------------------------------


@pytest.mark.parametrize("from_ids", [False, True], ids=["embeds", "ids"])
def test_mix_prompts(from_ids):
    b, t, d, count, length = 6, 7, 37, 5, 3
    prompts, mixture = torch.randn(count, length, d), torch.rand(b, count)
    ids = torch.randint(0, 20, (b, t)) if from_ids else None
    source = torch.randn(20, d).half() if from_ids else torch.randn(b, t, d).half()
    rows = ids.unique().numel() if from_ids else None
    c = Prompts(b, t, d, count, length, rows, prompt_itemsize=4)
    name = "table" if from_ids else "embeds"
    inputs = {"prompts": prompts, "mixture": mixture, name: source}
    if from_ids:
        inputs["ids"] = ids
    _check(
        lambda: {"y": mix_prompts_fwd(prompts, mixture, source, ids)},
        inputs,
        prompts_forward(c),
        {"prompts": b, name: b * t / rows if from_ids else 1},
    )
    dy = torch.randn(b, length + t, d).half()
    _check(
        lambda: dict(
            zip(
                ("d_prompts", "d_mixture"),
                mix_prompts_bwd(dy, prompts, mixture, True, True),
                strict=True,
            )
        ),
        {"dy": dy, "prompts": prompts, "mixture": mixture},
        prompts_backward(c),
        # 4 prompts share a read of dy, in either pass; dy's samples each read the prompts.
        {"dy": _tiles(count, 4), "prompts": b * _tiles(count, 4) * 4 / count},
    )


@pytest.mark.parametrize(("k", "metric"), [(5, "cosine"), (30, "l2"), (70, "dot")])
def test_topk_keys(k, metric):
    kept = next((size for size in (8, 32, 64) if size >= k), 64)
    m, n, d = (8, 90, 37) if k <= kept else (2, 90, 17)
    query, keys = torch.randn(m, d).half(), torch.randn(n, d).half()
    c = Search(m, n, d, k, metric, kept)
    block = max(16, kept)
    _check(
        lambda: dict(zip(("scores", "index"), topk_keys_fwd(query, keys, k, metric), strict=True)),
        {"query": query, "keys": keys},
        topk_keys(c),
        {"keys": _tiles(m, 2) * _tiles(n, block) * block / n, "query": _tiles(n, block)},
    )


def test_nearest_key():
    m, n, d = 8, 50, 37
    query, keys, radius = torch.randn(m, d).half(), torch.randn(n, d).half(), torch.rand(n)
    found = nearest_key_fwd(query, keys, radius)[2].unique().numel()
    _check(
        lambda: dict(
            zip(("distance", "index", "nearest"), nearest_key_fwd(query, keys, radius), strict=True)
        ),
        {"query": query, "keys": keys, "radius": radius},
        nearest_key(Search(m, n, d, found=found)),
        {"keys": _tiles(m, 2) * _tiles(n, 16) * 16 / n, "query": _tiles(n, 16)},
    )


def test_searches_in_splits(monkeypatch):
    """Keys are read once all the same; what the shares keep goes through memory."""
    _four_multiprocessors(monkeypatch)
    m, n, d = 3, 300, 17
    query, keys, radius = torch.randn(m, d).half(), torch.randn(n, d).half(), torch.rand(n)
    inputs = {"query": query, "keys": keys, "radius": radius}
    found = nearest_key_fwd(query, keys, radius)[2].unique().numel()
    _check(
        lambda: dict(
            zip(("distance", "index", "nearest"), nearest_key_fwd(query, keys, radius), strict=True)
        ),
        inputs,
        nearest_key(Search(m, n, d, splits=3, found=found)),
        {},
    )
    c = Search(m, n, d, 3, kept=8, splits=3)
    _check(
        lambda: dict(zip(("scores", "index"), topk_keys_fwd(query, keys, 3, "dot"), strict=True)),
        {"query": query, "keys": keys},
        topk_keys(c),
        {},
    )


@pytest.mark.parametrize("crowded", [False, True], ids=["scattered", "crowded"])
def test_mix_experts(crowded, monkeypatch):
    monkeypatch.setattr(experts_kernels, "grouping_pays", lambda *_: crowded)
    m, k, n, i, o, rank = 10, 3, 12, 33, 41, 5
    x, dy = torch.randn(m, i).half(), torch.randn(m, o).half()
    bank_a, bank_b = torch.randn(n, rank, i).half(), torch.randn(n, rank, o).half()
    index, weights = torch.randint(0, n, (m, k)), torch.rand(m, k)
    c = Experts(m, k, n, i, o, rank, chosen=index.unique().numel())
    inputs = {"bank_a": bank_a, "bank_b": bank_b, "index": index, "weights": weights}

    def forward():
        y, h = experts_kernels.mix_experts_fwd(x, bank_a, bank_b, index, weights, 2.0)
        return {"y": y, "h": h}

    # Scattered, a pair reads its expert; sorted, a tile of 16 pairs does, and x or h with it.
    per_pair = m * k / c.read
    rereads: Bound = {"bank_a": per_pair, "bank_b": per_pair, "x": k}
    if crowded:
        rereads = {"bank_a": 2, "bank_b": 2, "x": k}
    _check(forward, {"x": x, **inputs}, experts_forward(c, crowded), rereads)

    h, groups = forward()["h"], pair_groups(index, n, True)

    def backward():
        grads = experts_kernels.mix_experts_bwd(
            dy, x, bank_a, bank_b, index, weights, h, 2.0, groups, True, True
        )
        return dict(zip(("dx", "d_weights", "d_a", "d_b"), grads, strict=True))

    passes = experts_backward(c, crowded)
    _check(backward, {"x": x, "dy": dy, "h": h, **inputs}, passes, rereads | {"dy": k, "x": k})


# --- the check can fail ------------------------------------------------------------------------


@triton.jit
def _store_kernel(out_ptr, size, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, 0.0, mask=offsets < size)


def _forward(c: MixedLora, run: Callable[..., list[tuple[Tensor, Tensor]]]):
    """(call, inputs) of a forward that may do what it should not."""
    x, mixture, projections, inputs = _mixed_inputs(c)

    def call():
        with routes.forced(routes.FUSED):
            outputs = run(x, mixture, projections)
        return {
            f"{n}{j}": t for j, pair in enumerate(outputs) for n, t in zip("yh", pair, strict=True)
        }

    return call, inputs


def test_a_stored_product_of_every_adapter_is_seen():
    """K x M x d, as the released loop stores it."""
    c = MIXED["one, descriptors"]
    size = c.adapters * c.m * c.i

    def forward(x, mixture, projections):
        _store_kernel[(_tiles(size, 1024),)](x.new_empty(size), size, BLOCK=1024)
        return mixed_lora_fwd(x, mixture, projections)

    call, inputs = _forward(c, forward)
    passes = mixed_lora_forward(c, "fused")
    for extra in ([], [Pass("a launch that stores nothing", {}, {})]):
        with pytest.raises(AssertionError):
            _check(call, inputs, [*passes, *extra], {})
    stated = Pass("a stated product", {}, {"product": size * c.itemsize})
    _check(call, inputs, [*passes, stated], {})


def test_a_shrink_for_each_projection_is_seen():
    """Without the group's one launch x is read once more."""
    c = MIXED["two, pointers"]

    def forward(x, mixture, projections):
        return [mixed_lora_fwd(x, mixture, [p])[0] for p in projections]

    call, inputs = _forward(c, forward)
    passes = mixed_lora_forward(c, "fused")
    again = {"mixture": c.mixture}
    for extra in ([], [Pass("a shrink without x", again, {})]):
        with pytest.raises(AssertionError):
            _check(call, inputs, [*passes, *extra], {})
    again["x"] = c.m * c.i * c.itemsize
    _check(call, inputs, [*passes, Pass("a second shrink", again, {})], {})


def test_reading_more_often_than_the_tiles_explain_is_seen():
    c = MIXED["one, descriptors"]
    call, inputs = _forward(c, mixed_lora_fwd)
    with pytest.raises(AssertionError, match=r"^x"):
        _check(call, inputs, mixed_lora_forward(c, "fused"), {"x": 1})


def test_an_unread_byte_is_seen():
    """Of a table one row too many in the formula."""
    ids, table = torch.tensor([[0, 2, 2], [1, 0, 0]]), torch.randn(5, 8).half()
    for rows, fits in ((3, True), (4, False)):
        c = Router(2, 3, 8, distinct=rows)

        def call():
            return {"pooled": pool_tokens_fwd(ids, table, None, "max")[0]}

        if fits:
            _check(call, {"ids": ids, "table": table}, pool_forward(c), {})
        else:
            with pytest.raises(AssertionError, match="table"):
                _check(call, {"ids": ids, "table": table}, pool_forward(c), {})


# --- formulas and table ------------------------------------------------------------------------


def test_time_is_the_longer_of_bytes_and_flops():
    device = Device("toy", bandwidth=10.0, flops=100.0)
    copy = Pass("copy", {"x": 30}, {"y": 20}, flops=10)
    product = Pass("product", {"x": 10}, {"y": 10}, flops=1000)
    assert (copy.seconds(device), product.seconds(device)) == (5.0, 10.0)
    assert total_seconds([copy, product], device) == 15.0
    assert bound([copy, product], device) == "arithmetic"
    assert bound([copy, copy, copy, product], device) == "memory"


def test_the_formulas_give_the_known_sizes():
    """At d 4096, R 60: base product and rank products in FLOPs, and M R 4 bytes for h."""
    c = MixedLora(8192, 4096, 16, 15, (Member(4096, 60, (56, 60)),))
    forward = mixed_lora_forward(c, "fused")
    assert total_flops(base_linear(c)) == 2 * 8192 * 4096 * 4096
    assert total_flops(forward) == 2 * 8192 * 4096 * (4096 + 60 + 60)
    assert forward[0].writes["h0"] == 8192 * 64 * 4
    extra = total_bytes(mixed_lora_forward(c, "expand first"))
    assert extra - total_bytes(forward) == 2 * 8192 * 4096 * 2
    for through, most in ((True, 1.0), (False, 0.999)):
        exact = total_bytes(mixed_lora_backward(c, "fused"))
        assert total_bytes(mixed_lora_backward(c, "fused", through)) <= most * exact


def test_the_table_prints_every_op():
    script = Path(roofline.__file__)
    command = [sys.executable, str(script), "--csv", "--bandwidth", "8.6", "--flops", "1580"]
    fast = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    slow = subprocess.run(command[:3], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in slow.splitlines()]
    for op in ("base linear", "mixed_lora", "pool_tokens", "router head", "mix_prompts",
               "topk_keys", "nearest_key", "mix_experts"):  # fmt: skip
        assert any(row[0].strip('"').startswith(op) for row in rows), op
    assert len(fast) == len(rows) > 40
