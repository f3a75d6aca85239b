"""Draws the tables of README.md and docs/results/speed.md, and their plots, from recorded results.

`python benchmarks/figures.py benchmarks/results/<machine>/<file>.json` puts that result into the
first `results` block of both pages and into docs/images/cpu_*.png. Other blocks are drawn again
from the files that they name.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checks import over
from measure import ROOT

README = ROOT / "README.md"
SPEED = ROOT / "docs" / "results" / "speed.md"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

# The targets that README.md shows, in its words; docs/results/speed.md has all of them.
HIGHLIGHTS = {
    "T5 step: ours / PEFT with one LoRA": "T5 training step, time: ours / PEFT with one LoRA",
    "T5 step peak memory: ours / PEFT with one LoRA": (
        "T5 training step, peak memory: ours / PEFT with one LoRA"
    ),
    "T5 step: released / ours": "T5 training step, time: original SAPT code / ours",
    "layer fp32: PEFT loop / ours": "one layer, float32, time: PEFT's loop over adapters / ours",
    "decode one token: ours / base": "decoding a token, time: ours / model without adapters",
}
# What the plots call the providers of the benchmarks.
LABELS = {
    "ours": "sapt_fast",
    "ours_cpu": "sapt_fast",
    "base": "no adapters",
    "base_onednn": "no adapters, oneDNN",
    "stacked": "stacked torch",
    "stacked_compiled": "stacked torch, compiled",
    "stacked_onednn": "stacked torch, oneDNN",
    "peft": "PEFT, all adapters",
    "peft_default": "PEFT, float32 adapters",
    "peft_one_lora": "PEFT, one LoRA",
    "released": "original SAPT code",
}
_STEP = re.compile(r"t5 d(\d+) layers (\d+) heads \d+ B(\d+) T(\d+)/(\d+) K(\d+) (\w+)")
_LAYER = re.compile(r"B(\d+) T(\d+) d(\d+)->(\d+) K(\d+) r(\d+) \w+")


def table(result: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> str:
    """The Markdown table of the targets: all of them, or those in `labels` in its words."""
    about = result["environment"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['date']}, commit {about['commit']}. Medians; ratios within one run.",
        "",
        "| what | measured | target |",
        "|---|---|---|",
    ]
    rows = {row["what"]: row for row in result["targets"]}
    full = {what: what.replace("released", "original SAPT code") for what in rows}
    for what, label in (labels or full).items():
        row = rows[what]
        sign = ">=" if row["at_least"] else "<="
        missed = "" if row["met"] else " (missed)"
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}{missed}"
        lines.append(f"| {label} | {value} | {sign} {row['target']:g} |")
    return "\n".join(lines) + "\n"


def rendered(page: str, labels: Mapping[str, str] | None = None, path: Path | None = None) -> str:
    """The page with each block drawn from the file it names; the first from `path` if given.

    Raises:
        ValueError: if the page has no pair of `results` markers.
    """
    given = iter([path])

    def one(match: re.Match[str]) -> str:
        file = next(given, None) or Path(match.group(2))
        result = json.loads((ROOT / file).read_text())
        return f"<!-- results: {file.as_posix()} -->\n\n{table(result, labels)}\n{match.group(3)}"

    text, count = BLOCK.subn(one, page)
    if not count:
        raise ValueError("page: got no results markers, expected at least one pair")
    return text


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Bars of time relative to ours and of peak memory relative to PEFT with one LoRA."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    layers = [row for row in result["layers"] if row["pass"] == "forward+backward"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(layers)), layers, strict=True):
        _bars(axis, {"ours_cpu": 1.0, **{name: over(row, name) for name in row["pairs"]}})
        axis.set_title(row["layer"].split()[-1], fontsize=9)
        axis.set_xlabel("time / sapt_fast, forward + backward")
    title = r"Linear layer of width \3, \5 adapters of rank \6, \1 x \2 tokens"
    figure.suptitle(_LAYER.sub(title, layers[0]["layer"]), fontsize=9)
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
    title = r"T5 of width \1, \2 + \2 layers, \6 adapters, \3 x \4 tokens in, \5 out, \7"
    figure.suptitle(_STEP.sub(title, step["what"]["ours"]["step"]), fontsize=9)
    memory = folder / "cpu_step.png"
    figure.savefig(memory, dpi=150)
    return [speed, memory]


def _bars(axis: Any, values: dict[str, float]) -> None:
    names = sorted(values, key=values.__getitem__, reverse=True)
    colours = ["tab:blue" if name.startswith("ours") else "lightgrey" for name in names]
    labels = [LABELS[name] for name in names]
    bars = axis.barh(labels, [values[name] for name in names], color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max(values.values()) * 1.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="a file of cpu_check under benchmarks/results")
    path = parser.parse_args().result.resolve().relative_to(ROOT)
    result = json.loads((ROOT / path).read_text())
    README.write_text(rendered(README.read_text(), HIGHLIGHTS, path))
    SPEED.write_text(rendered(SPEED.read_text(), path=path))
    for image in draw(result, IMAGES):
        print(f"drew {image.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
