"""Class-incremental learning on images with every method of the library, on a CPU.

    python benchmarks/images.py --data DIR --model DIR/dinov2-small --work DIR/work
    python benchmarks/images.py ... --report --frozen FILE   # writes the result of what has run

`--data` holds the folders that `image_assets.py` writes, `<set>-<seed>`; the seed draws the sample,
the split, the order of classes, and what training draws. The task of a test image is not known. All
methods train blocks 5 to 8 of a DINOv2 ViT-S at 56 pixels in some way (`image_methods.py`), and
share batches, steps, optimizer, gradient clipping and the loss: cross-entropy over the classes of
the task at hand ("joint": over all).

Each run is predicted from in several ways: by its own head, and by nearest class mean, LDA and
ridge on what its head reads, whose statistics were summed up as each task ended. "Refitted" heads
read all training images under the final model, which continual learning cannot. The bar is the same
heads on features that nobody trained: `images_frozen.py`, whose result is FILE.

Learning rates are tuned alike for all: on the first three tasks of emoji, seed 0, with a quarter of
their training images held out; first the head's, then each method's own. What decides is the
incremental accuracy of the method's own head (the mean over tasks of the accuracy after each): the
accuracy at the end counts 48 images and ties. Rates are tried until the best has worse ones on both
sides.

Every run is a file under `--work/cells`: a script that was ended goes on with the same command, and
nothing runs twice. Several may share the folder if their `--methods` or `--seeds` differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from image_data import CLASSES_A_TASK, Split, held_out, load_split, tasks_of
from image_methods import FIRST, METHODS, LdaExperts, Method, Rows, as_images, upper_model
from image_selection import spread
from image_targets import bar_of, targets
from measure import RESULTS, environment, save, write
from torch import Tensor

from sapt_fast.continual.closed_form import ClassStatistics

HEADS = ("own", "NCM", "LDA", "ridge")
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
_FIRST_TRIED = slice(4, 7)
BATCH, EVAL_BATCH = 16, 50
TUNING_SET, TUNING_TASKS, TUNING_SHARE = "emoji", 3, 0.25
_HEAD = "fine-tuned head"


@dataclass(frozen=True)
class Data:
    """One seed of a data set.

    Attributes:
        train, test: the images.
        tasks: the classes of each task.
    """

    train: Rows
    test: Rows
    tasks: list[list[int]]

    def of_task(self, rows: Rows, classes: Sequence[int]) -> Rows:
        """Returns the rows of some classes."""
        return rows.at(torch.isin(rows.labels, torch.tensor(classes)))


def incremental(run: dict[str, Any]) -> float:
    """Returns the mean over tasks of the accuracy after each, by the method's own head."""
    return fmean(fmean(row) for row in run["matrix"]["own"])


def rows_of(split: Split) -> Rows:
    """Returns the images of a split, with their queries."""
    return Rows(as_images(split.states["below"]), split.states["mean.9"], split.labels)


def load(name: str, seed: int, options: argparse.Namespace) -> Data:
    """Returns one seed of a data set."""
    folder = options.data / f"{name}-{seed}"
    train, test = (
        load_split(folder / part, options.model, options.work, below=FIRST)
        for part in ("train", "test")
    )
    tasks = tasks_of(train.names, CLASSES_A_TASK[name], seed)
    return Data(rows_of(train), rows_of(test), tasks)


def for_tuning(data: Data) -> Data:
    """Returns the first tasks, with held-out training images in place of test images."""
    tasks = data.tasks[:TUNING_TASKS]
    rows = data.of_task(data.train, [label for task in tasks for label in task])
    dev = held_out(rows.labels, TUNING_SHARE, 0)
    return Data(rows.at(~dev), rows.at(dev), tasks)


