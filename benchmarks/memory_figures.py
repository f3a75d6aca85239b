"""Draws the tables and the plot of docs/concepts/indexes.md from a recorded run of memory.py.

`python benchmarks/memory_figures.py FILE` rewrites what lies between the page's `results` markers
and docs/images/memory.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import figures
from measure import ROOT

PAGE = ROOT / "docs" / "concepts" / "indexes.md"
IMAGE = "memory.png"
LABELS = {
    "exact": "exact",
    "product": "product keys",
    "ivf": "IVF (faiss)",
    "hnsw": "HNSW (faiss)",
    "embeddings": "product keys, nn.Embedding",
    "ours": "sapt_fast",
    "dense": "nn.Embedding, AdamW",
    "sparse": "nn.Embedding, SparseAdam",
    "reverse_index": "reverse index, AdamW",
}


def block(result: Mapping[str, Any]) -> list[str]:
    """What stands between the markers."""
    return [
        *figures.table(result).rstrip().split("\n"),
        "",
        f"![Decoding, training and memory against the number of experts](../images/{IMAGE})",
        "",
        *_decode_table(result),
        "",
        *_step_table(result),
    ]


def _decode_table(result: Mapping[str, Any]) -> list[str]:
    """Search and decoded token of each index, with recall and the time to build it."""
    times = result["decode_ms"]
    lines = [
        "| index | N | search, ms | decoded token, ms | recall near keys | recall, random queries "
        "| build, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["recall"], key=lambda row: list(LABELS).index(row["kind"])):
        kind, count = row["kind"], row["experts"]
        search, token = (times.get(f"{what} {kind} {count}") for what in ("search", "token"))
        lines.append(
            f"| {LABELS[kind]} | {count:,} | {_ms(search)} | {_ms(token)} | {row['near']:.3f} | "
            f"{row['random']:.3f} | {row['build_seconds']:.1f} |"
        )
    lines.append(f"| no experts | | | {_ms(times.get('mlp alone'))} | | | |")
    return lines


def _step_table(result: Mapping[str, Any]) -> list[str]:
    """Time, memory and optimizer state of a training step of each kind."""
    lines = [
        "| training | N | step, ms | peak memory, MB | optimizer state, MB |",
        "|---|---|---|---|---|",
    ]
    for row in result["steps"]:
        start = f"| {LABELS[row['kind']]} | {row['experts']:,} |"
        if "not_measured" in row:
            lines.append(f"{start} not measured: {row['not_measured']} | | |")
            continue
        peak, state = (f"{row[name] / 1e6:,.1f}" for name in ("peak_bytes", "optimizer_bytes"))
        lines.append(f"{start} {row['ms']['median']:,.1f} | {peak} | {state} |")
    return lines


def _ms(times: Mapping[str, float] | None) -> str:
    return "not measured" if times is None else f"{times['median']:.3g}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Decoded token, training step and peak memory against N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for number, (kind, label) in enumerate(LABELS.items()):
        style = {"label": label, "color": f"C{number}", "marker": "o", "markersize": 3}
        points = [
            (count, result["decode_ms"][name]["median"])
            for count in result["experts"]
            if (name := f"token {kind} {count}") in result["decode_ms"]
        ]
        if points:
            left.plot(*zip(*points, strict=True), **style)
        rows = [row for row in result["steps"] if row["kind"] == kind and "ms" in row]
        counts = [row["experts"] for row in rows]
        if rows:
            middle.plot(counts, [row["ms"]["median"] for row in rows], **style)
            right.plot(counts, [row["peak_bytes"] / 1e6 for row in rows], **style)
    titles = ("decoded token, ms", "training step, ms", "peak memory of training, MB")
    for axis, title in zip((left, middle, right), titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="experts N", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (left, middle):
        axis.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="a file under benchmarks/results")
    file = parser.parse_args().result.resolve().relative_to(ROOT)
    result = json.loads((ROOT / file).read_text())
    text = "\n".join([f"<!-- results: {file.as_posix()} -->", "", *block(result), ""])
    page = figures.BLOCK.sub(lambda match: f"{text}\n{match.group(3)}", PAGE.read_text())
    PAGE.write_text(page)
    draw(result, figures.IMAGES / IMAGE)


if __name__ == "__main__":
    main()
