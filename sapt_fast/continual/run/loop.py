"""The continual run: learns the tasks in order, scores those seen so far, and resumes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import set_seed

from sapt_fast import __version__
from sapt_fast.continual.data.image_transform import ImageTransform
from sapt_fast.continual.data.rows import TaskData, merged
from sapt_fast.continual.image_bench import ImageBench
from sapt_fast.continual.run import processes
from sapt_fast.continual.run.checkpoints import config_name, load_checkpoint, save_checkpoint
from sapt_fast.continual.run.checks import (
    check_alone,
    check_kind,
    check_processes,
    check_replay,
    check_sites,
    check_tasks,
)
from sapt_fast.continual.run.evaluate import Mixture, metric_of
from sapt_fast.continual.run.gather import gather_results, write_results
from sapt_fast.continual.run.memory import peak_memory, reset_peak_memory
from sapt_fast.continual.run.pseudo_samples import make_pseudo_samples, pseudo_sample_file
from sapt_fast.continual.run.stage import steps_of, train_stage
from sapt_fast.continual.run.state import RunFolder, read_alone, read_json
from sapt_fast.continual.scores.results import Results
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.stored_settings import differences
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.continual.workbench import Workbench
from sapt_fast.files.writing import write_json
from sapt_fast.methods.base import handles
from sapt_fast.methods.registry import handle_type
from sapt_fast.methods.run_header import model_header, trained_count
from sapt_fast.patching import patch, unpatch

__all__ = ["Results", "evaluate_run", "run_alone", "run_continual"]

logger = logging.getLogger(__name__)

ALONE_NAME = "alone.json"


def run_continual(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskData],
    output_dir: str | PathLike[str],
    settings: ContinualSettings | None = None,
    *,
    resume: bool = True,
    alone: Mapping[str, float] | None = None,
    source: Mapping[str, Any] | None = None,
) -> Results:
    """Learns the tasks in order and measures how much of each is retained.

    To resume an interrupted run, call it again with the same arguments; it ends with the same
    weights.

    Args:
        model: an unpatched transformers model with a language-modelling head, an encoder without
            any head (`continual.data.encoder`), or an image classifier with a row for every class
            (`continual.image_bench`). It is patched in place and keeps the adapters of the last
            task.
        tokenizer: its tokenizer, with a pad token; an `ImageTransform` for images.
        tasks: in learning order.
        output_dir: gets run.json, state.json, a checkpoint after each task (`load_pretrained`
            reads them), results.json, results.md and, with one adapter per task, attention.png.
        settings: defaults to `ContinualSettings()`.
        resume: whether to resume a run that is in `output_dir`.
        alone: each task's score when learned alone (`run_alone`), for FWT.
        source: a JSON-ready note of where model and tasks come from, kept in run.json.

    Raises:
        TypeError: if `model` is not a transformers model.
        ValueError: if there are no tasks, a split is empty or a name is given twice.
        ValueError: if the model is patched, or the tokenizer has no pad token.
        ValueError: if `output_dir` holds a run with different settings or data, or another process
            runs there.
        FileExistsError: if `output_dir` holds other files, or a run and `resume` is False.

    Several processes (torchrun, accelerate launch) give the results of one, up to rounding: they
    divide each micro-batch and the evaluation, and the first one writes. A run may be resumed with
    another number of processes.
    """
    settings = settings or ContinualSettings()
    if STRATEGIES[settings.strategy].alone:
        raise ValueError(f"strategy: {settings.strategy!r} has no sequence, use run_alone")
    run = _Run(model, tokenizer, tasks, settings)
    if alone is not None:
        check_alone(alone, run.names)
    with run.open(Path(output_dir), source, resume):
        run.learn_all()
        return run.report(alone)


def run_alone(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskData],
    output_dir: str | PathLike[str],
    settings: ContinualSettings | None = None,
    *,
    resume: bool = True,
    source: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Learns every task alone on the base model; the scores are the reference of FWT.

    Args and Raises as in `run_continual`, with these differences: the strategy is always "single",
    alone.json is written, and the model is unpatched at the end.

    Returns:
        The score of each task in percent, by name.
    """
    settings = replace(settings or ContinualSettings(), strategy="single", strategy_options={})
    run = _Run(model, tokenizer, tasks, settings)
    with run.open(Path(output_dir), source, resume):
        run.learn_all()
        run.reset()
        scores = {name: row[0] for name, row in zip(run.names, run.folder.scores, strict=True)}
        if processes.is_first():
            write_json(run.folder.path / ALONE_NAME, scores)
        processes.wait()
        return scores


