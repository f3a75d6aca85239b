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
WITHOUT_REPLAY = (
    "seqlora", "ewc", "lwf", "lwf_old_classes", "olora", "inflora", "gainlora", "sd_lora",
)  # fmt: skip
METRICS = ("AP", "F.Ra", "FWT", "BWT")
CONSTANT = "constant answer (majority label of each task)"


def main_table(result: Mapping[str, Any]) -> list[str]:
    """Mean and deviation of the metrics of each row, by falling AP, and the constant answers."""
    rows = {**result["rows"]}
    if "constant" in result:
        rows[CONSTANT] = result["constant"]
    lines = ["| | AP | F.Ra | FWT | BWT | trained | runs |", "|---|---|---|---|---|---|---|"]
    for name in sorted(rows, key=lambda name: -mean(rows[name], "AP")):
        metrics, row = rows[name]["metrics"], rows[name]
        cells = [with_deviation(metrics[m]) if m in metrics else "-" for m in METRICS]
        trained = f"{row['trained_parameters']:,}" if "trained_parameters" in row else "0"
        lines.append(f"| {' | '.join([name, *cells, trained, str(row.get('runs', '-'))])} |")
    return lines


def own_weights(result: Mapping[str, Any]) -> dict[str, dict[str, list[list[float]]]]:
    """Weights of each task's own adapter by learning position, of rows that route.

    Returns:
        By row, "learned" (dev rows, when the task had been learned) and "end" (test rows, after the
        last task): for each position one value per run.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, row in result["rows"].items():
        cells = [cell for cell in row["cells"] if cell.get("testing_attention")]
        if not cells:
            continue
        found[name] = {
            when: [
                [cell[kind][place][place] for cell in cells]
                for place in range(len(cells[0]["tasks"]))
            ]
            for when, kind in (("learned", "training_attention"), ("end", "testing_attention"))
        }
    return found


def weight_table(result: Mapping[str, Any]) -> list[str]:
    """The mean weight of a task's own adapter by learning position."""
    known = own_weights(result)
    if not known:
        return []
    count = len(next(iter(known.values()))["end"])
    positions = " | ".join(str(place + 1) for place in range(count))
    lines = [
        f"| own adapter's weight, by learning position | {positions} |",
        "|---" * (count + 1) + "|",
    ]
    for name, by_time in known.items():
        for when, values in by_time.items():
            shown = " | ".join(f"{fmean(value):.2f}" for value in values)
            label = "when learned" if when == "learned" else "after the last task"
            lines.append(f"| {name}, {label} | {shown} |")
    return lines


def findings(result: Mapping[str, Any]) -> list[str]:
    """Sentences that follow from the file, as a list; they are computed, never typed."""
    rows = result["rows"]
    lines = []
    if "constant" in result:
        floor = mean(result["constant"], "AP")
        above = {name: mean(row, "AP") - floor for name, row in rows.items()}
        names = sorted(above, key=lambda name: -above[name])
        better = ", ".join(f"{name} {above[name]:+.1f}" for name in names if above[name] > 0)
        worse = ", ".join(name for name in names if above[name] <= 0)
        lines.append(f"The {CONSTANT} has AP {floor:.1f}. Above it: {better or 'none'}.")
        if worse:
            lines.append(f"Not above it: {worse}.")
    alone = [fmean(c["alone"]) - c["metrics"]["AP"] for c in rows.get("replay", {}).get("cells", ())
             if c.get("alone")]  # fmt: skip
    if alone:
        lines.append(f"replay is {fmean(alone):.1f} below the tasks learned alone.")
    for name, values in own_weights(result).items():
        cells = [value for place in values["end"] for value in place]
        low = sum(value < 0.5 for value in cells)
        lines.append(f"{name}: the own adapter has less than half of the weight in {low} of "
                     f"{len(cells)} cells after the last task.")  # fmt: skip
    open_ends = [
        f"{name} ({setting})"
        for name, row in rows.items()
        for setting, scores in (row["dev_ap"] or {}).items()
        if is_at_an_end(scores)
    ]
    if open_ends:
        lines.append(f"The best value tried is the lowest or the highest: {', '.join(open_ends)}.")
    return [f"- {line}" for line in lines]


def is_at_an_end(scores: Mapping[str, float]) -> bool:
    """Returns whether the lowest or the highest value that was tried has the best AP."""
    tried = sorted(scores, key=float)
    return max(scores.values()) in (scores[tried[0]], scores[tried[-1]])


