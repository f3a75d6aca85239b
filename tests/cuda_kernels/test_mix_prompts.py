"""The cuda backend of mix_prompts, its kernel on the emulator, against float64."""

import importlib

import pytest
import torch
from torch import Tensor

# The package's attribute of this name is the function.
reference = importlib.import_module("sapt_fast.ops.mix_prompts")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _case(
    samples: int = 2,
    adapters: int = 3,
    length: int = 3,
    tokens: int = 4,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    prompts_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(adapters, length, width).to(prompts_dtype or dtype),
        torch.softmax(normal(samples, adapters), -1).float(),
        normal(samples, tokens, width).to(dtype),
    )


@pytest.fixture
def check(cuda, emulated_module):
    kernel = cuda("mix_prompts")

    def run(prompts: Tensor, mixture: Tensor, source: Tensor, ids: Tensor | None = None) -> Tensor:
        emulated_module.set_order(3)
        y = kernel.mix_prompts_fwd(prompts, mixture, source, ids)
        want = reference.mix_prompts_fwd(prompts.double(), mixture.double(), source.double(), ids)
        assert y.dtype == source.dtype
        assert y.is_contiguous()
        length = prompts.shape[1]
        assert torch.equal(y[:, length:].double(), want[:, length:])
        limit = TOLERANCE[y.dtype] * max(1.0, want.abs().max().item()) if y.numel() else 0.0
        torch.testing.assert_close(y.double(), want, rtol=0, atol=limit)
        return y

    return run


@pytest.mark.parametrize("prompts_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_every_dtype(check, samples, dtype, prompts_dtype):
    check(*_case(samples, dtype=dtype, prompts_dtype=prompts_dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("adapters", [1, 4, 9])
@pytest.mark.parametrize(
    ("length", "tokens", "width"), [(0, 2, 8), (2, 0, 8), (7, 5, 63), (1, 1, 1), (3, 40, 130)]
)
def test_sizes(check, adapters, length, tokens, width, dtype):
    check(*_case(3, adapters, length, tokens, width, dtype))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [16, 21])
def test_token_ids(check, width, id_dtype):
    prompts, mixture, _ = _case(width=width, dtype=torch.bfloat16)
    table = _case(1, tokens=9, width=width, dtype=torch.bfloat16)[2][0]
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]], dtype=id_dtype)
    check(prompts, mixture, table, ids)


def test_unknown_ids(cuda):
    prompts, mixture, _ = _case()
    ids = torch.tensor([[0, 9], [-1, 2]])
    y = cuda("mix_prompts").mix_prompts_fwd(prompts, mixture, torch.ones(9, 24), ids)
    unknown = y[:, 3:].isnan().all(-1)
    assert torch.equal(unknown, torch.tensor([[False, True], [True, False]]))
    assert not y[:, 3:][~unknown].isnan().any()


@pytest.mark.parametrize("samples", [1, 6])
def test_prompts_without_weight_are_not_read(check, cuda, samples):
    prompts, mixture, source = _case(samples, adapters=7)
    mixture[:, 2] = mixture[:, 5] = 0
    exact = check(prompts, mixture, source)
    prompts[2] = prompts[5] = float("nan")
    y = cuda("mix_prompts").mix_prompts_fwd(prompts, mixture, source, None)
    assert torch.equal(y, exact)


def test_a_prompt_without_weight_in_one_sample(cuda):
    """What one sample ignores, another sample of the tile may read."""
    prompts, mixture, source = _case(2)
    prompts[1], mixture[0, 1] = float("nan"), 0
    y = cuda("mix_prompts").mix_prompts_fwd(prompts, mixture, source, None)
    assert not y[0].isnan().any()
    assert y[1, :3].isnan().all()


def test_views(check):
    prompts, mixture, source = _case(width=16)
    check(prompts, mixture, source.transpose(0, 1).contiguous().transpose(0, 1))
    check(prompts, mixture, source.transpose(1, 2).contiguous().transpose(1, 2))
    check(prompts[..., 3:], mixture, source[..., 3:])


def test_nothing(cuda):
    kernel = cuda("mix_prompts")
    assert kernel.mix_prompts_fwd(*_case(samples=0), None).shape == (0, 7, 24)
    assert kernel.mix_prompts_fwd(*_case(length=0, tokens=0), None).shape == (2, 0, 24)
