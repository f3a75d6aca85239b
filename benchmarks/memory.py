"""Look-up, decoding and training of a bank of experts against their number N.

    python benchmarks/memory.py [--quick] [--model MODEL_DIR] [--out FOLDER]

- Decoding: one token through an MLP of SmolLM2-135M's sizes whose output a bank of rank-1 experts
  changes. The experts are found by each kind of index; all N are stored, and every token meets
  another query, so that its experts come from memory. Rivals: the MLP alone, and `nn.Embedding`s
  in plain torch in place of the bank.
- Recall of the approximate indexes, for queries near keys and for random queries.
- Training steps with time and memory, each in a process of its own: see memory_step.py.
- With --model: a whole model with as many experts memorises facts and decodes: see memory_model.py.

Every search, decoding and step is compared with float64 before a time is reported. The last line
printed is one JSON object; with --quick its values are those of the largest and smallest N there:

- decode_product_1e6_over_1e3: time of a decoded token with product keys, N 1e6 over N 1024.
- decode_exact_1e6_over_copy: time of an exact search in 1e6 keys over that of one pass over them
  at the speed of a copy (half the time in which torch copies them).
- state_bytes_per_touched: bytes of the optimizer's state for each expert trained at N 1e6, with the
  map from experts to it.
- step_peak_1e6_over_1e3: peak memory of training (bank, optimizer, steps), N 1e6 over N 1024.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checks
import measure
import memory_step
import psutil
import torch
import torch.nn.functional as F
from checks import target
from memory_step import KINDS, Sizes
from torch import Tensor, nn

from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.key_index import KINDS as INDEXES
from sapt_fast.pools.key_index import KeyIndex, key_index

EXPERTS = (1024, 10_000, 316**2, 1000**2)  # squares, for product keys
EXPERTS_QUICK = (1024, 4096)
OPTIONS: dict[str, dict[str, Any]] = {"ivf": {"probes": 32}, "hnsw": {"links": 16}}
_QUERIES = 256
_SHARE_OF_MEMORY = 0.8  # of what is free, that tables may need


class Memory(nn.Module):
    """An MLP, an index of each kind over N keys, and a bank of N stored experts.

    Attributes:
        near, far: [Q, D], queries near keys of the tables, and random ones.
    """

    def __init__(self, experts: int, sizes: Sizes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(experts)
        self.sizes, self.experts, self.build_seconds = sizes, experts, dict[str, float]()
        keys = torch.randn(experts, sizes.key_width, generator=generator)
        self.indexes = nn.ModuleDict()
        for kind in INDEXES:
            index = key_index(kind, experts, sizes.key_width, **OPTIONS.get(kind, {}))
            if kind != "product":
                index.set_rows(torch.arange(experts), keys)
            start = time.perf_counter()
            index.build(torch.get_num_threads()) if kind in OPTIONS else index.build()
            self.build_seconds[kind] = time.perf_counter() - start
            self.indexes[kind] = index.requires_grad_(False)
        noise, self.far = torch.randn(2, _QUERIES, sizes.key_width, generator=generator)
        at = torch.randint(experts, (_QUERIES,), generator=generator)
        self.near = keys[at] + 0.3 * noise
        self.bank = ExpertBank(experts, 1, sizes.width, sizes.width)
        for ids in torch.arange(experts).split(100_000):
            rows = torch.randn(2, len(ids), 1, sizes.width, generator=generator)
            self.bank.write(ids, *rows)
        self.up, self.gate = (nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)
        self.requires_grad_(False)

    def index(self, kind: str) -> KeyIndex:
        found = self.indexes[kind]
        assert isinstance(found, KeyIndex)
        return found

    def mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y

    def token(self, x: Tensor, query: Tensor, kind: str) -> Tensor:
        """A token x [1, W] whose experts an index of this kind finds."""
        scores, index = self.index(kind).search(query, self.sizes.k)
        return self.mlp(x) + self.bank.mix(x, index, scores.softmax(1))

    def token_embeddings(self, x: Tensor, query: Tensor) -> Tensor:
        """As `token` with product keys, from plain tables [N, W]; row n is that of expert n."""
        scores, index = self.index("product").search(query, self.sizes.k)
        a, b = (table[:, 0] for table in self.tables)
        h = torch.einsum("mi,mki->mk", x, F.embedding(index, a))
        delta = torch.einsum("mk,mko->mo", h * scores.softmax(1), F.embedding(index, b))
        return self.mlp(x) + delta

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        chosen = self.bank.select(torch.zeros(1, 1, dtype=torch.int64), torch.float32)
        return chosen.a, chosen.b


# --- correctness ---


def correctness(memory: Memory, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Compares each index and a decoded token with float64, for a few queries."""
    query, found = torch.cat([memory.near[:4], memory.far[:4]]), {}
    for kind in INDEXES:
        index = memory.index(kind)
        keys, _ = index.present_keys()
        exact = torch.cat([query.double() @ part.double().t() for part in keys.split(100_000)], 1)
        scores, at = index.search(query, sizes.k)
        best = exact.topk(sizes.k)[0] if kind not in OPTIONS else exact.gather(1, at)
        error = float((scores - best).abs().max() / best.abs().max())
        distinct = all(len(set(row)) == sizes.k for row in at.tolist())
        found[f"{kind}, N {memory.experts}"] = {"ok": error < 1e-5 and distinct, "error": error}
    x = torch.randn(8, sizes.width, generator=torch.Generator().manual_seed(0))
    scores, index = memory.index("product").search(query, sizes.k)
    a, b = (table[index, 0].double() for table in memory.tables)
    h = torch.einsum("mi,mki->mk", x.double(), a) * scores.double().softmax(1)
    want = torch.einsum("mk,mko->mo", h, b) + memory.mlp(x).double()
    for name, got in (
        ("token", memory.token(x, query, "product")),
        ("token, embeddings", memory.token_embeddings(x, query)),
    ):
        error = float((got - want).abs().max() / want.abs().max())
        found[f"{name}, N {memory.experts}"] = {"ok": error < 1e-5, "error": error}
    return found


