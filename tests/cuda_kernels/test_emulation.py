"""The emulator finds the faults it is there for, and nothing in a kernel without them."""

import pytest
import torch

SEEDS = range(8)


def _run(module, name: str, seed: int) -> torch.Tensor:
    module.set_order(seed)
    values = torch.arange(128.0)
    out = torch.full((128,), -1.0)
    module.run_toy(name, values.data_ptr(), out.data_ptr())
    module.synchronize()
    return out


def test_a_correct_kernel(emulated_module):
    want = torch.arange(128.0).view(2, 64).flip(1).flatten()
    for seed in SEEDS:
        assert torch.equal(_run(emulated_module, "reverse", seed), want)


@pytest.mark.parametrize("name", ["race", "late_race", "every_block_writes"])
def test_a_race_shows_in_the_order(emulated_module, name):
    results = [tuple(_run(emulated_module, name, seed).nan_to_num(-2).tolist()) for seed in SEEDS]
    assert len(set(results)) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_for_half", "different barriers"),
        ("beyond_shared", "beyond the 256 bytes of shared memory"),
        ("lets_go_before_waiting", "before this one has waited"),
        ("never_waits", "^0 of 64 threads have waited"),
        ("half_wait", "^32 of 64 threads have waited"),
    ],
)
def test_faults_are_reported(emulated_module, name, message):
    with pytest.raises(RuntimeError, match=message):
        _run(emulated_module, name, 1)
    _run(emulated_module, "reverse", 1)  # and the next kernel runs


@pytest.mark.parametrize("name", ["reverse", "reads_too_early"])
def test_overlapping_kernels(emulated_module, name):
    """The second of two kernels starts while the first has not written anything."""
    emulated_module.set_order(0)
    values = torch.arange(128.0)
    between, out = torch.full((128,), -1.0), torch.full((128,), -1.0)
    emulated_module.run_toy("reverse", values.data_ptr(), between.data_ptr())
    emulated_module.run_toy(name, between.data_ptr(), out.data_ptr())
    emulated_module.synchronize()
    if name == "reverse":
        assert torch.equal(out, values)
    else:
        assert (out == -1).any()
