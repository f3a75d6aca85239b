"""Triton kernels of `mixed_lora` against a float64 loop over the adapters, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_work import counted_work
from triton_mixed_lora_cases import CASES, DEVICE, Case, expected_values, made_inputs, viewed

from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.blocks import casts, common, gemm, shrink, shrink_tiles
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.mixed_lora import empty_h, mixed_lora_bwd, mixed_lora_fwd

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not common.INTERPRETED, reason="neither a GPU nor TRITON_INTERPRET=1"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that an element left unwritten shows."""

    def poisoned(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


def _projection(t: dict[str, Any]) -> Projection:
    return Projection(*(t[name] for name in Projection._fields))


def _forward(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
    [result] = mixed_lora_fwd(t["x"], t["mixture"], [_projection(t)])
    return result


def _backward(t: dict[str, Any], h: Tensor, *modes: bool) -> list[Tensor | None]:
    """dx, d_mixture, d_a, d_b; the modes are needs_x, needs_mixture, grad_through_frozen."""
    dx, d_mixture, [factors] = mixed_lora_bwd(
        [t["dy"]], t["x"], t["mixture"], [_projection(t)], [h], [t["train_rows"]], *modes
    )
    return [dx, d_mixture, *factors]


def _actual(case: Case, t: dict[str, Any]) -> list[Tensor | None]:
    y, h = _forward(t)
    assert h.shape == (t["x"].shape[0], sum(case.ranks))
    assert h.dtype == torch.float32
    return [y, *_backward(t, h, case.needs_x, case.needs_mixture, case.through_frozen)]


def _result_dtype(name: str, inputs: dict[str, Any]) -> torch.dtype:
    source = {"d_mixture": "mixture", "d_a": "lora_a", "d_b": "lora_b"}.get(name, "x")
    return inputs[source].dtype


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


BY_BOTH_ROUTES = {"mixed-ranks", "one-row", "descriptors", "views", "last-trains-cut"}


@pytest.fixture
def route(request: pytest.FixtureRequest) -> Any:
    with routes.forced(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize(
    ("case", "route"),
    [(case, routes.FUSED) for case in CASES]
    + [(case, routes.EXPAND_FIRST) for case in CASES if case.name in BY_BOTH_ROUTES],
    ids=lambda value: value.name if isinstance(value, Case) else value,
    indirect=["route"],
)
def test_forward_and_gradients(case: Case, dtype: torch.dtype, route: str) -> None:
    inputs = made_inputs(case, dtype)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    exact = expected_values(case, inputs, torch.float64)
    plain = expected_values(case, inputs, dtype)
    outputs = _actual(case, inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written to"
    names = ["y", "dx", "d_mixture", "d_a", "d_b"]
    for name, got, want, torch_made in zip(names, outputs, exact, plain, strict=True):
        _check(name, got, want, torch_made, _result_dtype(name, inputs))


def _check(
    name: str,
    got: Tensor | None,
    want: Tensor | None,
    torch_made: Tensor | None,
    of: torch.dtype,
    stores: int = 1,
) -> None:
    """Compare with float64 by the error that torch makes in the dtype of the inputs.

    `stores` counts how often a value is stored while it is summed.
    """
    assert (got is None) == (want is None), name
    if got is None or want is None or torch_made is None:
        return
    assert got.shape == want.shape, name
    assert got.is_contiguous(), name
    assert got.dtype == of, name
    # The interpreter truncates where bfloat16 is stored; a GPU and torch round.
    truncates = common.INTERPRETED and torch_made.dtype == torch.bfloat16
    factor = 3 * stores**0.5 if truncates else 2
    assert _error(got, want) <= factor * _error(torch_made, want) + 1e-6, name


WIDE = Case(samples=2, rows=45, i=48, o=64, ranks=(20, 4, 13), trainable=(1, 2))
CUT = Case(ranks=(20, 30, 4), through_frozen=False)

GROUPS = {
    "two": [Case(), Case(o=40, bias=False)],
    "five-of-unequal-ranks": [
        Case(),
        Case(ranks=(33, 2, 5), o=40, trainable=(0, 2)),
        Case(ranks=(0, 0, 0), trainable=(), bias=False),
        Case(ranks=(1, 0, 0), trainable=(0,), weight="transposed"),
        Case(ranks=(16, 16, 16), trainable=(0, 1, 2), weight="strided", dy="sliced"),
    ],
    "nine": [replace(Case(), ranks=(n, 2, n)) for n in range(9)],
    "descriptors": [WIDE, replace(WIDE, ranks=(4, 4, 4), o=32), replace(WIDE, bias=False)],
    "split-reduction": [
        Case(samples=2, rows=5, i=288, ranks=(3, 2), trainable=(1,)),
        Case(samples=2, rows=5, i=288, ranks=(20, 2), trainable=(0,)),
    ],
    "per-token": [
        Case(samples=23, rows=1, ranks=(4, 4, 9)),
        Case(samples=23, rows=1, ranks=(4, 40, 9)),
    ],
    "factors-of-two-dtypes": [Case(), Case(lora_dtype=torch.float32), Case(o=8)],
    "no-weight-first": [Case(weight="none", bias=False), Case()],
    "no-weight-last": [Case(), Case(weight="none", bias=False)],
    "nothing-but-one": [
        Case(weight="none", bias=False, ranks=(0, 0, 0), trainable=()),
        Case(ranks=(0, 0, 0), trainable=()),
    ],
    "nothing-at-all": [Case(weight="none", bias=False, ranks=(0, 0, 0), trainable=())] * 2,
    "cut": [CUT, replace(CUT, trainable=(0, 2)), replace(CUT, trainable=())],
    "cut-without-mixture": [
        replace(CUT, needs_mixture=False),
        replace(CUT, needs_mixture=False, trainable=()),
    ],
    "mixture-only": [Case(trainable=(), needs_x=False), Case(trainable=(), needs_x=False, o=8)],
    "alike-and-another": [Case(), Case(o=40), Case(bias=False), Case()],
    "alike-in-parts": [Case(samples=1, rows=530, i=32, ranks=(2, 6), trainable=(0, 1))] * 2,
    "alike-split-reduction": [Case(rows=5, i=40, o=288, ranks=(20, 2), trainable=(1,))] * 2,
    "alike-two-ranges": [Case(ranks=(9, 9, 20, 9), trainable=(0, 3), samples=2, rows=80)] * 2,
    "alike-cut": [replace(CUT, needs_mixture=False)] * 3,
    "alike-per-token": [Case(samples=23, rows=1, ranks=(4, 40, 9))] * 2,
    "strided-x": [Case(x="transposed"), Case(x="transposed", dy="expanded")],
}


def _group_inputs(cases: list[Case], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Inputs of the members, with one x and one mixture."""
    inputs = [made_inputs(case, dtype, seed) for seed, case in enumerate(cases)]
    for member in inputs:
        member["x"], member["mixture"] = inputs[0]["x"], inputs[0]["mixture"]
    return inputs


def _group_expected(
    cases: list[Case], inputs: list[dict[str, Any]], dtype: torch.dtype
) -> list[Tensor | None]:
    """y of each member, then dx and d_mixture summed, then d_a and d_b of each."""
    made = [expected_values(case, t, dtype) for case, t in zip(cases, inputs, strict=True)]
    summed = [
        None if all(grad is None for grad in grads) else sum(g for g in grads if g is not None)
        for grads in ([m[1] for m in made], [m[2] for m in made])
    ]
    return [*(m[0] for m in made), *summed, *(grad for m in made for grad in m[3:])]


def _group_actual(cases: list[Case], inputs: list[dict[str, Any]]) -> list[Tensor | None]:
    projections = [_projection(t) for t in inputs]
    outputs = mixed_lora_fwd(inputs[0]["x"], inputs[0]["mixture"], projections)
    dx, d_mixture, factors = mixed_lora_bwd(
        [t["dy"] for t in inputs],
        inputs[0]["x"],
        inputs[0]["mixture"],
        projections,
        [h for _, h in outputs],
        [t["train_rows"] for t in inputs],
        cases[0].needs_x,
        cases[0].needs_mixture,
        cases[0].through_frozen,
    )
    ys = [y for y, _ in outputs]
    return [*ys, dx, d_mixture, *(grad for pair in factors for grad in pair)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("route", [routes.FUSED, routes.EXPAND_FIRST], indirect=True)
def test_groups_of_projections(group: str, dtype: torch.dtype, route: str) -> None:
    cases = GROUPS[group]
    inputs = _group_inputs(cases, dtype)
    before = [{k: v.clone() for k, v in t.items() if isinstance(v, Tensor)} for t in inputs]
    exact = _group_expected(cases, inputs, torch.float64)
    plain = _group_expected(cases, inputs, dtype)
    outputs = _group_actual(cases, inputs)
    for values, t in zip(before, inputs, strict=True):
        for name, value in values.items():
            assert torch.equal(t[name], value), f"{name} was written to"
    n = len(cases)
    names = [f"y {i}" for i in range(n)] + ["dx", "d_mixture"]
    names += [f"{name} {i}" for i in range(n) for name in ("d_a", "d_b")]
    for name, got, want, torch_made in zip(names, outputs, exact, plain, strict=True):
        kind, _, member = name.partition(" ")
        of = _result_dtype(kind, inputs[int(member or 0)])
        _check(name, got, want, torch_made, of, stores=n if kind == "dx" else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_that_are_cast_first(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts, "_LAUNCH_SECONDS", 0.0)
    launch, launched = casts.launch, []
    monkeypatch.setattr(casts, "launch", lambda *a, **k: launched.append(a) or launch(*a, **k))
    cases = [
        Case(lora_dtype=torch.float32, trainable=(0, 2)),
        Case(trainable=(0, 2)),  # like the first, once that is cast
        Case(lora_dtype=torch.float32, ranks=(0, 0, 0), trainable=()),
        Case(lora_dtype=torch.float32, o=8),
    ]
    inputs = _group_inputs(cases, dtype)
    exact = _group_expected(cases, inputs, torch.float64)
    plain = _group_expected(cases, inputs, dtype)
    outputs = _group_actual(cases, inputs)
    assert len(launched) == 2
    names = ["y"] * 4 + ["dx", "d_mixture"] + ["d_a", "d_b"] * 4
    members = [0, 1, 2, 3, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    for i, name, *values in zip(members, names, outputs, exact, plain, strict=True):
        of = _result_dtype(name, inputs[i])
        _check(name, *values, of, stores=4 if name == "dx" else 1)


def test_a_write_that_torch_does_not_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts, "_LAUNCH_SECONDS", 0.0)
    inputs = made_inputs(Case(lora_dtype=torch.float32), torch.float16)
    before, _ = _forward(inputs)
    inputs["lora_b"].data.mul_(2)
    after, _ = _forward(inputs)
    fresh, _ = _forward(inputs | {"lora_b": inputs["lora_b"].clone()})
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_a_group_is_one_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    for module, name in ((shrink, "_shrink_fwd_kernel"), (shrink_tiles, "_split_kernel")):
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                launches.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())
    for group, expected in (
        ("five-of-unequal-ranks", ["_shrink_fwd_kernel"]),
        ("split-reduction", ["_split_kernel", "_shrink_fwd_kernel"]),
        ("nine", ["_shrink_fwd_kernel"] * 2),
    ):
        launches.clear()
        inputs = _group_inputs(GROUPS[group], torch.float32)
        mixed_lora_fwd(inputs[0]["x"], inputs[0]["mixture"], [_projection(t) for t in inputs])
        assert launches == expected, group


@pytest.mark.parametrize("i", [40, 288])  # in one go and in parts
def test_factors_of_a_group_may_have_any_row_strides(i: int) -> None:
    cases = [
        Case(rows=4, i=i, ranks=(1, 0, 0), trainable=()),
        Case(rows=4, i=i),
        Case(rows=4, i=i),
    ]
    inputs = _group_inputs(cases, torch.float32)
    want = _group_actual(cases, inputs)
    inputs[0]["lora_a"] = inputs[0]["lora_a"].as_strided((1, i), (3, 1))
    inputs[2]["lora_a"] = viewed(inputs[2]["lora_a"], "sliced")
    for got, same in zip(_group_actual(cases, inputs), want, strict=True):
        assert (got is None) == (same is None)
        if got is not None and same is not None:
            assert _error(got, same) < 1e-6  # other groups may sum in other parts


def test_members_do_not_share_memory() -> None:
    inputs = _group_inputs(GROUPS["two"], torch.float32)
    results = mixed_lora_fwd(inputs[0]["x"], inputs[0]["mixture"], [_projection(t) for t in inputs])
    storages = {t.untyped_storage().data_ptr() for result in results for t in result}
    assert len(storages) == 4


def test_empty_batch() -> None:
    case = Case(samples=2, rows=0)
    inputs = made_inputs(case, torch.float32)
    y, dx, d_mixture, d_a, d_b = _actual(case, inputs)
    assert y is not None
    assert dx is not None
    assert y.shape == (0, case.o)
    assert dx.shape == (0, case.i)
    for grad, shape in ((d_mixture, (2, 3)), (d_a, (7, case.i)), (d_b, (7, case.o))):
        assert grad is not None
        assert torch.equal(grad, torch.zeros(shape, device=DEVICE))


def test_h_may_come_back_with_other_strides() -> None:
    """Hooks on saved tensors return what they like."""
    case = Case()
    inputs = made_inputs(case, torch.float16)
    _, h = _forward(inputs)
    want = _backward(inputs, h, True, True, True)
    for other in (h.clone(memory_format=torch.contiguous_format), h.t().contiguous().t()):
        got = _backward(inputs, other, True, True, True)
        for a, b in zip(got, want, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_h_is_laid_out_as_announced() -> None:
    inputs = made_inputs(Case(), torch.float32)
    _, h = _forward(inputs)
    announced = empty_h(inputs["x"], h.shape[1])
    assert (h.shape, h.stride(), h.dtype) == (announced.shape, announced.stride(), announced.dtype)
    assert h.stride(0) % 16 == 0


def test_two_runs_agree_bit_for_bit() -> None:
    case = Case(samples=4, rows=21)
    inputs = made_inputs(case, torch.float16)
    for a, b in zip(_actual(case, inputs), _actual(case, inputs), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["descriptors", "per-token", "two-samples-per-tile"])
def test_a_wide_tile_is_finished_a_few_columns_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(next(c for c in CASES if c.name == name), ranks=(20, 9, 13))
    inputs = made_inputs(case, torch.float16)
    whole = _actual(case, inputs)
    monkeypatch.setattr(shrink, "_WIDTH", 8)  # of 32
    for a, b in zip(whole, _actual(case, inputs), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_double_precision_is_refused() -> None:
    inputs = made_inputs(Case(), torch.float64)
    with pytest.raises(TypeError, match="float64"):
        _forward(inputs)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("rows", [1, 3, 8, 14, 16, 17, 40, 64, 65, 128])
def test_segments_cover_every_tile(rows: int, block_m: int) -> None:
    samples = 7
    segments = shrink_tiles.segments_of(block_m, samples, rows)
    total = samples * rows
    met = [
        (min(start + block_m, total) - 1) // rows - start // rows + 1
        for start in range(0, total, block_m)
    ]
    assert segments in (0, 1, 2, 4)
    assert segments == 0 or segments >= max(met)
    assert segments > 0 or rows < block_m


def test_descriptors_and_pointers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    describe = gemm._descriptor
    monkeypatch.setattr(gemm, "_descriptor", lambda *a: used.append(a) or describe(*a))
    cases = [WIDE, WIDE]  # dx is added to
    inputs = _group_inputs(cases, torch.float16)
    results = []
    for route, expected in ((routes.FUSED, True), (routes.FUSED_POINTERS, False)):
        used.clear()
        with routes.forced(route):
            results.append(_group_actual(cases, inputs))
        assert bool(used) == expected
    for name, a, b in zip(("y 0", "y 1", "dx"), *results, strict=False):
        assert a is not None
        assert b is not None
        assert _error(a, b) < 1e-3, name


@pytest.mark.skipif(not common.INTERPRETED, reason="the interpreter counts")
@pytest.mark.parametrize("route", [routes.FUSED, routes.EXPAND_FIRST], indirect=True)
@pytest.mark.parametrize("needs_mixture", [True, False])
def test_gradients_cut_at_frozen_adapters_cost_less(needs_mixture: bool, route: str) -> None:
    case = Case(samples=2, rows=32, i=64, o=64, ranks=(32, 32, 16))
    inputs = _group_inputs([case, case], torch.float16)
    projections = [_projection(t) for t in inputs]
    outputs = mixed_lora_fwd(inputs[0]["x"], inputs[0]["mixture"], projections)
    spent = []
    for through_frozen in (True, False):
        with counted_work() as work:
            mixed_lora_bwd(
                [t["dy"] for t in inputs],
                inputs[0]["x"],
                inputs[0]["mixture"],
                projections,
                [h for _, h in outputs],
                [t["train_rows"] for t in inputs],
                True,
                needs_mixture,
                through_frozen,
            )
        spent.append(work)
    whole, cut = spent
    m, frozen, members = 64, 64, 2
    # g * w is not stored for the frozen columns, and neither they nor their rows of A reach dx;
    # without the mixture they are not computed either.
    columns = members * m * frozen
    assert whole.stored - cut.stored == columns * 2
    assert whole.loaded - cut.loaded >= columns * 2 + members * frozen * case.i * 2
    dx, g = 2 * columns * case.i, 2 * columns * case.o
    assert whole.flops - cut.flops >= dx + (0 if needs_mixture else g)


@pytest.mark.parametrize("rows", [5, 45])  # by pointers and by descriptors
@pytest.mark.parametrize("route", [routes.FUSED, routes.EXPAND_FIRST], indirect=True)
def test_an_absent_adapter_of_one_member_is_not_seen(rows: int, route: str) -> None:
    case = Case(samples=2, rows=rows, i=32, o=48, ranks=(20, 4, 13), trainable=(1, 2))
    inputs = _group_inputs([case] * 3, torch.float16)
    inputs[0]["mixture"][:, 1] = 0.0
    want = _group_actual([case] * 3, inputs)
    for name, bad in (("lora_a", "inf"), ("lora_b", "nan")):
        inputs[1][name] = inputs[1][name].clone()
        inputs[1][name][20:24] = float(bad)
    for i, (got, finite) in enumerate(zip(_group_actual([case] * 3, inputs), want, strict=True)):
        assert got is not None
        assert finite is not None
        if i == 4:  # d_mixture, to whose second column the member adds nothing
            assert got.isfinite().all()
            got, finite = got[:, ::2], finite[:, ::2]
        assert _error(got, finite) < 2e-3
