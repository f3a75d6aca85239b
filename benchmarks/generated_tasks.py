"""Continual learning on generated tasks with a small T5: prompt pools and pseudo-samples.

    python benchmarks/generated_tasks.py

learns the six tasks of the demo one after the other, forwards and backwards, with the strategies
that an encoder cannot use beside SAPT and one LoRA alone. Each strategy's learning rate is chosen
on dev rows of the first order, with seed 0. The pseudo-samples of `generative_replay`, `lfpt5` and
`sapt_pseudo_samples` come from generators that were trained on the tasks of seed 0. Every run is a
folder under --work: a script that was killed goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import measure
from continual_protocol import record, report, tune

from sapt_fast.commands.demo import demo_settings
from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.data.sources import DEMO, Source
from sapt_fast.continual.run.pseudo_samples import make_pseudo_samples
from sapt_fast.continual.settings import ContinualSettings, GeneratorSettings

LORA_RATES, PROMPT_RATES = (1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0, 3.0)
PROMPTS = ("sapt_prompt", "progprompt", "l2p")
PSEUDO_SAMPLES = ("sapt_pseudo_samples", "generative_replay", "lfpt5")
ROWS = "sapt,sapt_pseudo_samples,sapt_prompt,progprompt,l2p,generative_replay,lfpt5,seqlora"
# The released ones are for words: 5000 steps, and a penalty that characters do not bear.
GENERATOR = GeneratorSettings(
    learning_rate=5e-3, steps=300, batch_size=32, max_length=16, repetition_penalty=1.2,
    lora_dropout=0.0, share=16 / 512,
)  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS, help="of the table: strategies, and SAPT's forms")
    parser.add_argument("--tasks", help="the first order; by default the demo's")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=demo_settings().steps)
    parser.add_argument("--generator-steps", type=int, default=GENERATOR.steps)
    parser.add_argument("--tuning-tasks", type=int, default=3, help="as many, of the first order")
    parser.add_argument("--work", type=Path, default=Path("runs/generated_tasks"))
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args(given)


def at_rate(settings: ContinualSettings, rate: float) -> ContinualSettings:
    """With this learning rate; the router keeps its own."""
    return settings.but(learning_rate=rate)


def make_all_pseudo_samples(source: Source, folder: Path, settings: GeneratorSettings) -> None:
    """Pseudo-samples of all tasks of the source, those that are not there yet."""
    model, tokenizer = source.load_model()
    for task in source.load_tasks():
        make_pseudo_samples(model, tokenizer, task, folder, settings, seed=source.seed)


def settings_of(row: str, base: ContinualSettings, pseudo_samples: Path) -> ContinualSettings:
    """What a row starts from."""
    replay = str(pseudo_samples) if row in PSEUDO_SAMPLES else None
    return base.but(strategy="sapt" if row == "sapt_pseudo_samples" else row, replay=replay)


def main(given: Sequence[str] | None = None) -> Path:
    options = arguments(given)
    source = Source(model=DEMO, benchmark=DEMO, tasks=options.tasks)
    names = [task.name for task in source.load_tasks()]
    orders = [",".join(names), ",".join(names[::-1])][: options.orders]
    base = replace(demo_settings(), steps=options.steps)
    generator = replace(GENERATOR, steps=options.generator_steps)
    pseudo_samples = options.work / "pseudo_samples"
    rows = {row: settings_of(row, base, pseudo_samples) for row in options.rows.split(",")}
    if any(row in PSEUDO_SAMPLES for row in rows):
        make_all_pseudo_samples(source, pseudo_samples, generator)
    rates = {row: PROMPT_RATES if row in PROMPTS else LORA_RATES for row in rows}
    few = replace(source, tasks=",".join(names[: options.tuning_tasks]))
    rows, tuning = tune(few, rows, rates, options.work / "tuning", at_rate)
    comparison = compare(
        source, rows, options.work / "runs",
        orders=orders,
        seeds=[int(seed) for seed in options.seeds.split(",")],
        alone=rows.get("seqlora"),
    )  # fmt: skip
    return record(
        "generated-tasks",
        given,
        comparison,
        options.out,
        orders=orders,
        generator=asdict(generator),
        rows=report(comparison, rows, base, tuning),
    )


if __name__ == "__main__":
    main()
