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
        "sum_parts_kernel",
    }
)

_CONVERTED = "float32 factors are converted in shared memory before the product of the same step"
_OUTER = (
    "a few pairs of an expert are added as outer products, which read less than the matrix unit"
)
_WEIGHTED = "float32 h is weighted and rounded in registers before the product of the same step"

KNOWN: tuple[Known, ...] = (
    Known("wgmma.wait_group 0", "*shrink*_kernel", "*float32 factors*", _CONVERTED, (90,)),
    Known("wgmma.wait_group 0", "gemm*_kernel", "*float32 factors*", _CONVERTED, (90,)),
    Known("wgmma.wait_group 0", "grouped_out_of_ranks_kernel", "*", _WEIGHTED, (90,)),
    Known(
        "wgmma.wait_group 0", "grouped_into_ranks_kernel", "crowded, float32 bank",
        _CONVERTED, (90,),
    ),
    Known(
        "wgmma.wait_group 0", "grouped_into_ranks_kernel", "crowded, odd width",
        "rows that are not aligned are loaded by element, through registers", (90,),
    ),
    Known(
        "narrow loads", "into_ranks_kernel", "experts, rank 1",
        "512 columns give each of 128 threads 4 elements of 16 bits",
    ),
    Known(
        "spills", "mix_prompts_kernel", "prompts, float32 pool",
        "two registers; half the tile would spill none and read less at a time", (120,),
    ),
    Known("wgmma.wait_group 0", "bank_grad_kernel", "*", _WEIGHTED, (90,)),
    Known("FFMA in place of matrix instructions", "bank_grad_kernel", "*", _OUTER),
    Known(
        "narrow loads in a main loop", "grouped_out_of_ranks_kernel", "*",
        "rows of h have 4 R bytes, for any R",
    ),
    Known(
        "narrow loads", "prompt_mixture_grad_kernel", "*",
        "the first column of a part is not known to be a multiple of 16",
    ),
    Known(
        "narrow loads", "prompt_grad_kernel", "*",
        "a row of 256 columns gives each of 128 threads 2 elements; the other loads are weights",
    ),
    Known("narrow loads", "route_kernel", "*", "rows of the bottleneck have 100 elements"),
    Known("narrow loads", "sum_parts_kernel", "prompts*", "d_mixture has 15 columns"),
)  # fmt: skip
