"""Continual learning on generated tasks with a small T5: prompt pools and pseudo-samples.

    python benchmarks/generated_tasks.py --seeds 0

learns the six tasks of the demo one after the other, forwards and backwards, with the strategies
that an encoder cannot use beside SAPT, replay and one LoRA. The weight of each strategy's second
loss and its learning rate are chosen on dev rows of the first tasks, with seed 0; the grids grow
until the best value is inside (`GRIDS`). Prompts train for `--prompt-steps`. The pseudo-samples of
`generative_replay`, `lfpt5` and `sapt_pseudo_samples` come from generators that were trained on the
tasks of seed 0. Every run is a folder under --work: a script that was ended goes on with the same
command, and further seeds or rows may be added. The result is written after each seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import torch
from continual_protocol import (
    Grid,
    constant_answers,
    known_rows,
    one_seed_more,
    record,
    report,
    tune,
)

from sapt_fast.commands.demo import demo_settings
from sapt_fast.continual.compare.compare import compare, settings_of_rows
from sapt_fast.continual.data.sources import DEMO, Source
from sapt_fast.continual.run.pseudo_samples import make_pseudo_samples
from sapt_fast.continual.settings import ContinualSettings, GeneratorSettings

PROMPTS = ("sapt_prompt", "progprompt", "l2p")
PSEUDO_SAMPLES = ("sapt_pseudo_samples", "generative_replay", "lfpt5", "lfpt5_kl_sum")
# The rows of the table, with settings and options of their strategies where they are not defaults.
# Those whose strategy this version lacks are left out.
ROWS: dict[str, dict[str, Any]] = {
    "sapt": {},
    "sapt_pseudo_samples": {"strategy": "sapt"},
    "sapt_prompt": {},
    "progprompt": {},
    "l2p": {},
    "replay": {},
    "generative_replay": {},
    "lfpt5": {},
    "lfpt5_kl_sum": {"strategy": "lfpt5", "kl_sum": True, "task_markers": True},
    "lfpt5_generates": {
        "strategy": "lfpt5", "kl_sum": True, "task_markers": True, "generate": True,
        "replay": "none",
    },
    "inflora": {},
    "gainlora": {},
    "sd_lora": {},
    "joint": {},
    "seqlora": {},
}  # fmt: skip
LORA_RATES = Grid("learning_rate", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), (1e-3, 3e-3, 1e-2))
PROMPT_RATES = Grid("learning_rate", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.3, 1.0, 3.0))
_WEIGHT = Grid("weight", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.3, 1.0, 3.0))
_SHARE = Grid("kl_share", (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.9), (1e-3, 0.01, 0.03))
WEIGHTS: dict[str, tuple[Grid, ...]] = {
    "replay": (_WEIGHT,),
    "generative_replay": (_WEIGHT,),
    "lfpt5": (_SHARE,),
    "lfpt5_kl_sum": (_SHARE,),
    "lfpt5_generates": (_SHARE,),
}
GRIDS = {
    row: (*WEIGHTS.get(row, ()), PROMPT_RATES if row in PROMPTS else LORA_RATES) for row in ROWS
}
# The released ones are for words: 5000 steps, and a penalty that characters do not bear.
GENERATOR = GeneratorSettings(
    learning_rate=5e-3, steps=300, batch_size=32, max_length=16, repetition_penalty=1.2,
    lora_dropout=0.0, share=16 / 512,
)  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"of the table, by default all of {', '.join(ROWS)}")
    parser.add_argument("--tasks", help="the first order; by default the demo's")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=demo_settings().steps)
    parser.add_argument("--prompt-steps", type=int, default=240, help=f"of {', '.join(PROMPTS)}")
    parser.add_argument("--generator-steps", type=int, default=GENERATOR.steps)
    parser.add_argument("--tuning-tasks", type=int, default=3, help="as many, of the first order")
    parser.add_argument("--work", type=Path, default=Path("runs/generated_tasks"))
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args(given)


def make_all_pseudo_samples(source: Source, folder: Path, settings: GeneratorSettings) -> None:
    """Pseudo-samples of all tasks of the source, those that are not there yet."""
    model, tokenizer = source.load_model()
    for task in source.load_tasks():
        make_pseudo_samples(model, tokenizer, task, folder, settings, seed=source.seed)


def settings_of(
    names: Sequence[str], base: ContinualSettings, pseudo_samples: Path, prompt_steps: int
) -> dict[str, ContinualSettings]:
    """Returns what the rows start from."""
    values: dict[str, Any] = {}
    for name in names:
        own = dict(ROWS[name])
        if name in PSEUDO_SAMPLES:
            own["replay"] = str(pseudo_samples)
        if name in PROMPTS:
            own["steps"] = prompt_steps
        values |= {f"{name}.{option}": v for option, v in own.items() if option != "strategy"}
    return settings_of_rows(base, [f"{n}={ROWS[n].get('strategy', n)}" for n in names], values)


def main(given: Sequence[str] | None = None) -> Path:
    options = arguments(given)
    torch.set_num_threads(1)
    source = Source(model=DEMO, benchmark=DEMO, tasks=options.tasks)
    names = [task.name for task in source.load_tasks()]
    orders = [",".join(names), ",".join(names[::-1])][: options.orders]
    base = replace(demo_settings(), steps=options.steps)
    generator = replace(GENERATOR, steps=options.generator_steps)
    pseudo_samples = options.work / "pseudo_samples"
    asked = known_rows(ROWS, options.rows)
    rows = settings_of(asked, base, pseudo_samples, options.prompt_steps)
    if any(row in PSEUDO_SAMPLES for row in rows):
        make_all_pseudo_samples(source, pseudo_samples, generator)
    few = replace(source, tasks=",".join(names[: options.tuning_tasks]))
    rows, tuning = tune(few, rows, GRIDS, options.work / "tuning")
    for seeds in one_seed_more(options.seeds):
        comparison = compare(
            source, rows, options.work / "runs",
            orders=orders, seeds=seeds, alone=rows.get("seqlora"),
        )  # fmt: skip
        path = record(
            "generated-tasks",
            given,
            comparison,
            options.out,
            orders=orders,
            generator=asdict(generator),
            constant=constant_answers(source, seeds, base),
            rows=report(comparison, rows, base, tuning),
        )
    return path


if __name__ == "__main__":
    main()
