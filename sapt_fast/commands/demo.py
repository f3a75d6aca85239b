"""`sapt-fast demo`: six generated tasks in sequence, learned with SAPT and with one shared LoRA."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sapt_fast.checks import MOST_SEED, require_count, require_folder
from sapt_fast.continual.data.sources import demo_tasks
from sapt_fast.continual.run.loop import Results, run_alone, run_continual
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.files.writing import write_json
from sapt_fast.methods.sapt import SaptConfig

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["demo_settings", "demo_tables", "run_demo", "tiny_model"]

STRATEGIES = ("sapt", "seqlora")
# Values that override the recipe for a strategy: prompts need far higher learning rates.
STRATEGY_VALUES = {name: {"learning_rate": 0.3} for name in ("sapt_prompt", "progprompt", "l2p")}


def demo_settings(
    strategy: str = "sapt", *, seed: int = 0, progress: bool = False
) -> ContinualSettings:
    """Returns the demo's settings.

    The router learns about as fast as the LoRA. If it learned much more slowly, B would grow to
    compensate for a tiny mixing weight, and routing would not converge.
    """
    return ContinualSettings(
        strategy=strategy,
        sapt=SaptConfig(r=8, lora_alpha=16, key_init="mean_query", kl_ratio=0.5),
        learning_rate=3e-3,
        key_learning_rate=1e-2,
        query_learning_rate=1e-3,
        steps=80,
        batch_size=32,
        accumulation=1,
        max_grad_norm=0.0,
        max_source_length=16,
        max_target_length=8,
        replay_share=16 / 512,
        replay_batch_size=16,
        eval_batch_size=128,
        save_steps=80,
        seed=seed,
        device="cpu",
        progress=progress,
    )


def run_demo(
    output_dir: str | os.PathLike[str], *, seed: int = 0, progress: bool = False
) -> dict[str, Results]:
    """Learns the six tasks each alone, with SAPT and with SeqLoRA, on the CPU in one thread.

    Args:
        output_dir: gets a folder of each run (`sapt/attention.png` is the heat map) and demo.json;
            an interrupted demo in this folder is resumed.
        seed: seed of the rows, the initial weights and the order of training.
        progress: show progress bars of each training.

    Returns:
        The results by strategy.

    Raises:
        NotADirectoryError: if `output_dir` is a file, or below one.
        ValueError: if the seed is not valid, or the folder holds a demo with another seed.
    """
    require_folder("output", output_dir)
    require_count("seed", seed, least=0, most=MOST_SEED)
    folder, tasks, tokenizer = Path(output_dir), demo_tasks(seed), CharTokenizer()
    start = time.perf_counter()
    results: dict[str, Results] = {}
    with tiny_model():
        settings = demo_settings("single", seed=seed, progress=progress)
        alone = run_alone(load_backbone(), tokenizer, tasks, folder / "alone", settings)
        for strategy in STRATEGIES:
            settings = demo_settings(strategy, seed=seed, progress=progress)
            results[strategy] = run_continual(
                load_backbone(), tokenizer, tasks, folder / strategy, settings, alone=alone
            )
    summary = {name: result.metrics.as_dict() for name, result in results.items()}
    write_json(
        folder / "demo.json",
        {"seed": seed, "metrics": summary, "alone": alone, "seconds": time.perf_counter() - start},
    )
    return results


def demo_tables(results: Mapping[str, Results]) -> tuple[Table, Table]:
    """Two `rich` tables: the metrics by strategy, and each task's score after the last task."""
    from rich.table import Table

    first = next(iter(results.values()))
    metrics = Table(
        title=f"{len(first.tasks)} tasks in sequence, exact match in %",
        caption="AP: mean after the last task. F.Ra: score lost since its best. FWT: gain over "
        "each task learned alone. BWT: change since a task was learned.",
    )
    metrics.add_column("strategy")
    for name in first.metrics.as_dict():
        metrics.add_column(name, justify="right")
    for strategy, result in results.items():
        values = result.metrics.as_dict().values()
        metrics.add_row(strategy, *(f"{value:.1f}" for value in values))

    tasks = Table(title="score of each task after the last one")
    tasks.add_column("task")
    alone = {} if first.alone is None else {"alone": first.alone}
    columns = {**{name: result.scores[-1] for name, result in results.items()}, **alone}
    for name in columns:
        tasks.add_column(name, justify="right")
    for index, task in enumerate(first.tasks):
        tasks.add_row(task, *(f"{scores[index]:.1f}" for scores in columns.values()))
    return metrics, tasks


@contextmanager
def tiny_model() -> Iterator[None]:
    """A context that speeds up many trainings of a tiny model.

    torch uses one thread, as a second one only costs time, and garbage collections skip what was
    imported before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
