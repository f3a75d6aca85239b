"""Draws the tables of docs/results/images.md from the recorded results.

`python benchmarks/image_tables.py [FILE...]` rewrites what lies between the page's `results`
markers from the files that they name; given files take the place of those of the same kind.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import BLOCK
from measure import ROOT

PAGE = ROOT / "docs" / "results" / "images.md"
_HEADS = ("own", "NCM", "LDA", "ridge")
_LABELS = {"mean.9": "mean patch, layer 9", "cls.11": "CLS, layer 11"}


def frozen(result: Mapping[str, Any]) -> list[str]:
    """Returns the bar, the targets, the selection of prompts and the rates tried."""
    sets = result["sets"]
    rows = []
    first = next(iter(sets.values()))["features"]
    for feature, found in first.items():
        for head in found["heads"]:
            runs = [sets[name]["features"][feature]["heads"][head] for name in sets]
            cells = [_shares([run["accuracy"] for run in by_seed.values()]) for by_seed in runs]
            for by_seed in runs:
                known = [run["task known"] for run in by_seed.values() if "task known" in run]
                cells.append(_shares(known) if known else "")
            rows.append([_LABELS[feature], head, *cells])
    head = ["features", "head", *sets, *(f"{name}, task found" for name in sets)]
    lines = [*_table(head, rows), "", "Targets, on the mean patch of layer 9:", ""]
    lines += [*_targets(result), "", "Choice of prompts, means over the seeds:", ""]
    fields = ["exp(H)", "one set", "mutual information", "overlap"]
    selected = [
        [name, kind, *(f"{fmean(run[field] for run in by_seed.values()):.2f}" for field in fields)]
        for name, found in sets.items()
        for kind, by_seed in found["selection"].items()
    ]
    lines += [*_table(["set", "choice", *fields], selected), ""]
    lines += ["Accuracy of linear heads on held-out training images, by rate:", ""]
    tried = [
        [name, _LABELS[feature], kind, _tried(scores)]
        for name, found in sets.items()
        for feature, by_feature in found["features"].items()
        for kind, scores in by_feature["tuning"].items()
    ]
    return [*lines, *_table(["set", "features", "head", "rate: accuracy"], tried)]


def methods(result: Mapping[str, Any]) -> list[str]:
    """Returns what each method reached, what did not run, and the rates tried."""
    lines: list[str] = []
    for name, by_method in result["runs"].items():
        rows = [
            [f"**frozen features, {head}**", str(len(by_seed)), _shares([*by_seed.values()])]
            + [""] * (len(_HEADS) + 2)
            for head, by_seed in result.get("bar", {}).get(name, {}).items()
        ]
        for method, by_seed in by_method.items():
            runs = list(by_seed.values())
            cells = [_shares([run["accuracy"][head] for run in runs]) for head in _HEADS]
            rates = " / ".join(f"{runs[0][name]:g}" for name in ("rate", "head_rate"))
            again = [run["refitted"]["LDA"] for run in runs if "refitted" in run]
            cells += [_shares(again) if again else "", _forgetting(runs), rates]
            rows.append([method, str(len(runs)), *cells])
        head = [name, "seeds", *(f"{head} head" for head in _HEADS)]
        head += ["LDA refitted", "forgetting, own head", "rate / of the head"]
        lines += [*_table(head, rows), ""]
    notes = [
        [name, method, *_noted(list(by_seed.values()))]
        for name, by_method in result["runs"].items()
        for method, by_seed in by_method.items()
    ]
    head = ["set", "method", "choice at test time", "last training loss", "s a run"]
    lines += [*_table(head, notes), ""]
    if "targets" in result:
        lines += [*_targets(result), ""]
    for name, by_method in result["not run"].items():
        left = [f"{method} (seeds {', '.join(map(str, s))})" for method, s in by_method.items()]
        lines += [f"**Not run on {name}:** {'; '.join(left)}.", ""]
    lines += ["Incremental accuracy of the own head on held-out training images, by rate:", ""]
    tried = [[method, _tried(scores)] for method, scores in result["tuning"].items() if scores]
    return [*lines, *_table(["method", "rate: accuracy"], tried)]


def prompts(result: Mapping[str, Any]) -> list[str]:
    """Returns times and memory of prompt pools."""
    rows = []
    for row in result["rows"]:
        cells = [row["kind"], str(row["prompts"]), str(row["batch"]), str(row["width"])]
        for field in ("forward_ms", "step_ms"):
            times = {form: found["median"] for form, found in row[field].items()}
            others = [f"{form} {time / times['ours']:.2f}" for form, time in times.items()]
            cells += [f"{times['ours']:.2f}", ", ".join(o for o in others if o[:4] != "ours")]
        cells.append(", ".join(f"{n} {b / 2**20:.0f}" for n, b in row["step_bytes"].items()))
        rows.append(cells)
    head = ["pool", "M", "B", "D", "forward, ms", "others / ours", "step, ms", "others / ours"]
    return _table([*head, "step, MiB"], rows)


_BLOCKS = {"images-frozen": frozen, "images": methods, "image-prompts": prompts}


def block(result: Mapping[str, Any]) -> str:
    """Returns what stands between the markers of a result."""
    about = result["environment"]
    head = f"{about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}."
    return "\n".join([head, "", *_BLOCKS[result["only"]](result)]) + "\n"


def rendered(page: str, files: Mapping[str, Path]) -> str:
    """Returns the page with each block drawn from its file, or from that of `files`."""

    def one(match: re.Match[str]) -> str:
        path = Path(match.group(2))
        path = files.get(json.loads((ROOT / path).read_text())["only"], path)
        result = json.loads((ROOT / path).read_text())
        return f"<!-- results: {path.as_posix()} -->\n\n{block(result)}\n{match.group(3)}"

    return BLOCK.sub(one, page)


def _targets(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["target"], f"{row['value']:.3g}" + ("" if row["reached"] else " (missed)")]
        for row in result["targets"]
    ]
    return _table(["target", "measured"], rows)


def _forgetting(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the mean fall from a task's best accuracy to its last; "" for joint training."""
    found = []
    for run in runs:
        matrix = run["matrix"]["own"]
        if len(matrix) < 2:
            return ""
        last = matrix[-1]
        falls = [max(row[t] for row in matrix[:-1] if t < len(row)) - last[t]
                 for t in range(len(last) - 1)]  # fmt: skip
        found.append(fmean(falls))
    return _shares(found)


def _noted(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    chosen = {key: fmean(run["chosen"][key] for run in runs) for key in runs[0]["chosen"]}
    for key in ("task found", "within the known task"):
        if key in runs[0]:
            chosen[key] = fmean(run[key] for run in runs)
    text = ", ".join(f"{key} {value:.2f}" for key, value in chosen.items())
    loss = fmean(run["loss of the last steps"][-1] for run in runs)
    return [text, f"{loss:.2f}", f"{fmean(run['seconds'] for run in runs):.0f}"]


def _tried(scores: Mapping[str, float]) -> str:
    ordered = sorted(scores.items(), key=lambda item: float(item[0]))
    return ", ".join(f"{float(rate):g}: {100 * score:.1f}" for rate, score in ordered)


def _shares(values: Sequence[float]) -> str:
    """Returns the mean in per cent, with the least and the largest of several."""
    text = f"{100 * fmean(values):.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="files under benchmarks/results")
    given = [path.resolve().relative_to(ROOT) for path in parser.parse_args().results]
    files = {json.loads((ROOT / path).read_text())["only"]: path for path in given}
    PAGE.write_text(rendered(PAGE.read_text(), files))


if __name__ == "__main__":
    main()
