"""Draws the tables and plots of docs/results/continual.md from the recorded experiments.

`python benchmarks/continual_tables.py` rewrites what lies between the page's `results` markers from
the files that they name, and docs/images/<experiment>.png; with files of benchmarks/results given,
these take the place of those of the same experiment.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import BLOCK, IMAGES
from measure import ROOT

from sapt_fast.continual.compare.report import with_deviation

PAGE = ROOT / "docs" / "results" / "continual.md"
# Neither replays inputs of earlier tasks nor keeps a private adapter for each.
WITHOUT_REPLAY = ("seqlora", "ewc", "lwf", "olora")


def main_table(rows: Mapping[str, Any]) -> list[str]:
    """Mean and deviation of the metrics of each row, by falling AP."""
    ordered = sorted(rows, key=lambda name: -mean(rows[name], "AP"))
    lines = ["| | AP | F.Ra | FWT | BWT | runs |", "|---|---|---|---|---|---|"]
    for name in ordered:
        metrics = rows[name]["metrics"]
        cells = " | ".join(with_deviation(metrics[m]) for m in ("AP", "F.Ra", "FWT", "BWT"))
        lines.append(f"| {name} | {cells} | {rows[name]['runs']} |")
    return lines


def mean(row: Mapping[str, Any], metric: str) -> float:
    """Mean of a metric over a row's runs."""
    return float(row["metrics"][metric]["mean"])


def targets(result: Mapping[str, Any]) -> list[str]:
    """What was aimed at with the real tasks, and what came out."""
    rows, ablations = result["rows"], result.get("ablations", {})
    sapt = rows["sapt"]
    ap, forgetting = mean(sapt, "AP"), mean(sapt, "F.Ra")
    best = max(WITHOUT_REPLAY, key=lambda name: mean(rows[name], "AP"))
    found = [
        ("F.Ra of sapt", forgetting, "<=", 3.0),
        ("F.Ra of sapt / of seqlora", forgetting / mean(rows["seqlora"], "F.Ra"), "<=", 0.1),
        ("AP over seqlora", ap - mean(rows["seqlora"], "AP"), ">=", 30.0),
        (f"AP over the best without replay but epi ({best})", ap - mean(rows[best], "AP"), ">=", 8),
        ("AP over replay of the same share", ap - mean(rows["replay"], "AP"), ">=", 3.0),
        ("AP below joint", mean(rows["joint"], "AP") - ap, "<=", 2.0),
    ]
    if "sapt_without_reflection" in ablations:
        fall = mean(ablations["sapt"], "AP") - mean(ablations["sapt_without_reflection"], "AP")
        found.append(("AP lost without the reflection loss", fall, ">=", 25.0))
    lines = ["| what | measured | target |", "|---|---|---|"]
    for what, value, sign, target in found:
        met = value <= target if sign == "<=" else value >= target
        missed = "" if met else " (missed)"
        lines.append(f"| {what} | {value:.2f}{missed} | {sign} {target:g} |")
    return lines


def ablation_table(result: Mapping[str, Any]) -> list[str]:
    """SAPT's and replay's changed forms, and SAPT answering with weights not the router's."""
    rows = result["ablations"]
    lines = ["| | AP | F.Ra | AP, change |", "|---|---|---|---|"]
    for name, row in rows.items():
        origin = rows["replay" if name.startswith("replay") else "sapt"]
        change = mean(row, "AP") - mean(origin, "AP")
        shown = "" if row is origin else f"{change:+.1f}"
        ap, forgetting = (with_deviation(row["metrics"][metric]) for metric in ("AP", "F.Ra"))
        lines.append(f"| {name} | {ap} | {forgetting} | {shown} |")
    for name in ("uniform", "hardest_wrong"):
        cells = [cell[name] for cell in result["other_weights"]]
        means = {metric: fmean(cell[metric] for cell in cells) for metric in ("AP", "F.Ra")}
        change = means["AP"] - mean(rows["sapt"], "AP")
        shown = " | ".join(f"{value:.1f}" for value in means.values())
        lines.append(f"| sapt, {name} weights | {shown} | {change:+.1f} |")
    return lines


def tuning_table(rows: Mapping[str, Any]) -> list[str]:
    """AP on dev rows of what was tried."""
    lines = ["| | AP on dev rows by setting |", "|---|---|"]
    for name, row in rows.items():
        tried = "; ".join(
            f"{setting} " + ", ".join(f"{value}: {ap:.1f}" for value, ap in scores.items())
            for setting, scores in row["dev_ap"].items()
        )
        lines.append(f"| {name} | {tried} |")
    return lines


def task_table(result: Mapping[str, Any]) -> list[str]:
    """Score of each task after the last one, the mean over runs."""
    tasks = result["orders"][0].split(",")
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name, row in result["rows"].items():
        last = [dict(zip(c["tasks"], c["scores"][-1], strict=True)) for c in row["cells"]]
        scores = (fmean(scores[task] for scores in last) for task in tasks)
        lines.append(f"| {name} | " + " | ".join(f"{score:.0f}" for score in scores) + " |")
    return lines


def block(result: Mapping[str, Any]) -> str:
    """What stands between the markers of an experiment."""
    about = result["environment"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}. "
        "Scores in %, mean ± deviation over seeds and orders.",
        "",
        *main_table(result["rows"]),
    ]
    if "ablations" in result:
        lines += ["", *targets(result), "", *task_table(result)]
        lines += ["", *ablation_table(result)]
    return "\n".join([*lines, "", *tuning_table(result["rows"])]) + "\n"


def recorded(path: Path | str) -> dict[str, Any]:
    """A file of benchmarks/results, named from the project's folder."""
    result: dict[str, Any] = json.loads((ROOT / path).read_text())
    return result


def rendered(page: str, files: Mapping[str, Path] | None = None) -> str:
    """The page with the blocks of its files, or of those given by the experiment's name."""

    def one(match: re.Match[str]) -> str:
        path = Path(match.group(2))
        result = recorded(path)
        if files and result["only"] in files:
            path = files[result["only"]]
            result = recorded(path)
        return f"<!-- results: {path.as_posix()} -->\n\n{block(result)}\n{match.group(3)}"

    return BLOCK.sub(one, page)


def draw(result: Mapping[str, Any]) -> Path:
    """Average performance after each task, the mean over runs, as far as it has been learned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, row) in enumerate(result["rows"].items()):
        curves = [
            [fmean(scores[: index + 1]) for index, scores in enumerate(cell["scores"])]
            for cell in row["cells"]
            if cell["strategy"] != "joint"  # which has no first tasks
        ]
        if not curves:
            continue
        means = [fmean(points) for points in zip(*curves, strict=True)]
        axis.plot(
            range(1, len(means) + 1), means,
            label=name, color=f"C{number}", linewidth=2.5 if name == "sapt" else 1.2,
        )  # fmt: skip
    axis.set_xlabel("tasks learned")
    axis.set_ylabel("mean score on them, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    path = IMAGES / f"{result['only'].replace('-', '_')}.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="files under benchmarks/results")
    given = [path.resolve().relative_to(ROOT) for path in parser.parse_args().results]
    files = {recorded(path)["only"]: path for path in given}
    PAGE.write_text(rendered(PAGE.read_text(), files))
    for match in BLOCK.finditer(PAGE.read_text()):
        image = draw(recorded(match.group(2)))
        print(f"drew {image.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
