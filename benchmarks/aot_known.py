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
_SPLIT = (
    "each float32 operand becomes two of tf32 in registers, and one goes from there through shared "
    "memory into the product of the same step; only a measurement chooses this route"
)
_UNALIGNED = (
    "rows that are no multiple of 16 elements are not known to begin at more than an element of 2 "
    "bytes, and copies past the registers take 4 or more"
)
_AROUND_LOOPS = (
    "{} stored once before the first loop and read once behind the last: {} registers let {} "
    "programs of {} threads share the 65536 of a multiprocessor"
)
_SIXTEEN_RANKS = (
    "16 ranks of 64 rows and of 64 columns are 4 elements of 16 bits for each of 256 threads, once "
    "for a tile"
)
_WEIGHTED = "float32 h is weighted and rounded in registers before the product of the same step"

KNOWN: tuple[Known, ...] = (
    Known("wgmma.wait_group 0", "gemm*_kernel", "*float32 factors*", _CONVERTED, (90,)),
    Known("wgmma.wait_group 0", "split_kernel", "*float32 factors*", _CONVERTED, (90,)),
    Known("wgmma.wait_group 0", "gemm_kernel", "*float32", _SPLIT, (90,)),
    Known("wgmma.wait_group 0", "split_kernel", "*float32", _SPLIT, (90,)),
    Known("wgmma.wait_group 0", "gemm_kernel", "*odd width", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "split_kernel", "*odd width", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "shrink_*_kernel", "*odd width", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "factor_grad_kernel", "*odd width", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "nearest_stream_kernel", "keys, odd width*", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "route_tokens_kernel", "*odd width", _UNALIGNED, (90,)),
    Known("wgmma.wait_group 0", "group_*_kernel", "keys, odd width*", _UNALIGNED, (90,)),
    Known(
        "spills 4 bytes", "shrink_bwd_kernel", "decode, batch 32",
        _AROUND_LOOPS.format("one", 32, 8, 256), (80,),
    ),
    Known(
        "spills 4 bytes", "split_kernel", "few tiles, float32",
        _AROUND_LOOPS.format("one", 80, 3, 256), (90,),
    ),
    Known(
        "spills 8 bytes", "split_kernel", "five, decode",
        _AROUND_LOOPS.format("two", 64, 8, 128), (120,),
    ),
    Known(
        "spills 104 bytes", "gemm_tma_kernel", "five, short rows",
        "bounds and addresses of a tile, stored and read once for it: the code for sm_100 has none "
        "of them inside a loop of products", (100,),
    ),
    Known(
        "spills 12 bytes", "gemm_kernel", "two",
        "three registers are stored once and read once between the two main loops: 128 let two "
        "programs share a multiprocessor; only a measurement chooses this route", (100,),
    ),
    Known(
        "narrow loads in a main loop: 2 x 8 B", "gemm_kernel", "*few rows", _SIXTEEN_RANKS, (100,)
    ),
    Known(
        "narrow loads in a main loop: 2 x 8 B", "gemm_kernel", "two, dropout",
        _SIXTEEN_RANKS, (100,),
    ),
    Known(
        "narrow loads in a main loop: 2 x 8 B", "gemm_tma_kernel", "two, dropout",
        "the two seeds, 8 bytes each, once for a tile; operands come by descriptors", (100,),
    ),
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
    Known(
        "no wgmma.mma_async", "route_tokens_kernel", "token router, few",
        "tiles of 16 tokens, so that more programs read: a product of 16 keys takes less time than "
        "its loads", (90,),
    ),
    Known("narrow loads", "sum_parts_kernel", "prompts*", "d_mixture has 15 columns"),
)  # fmt: skip