def evaluate_run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskData],
    output_dir: str | PathLike[str],
    settings: ContinualSettings,
    mixture: Callable[[str], Mixture] | None = None,
) -> Results:
    """Computes the results of a finished run again, from its checkpoints alone.

    Nothing is written.

    Args:
        model, tokenizer, tasks: as in `run_continual`.
        output_dir: the run's folder.
        settings: those of the run; device and evaluation batch size may differ.
        mixture: called with a task's name, returns the weights of the adapters for its rows;
            defaults to those of the strategy. The attention in the results is always the
            strategy's.

    Raises:
        FileNotFoundError: if a checkpoint is missing.
        ValueError: as `run_continual`, and if `model` or `tasks` are not those of the run.
    """
    run = _Run(model, tokenizer, tasks, settings)
    run.folder = RunFolder(Path(output_dir), run.names)
    stored, ours = read_json(run.folder.path / "run.json", "tasks", "model"), run.description()
    for part in ("tasks", "model"):
        found = differences(stored[part], ours[part])
        if found:
            raise ValueError(
                f"{part}: not the {part} of the run in {output_dir}: " + "; ".join(found)
            )
    run.folder.read_costs()
    alone = read_alone(run.folder.path / "results.json", len(run.names))
    attention: list[list[float]] = []
    for index in run.stages:
        run.restore(index + 1)
        run.folder.scores.append(run.score_seen(index, mixture))
        attention.append(run.target(index))
    run.folder.attention = attention
    return run.results(alone)