class Run:
    """One method on one seed of a data set.

    Args:
        name: of the method.
        data: the images.
        rate: of the method's own parameters.
        head_rate: of the head.
        steps: of a task.
        seed: of what the training draws.
        model: folder of a `Dinov2Model`.
    """

    def __init__(
        self,
        name: str,
        data: Data,
        rate: float,
        head_rate: float,
        steps: int,
        seed: int,
        model: Path,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.rate, self.head_rate, self.steps = data, rate, head_rate, steps
        self.classes = max(max(task) for task in data.tasks) + 1
        tokens = data.train.images.shape[1]
        self.model: Any = upper_model(model, tokens, self.classes)
        self.method: Method = METHODS[name](self.model, len(data.tasks))
        self.draws = torch.Generator().manual_seed(seed)
        self.owner = torch.zeros(self.classes, dtype=torch.int64)
        for number, task in enumerate(data.tasks):
            self.owner[task] = number
        self.read = ClassStatistics(self.model.classifier.in_features, self.classes)
        self.queries = ClassStatistics(data.train.queries.shape[1], self.classes)

    def __call__(self) -> dict[str, Any]:
        """Learns all tasks; returns accuracies, and what was chosen."""
        start, data, found = time.monotonic(), self.data, {head: [] for head in HEADS}
        together = self.method.together
        stages = [[c for task in data.tasks for c in task]] if together else data.tasks
        losses: list[float] = []
        for number, classes in enumerate(stages):
            rows = data.of_task(data.train, classes)
            losses.append(self.learn(number, classes, rows, len(data.tasks) if together else 1))
            learned = data.tasks if together else data.tasks[: number + 1]
            for head, scores in self.predict(learned).items():
                found[head].append(self.by_task(scores, learned))
        return {
            "accuracy": {head: fmean(rows[-1]) for head, rows in found.items()},
            "matrix": found,
            "loss of the last steps": losses,
            "refitted": self.refitted(),
            "chosen": self.chosen(),
            "seconds": time.monotonic() - start,
            **self.known(),
        }

    def learn(self, number: int, classes: list[int], rows: Rows, times: int) -> float:
        """Learns a task; returns the mean loss of the last ten steps."""
        method, model = self.method, self.model
        method.begin(number, rows)
        head = list(model.classifier.parameters())
        groups = [{"params": head, "lr": self.head_rate}]
        if own := method.parameters():
            groups.append({"params": own, "lr": self.rate})
        optimizer = torch.optim.Adam(groups)
        others = torch.ones(self.classes, dtype=torch.bool)
        others[classes] = False
        losses = []
        model.train()
        for _ in range(self.steps * times):
            batch = rows.at(torch.randint(len(rows), (BATCH,), generator=self.draws))
            logits = method.logits(batch)[0].masked_fill(others, -torch.inf)
            loss = F.cross_entropy(logits, batch.labels)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            (loss + method.loss(batch)).backward()
            torch.nn.utils.clip_grad_norm_([*head, *own], 1.0)
            optimizer.step()
        model.eval()
        method.end(rows)
        self.queries.update(rows.queries, rows.labels)
        if isinstance(method, LdaExperts):
            method.lda, method.owner = self.queries.lda(), self.owner
        told = replace(rows, told=torch.full((len(rows),), number))
        self.read.update(self.outputs(told)[1], rows.labels)
        return fmean(losses[-10:])

    @torch.no_grad()
    def outputs(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Returns logits [N, C] and what the head read."""
        places = torch.arange(len(rows)).split(EVAL_BATCH)
        parts = [self.method.logits(rows.at(part)) for part in places]
        logits, read = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(read)

    def predict(self, learned: list[list[int]]) -> dict[str, Tensor]:
        """Returns the scores [N, C] of each head on the test images of learned tasks."""
        rows = self.data.of_task(self.data.test, [c for task in learned for c in task])
        logits, read = self.outputs(rows)
        heads = (self.read.nearest_class_mean(), self.read.lda(), self.read.ridge())
        return dict(zip(HEADS, [logits, *(head(read) for head in heads)], strict=True))

    def refitted(self) -> dict[str, float]:
        """Returns accuracies of heads on the features that the final model has of all images.

        They need the images of all tasks, and show how stale the statistics of earlier tasks are.
        """
        train, test = self.data.train, self.data.test
        told = replace(train, told=self.owner[train.labels])
        statistics = ClassStatistics(self.model.classifier.in_features, self.classes)
        statistics.update(self.outputs(told)[1], train.labels)
        read = self.outputs(test)[1]
        heads = {"LDA": statistics.lda(), "ridge": statistics.ridge()}
        return {
            name: float((head(read).argmax(1) == test.labels).double().mean())
            for name, head in heads.items()
        }

    def by_task(self, scores: Tensor, learned: list[list[int]]) -> list[float]:
        """Returns the accuracy [T] of scores of the learned tasks' test images."""
        labels = self.data.of_task(self.data.test, [c for task in learned for c in task]).labels
        right = (scores.argmax(1) == labels).double()
        return [float(right[torch.isin(labels, torch.tensor(task))].mean()) for task in learned]

    def known(self) -> dict[str, float]:
        """Returns how often LDA finds the task, and the accuracy if the task is told."""
        method, rows = self.method, self.data.test
        if not isinstance(method, LdaExperts):
            return {}
        tasks = self.owner[rows.labels]
        routed = float((method.task_of(rows) == tasks).double().mean())
        told = self.outputs(replace(rows, told=tasks))[0]
        right = (told.argmax(1) == rows.labels).double().mean()
        return {"task found": routed, "within the known task": float(right)}

    @torch.no_grad()
    def chosen(self) -> dict[str, float]:
        """Returns how the prompts that prediction chooses spread; empty for other methods."""
        handle, rows = self.method.handle, self.data.test
        if getattr(handle, "attention", None) is None:
            return {}
        parts = []
        for places in torch.arange(len(rows)).split(EVAL_BATCH):
            self.method.logits(rows.at(places))
            parts.append(handle.attention.expand(len(places), -1))
        picked, tasks = torch.cat(parts), self.owner[rows.labels]
        if picked.is_floating_point():  # weights, not places
            if picked.shape[1] != len(self.data.tasks):
                return {}
            return {"weight of the own task": float(picked.gather(1, tasks[:, None]).mean())}
        return spread(picked, tasks, int(picked.max()) + 1)


# --- cells -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A run that is kept in a file.

    Attributes:
        part: "tuning" or the data set.
        method: its name.
        label: the seed, or the rate that is tried.
    """

    part: str
    method: str
    label: str

    def path(self, work: Path) -> Path:
        """Returns the file."""
        method = self.method.replace(", ", "-").replace(" ", "_")
        return work / "cells" / self.part / method / f"{self.label}.json"


class Experiment:
    """All cells of the command.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.methods: list[str] = options.methods.split(";")
        self.seeds = [int(seed) for seed in options.seeds.split(",")]
        self.sets: list[str] = options.sets.split(",")
        self.kept: dict[tuple[str, int], Data] = {}
        self.seconds: list[float] = []
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise SystemExit(f"--methods: got {unknown}, expected names among {list(METHODS)}")

    def data(self, name: str, seed: int) -> Data:
        """Returns one seed of a data set, read once."""
        if (name, seed) not in self.kept:
            self.kept = {(name, seed): load(name, seed, self.options)}
        return self.kept[name, seed]

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a run that is kept; None if there is none.

        Raises:
            SystemExit: if it was made with other settings.
        """
        path = cell.path(self.options.work)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        if found["steps"] != self.options.steps:
            raise SystemExit(
                f"{path}: got {found['steps']} steps, expected {self.options.steps}: use another "
                "folder --work, or the steps of the runs that are there"
            )
        return found

    def run(self, cell: Cell, name: str, data: Data, seed: int, rates: tuple[float, float]) -> Any:
        """Returns a cell's run, made now unless it is kept."""
        found = self.cell(cell)
        if found is None:
            steps = self.options.steps
            run = Run(name, data, *rates, steps, seed, self.options.model)
            about = environment("cpu")
            found = {"steps": steps, "rate": rates[0], "head_rate": rates[1], **run()}
            found |= {"commit": about["commit"], "package": about["package"]}
            path = cell.path(self.options.work)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(found, indent=1) + "\n")
            self.seconds.append(found["seconds"])
            shown = {head: f"{share:.3f}" for head, share in found["accuracy"].items()}
            print(f"{cell.part} {name} {cell.label}: {shown} {found['seconds']:.0f} s", flush=True)
        return found

    def tuned(self, name: str) -> tuple[float, float]:
        """Returns the rates of a method and of the head, which tuning chose."""
        head = self._best(_HEAD, None)
        return (0.0, head) if name == _HEAD else (self._best(name, head), head)

    def _best(self, name: str, head: float | None) -> float:
        """Returns the best rate, with worse ones on both sides where `RATES` has any."""
        tried = list(RATES[_FIRST_TRIED])
        while True:
            scores = [self._tried(name, rate, head) for rate in tried]
            place = scores.index(max(scores))
            first, last = RATES.index(tried[0]), RATES.index(tried[-1])
            if place == 0 and first > 0:
                tried.insert(0, RATES[first - 1])
            elif place == len(tried) - 1 and last < len(RATES) - 1:
                tried.append(RATES[last + 1])
            else:
                return tried[place]

    def _tried(self, name: str, rate: float, head: float | None) -> float:
        cell = Cell("tuning", name, f"{rate:g}")
        found = self.cell(cell)
        if found is None:
            data = for_tuning(self.data(TUNING_SET, 0))
            found = self.run(cell, name, data, 0, (0.0, rate) if head is None else (rate, head))
        return incremental(found)

    def cells(self) -> Iterator[tuple[str, int, str]]:
        """Yields data set, seed and method: one seed of all methods before the next seed."""
        for seed in self.seeds:
            for name in self.sets:
                for method in self.methods:
                    yield name, seed, method

    def all(self) -> None:
        """Runs what has not run, and prints when it will be done."""
        cells = list(self.cells())
        for number, (name, seed, method) in enumerate(cells):
            cell = Cell(name, method, f"seed{seed}")
            if self.cell(cell) is None:
                rates = self.tuned(method)
                self.run(cell, method, self.data(name, seed), seed, rates)
            left = sum(self.cell(Cell(n, m, f"seed{s}")) is None for n, s, m in cells)
            if left and self.seconds:
                minutes = left * fmean(self.seconds) / 60
                done = f"{number + 1} of {len(cells)}"
                print(f"{done}, about {minutes:.0f} minutes left, and tuning", flush=True)

    def report(self) -> dict[str, Any]:
        """Returns the runs that are there, and names those that are not."""
        runs: dict[str, Any] = {}
        missing: dict[str, dict[str, list[int]]] = {}
        for name, seed, method in self.cells():
            found = self.cell(Cell(name, method, f"seed{seed}"))
            if found is None:
                missing.setdefault(name, {}).setdefault(method, []).append(seed)
            else:
                runs.setdefault(name, {}).setdefault(method, {})[seed] = found
        tuning: dict[str, Any] = {}
        for method in METHODS:
            folder = Cell("tuning", method, "").path(self.options.work).parent
            files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
            tuning[method] = {rate: incremental(found) for rate, found in files.items()}
        result = {"runs": runs, "not run": missing, "tuning": tuning}
        if self.options.frozen is not None:
            result["bar"] = bar_of(json.loads(self.options.frozen.read_text()))
            result["targets"] = targets(runs, result["bar"])
        return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds the folders <set>-<seed>")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Dinov2Model")
    parser.add_argument("--work", type=Path, required=True, help="keeps frozen states and runs")
    parser.add_argument("--sets", default="emoji,mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=60, help="of a task, of 16 images each")
    parser.add_argument("--report", action="store_true", help="write the result; run nothing")
    parser.add_argument("--frozen", type=Path, help="a result of images_frozen.py, for the bar")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    experiment = Experiment(options)
    if not options.report:
        experiment.all()
    command = " ".join(["python", "benchmarks/images.py", *(given or sys.argv[1:])])
    about = {"environment": environment("cpu"), "only": "images", "command": command}
    settings = {"steps": options.steps, "batch": BATCH, "rates": RATES}
    print(save({**about, **settings, **experiment.report()}, options.out))


if __name__ == "__main__":
    main()