# --- decoding ---


def decoding(memories: list[Memory], gate: dict[str, dict[str, Any]], repeats: int) -> Any:
    """Times of look-ups and of decoded tokens, all in turns."""
    calls: dict[str, Callable[[], object]] = {}
    for memory in memories:
        for kind in INDEXES:
            if not all(gate[f"{name}, N {memory.experts}"]["ok"] for name in (kind, "token")):
                continue
            calls[f"search {kind} {memory.experts}"] = _search(memory, kind)
            calls[f"token {kind} {memory.experts}"] = _token(memory, kind)
        if gate[f"token, embeddings, N {memory.experts}"]["ok"]:
            calls[f"token embeddings {memory.experts}"] = _token(memory, "embeddings")
    largest = memories[-1]
    keys, (x, _) = largest.index("exact").present_keys()[0], next(_inputs(largest))
    to = torch.empty_like(keys)
    calls["mlp alone"] = lambda: largest.mlp(x)
    calls["copy of the keys"] = lambda: to.copy_(keys)
    return measure.interleaved_ms(calls, "cpu", repeats=repeats)


def _search(memory: Memory, kind: str) -> Callable[[], object]:
    inputs = _inputs(memory)
    return lambda: memory.index(kind).search(next(inputs)[1], memory.sizes.k)


def _token(memory: Memory, kind: str) -> Callable[[], object]:
    inputs = _inputs(memory)
    if kind == "embeddings":
        return lambda: memory.token_embeddings(*next(inputs))
    return lambda: memory.token(*next(inputs), kind)


def _inputs(memory: Memory) -> Iterator[tuple[Tensor, Tensor]]:
    x = torch.randn(_QUERIES, memory.sizes.width, generator=torch.Generator().manual_seed(1))
    return itertools.cycle(zip(x.split(1), memory.near.split(1), strict=True))


# --- training steps ---


