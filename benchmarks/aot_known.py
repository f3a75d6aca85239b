"""What the ahead-of-time report expects of single kernels, and the problems that it knows."""

from __future__ import annotations

from aot_checks import Known

# Kernels without matrix instructions whose widest loop loads rows of adjacent elements.
STREAMS = frozenset(
    {
        "bank_grad_kernel",
        "into_ranks_kernel",
        "mean_grad_kernel",
        "mix_prompts_kernel",
        "out_of_ranks_kernel",
        "pool_kernel",
        "prompt_grad_kernel",
        "prompt_mixture_grad_kernel",
        "route_kernel",
        "row_squares_kernel",
        "sum_choices_kernel",
        "sum_parts_kernel",
    }
)

_CONVERTED = "float32 factors are converted in shared memory before the product of the same step"

KNOWN: tuple[Known, ...] = (
    Known("wgmma.wait_group 0", "*shrink*_kernel", "*float32 factors*", _CONVERTED, (90,)),
    Known("wgmma.wait_group 0", "gemm*_kernel", "*float32 factors*", _CONVERTED, (90,)),
)
