"""Every backend of `mix_experts` against a float64 loop over the pairs: forward, all gradients."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import mix_experts, nearest_key, topk_keys

op = importlib.import_module("sapt_fast.ops.mix_experts")
kernels = importlib.import_module("sapt_fast.triton_kernels.mix_experts")
grouped_experts = importlib.import_module("sapt_fast.triton_kernels.blocks.grouped_experts")

# The reference, C++, and Triton's two ways: pair by pair, and sorted by expert.
WAYS = ["reference", "cpu", "triton", "grouped"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Error relative to the root mean square; the interpreter truncates where bfloat16 is stored.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FLOATS = ("x", "bank_a", "bank_b", "weights")
# name: (M, N, r, I, O, k)
CASES = {
    "odd": (5, 7, 3, 19, 21, 3),
    "one_of_everything": (1, 1, 1, 1, 1, 1),
    "one_row_of_many_experts": (1, 50, 4, 16, 8, 9),
    "ranks_beyond_a_tile": (3, 4, 21, 16, 24, 2),
    "crowded": (20, 2, 4, 16, 40, 1),
    "one_expert": (21, 1, 5, 16, 8, 2),
    "every_expert": (6, 5, 4, 16, 24, 5),
    "several_tiles": (50, 3, 17, 40, 70, 3),
}


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _inputs(case, dtype=torch.float32, bank_dtype=None, seed=0):
    m, n, r, i, o, k = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    return {
        "x": draw(m, i),
        "bank_a": draw(n, r, i, of=bank_dtype or dtype),
        "bank_b": draw(n, r, o, of=bank_dtype or dtype),
        "index": torch.randint(-1 if n > 1 else 0, n, (m, k), generator=generator),
        "weights": draw(m, k, of=torch.promote_types(dtype, torch.float32)),
    }


def _leaves(inputs, backend):
    moved = {n: t.detach().to(_device(backend), copy=True) for n, t in inputs.items()}
    return {n: t.requires_grad_(t.is_floating_point()) for n, t in moved.items()}


def _incoming(y):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def _run(inputs, backend, **options):
    """(output, gradients by name) on the CPU."""
    leaves = _leaves(inputs, backend)
    y = mix_experts(*leaves.values(), backend=backend, **options)
    y.backward(_incoming(y))
    return y.detach().cpu(), {name: leaves[name].grad.cpu() for name in FLOATS}


def _loop(inputs, scaling):
    """The formula pair by pair in float64."""
    leaves = {n: t.double() if n != "index" else t for n, t in inputs.items()}
    leaves = _leaves(leaves, "reference")
    x, bank_a, bank_b, index, weights = leaves.values()
    rows = []
    for m in range(len(x)):
        row = x.new_zeros(bank_b.shape[2])
        for j, n in enumerate(index[m].tolist()):
            if n >= 0:
                row = row + scaling * weights[m, j] * ((x[m] @ bank_a[n].t()) @ bank_b[n])
        rows.append(row)
    y = torch.stack(rows)
    y.backward(_incoming(y))
    return y.detach(), {name: leaves[name].grad for name in FLOATS}


def _error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.fixture(params=WAYS)
def backend(request, monkeypatch):
    name = "triton" if request.param == "grouped" else request.param
    reason = dispatch.unavailable("mix_experts", name, _device(name))
    assert reason is None, reason
    monkeypatch.setattr(kernels, "grouping_pays", lambda *_: request.param == "grouped")
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(backend, case, dtype):
    inputs = _inputs(case, dtype)
    exact, exact_grads = _loop(inputs, 0.5)
    y, grads = _run(inputs, backend, scaling=0.5)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert _error(y, exact) <= TOLERANCE[dtype]
    for name in FLOATS:
        assert grads[name].dtype == inputs[name].dtype
        assert _error(grads[name], exact_grads[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_sparse_gradients_hold_the_chosen_experts_only(backend, dtype):
    inputs = _inputs("one_row_of_many_experts", dtype)
    _, dense = _run(inputs, backend)
    _, sparse = _run(inputs, backend, sparse_grad=True)
    chosen = inputs["index"].unique()
    for name in ("bank_a", "bank_b"):
        assert sparse[name].layout == torch.sparse_coo
        assert torch.equal(sparse[name]._indices()[0], chosen[chosen >= 0])  # unique, ascending
        assert torch.equal(sparse[name].to_dense(), dense[name])
    for name in ("x", "weights"):
        assert torch.equal(sparse[name], dense[name])


def test_a_step_of_sparse_adam_is_one_of_adam_for_the_chosen(backend):
    inputs = _inputs("odd")
    stepped = []
    for optimizer, sparse in ((torch.optim.SparseAdam, True), (torch.optim.Adam, False)):
        leaves = _leaves(inputs, backend)
        banks = [leaves["bank_a"], leaves["bank_b"]]
        mix_experts(*leaves.values(), sparse_grad=sparse, backend=backend).sum().backward()
        optimizer(banks, lr=0.1).step()
        stepped.append([bank.detach() for bank in banks])
    for by_sparse, by_dense in zip(*stepped, strict=True):
        torch.testing.assert_close(by_sparse, by_dense)


def test_sparse_gradients_when_no_expert_is_chosen(backend):
    inputs = {**_inputs("odd"), "index": torch.full((5, 3), -1)}
    y, grads = _run(inputs, backend, sparse_grad=True)
    assert not y.any()
    assert not grads["x"].any()
    assert grads["bank_a"]._values().shape == (0, 3, 19)


def test_an_expert_chosen_twice_counts_twice(backend):
    inputs = _inputs("odd")
    inputs["index"] = torch.zeros(5, 3, dtype=torch.int64)
    exact, exact_grads = _loop(inputs, 1.0)
    y, grads = _run(inputs, backend)
    assert _error(y, exact) <= 1e-6
    assert all(_error(grads[name], exact_grads[name]) <= 2e-6 for name in FLOATS)


@pytest.mark.parametrize("wanted", FLOATS)
def test_when_only_one_input_wants_a_gradient(backend, wanted):
    inputs = _inputs("odd")
    _, expected = _run(inputs, backend)
    leaves = {n: t.to(_device(backend), copy=True) for n, t in inputs.items()}
    leaves[wanted].requires_grad_()
    y = mix_experts(*leaves.values(), backend=backend)
    y.backward(_incoming(y))
    assert torch.equal(leaves[wanted].grad.cpu(), expected[wanted])


def test_float32_banks_on_bfloat16_rows(backend):
    inputs = _inputs("odd", torch.bfloat16, torch.float32)
    exact, exact_grads = _loop(inputs, 1.0)
    y, grads = _run(inputs, backend)
    assert y.dtype == torch.bfloat16
    assert grads["bank_a"].dtype == torch.float32
    assert _error(y, exact) <= 1e-2
    assert all(_error(grads[name], exact_grads[name]) <= 1e-2 for name in FLOATS)


def test_weights_may_be_of_the_rows_dtype(backend):
    inputs = _inputs("odd", torch.float16)
    inputs["weights"] = inputs["weights"].half()
    y, grads = _run(inputs, backend)
    assert _error(y, _loop(inputs, 1.0)[0]) <= 2e-3
    assert grads["weights"].dtype == torch.float16


def test_chunks_change_nothing(monkeypatch):
    inputs = _inputs("odd")
    expected = _run(inputs, "reference")
    monkeypatch.setattr(op, "_GATHER_CHUNK", 400)
    y, grads = _run(inputs, "reference")
    assert _error(y, expected[0]) <= 1e-6
    assert all(_error(grads[n], expected[1][n]) <= 1e-6 for n in FLOATS)


def test_the_reference_gathers_no_more_than_a_chunk(monkeypatch):
    inputs, sizes = _inputs("odd"), []
    gather = op._gather
    monkeypatch.setattr(op, "_GATHER_CHUNK", 400)
    monkeypatch.setattr(op, "_gather", lambda *a: sizes.append(gather(*a).numel()) or gather(*a))
    _run(inputs, "reference")
    assert max(sizes) <= 400


def test_takes_what_the_searches_return(backend):
    inputs = _inputs("odd")
    keys = torch.randn(7, 19, generator=torch.Generator().manual_seed(2))
    scores, index = topk_keys(inputs["x"], keys, 3, backend="reference")
    inputs |= {"index": index, "weights": scores.softmax(-1)}
    assert _error(_run(inputs, backend)[0], _loop(inputs, 1.0)[0]) <= 1e-6
    index, _ = nearest_key(inputs["x"], keys, torch.full((7,), 5.0), backend="reference")
    inputs |= {"index": index.unsqueeze(1), "weights": torch.ones(5, 1)}
    assert {True, False} == set((index < 0).tolist())
    assert _error(_run(inputs, backend)[0], _loop(inputs, 1.0)[0]) <= 1e-6


def test_sparse_gradients_are_refused_under_compile():
    def layer(x, bank_a, bank_b, index, weights):
        return mix_experts(x, bank_a, bank_b, index, weights, sparse_grad=True)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="sparse_grad"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(*_inputs("odd").values())


def test_autocast_computes_in_its_dtype(backend):
    inputs = _inputs("odd")
    with torch.autocast(_device(backend), torch.bfloat16):
        y, grads = _run(inputs, backend)
    assert y.dtype == torch.bfloat16
    assert _error(y, _loop(inputs, 1.0)[0]) <= 2e-2
    assert all(grads[name].dtype == torch.float32 for name in FLOATS)


@pytest.mark.parametrize("grouped", [False, True], ids=["gathered", "grouped"])
def test_values_out_of_range_touch_nothing_in_the_kernels(grouped, monkeypatch):
    monkeypatch.setattr(kernels, "grouping_pays", lambda *_: grouped)
    inputs = _inputs("odd")
    results = []
    for none in (-1, 7, -9, 2**40):
        inputs["index"] = torch.tensor([[3, none, 0]] * 5)
        t = [v.to(_device("triton")) for v in inputs.values()]
        order = op.pair_order(t[3], t[4], 7)
        y, h = kernels.mix_experts_fwd(*t, 1.0, order)
        groups = op.pair_groups(t[3], t[4], 7, order, False)
        grads = kernels.mix_experts_bwd(y, *t, h, 1.0, groups, True, True)
        results.append([y, h, *grads])
    # Not bit for bit: sorted, a large index moves the others' places in their tile, and the BLAS
    # under the interpreter rounds by place.
    for other in results[1:]:
        assert all(_error(a, b) <= 1e-6 for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("rows", "compact"), [(2, False), (9, False), (9, True)], ids=["few", "many", "compact"]
)
def test_every_element_of_the_gradients_is_written(rows, compact):
    """Memory that nobody wrote is NaN: experts without a pair have zeros all the same."""
    inputs = {**_inputs("odd"), "x": torch.randn(rows, 19), "weights": torch.rand(rows, 3)}
    inputs["index"] = torch.tensor([[1, -1, 4], [4, 4, 7]] + [[4, 1, 1]] * (rows - 2))
    inputs["weights"][1, 0] = 0
    t = [v.to(_device("triton")) for v in inputs.values()]
    torch.use_deterministic_algorithms(True)
    try:
        y, h = kernels.mix_experts_fwd(*t, 1.0)
        order = op.pair_order(t[3], t[4], 7)
        groups = op.pair_groups(t[3], t[4], 7, order, compact)
        grads = kernels.mix_experts_bwd(y, *t, h, 1.0, groups, True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    t[3] = t[3].masked_fill(t[3] == 7, -1)  # no expert either
    groups = op.pair_groups(t[3], t[4], 7, op.pair_order(t[3], t[4], 7), compact)
    expected = op.mix_experts_bwd(y, *t, h, 1.0, groups, True, True)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_bad_expert_spoils_only_the_rows_that_chose_it(backend):
    inputs = _inputs("several_tiles")
    clean, _ = _run(inputs, backend)
    inputs["bank_a"][1, 2, 3], inputs["bank_b"][1, 4, 5] = float("inf"), float("nan")
    spoiled = (inputs["index"] == 1).any(1)
    y, grads = _run(inputs, backend)
    assert spoiled.any()
    assert torch.equal(y[~spoiled], clean[~spoiled])
    assert y[spoiled].isnan().any(1).all()
    assert grads["x"][~spoiled].isfinite().all()


def test_products_of_pairs_a_few_columns_at_a_time(monkeypatch):
    inputs = _inputs("several_tiles")
    monkeypatch.setattr(kernels, "grouping_pays", lambda *_: True)
    expected = _run(inputs, "triton")
    held = []
    allocate = torch.Tensor.new_empty

    def noting(like, *size, **options):
        held.append(allocate(like, *size, **options))
        return held[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", noting)
    monkeypatch.setattr(grouped_experts, "_PRODUCT_BYTES", 1)
    y, grads = _run(inputs, "triton")
    pairs = inputs["index"].numel()
    widths = {t.shape[1] for t in held if t.dim() == 2 and len(t) == pairs}
    assert widths == {32}
    assert torch.equal(y, expected[0])
    assert all(torch.equal(grads[n], expected[1][n]) for n in FLOATS)


@pytest.mark.parametrize(
    ("pairs", "experts", "rank", "width", "pays"),
    [
        (8192, 8192 // 3, 64, 2048, False),  # scattered
        (8192, 8192 // 17, 4, 2048, True),  # crowded
        (8192, 8192 // 17, 3, 2048, False),  # too thin for the matrix unit
        (512, 8, 64, 2048, False),  # too few to sort
        (8192, 1024, 4, 2048, True),  # between: 8 bytes a column of a pair against 1 + 4
        (8192, 1024, 4, 32, False),  # between: the sort costs more
    ],
)
def test_the_way_is_chosen_by_pairs_per_expert_and_bytes(pairs, experts, rank, width, pays):
    assert grouped_experts.grouping_pays(pairs, experts, rank, width, 2) is pays


def test_pairs_are_sorted_once_and_where_the_banks_are_trained_only(monkeypatch):
    inputs, sort, sorts = _inputs("odd"), op.pair_order, []
    for module in (op, kernels):
        monkeypatch.setattr(module, "pair_order", lambda *a: sorts.append(1) or sort(*a))
    for grouped, trained, expected in ((True, 1, 1), (False, 1, 1), (False, 0, 0), (True, 0, 2)):
        monkeypatch.setattr(kernels, "grouping_pays", lambda *_, grouped=grouped: grouped)
        leaves = _leaves(inputs, "triton")
        leaves["bank_a"].requires_grad_(bool(trained))
        leaves["bank_b"].requires_grad_(bool(trained))
        sorts.clear()
        mix_experts(*leaves.values(), backend="triton").sum().backward()
        assert len(sorts) == expected, (grouped, trained)


def test_pairs_of_weight_zero_lie_behind_the_others_by_expert():
    """So that a tile of sorted pairs meets few experts."""
    index = torch.tensor([[2, 0], [-1, 2], [1, 9], [2, 0]])
    weights = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, -0.0]])
    order = op.pair_order(index, weights, 3)
    assert order.tolist() == [2, 1, 3, 6, 5, 7, 4, 0]
    whole = op.pair_groups(index, weights, 3, order, False)
    assert whole.target.tolist() == [-1, 0, 2, 2, 3, 4, 5, 6]
    chosen = op.pair_groups(index, weights, 3, order, True)
    assert chosen.target.tolist() == [-1, 0, 1, 1, 2, 2, 2, 2]
    assert chosen.ids.tolist() == [0, 2]