def steps(sizes: Sizes, experts: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Time and memory of a step of each kind and N, where the machine has room for its tables."""
    rows: list[dict[str, Any]] = []
    for kind, count in itertools.product(KINDS, experts):
        need = 2 * count * sizes.width * 4 * memory_step.COPIES.get(kind, 0)
        row: dict[str, Any] = {"kind": kind, "experts": count}
        if need > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
            rows.append({**row, "not_measured": f"its tables need {need / 1e9:.1f} GB"})
            continue
        script = Path(__file__).with_name("memory_step.py")
        command = [sys.executable, str(script)]
        command += memory_step.command(kind, count, sizes, repeats)
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            if kind == "ours":
                raise RuntimeError(run.stderr)
            rows.append({**row, "not_measured": f"ended with status {run.returncode}"})
            continue
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    return rows


# --- a whole model ---


def of_model(folder: Path, experts: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """What memory_model.py measures with the smallest and the largest N."""
    script = Path(__file__).with_name("memory_model.py")
    command = [sys.executable, str(script), str(folder), str(repeats)]
    command += [str(count) for count in (min(experts), max(experts))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


# --- the report ---


def summary(result: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of the last line; None for what was not measured."""
    few, many = min(result["experts"]), max(result["experts"])
    decode = result["decode_ms"]
    ours = {row["experts"]: row for row in result["steps"] if row["kind"] == "ours"}
    copied = checks.ratio(decode, f"search exact {many}", "copy of the keys")
    state = peak = None
    if ours:
        state = ours[many]["optimizer_bytes"] / ours[many]["touched"]
        peak = ours[many]["peak_bytes"] / max(1, ours[few]["peak_bytes"])
    return {
        "decode_product_1e6_over_1e3": checks.ratio(
            decode, f"token product {many}", f"token product {few}"
        ),
        "decode_exact_1e6_over_copy": None if copied is None else 2 * copied,
        "state_bytes_per_touched": state,
        "step_peak_1e6_over_1e3": peak,
    }


def targets(found: dict[str, float | None], sizes: Sizes) -> list[dict[str, Any]]:
    """The numbers of the last line against their targets."""
    moments = 2 * 4 * 2 * sizes.width  # bytes of the two moments of A and B
    state = found["state_bytes_per_touched"]
    return [
        target(
            "decoded token, product keys: N 1e6 / N 1024",
            found["decode_product_1e6_over_1e3"],
            1.1,
        ),
        target(
            "exact search, N 1e6: time / one pass over the keys at the speed of a copy",
            found["decode_exact_1e6_over_copy"],
            1.2,
        ),
        target(
            "optimizer state / moments of the experts trained",
            None if state is None else state / moments,
            1.1,
        ),
        target("training, peak memory: N 1e6 / N 1024", found["step_peak_1e6_over_1e3"], 1.1),
    ]


def targets_of_model(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole model's numbers against their targets."""
    found = result.get("model")
    if found is None:
        return []
    few, many = min(result["experts"]), max(result["experts"])
    tokens = checks.ratio(found["ms"], f"token product {many}", f"token product {few}")
    copied = checks.ratio(found["ms"], f"search exact {many}", f"copy {many}")
    told = sum(row["exact"] for row in found["rows"]) / sum(row["facts"] for row in found["rows"])
    return [
        target("whole model, decoded token, product keys: N 1e6 / N 1024", tokens, 1.1),
        target(
            "whole model, exact search, N 1e6: time / one pass at the speed of a copy",
            None if copied is None else 2 * copied,
            1.2,
        ),
        target("whole model: share of facts answered exactly", told, 1.0, at_least=True),
        target("whole models, peak memory, GB", found["peak_bytes"] / 1e9, 16.0),
    ]


@torch.inference_mode()
def measured(experts: tuple[int, ...], sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Correctness, recall and times of decoding."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    memories = [Memory(count, sizes) for count in experts]
    gate: dict[str, dict[str, Any]] = {}
    for memory in memories:
        gate |= correctness(memory, sizes)
    recall = [
        {
            "kind": kind,
            "experts": memory.experts,
            "build_seconds": memory.build_seconds[kind],
            "near": memory.index(kind).recall(memory.near, sizes.k),
            "random": memory.index(kind).recall(memory.far, sizes.k),
        }
        for memory in memories
        for kind in INDEXES
    ]
    return {
        "correctness": gate,
        "recall": recall,
        "decode_ms": decoding(memories, gate, repeats),
    }


def main() -> int:
    parser = checks.parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="of a small chat model")
    options = parser.parse_args()
    experts, sizes, repeats = EXPERTS, Sizes(), 100
    if options.quick:
        experts, sizes, repeats = EXPERTS_QUICK, Sizes(256, 128, 16, 8, 4, 64), 3
    result = {
        "kind": "memory",
        "only": "memory",
        "quick": options.quick,
        "environment": measure.environment("cpu"),
        "experts": experts,
        "sizes": vars(sizes),
        "indexes": OPTIONS,
        **measured(experts, sizes, repeats),
    }
    gate = memory_step.correctness(sizes)
    result["correctness"] |= gate
    right = all(row["ok"] for row in gate.values())
    result["steps"] = steps(sizes, experts, max(2, repeats // 20)) if right else []
    if options.model is not None:
        result["model"] = of_model(options.model, experts, max(3, repeats // 5))
    found = summary(result)
    result["targets"] = [*targets(found, sizes), *targets_of_model(result)]
    status = checks.finish(result, options.out)
    print(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
