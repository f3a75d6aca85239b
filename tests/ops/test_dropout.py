"""Dropout inside of `mixed_lora`: the mask, and what every backend makes of it."""

import importlib

import pytest
import torch
from ops.test_projections import GROUPS, backend, device, error, finish, leaves, pooled  # noqa: F401

from sapt_fast import dispatch
from sapt_fast.cpu_kernels.dropout import Mask
from sapt_fast.ops import mixed_lora
from sapt_fast.ops._dropout import UNIT, Dropout, _philox, drawn, drop_count, mask

op = importlib.import_module("sapt_fast.ops.mixed_lora")

SEEDS = [torch.tensor([7]), torch.tensor([-(1 << 62) + 3]), torch.tensor([1 << 40])]


def test_the_generator_gives_the_published_numbers():
    """The vectors of Random123 for philox4x32-10."""
    words = _philox(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[0]]))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 1.0])
def test_rate(rate):
    kept = mask(SEEDS[0], drop_count(rate), 512, 520).double()
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - rate)) <= 4 * deviation + 1 / UNIT
    scale = Dropout(drop_count(rate), SEEDS).scale
    assert scale == (0 if rate == 1 else pytest.approx(1 / (1 - rate), rel=1e-4))


def test_elements_are_independent():
    """Rows, columns, the eight elements of a counter, and masks of other seeds."""
    kept = mask(SEEDS[0], UNIT // 2, 512, 512).double() * 2 - 1
    other = mask(SEEDS[0] + 1, UNIT // 2, 512, 512).double() * 2 - 1
    shifts = [(1, 0), (0, 1), (8, 0), (0, 8), (8, 8), (0, 2), (0, 4), (1, 8), (256, 0), (0, 256)]
    pairs = [kept * kept.roll(shift, (0, 1)) for shift in shifts]
    pairs += [kept * other, kept * kept.t().contiguous()]
    for product in pairs:
        assert abs(product.mean()) < 4.5 / 512
    assert kept.mean(0).abs().max() < 5 / 512**0.5
    assert kept.mean(1).abs().max() < 5 / 512**0.5


def test_more_elements_than_32_bits_count():
    """Rows and columns have words of their own: nothing repeats after 2**32 elements."""
    x = torch.ones(32, 1 << 12)
    first, later = (Mask(UNIT // 2, 7).drop(x.clone(), row) for row in (0, 1 << 20))
    assert abs((first * later).mean() - 0.25) < 0.01
    row = (1 << 32) - 1  # the last that a word counts
    words = torch.cat(_philox(SEEDS[0], torch.tensor([0]), torch.tensor([[row]])))
    want = torch.cat([words & 0xFFFF, words >> 16], 1).flatten() >= UNIT // 2
    assert torch.equal(Mask(UNIT // 2, 7).drop(torch.ones(1, 8), row)[0] != 0, want)


@pytest.mark.parametrize("shape", [(1, 1), (37, 70), (5, 130)])
def test_the_cpu_drops_the_same(shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        for seed in SEEDS:
            got = Mask(UNIT // 3, int(seed)).drop(x, out=torch.full_like(x, float("nan")))
            assert torch.equal(got, torch.where(mask(seed, UNIT // 3, *shape), x, 0))


@pytest.mark.parametrize(
    ("group", "used", "through"), [("pair", [1], True), ("unequal", None, False)]
)
def test_every_projection_has_a_mask_of_its_own(backend, group, used, through):  # noqa: F811
    """Also where the loss depends on some of the projections only."""
    where = device(backend)
    dropout = Dropout(UNIT // 4, SEEDS[: len(GROUPS[group])])
    exact = leaves(group, torch.float32, rows=7)
    exact = {k: v.detach().double().requires_grad_() for k, v in exact.items()}
    want = [
        op.mix(exact["x"], exact["mixture"], [given], through, "reference", dropout.of([i]))[0]
        for i, given in enumerate(pooled(group, exact))
    ]
    want, want_grads = finish(exact, want, used)
    t = leaves(group, torch.float32, where=where, rows=7)
    own = dropout._replace(seeds=[seed.to(where) for seed in dropout.seeds])
    got = op.mix(t["x"], t["mixture"], pooled(group, t), through, backend, own)
    got, grads = finish(t, got, used)
    for y, y_exact in zip(got, want, strict=True):
        assert error(y, y_exact) < 2e-6
    for name, grad in want_grads.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None and grad.numel():
            assert error(grads[name], grad) < 2e-6, name


def test_what_is_dropped_is_not_seen(backend):  # noqa: F811
    """Neither an infinity of x where it is dropped, nor a gradient that is not finite there."""
    seed, where = SEEDS[0].to(device(backend)), device(backend)
    keeps = mask(seed, UNIT // 2, 24, 20)
    x = torch.where(keeps, torch.randn(24, 20, device=where), float("inf")).requires_grad_()
    a = torch.randn(4, 20, device=where, requires_grad=True)
    b = torch.randn(4, 8, device=where, requires_grad=True)
    mixture = torch.tensor([[0.0, 1.0], [2.0, 1.0]], device=where, requires_grad=True)
    y = mixed_lora(x, a, b, mixture.repeat_interleave(12, 0), ranks=2, dropout_p=0.5, seed=seed,
                   backend=backend)  # fmt: skip
    y.square().sum().backward()
    for t in (y, x.grad, a.grad, b.grad, mixture.grad):
        assert t.isfinite().all()
    assert torch.equal(x.grad != 0, keeps)


def test_absent_adapters_are_not_seen_through_a_mask(backend):  # noqa: F811
    where = device(backend)
    results = []
    for held in (0.0, float("nan")):
        t = {k: v.to(where) for k, v in {
            "x": torch.linspace(-1, 1, 400).view(20, 20), "a": torch.ones(4, 20),
            "b": torch.ones(4, 8),
        }.items()}  # fmt: skip
        t["a"][:2], t["b"][:2] = held, held
        t = {k: v.requires_grad_() for k, v in t.items()}
        mixture = torch.tensor([0.0, 1.0], device=where).expand(20, 2)
        y = mixed_lora(t["x"], t["a"], t["b"], mixture, ranks=2, dropout_p=0.5,
                       seed=SEEDS[0].to(where), backend=backend)  # fmt: skip
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in t.values())])
    for plain, got in zip(*results, strict=True):
        assert torch.equal(plain, got)


def test_seeds_come_from_torch_and_zero_draws_none():
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    assert drawn(0.0, x, 3) is None
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    first = drawn(0.5, x, 3)
    torch.manual_seed(1)
    second = drawn(0.5, x, 3)
    assert torch.equal(torch.cat(first.seeds), torch.cat(second.seeds))
    assert len({int(seed) for seed in first.seeds}) == 3


def test_backends_without_dropout_are_not_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda *_: None)
    dispatch._resolve.cache_clear()
    cpu = torch.device("cpu")
    with pytest.raises(dispatch.BackendError, match=r"'cuda' .*its kernels have no dropout"):
        dispatch.resolve("mixed_lora", cpu, "cuda", feature="dropout")
    monkeypatch.setenv(dispatch.ENV_VARIABLE, "cuda")
    assert dispatch.resolve("mixed_lora", cpu) == "cuda"
    assert dispatch.resolve("mixed_lora", cpu, feature="dropout") != "cuda"
    dispatch._resolve.cache_clear()