class _Run:
    """One run; `learn_all` trains the stages that its folder does not have yet."""

    folder: RunFolder

    def __init__(
        self, model: Any, tokenizer: Any, tasks: Sequence[TaskData], settings: ContinualSettings
    ) -> None:
        if handles(model):
            raise ValueError("model: got a patched model; pass it unpatched (sapt_fast.unpatch)")
        check_tasks(tasks)
        self.device = processes.start(settings.device)
        if not processes.is_first():
            settings = replace(settings, progress=False)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        kind = STRATEGIES[settings.strategy]
        has_images = isinstance(tokenizer, ImageTransform)
        check_kind(settings.strategy, has_images)
        self.bench = (ImageBench if has_images else Workbench)(model, tokenizer, settings)
        self.given, self.tasks = tuple(tasks), self.bench.prepare(tasks)
        self.names = tuple(task.name for task in tasks)
        if kind.generates and not self.bench.writes:
            raise ValueError(
                f"strategy: {settings.strategy!r} generates text, which {type(model).__name__} "
                "cannot"
            )
        check_processes(settings)
        self.strategy = kind(
            self.bench, kind.options_of(settings.strategy, settings.strategy_options)
        )
        if has_images:  # before anything is written
            check_sites(model, self._config())
        # The tasks after which the model is saved and scored.
        self.stages = [len(tasks) - 1] if kind.together else list(range(len(tasks)))
        check_replay(self.bench, self.strategy, self.tasks)
        model.to(self.device)
        # How many tasks the model holds; None before it is patched.
        self._holds: int | None = None

    def open(
        self, path: Path, source: Mapping[str, Any] | None, resume: bool
    ) -> AbstractContextManager[Any]:
        """Opens the folder and locks it until the context ends."""
        description = {**self.description(), "source": dict(source or {})}
        with processes.first_goes_first():
            resume = resume or not processes.is_first()
            self.folder = RunFolder.open(path, self.names, description, resume=resume)
        self.folder.complete_with = config_name(self.model, self._config())
        self.bench.pseudo_samples = path / "pseudo_samples"
        return closing(self.folder)

    def description(self) -> dict[str, Any]:
        """Returns a JSON-ready description of the run; runs with equal ones are the same."""
        return {
            "settings": self.settings.to_dict(),
            "tasks": {
                task.name: {
                    "position": position,
                    **given.describe(),
                    "content": task.digest_of_prompts(),
                }
                for position, (given, task) in enumerate(zip(self.given, self.tasks, strict=True))
            },
            "model": {
                "class": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "dtype": str(self.model.dtype),
                **self.bench.describe(),
            },
            "version": __version__,
        }

    # --- the steps of a run ---

    def learn_all(self) -> None:
        left = self.stages[len(self.folder.scores) :]
        if left:
            site = handle_type(self._config().method, "strategy").site
            logger.info("%s", model_header(self.model, self.device, site))
        for index in left:
            logger.info(
                "%s, task %d of %d: %s",
                self.settings.strategy, index + 1, len(self.tasks), self.names[index],
            )  # fmt: skip
            start = time.perf_counter()
            reset_peak_memory(self.bench.device)
            if not self.folder.has_checkpoint(index):
                self.learn(index)
            self.restore(index + 1)
            scores = self.score_seen(index)
            self.folder.scores.append(scores)
            self.folder.attention.append(self.target(index))
            self.folder.seconds.append(time.perf_counter() - start)
            self.folder.peaks.append(peak_memory(self.bench.device))
            self.folder.write()
            logger.info("scores: %s", "  ".join(f"{value:.1f}" for value in scores))
        self._remove(self.folder.path / "training")

    def learn(self, index: int) -> None:
        """Trains on a task, from the model after the one before, and saves what it came to."""
        strategy, seed = self.strategy, 1000 * self.settings.seed + index
        task = merged(self.tasks) if strategy.together else self.tasks[index]
        learned = () if strategy.alone or strategy.together else self.tasks[:index]
        self._generate(learned)
        self.restore(0 if strategy.alone or strategy.together else index)
        handle = self.bench.handle
        set_seed(seed)
        strategy.begin_task(task, learned)
        self._holds = None
        self.folder.trained.append(sum(p.numel() for p in handle.trainable_parameters()))
        self.folder.write()
        if strategy.trains:
            count, rows = trained_count(handle.trainable_parameters()), len(task.train)
            steps = steps_of(self.settings, rows, self._steps())
            logger.info("%s, %d rows, %d steps", count, rows, steps)
            folder = self.folder.training(index)
            train_stage(self.bench, strategy, task, learned, folder, seed, self._steps())
        with self.bench.seeded():
            strategy.end_task(task)
            self.bench.end_task(task, strategy.mixture)
            if strategy.routes:
                handle.targets[task.name] = self.bench.mean_attention(task.dev, strategy.mixture)
        self.folder.forget_unfinished(index)
        state = {**strategy.state(), **self.bench.state()}
        save_checkpoint(handle, self.folder.checkpoint(index), state)
        self._holds = index + 1
        self._remove(self.folder.training(index))

    def _remove(self, folder: Path) -> None:
        """Deletes a folder that is no longer needed, once the files written before are complete."""
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)
        processes.wait()

    def _generate(self, learned: Sequence[TaskData]) -> None:
        """Generates the pseudo-samples of earlier tasks that do not exist yet."""
        folder, settings = self.bench.pseudo_samples, self.settings
        if folder is None or settings.replay != "generated" or not self.strategy.pseudo:
            return
        for task in learned:
            if pseudo_sample_file(folder, task).is_file():
                continue
            self.reset()  # the generator is one of the base model
            make_pseudo_samples(
                self.model,
                self.tokenizer,
                task,
                folder,
                settings.generator,
                work=self.folder.path / "training" / f"generator-{task.name}",
                target_modules=settings.sapt.target_modules,
                seed=settings.seed,
                bf16=settings.bf16,
                progress=settings.progress,
            )

    def restore(self, count: int) -> None:
        """Makes the model what it was after `count` tasks."""
        if self._holds == count:
            return
        self.reset()
        if count:
            folder = self.folder.checkpoint(count - 1)
            state = load_checkpoint(self.model, folder, self.settings.strategy, self._config())
            self.bench.require_state(state, folder)
        else:
            set_seed(self.settings.seed)
            patch(self.model, self._config())
            self.bench.handle.strategy = self.settings.strategy
            state = {}
        self.strategy.load_state(state)
        self.bench.load_state(state)
        self._holds = count

    def reset(self) -> None:
        """Takes the adapters off."""
        if handles(self.model):
            unpatch(self.model)
        self.bench.reset()
        self._holds = None

    def _config(self) -> Any:
        """Returns the config with which the strategy patches the model."""
        return self.strategy.configure(self.bench.configure(self.settings.sapt))

    def target(self, index: int) -> list[float]:
        """Mean weights of a task's dev inputs when it was learned; empty if inputs do not route."""
        if not self.strategy.routes:
            return []
        found = self.bench.handle.targets.get(self.names[index])
        return [] if found is None else found.tolist()

    def score_seen(
        self, index: int, mixture: Callable[[str], Mixture] | None = None
    ) -> list[float]:
        """Scores of the tasks up to `index`; of that one only if tasks are learned alone."""
        seen = [self.tasks[index]] if self.strategy.alone else self.tasks[: index + 1]
        return [
            self.bench.score(
                getattr(task, self.settings.scored),
                task.benchmark,
                self.strategy.mixture if mixture is None else mixture(task.name),
            )
            for task in seen
        ]

    # --- training ---

    def _steps(self) -> int:
        """Optimizer steps of a stage; -1 if epochs count."""
        steps = self.settings.steps or -1
        return steps * len(self.tasks) if steps > 0 and self.strategy.together else steps

    # --- its results ---

    def results(self, alone: Sequence[float] | None) -> Results:
        return gather_results(
            self.folder, self.stages, type(self.strategy), alone, self._testing_attention()
        )

    def _testing_attention(self) -> NDArray[np.float64] | None:
        """[T, T] float64: mean weights of each task's scored rows on the adapters after the last
        task; None unless every task has an adapter that inputs choose."""
        if not self.strategy.routes or not all(self.folder.attention):
            return None
        count = len(self.tasks)
        attention = np.zeros((count, count))
        self.restore(count)
        for index, task in enumerate(self.tasks):
            rows = getattr(task, self.settings.scored)
            attention[index] = self.bench.mean_attention(rows, self.strategy.mixture).numpy()
        return attention

    def report(self, alone: Mapping[str, float] | None) -> Results:
        self.restore(len(self.tasks))
        results = self.results(None if alone is None else [alone[name] for name in self.names])
        if processes.is_first():
            metrics = sorted({metric_of(t.benchmark, self.settings) for t in self.tasks})
            further = self.bench.report(self.tasks)
            write_results(results, self.settings.strategy, metrics, further)
        processes.wait()
        return results
