"""Fuzzes every op against formulas in float64: values, gradients, transforms and bad input.

    python benchmarks/fuzz.py --calls 100000 --seed 0

Sizes are small and odd, zero included; layouts, dtypes and weights of zero vary; some inputs hold
NaN or infinities; a fifth of the calls have one bad argument. A call is right if its values are,
within what sums in its dtype allow, or if what is bad is refused by an error that names an
argument. Calls run in a process of their own, which is started again after one that crashed it.

The last line on stdout is JSON: the calls of each op that were right, refused and failed, and the
first failures. Exit status 1 if any call failed.
"""

import argparse
import faulthandler
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 20_000  # calls of one child process
_STRIDE = 10_000_000  # between the calls of two seeds
_HANGS_AFTER = 120.0  # seconds
_SHOWN = 20
_CHILD = [__file__]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    options = _parser().parse_args(argv)
    first = options.seed * _STRIDE if options.first is None else options.first
    first = first if options.only is None else options.only
    count = options.calls if options.only is None else 1
    if options.child:
        for record in run(first, count, options.op, options.backend, options.child):
            print(json.dumps(record), flush=True)
        return 0
    start = time.monotonic()
    records = (
        run(first, count, options.op, options.backend, None)
        if options.no_child
        else _children(first, count, options)
    )
    report = _report(records, count, options)
    report["seconds"] = round(time.monotonic() - start, 2)
    print(json.dumps(report))
    return 1 if any(row["failed"] for row in report["by_op"].values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="How many [default: 1000].")
    parser.add_argument("--seed", type=int, default=0, help="Of the first call [default: 0].")
    parser.add_argument("--op", help="One function or op only [default: all].")
    parser.add_argument(
        "--backend",
        help="Backend of every call; with triton set TRITON_INTERPRET=1 [default: drawn from those "
        "for the CPU].",
    )
    parser.add_argument("--only", type=int, metavar="SEED", help="Repeat one call.")
    parser.add_argument("--no-child", action="store_true", help="Run the calls in this process.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    return parser


def run(
    first: int, count: int, op: str | None, backend: str | None, trace: str | None
) -> Iterator[dict[str, Any]]:
    """The calls with seeds from `first` on: {"seed", "op", "refused", "failed"} of each.

    Args:
        trace: a file in which the running call's seed and op are kept.
    """
    import torch
    from fuzz_ops import MAKERS

    torch.set_num_threads(1)
    names = [n for n, (of, _) in MAKERS.items() if op in (None, n, of)]
    if not names:
        raise SystemExit(f"--op: got {op!r}, expected one of {sorted(MAKERS)}")
    file = None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT)
    if file is not None:
        faulthandler.enable()
    for seed in range(first, first + count):
        if file is not None and seed % 100 == 0:
            faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True)
        yield _one(seed, names, backend, file)


def _one(seed: int, names: list[str], backend: str | None, file: int | None) -> dict[str, Any]:
    from fuzz_calls import TRANSFORMS, Draw, WrongError, judge, spoil
    from fuzz_ops import MAKERS

    from sapt_fast import dispatch

    draw = Draw(seed)
    name = draw.pick(*names)
    of, make = MAKERS[name]
    if file is not None:
        os.pwrite(file, f"{seed:>20} {name:<40}".encode(), 0)
    mode = draw.pick("bad", "bad", *["forward"] * 3, *["backward"] * 3, *draw.pick(TRANSFORMS, ()))
    with_backend = of in dispatch.ops() and name not in ("pool_embeds", "reflection_loss")
    device = "cpu"
    chosen = backend or draw.pick(None, "reference", "cpu")
    if not with_backend or dispatch.unavailable(of, chosen or "reference", device):
        chosen = None
    record: dict[str, Any] = {"seed": seed, "op": name, "refused": False, "failed": None}
    try:
        call = make(draw, chosen, mode == "double backward")
        if mode not in ("bad", "forward") and not call.differentiable:
            mode = "forward"
        if call.poisoned and mode in TRANSFORMS:
            mode = "backward"
        if mode == "double backward" and not call.twice:
            mode = "grad"
        if mode == "bad":
            parameters = list(inspect.signature(call.function).parameters)
            spoil(call, draw, parameters)
            record["refused"] = True
        else:
            judge(call, draw, mode)
    except WrongError as wrong:
        record["failed"] = f"{mode}, backend {chosen}: {wrong}"
    except Exception as error:
        record["failed"] = f"{mode}, backend {chosen}: raised {type(error).__name__}: {error}"
    return record


def _children(first: int, count: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of calls that run in child processes, one after the other."""
    last = first + count
    with tempfile.TemporaryDirectory() as folder:
        while first < last:
            trace = Path(folder) / "running"
            trace.write_text("")
            size = min(_CHUNK, last - first)
            with (Path(folder) / "stderr").open("w+") as errors:
                child = subprocess.Popen(
                    [sys.executable, *_CHILD, "--child", str(trace), *_same(first, size, options)],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                assert child.stdout is not None
                yield from map(json.loads, child.stdout)
                if child.wait() == 0:
                    first += size
                    continue
                errors.seek(0)
                said = errors.read()
            running = trace.read_text().split()
            if not running:
                raise SystemExit(f"the calls could not be started:\n{said}")
            seed, name = int(running[0]), running[1]
            told = said.strip().splitlines()
            why = f"crashed (status {child.returncode}): {' | '.join(told[:6])[:300]}"
            yield {"seed": seed, "op": name, "refused": False, "failed": why}
            first = seed + 1


def _same(first: int, size: int, options: argparse.Namespace) -> list[str]:
    if options.only is not None:
        given = ["--only", str(options.only)]
    else:
        given = ["--calls", str(size), "--first", str(first)]
    return [*given, *_filters(options)]


def _filters(options: argparse.Namespace) -> list[str]:
    pairs = (("--op", options.op), ("--backend", options.backend))
    return [part for name, value in pairs if value for part in (name, value)]


def _report(
    records: Iterator[dict[str, Any]], count: int, options: argparse.Namespace
) -> dict[str, Any]:
    from tqdm import tqdm

    by_op: dict[str, dict[str, int]] = {}
    failed: list[dict[str, Any]] = []
    for record in tqdm(records, total=count, unit="call", file=sys.stderr, mininterval=1.0):
        row = by_op.setdefault(
            record["op"], dict.fromkeys(("calls", "right", "refused", "failed"), 0)
        )
        row["calls"] += 1
        if record["failed"] is None:
            row["refused" if record["refused"] else "right"] += 1
            continue
        row["failed"] += 1
        again = " ".join(
            ["python benchmarks/fuzz.py --only", str(record["seed"]), *_filters(options)]
        )
        failed.append(
            {"seed": record["seed"], "op": record["op"], "error": record["failed"], "repeat": again}
        )
        tqdm.write(f"{record['op']}: {record['failed']}\n    {again}", file=sys.stderr)
    return {
        "tool": "fuzz",
        "calls": sum(row["calls"] for row in by_op.values()),
        "seed": options.seed,
        "by_op": dict(sorted(by_op.items())),
        "failed": failed[:_SHOWN],
    }


if __name__ == "__main__":
    sys.exit(main())