def mean(row: Mapping[str, Any], metric: str) -> float:
    """Mean of a metric over a row's runs."""
    return float(row["metrics"][metric]["mean"])


def targets(result: Mapping[str, Any]) -> list[str]:
    """What was aimed at with the real tasks, and what came out."""
    rows, ablations = result["rows"], result.get("ablations", {})
    sapt = rows["sapt"]
    ap, forgetting = mean(sapt, "AP"), mean(sapt, "F.Ra")
    best = max(
        (name for name in WITHOUT_REPLAY if name in rows), key=lambda name: mean(rows[name], "AP")
    )
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
    constant = result.get("constant", {}).get("tasks")
    if constant:
        scores = " | ".join(f"{constant[task]:.0f}" for task in tasks)
        lines.append(f"| {CONSTANT} | {scores} |")
    for name, row in result["rows"].items():
        last = [dict(zip(c["tasks"], c["scores"][-1], strict=True)) for c in row["cells"]]
        scores = (fmean(scores[task] for scores in last) for task in tasks)
        lines.append(f"| {name} | " + " | ".join(f"{score:.0f}" for score in scores) + " |")
    return lines


def followed_weights(result: Mapping[str, Any]) -> list[str]:
    """The weight of a task's own adapter from before it trains, by variant of the router."""
    variants = result["variants"]
    count = len(result["orders"][0].split(","))
    positions = " | ".join(str(place + 1) for place in range(count))
    lines = [f"| | AP | F.Ra | own weight | {positions} |", "|---" * (count + 4) + "|"]
    times = {"start": "before training", "learned": "when learned", "end": "after the last task"}
    for name, found in variants.items():
        metrics = " | ".join(f"{fmean(found[metric]):.1f}" for metric in ("AP", "F.Ra"))
        for when, label in times.items():
            shown = " | ".join(f"{value:.2f}" for value in found["own weight"][when])
            lines.append(f"| {name} | {metrics} | {label} | {shown} |")
    return lines


def block(result: Mapping[str, Any]) -> str:
    """What stands between the markers of an experiment."""
    about = result["environment"]
    if result["only"] == "own-weights":
        first = f"{about['cpu']}, torch {about['torch']}, {about['date']}. AP and F.Ra in %."
        return "\n".join([first, "", *followed_weights(result)]) + "\n"
    lines = [
        f"{about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}. "
        "Scores in %, mean ± deviation over seeds and orders.",
        "",
        *main_table(result),
        "",
        *findings(result),
    ]
    if result["only"] == "real-encoder":
        if {"sapt", "seqlora", "replay", "joint"} <= result["rows"].keys():
            lines += ["", *targets(result)]
        lines += ["", *task_table(result)]
    if "ablations" in result:
        lines += ["", *ablation_table(result)]
    if weights := weight_table(result):
        lines += ["", *weights]
    return "\n".join([*lines, "", *tuning_table(result["rows"])]) + "\n"


def recorded(path: Path | str) -> dict[str, Any]:
    """A file of benchmarks/results, named from the project's folder."""
    result: dict[str, Any] = json.loads((ROOT / path).read_text())
    # Files of the first protocol have no constant answers; they were computed later.
    later = (ROOT / path).with_suffix(".constant.json")
    if "constant" not in result and later.exists():
        result["constant"] = json.loads(later.read_text())["constant"]
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
        look: dict[str, Any] = {"label": name, "color": f"C{number % 10}"}
        look["linestyle"] = "-" if number < 10 else ":"
        if any(cell["strategy"] == "joint" for cell in row["cells"]):  # it has no first tasks
            axis.axhline(mean(row, "AP"), **{**look, "linestyle": "--"})
            continue
        curves = [
            [fmean(scores[: index + 1]) for index, scores in enumerate(cell["scores"])]
            for cell in row["cells"]
        ]
        means = [fmean(points) for points in zip(*curves, strict=True)]
        axis.plot(range(1, len(means) + 1), means, linewidth=2.5 if name == "sapt" else 1.2, **look)
    if "constant" in result:
        axis.axhline(mean(result["constant"], "AP"), color="0.5", linestyle=":", label="constant")
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
        if recorded(match.group(2))["only"] == "own-weights":
            continue
        image = draw(recorded(match.group(2)))
        print(f"drew {image.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
