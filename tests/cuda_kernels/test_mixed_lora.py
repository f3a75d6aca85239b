"""The cuda backend of mixed_lora, its kernels on the emulator, against float64 loops."""

import pytest
import torch
from torch import Tensor

from sapt_fast.ops.projection import Projection

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EVERY_DTYPE = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


class Group:
    """x, mixture and projections of seeded random values."""

    def __init__(
        self,
        samples: int = 2,
        rows: int = 1,
        inputs: int = 40,
        outputs: tuple[int, ...] = (24, 136),
        ranks: tuple[int, ...] = (4, 4, 4),
        dtype: torch.dtype = torch.float32,
        lora_dtype: torch.dtype | None = None,
        weight: bool = True,
        bias: bool = True,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        count, total = len(ranks), sum(ranks)
        owners = torch.repeat_interleave(torch.arange(count), torch.tensor(ranks))
        scaling = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
        width = max(inputs, 1) ** 0.5
        self.x = normal(samples * rows, inputs).to(dtype)
        self.mixture = torch.softmax(normal(samples, count), -1).float()
        self.projections = [
            Projection(
                weight=(normal(o, inputs) / width).to(dtype) if weight else None,
                bias=normal(o).to(dtype) if bias else None,
                lora_a=(normal(total, inputs) / width).to(lora_dtype or dtype),
                lora_b=normal(total, o).to(lora_dtype or dtype),
                row_adapter=owners.to(torch.int32),
                row_scale=scaling[owners].float(),
            )
            for o in outputs
        ]

    def expected(self) -> list[Tensor]:
        """Adapter after adapter; one without weight adds nothing, whatever its factors hold."""
        per_sample = self.x.shape[0] // max(len(self.mixture), 1)
        mixture = self.mixture.double().repeat_interleave(per_sample, 0)
        x = self.x.double()
        results = []
        for p in self.projections:
            y = x.new_zeros(len(x), p.lora_b.shape[1])
            if p.weight is not None:
                y += x @ p.weight.double().t()
            if p.bias is not None:
                y += p.bias.double()
            for j, k in enumerate(p.row_adapter.tolist()):
                weighted = mixture[:, k] != 0
                w = mixture[weighted, k] * p.row_scale[j].double()
                h = x[weighted] @ p.lora_a[j].double()
                y[weighted] += torch.outer(w * h, p.lora_b[j].double())
            results.append(y)
        return results


@pytest.fixture
def check(cuda, emulated_module):
    kernel = cuda("mixed_lora")

    def run(group: Group, seeds: tuple[int, ...] = (0, 5)) -> list[Tensor]:
        want = group.expected()
        first: list[Tensor] = []
        for seed in seeds:
            emulated_module.set_order(seed)
            results = kernel.mixed_lora_fwd(group.x, group.mixture, group.projections)
            ys = [y for y, _ in results]
            first = first or ys
            for y, exact, once in zip(ys, want, first, strict=True):
                assert y.shape == exact.shape
                assert y.dtype == group.x.dtype
                assert y.is_contiguous()
                assert torch.equal(y, once), f"the order of seed {seed} changes the result"
                assert not y.isnan().any()
                limit = TOLERANCE[y.dtype] * max(1.0, exact.abs().max().item()) if y.numel() else 0
                torch.testing.assert_close(y.double(), exact, rtol=0, atol=limit)
            for _, h in results:
                assert h.shape == kernel.empty_h(group.x, 7).shape
        return first

    return run


@pytest.mark.parametrize(("dtype", "lora_dtype"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_every_dtype(check, dtype, lora_dtype, rows):
    check(Group(samples=1, rows=rows, dtype=dtype, lora_dtype=lora_dtype))


@pytest.mark.parametrize(("dtype", "lora_dtype"), EVERY_DTYPE, ids=str)
def test_odd_sizes_and_mixed_ranks(check, dtype, lora_dtype):
    """Rows that are not aligned to 16 bytes and end in the middle of a vector."""
    check(
        Group(3, 1, 63, (131, 5), (5, 0, 1, 7), dtype=dtype, lora_dtype=lora_dtype),
        seeds=(0, 1, 2, 3, 4),
    )


@pytest.mark.parametrize("rows", [2, 4, 5, 8, 13, 16, 64])
def test_rows(check, rows):
    check(Group(samples=rows, rows=1, outputs=(24,), dtype=torch.bfloat16))


def test_a_bias_of_each_row_beside_a_weight(check):
    group = Group(samples=2)
    group.projections = [
        p._replace(bias=torch.stack([p.bias, 3 * p.bias])) for p in group.projections
    ]
    check(group)


def test_several_rows_of_a_sample(check):
    check(Group(samples=3, rows=5))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_group_sizes(check, count):
    check(Group(outputs=(24, 16, 7, 130, 1)[:count]))


def test_more_projections_than_a_launch_takes(check):
    check(Group(outputs=tuple(range(1, 12)), ranks=(2,)))


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_weights_are_multiplied_in_the_same_launch(check, monkeypatch, samples):
    """Up to MAX_BASE_ROWS rows; torch multiplies none of them."""
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    check(Group(samples, 1, 63, (131, 5), (5, 0, 1, 7), dtype=torch.bfloat16))
    check(Group(samples, 1, 1100, (9,), dtype=torch.float16, lora_dtype=torch.float32, bias=False))


@pytest.mark.parametrize("samples", [1, 4])
def test_matrices_are_read_once_in_two_launches(cuda, emulated_module, samples):
    """W, A, B and what goes with the ranks; x is not counted, which comes from L1."""
    group = Group(samples, 1, 1024, (1024, 1024), (4,) * 15, dtype=torch.bfloat16)
    launches, before = emulated_module.traffic()
    cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections)
    after = emulated_module.traffic()
    once = [group.x, *(t for p in group.projections for t in (p.weight, p.lora_a, p.lora_b))]
    assert after[0] - launches == 2
    assert after[1] - before <= 1.15 * sum(t.nbytes for t in once if t is not None)


def test_infinite_weights_of_the_base(cuda):
    """They reach their own column of y alone, though others share its block."""
    group = Group(samples=2, outputs=(7,), bias=False)
    weight = group.projections[0].weight
    assert weight is not None
    weight[2, 3] = float("inf")
    ((y, _),) = cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections)
    assert torch.equal(y.isfinite().all(0), torch.arange(7) != 2)


@pytest.mark.parametrize(
    ("rows", "outputs"),
    [(1, (1,)), (3, (15, 17)), (9, (33,)), (1, (1017,) * 8), (3, (129,) * 8), (9, (505,) * 8)],
)
def test_blocks_of_few_and_of_many_columns(check, rows, outputs):
    """A block of the expansion takes 16 columns, or 64 where these make 128 blocks or more."""
    group = Group(1, rows, 8, outputs, (5, 65), dtype=torch.bfloat16, weight=False)
    check(group, seeds=(1,))


def test_one_adapter(check):
    check(Group(ranks=(1,)))


@pytest.mark.parametrize("total", [60, 255, 256, 257, 600])
def test_total_ranks(check, total):
    """Around the ranks that an expand block takes at a time."""
    check(Group(samples=1, inputs=24, outputs=(9,), ranks=(total - 3, 3)))


@pytest.mark.parametrize("inputs", [0, 1, 7, 1023, 1024, 1025, 5000, 9000])
def test_inputs(check, inputs):
    """Around a step of the reduction, in one and in several parts."""
    check(Group(samples=1, inputs=inputs, outputs=(9,), ranks=(3, 2), dtype=torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("ranks", [(3, 2), (0, 0)], ids=str)
def test_without_base_or_ranks(check, weight, bias, ranks):
    check(Group(weight=weight, bias=bias, ranks=ranks))


def test_nothing_to_do(check):
    check(Group(rows=0))
    check(Group(outputs=(0, 3)))


def test_projections_of_different_factors(check):
    group = Group(dtype=torch.bfloat16)
    other = Group(dtype=torch.bfloat16, lora_dtype=torch.float32, ranks=(7, 1, 0), seed=1)
    group.projections += other.projections
    check(group)


def test_non_contiguous(check):
    group = Group(outputs=(24,))
    want = check(group)
    group.x = group.x.repeat_interleave(2, 1)[:, ::2]
    group.mixture = group.mixture.t().contiguous().t()
    for i, p in enumerate(group.projections):
        assert p.weight is not None
        group.projections[i] = p._replace(
            weight=p.weight.t().contiguous().t(),
            lora_a=p.lora_a.t().contiguous().t(),
            lora_b=p.lora_b.t().contiguous().t(),
        )
    for y, exact in zip(check(group), want, strict=True):
        torch.testing.assert_close(y, exact)


class TestZeroWeights:
    @pytest.mark.parametrize("samples", [1, 3, 8])
    def test_skipped_adapters_are_not_read(self, check, samples):
        """Factors of NaN at every place that has no weight in any row."""
        group = Group(samples=samples, ranks=(4, 3, 5, 1, 4), dtype=torch.bfloat16)
        for k in (0, 2, 4):
            group.mixture[:, k] = 0
        for p in group.projections:
            without = torch.isin(p.row_adapter, torch.tensor([0, 2, 4], dtype=torch.int32))
            p.lora_a[without] = float("nan")
            p.lora_b[without] = float("nan")
        check(group, seeds=(0, 1, 2, 3))

    def test_weight_in_some_rows_only(self, check):
        """A row without weight ignores an infinite h that another row's weight let be computed."""
        group = Group(samples=4, ranks=(4, 3, 5))
        group.mixture[0, 1] = group.mixture[2, 1] = group.mixture[3, 0] = 0
        group.x[2] = float("inf")
        group.mixture[2] = 0
        for i, p in enumerate(group.projections):
            group.projections[i] = p._replace(weight=None)
        check(group)

    @pytest.mark.parametrize("where", ["a", "b"])
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("samples", [2, 3, 9])
    def test_factors_that_only_another_row_has_weight_for(self, cuda, where, value, samples):
        """They share a block with rows for which the adapter is not there."""
        group = Group(samples=samples, ranks=(4, 3, 5), dtype=torch.bfloat16)
        group.mixture[:, 1] = 0
        group.mixture[1, 1] = 0.5
        for p in group.projections:
            (p.lora_a if where == "a" else p.lora_b)[5, 2] = value
        results = cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections)
        others = torch.arange(samples) != 1
        for (y, _), exact in zip(results, group.expected(), strict=True):
            assert not y[1].isfinite().all()
            assert y[others].isfinite().all()
            torch.testing.assert_close(y[others].double(), exact[others], rtol=0, atol=0.05)

    def test_scaling_that_is_infinite(self, cuda):
        group = Group(samples=2)
        group.mixture[0, 1] = 0
        for p in group.projections:
            p.row_scale[p.row_adapter == 1] = float("inf")
        for y, _ in cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections):
            assert y[0].isfinite().all()
            assert not y[1].isfinite().any()

    def test_an_adapter_that_there_is_not(self, cuda):
        """A number of an adapter beyond the mixture reads nothing and gives NaN."""
        group = Group(samples=2)
        for p in group.projections:
            p.row_adapter[-1] = 1 << 30
        for y, _ in cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections):
            assert y.isnan().all()

    def test_no_weight_at_all(self, check):
        group = Group()
        group.mixture[:] = 0
        check(group)
        for i, p in enumerate(group.projections):
            group.projections[i] = p._replace(weight=None, bias=None)
        for y in check(group):
            assert not y.any()

    def test_nan_weights_reach_the_output(self, cuda):
        group = Group(samples=2)
        group.mixture[1, 0] = float("nan")
        (y, _), *_ = cuda("mixed_lora").mixed_lora_fwd(group.x, group.mixture, group.projections)
        assert not y[0].isnan().any()
        assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_survives(cuda, dtype):
    """Without weight y is read and written as it is, subnormals and infinities included."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    one = Group(samples=1, outputs=(len(every),), ranks=(1,), dtype=dtype, weight=False)
    one.projections[0] = one.projections[0]._replace(bias=every)
    one.mixture[:] = 0
    ((y, _),) = cuda("mixed_lora").mixed_lora_fwd(one.x, one.mixture, one.projections)
    assert torch.equal(y[0], every)


def test_inputs_are_left_alone(check):
    group = Group()
    tensors = [group.x, group.mixture, *(t for p in group.projections for t in p)]
    before = [t.clone() for t in tensors]
    check(group)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def _member(**change) -> tuple:
    """What the binding takes of a projection with 3 ranks, 5 inputs and 4 outputs."""
    good = {
        "y": torch.ones(2, 4, dtype=torch.bfloat16), "weight": None, "bias": None,
        "a": torch.ones(3, 5), "b": torch.ones(3, 4),
        "row_adapter": torch.zeros(3, dtype=torch.int32), "row_scale": torch.ones(3), "ranks": 3,
        "outputs": 4, "accumulate": False,
    }  # fmt: skip
    return tuple({**good, **change}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 9}, "dtype: not a known code"),
        ({"dtype": 3}, "float64 has no CUDA kernel"),
        ({"lora_dtype": 2}, "lora_dtype"),
        ({"rows": -1}, "rows"),
        ({"samples": 3}, "samples: does not divide rows"),
        ({"adapters": 0}, "adapters"),
        ({"mixture": None}, "mixture: got no memory"),
        ({"x": None}, "x: got no memory"),
        ({"x": torch.ones(2, 6)}, r"x: got 48 bytes, expected 2 for each of \[2, 5\] elements"),
        ({"inputs": 4_000_000}, "x: got 20 bytes"),
        ({"adapters": 2}, "mixture: got 4 bytes"),
        ({"workspace": torch.ones(1)}, "workspace: too small"),
        ({"projections": [_member()] * 9}, "MAX_PROJECTIONS"),
        ({"projections": [_member(y=None)]}, "y: got no memory"),
        ({"projections": [_member(weight=torch.ones(4, 5))]}, "weight: got 80 bytes"),
        ({"projections": [_member(bias=torch.ones(4))]}, "bias: got 16 bytes"),
        (
            {
                "rows": 5,
                "x": torch.ones(5, 5, dtype=torch.bfloat16),
                "projections": [_member(weight=torch.ones(4, 5))],
            },
            "weight: more than MAX_BASE_ROWS rows",
        ),
        ({"projections": [_member(a=torch.ones(3, 6))]}, "lora_a: got 72 bytes"),
        ({"projections": [_member(b=torch.ones(3, 5))]}, "lora_b: got 60 bytes"),
        ({"projections": [_member(row_adapter=torch.zeros(2))]}, "row_adapter: got 8 bytes"),
        ({"projections": [_member(row_scale=None)]}, "row_scale: got no memory"),
        ({"projections": [_member(ranks=-1)]}, "lora_a"),
        ({"projections": [_member(outputs=5)]}, "y: got 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(emulated_module, change, message):
    arguments = {
        "dtype": emulated_module.BFLOAT16, "lora_dtype": emulated_module.FLOAT32,
        "x": torch.ones(2, 5, dtype=torch.bfloat16), "mixture": torch.ones(1, 1),
        "projections": [_member()], "workspace": torch.ones(99), "rows": 2, "inputs": 5,
        "samples": 1, "adapters": 1, "place": (0, 0),
    }  # fmt: skip
    emulated_module.cuda_mixed_lora_decode(**arguments)
    emulated_module.synchronize()
    with pytest.raises(ValueError, match=message):
        emulated_module.cuda_mixed_lora_decode(**{**arguments, **change})
