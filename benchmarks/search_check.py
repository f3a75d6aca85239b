"""The CPU kernels of the ops beside `mixed_lora`: correctness, speed against what dispatch would
take without them and against the usual alternatives, and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checks
import measure
import op_checks
import torch
from op_cases import ExpertsCase, Inputs, NearestKeyCase, OpCase, TopKeysCase
from torch import Tensor

from sapt_fast.ops import pool_tokens


@dataclass(frozen=True)
class PoolCase:
    """The maximum over the embeddings of token ids; no two tokens are equal in any column."""

    batch: int
    tokens: int
    width: int
    vocabulary: int
    op: str = "pool_tokens"
    trains: tuple[str, ...] = ("table",)

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        order = torch.rand(self.vocabulary, self.width, generator=generator).argsort(0)
        size = self.batch, self.tokens
        ids = torch.randint(self.vocabulary, size, generator=generator, device=device)
        return {"ids": ids, "table": ((order - self.vocabulary // 2) / 64).to(dtype)}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return {"pooled": pool_tokens(inputs["ids"], inputs["table"], backend=backend)}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        ids, table = inputs.values()
        return {"torch": lambda: table[ids].amax(1)}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return self.batch * self.tokens * (8 + self.width * dtype.itemsize)


# (case, dtype) that are timed. The first is that of the search targets.
FULL: tuple[tuple[OpCase, torch.dtype], ...] = (
    (TopKeysCase(16, 1_000_000, 256, 32), torch.float32),
    (TopKeysCase(16, 1_000_000, 256, 32), torch.bfloat16),
    (TopKeysCase(1, 1_000_000, 256, 32), torch.float32),
    (TopKeysCase(64, 100, 768, 5), torch.float32),
    (NearestKeyCase(16, 100_000, 1024), torch.float32),
    (NearestKeyCase(16, 100_000, 1024), torch.bfloat16),
    (NearestKeyCase(1, 137, 1024), torch.float32),
    (PoolCase(8, 512, 1024, 32128), torch.float32),
    (PoolCase(8, 512, 1024, 32128), torch.bfloat16),
    (ExpertsCase(1, 32, 100_000, 1, 1024), torch.float32),
    (ExpertsCase(64, 8, 10_000, 4, 1024), torch.float32),
    (ExpertsCase(64, 8, 10_000, 4, 1024), torch.bfloat16),
    (ExpertsCase(512, 8, 100, 16, 1024), torch.float32),
)
QUICK: tuple[tuple[OpCase, torch.dtype], ...] = (
    (TopKeysCase(3, 700, 16, 5), torch.float32),
    (NearestKeyCase(4, 50, 32), torch.float32),
    (PoolCase(2, 9, 48, 90), torch.float32),
    (ExpertsCase(6, 3, 50, 4, 32), torch.float32),
)
CHECKED: tuple[OpCase, ...] = (
    *(TopKeysCase(17, 3001, 100, 32, metric) for metric in ("dot", "cosine", "l2")),
    TopKeysCase(64, 20_000, 256, 100),
    NearestKeyCase(16, 20_000, 256),
    NearestKeyCase(200, 1003, 100),
    PoolCase(3, 77, 100, 250),
    PoolCase(8, 128, 1024, 250),
    ExpertsCase(256, 8, 2000, 4, 256),
    ExpertsCase(1001, 3, 50, 5, 100),
)


def run(*, quick: bool, repeats: int) -> dict[str, Any]:
    """All of it.

    Returns:
        "correctness" by op, as `checks.correctness` returns it; "rows", the times of every case;
        "targets", rows of the table of targets.
    """
    gate = op_checks.correctness("cpu", CHECKED, "cpu")
    rows = [_timed(case, dtype, gate, repeats) for case, dtype in (QUICK if quick else FULL)]
    return {"correctness": gate, "rows": rows, "targets": _targets(rows)}


@torch.no_grad()
def _timed(
    case: OpCase, dtype: torch.dtype, gate: dict[str, dict[str, Any]], repeats: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "case": str(case), "dtype": str(dtype)}
    if not gate[case.op]["ok"]:
        return {**row, "not_measured": "its correctness check failed"}
    inputs = case.inputs(dtype, "cpu")
    ours = op_checks.bare(case, inputs, "cpu")
    row["extra_bytes"] = measure.peak_bytes(ours, "cpu")
    row["moved_bytes"] = case.moved_bytes(dtype)
    functions = {"ours": ours, "reference": op_checks.bare(case, inputs, "reference")}
    functions |= case.rivals(inputs)
    if isinstance(case, TopKeysCase):
        row["scores_bytes"] = case.queries * case.keys * dtype.itemsize
        if dtype == torch.float32 and case.metric == "dot":
            functions |= _faiss(case, inputs)
    row["ms"] = measure.interleaved_ms(functions, "cpu", repeats=repeats)
    return row


def _faiss(case: TopKeysCase, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Its exhaustive search, where faiss is installed."""
    try:
        import faiss
    except ImportError:
        return {}
    query, keys = (t.numpy() for t in inputs.values())
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(case.width)
    index.add(keys)
    return {"faiss": lambda: index.search(query, case.k)}


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def over(row: dict[str, Any], rival: str) -> float | None:
        return checks.ratio(row.get("ms", {}), rival, "ours")

    search, target = rows[0], checks.target
    memory = search["extra_bytes"] / search["scores_bytes"] if "extra_bytes" in search else None
    targets = [
        target("topk_keys: torch product and topk / ours", over(search, "torch"), 2, at_least=True),
        target("topk_keys: faiss IndexFlatIP / ours", over(search, "faiss"), 1, at_least=True),
        target("topk_keys: extra memory / that of the scores", memory, 0.05),
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        # What dispatch would take without the kernel must be slower in every case.
        gains = [over(row, "reference") for row in rows if row["op"] == op]
        known = [gain for gain in gains if gain is not None]
        least = min(known) if len(known) == len(gains) else None
        targets.append(target(f"{op}: reference / ours, least case", least, 1, at_least=True))
    return targets
