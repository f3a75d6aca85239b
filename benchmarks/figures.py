"""Draws README.md's table and plots from a recorded result.

`python benchmarks/figures.py benchmarks/results/<machine>/<file>.json` rewrites the part of
README.md between the `results` markers and docs/images/cpu_*.png.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from checks import over
from measure import ROOT

README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """The Markdown table of the targets."""
    about = result["environment"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['date']}, commit {about['commit']}. Medians; ratios within one run.",
        "",
        "| what | measured | target |",
        "|---|---|---|",
    ]
    for row in result["targets"]:
        sign = ">=" if row["at_least"] else "<="
        missed = "" if row["met"] else " (missed)"
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}{missed}"
        lines.append(f"| {row['what']} | {value} | {sign} {row['target']:g} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, path: Path) -> str:
    """The README with the table of the result at `path` between its markers."""
    result = json.loads((ROOT / path).read_text())
    text, count = BLOCK.subn(
        lambda m: f"<!-- results: {path.as_posix()} -->\n\n{table(result)}\n{m.group(3)}", readme
    )
    if count != 1:
        raise ValueError(f"README.md: got {count} pairs of results markers, expected 1")
    return text


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Bars of time relative to ours and of peak memory relative to PEFT with one LoRA."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    layers = [row for row in result["layers"] if row["pass"] == "forward+backward"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(layers)), layers, strict=True):
        _bars(axis, {"ours_cpu": 1.0, **{name: over(row, name) for name in row["pairs"]}})
        axis.set_title(row["layer"], fontsize=9)
        axis.set_xlabel("time / ours, forward + backward")
    speed = folder / "cpu_layer.png"
    figure.savefig(speed, dpi=150)

    step = result["steps"][0]
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    one = "peft_one_lora"
    times = {name: t["median"] / step["ms"][one]["median"] for name, t in step["ms"].items()}
    peaks = {name: peak / step["peak_bytes"][one] for name, peak in step["peak_bytes"].items()}
    for axis, values, what in ((left, times, "time"), (right, peaks, "peak memory")):
        _bars(axis, values)
        axis.set_xlabel(f"{what} / PEFT with one LoRA")
    figure.suptitle(step["what"]["ours"]["step"], fontsize=9)
    memory = folder / "cpu_step.png"
    figure.savefig(memory, dpi=150)
    return [speed, memory]


def _bars(axis: Any, values: dict[str, float]) -> None:
    names = sorted(values, key=values.__getitem__, reverse=True)
    colours = ["tab:blue" if name.startswith("ours") else "lightgrey" for name in names]
    bars = axis.barh(names, [values[name] for name in names], color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max(values.values()) * 1.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="a file of cpu_check under benchmarks/results")
    path = parser.parse_args().result.resolve().relative_to(ROOT)
    result = json.loads((ROOT / path).read_text())
    README.write_text(with_table(README.read_text(), path))
    for image in draw(result, IMAGES):
        print(f"drew {image.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
