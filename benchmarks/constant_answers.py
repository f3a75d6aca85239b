"""Scores the constant answers of recorded files that lack them.

    python benchmarks/constant_answers.py FILE... --data CL_Benchmark

writes FILE with the ending `.constant.json`: for each task of the file, the score of the answer
that its training rows have most often. `continual_tables.py` reads it beside FILE.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
from continual_protocol import constant_answers

from sapt_fast.continual.data.sources import DEMO, Source
from sapt_fast.continual.settings import ContinualSettings


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--data", help="folder that holds Long_Sequence/")
    options = parser.parse_args(given)
    for path in options.files:
        result = json.loads(path.read_text())
        values = {"model": DEMO, "benchmark": DEMO, **result.get("source", {})}
        if values["benchmark"] != DEMO:
            values |= {"model": DEMO, "kind": "auto", "data": options.data}  # rows need no model
        values["tasks"] = result["orders"][0]
        seeds = sorted({cell["seed"] for cell in result["rows"]["sapt"]["cells"]})
        found = {
            "command": shlex.join(["python", *(sys.argv if given is None else given)]),
            "environment": measure.environment("cpu"),
            "of": path.name,
            "constant": constant_answers(Source(**values), seeds, ContinualSettings()),
        }
        target = path.with_suffix(".constant.json")
        measure.write(target, json.dumps(found, indent=1) + "\n")
        print(target)


if __name__ == "__main__":
    main()
