"""The CPU kernels of the ops beside `mixed_lora`: correctness, speed against what dispatch would
take without them and against the usual alternatives, and memory."""

from collections.abc import Callable, Iterable
from typing import Any

import cases
import checks
import measure
import op_checks
import torch
from cases.topk_keys import TopKeysCase
from op_case import Inputs, OpCase


def run(*, quick: bool, repeats: int) -> dict[str, Any]:
    """All of it.

    Returns:
        "correctness" by op, as `checks.correctness` returns it; "rows", the times of every case;
        "targets", rows of the table of targets.
    """
    gate = op_checks.correctness("cpu", cases.gathered("CPU_CHECKED"), "cpu")
    timed = cases.gathered("CPU_TIMED_QUICK" if quick else "CPU_TIMED")
    rows = [_timed(case, dtype, gate, repeats) for case, dtype in timed]
    return {"correctness": gate, "rows": rows, "targets": _targets(rows)}


@torch.no_grad()
def _timed(
    case: OpCase, dtype: torch.dtype, gate: dict[str, dict[str, Any]], repeats: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "case": str(case), "dtype": str(dtype)}
    if not gate[case.op]["ok"]:
        return {**row, "not_measured": "its correctness check failed"}
    inputs = case.inputs(dtype, "cpu")
    ours = case.bare(inputs, "cpu")
    row["extra_bytes"] = measure.peak_bytes(ours, "cpu")
    row["moved_bytes"] = case.moved_bytes(dtype)
    functions = {"ours": ours, "reference": case.bare(inputs, "reference")}
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

    search, target = next(row for row in rows if row["op"] == "topk_keys"), checks.target
    memory = search["extra_bytes"] / search["scores_bytes"] if "extra_bytes" in search else None
    targets = [
        target("topk_keys: torch product and topk / ours", over(search, "torch"), 2, at_least=True),
        target(
            "topk_keys: torch product and topk / ours, least case",
            _least(over(row, "torch") for row in rows if row["op"] == "topk_keys"),
            1,
            at_least=True,
        ),
        target("topk_keys: faiss IndexFlatIP / ours", over(search, "faiss"), 1, at_least=True),
        target("topk_keys: extra memory / that of the scores", memory, 0.05),
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        # What dispatch would take without the kernel must be slower in every case.
        least = _least(over(row, "reference") for row in rows if row["op"] == op)
        targets.append(target(f"{op}: reference / ours, least case", least, 1, at_least=True))
    return targets


def _least(gains: Iterable[float | None]) -> float | None:
    """None if one of them was not measured."""
    every = list(gains)
    known = [gain for gain in every if gain is not None]
    return min(known) if len(known) == len(every) else None
