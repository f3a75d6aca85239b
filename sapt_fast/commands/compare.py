"""`sapt-fast compare`: several strategies over seeds and orders, in one table.

The runs are imported when they start, so that the help of the command does not load transformers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

from sapt_fast.checks import MOST_SEED, require_count
from sapt_fast.commands.options import PANELS, option, with_fields
from sapt_fast.commands.output import show
from sapt_fast.commands.source_options import SOURCE_FIELDS, source_of
from sapt_fast.continual.data.sources import DEMO, Source
from sapt_fast.continual.settings import PRESETS, ContinualSettings, parse_values

__all__ = ["compare_command"]


@with_fields([*SOURCE_FIELDS, "device", "progress"], ContinualSettings, Source, panels=PANELS)
def compare_command(
    output: Annotated[
        Path, option("Folder of the comparison; an existing one in this folder is resumed.")
    ],
    orders: Annotated[
        list[str] | None,
        option(
            "A published order, or task names separated by commas; may be repeated.",
            "--order",
            panel="Data",
            default="all tasks",
        ),
    ] = None,
    strategies: Annotated[
        str,
        option(
            "Strategies of `train`, separated by commas; NAME=STRATEGY gives one another name, so "
            "that the table can have it twice.",
            panel="Training",
        ),
    ] = "sapt,seqlora,joint,replay,ewc,lwf,olora,epi",
    seeds: Annotated[str, option("Seeds, separated by commas.", panel="Training")] = "0",
    preset: Annotated[
        str | None,
        option(
            f"Settings of the original SAPT code, as in `train`: {', '.join(PRESETS)}.",
            panel="Training",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        option(
            "NAME=VALUE for all strategies, ROW.NAME=VALUE for one: any setting of `train` "
            "(learning_rate, steps, r, ...) or option of the strategy; may be repeated.",
            "--set",
            panel="Training",
        ),
    ] = None,
    fwt: Annotated[
        bool, option("Learn every task alone first, to compute FWT.", panel="Training")
    ] = True,
    tensorboard: Annotated[
        bool, option("Write the scores for TensorBoard too.", panel="Machine")
    ] = False,
    **fields: Any,
) -> None:
    """Runs `compare` with the options of the command line."""
    from sapt_fast.continual.compare.compare import compare, settings_of_rows
    from sapt_fast.continual.compare.report import comparison_table

    source = source_of(fields, preset)
    base = ContinualSettings.of(preset)
    context: AbstractContextManager[None] = nullcontext()
    defaults = None
    if source.benchmark == DEMO and preset is None:
        from sapt_fast.commands.demo import STRATEGY_VALUES, demo_settings, tiny_model

        base, context, defaults = demo_settings(), tiny_model(), STRATEGY_VALUES
    base = base.but(device=fields["device"], progress=fields["progress"])
    given = parse_values(values or (), "set")
    rows = settings_of_rows(base, strategies.split(","), given, defaults)
    shared = {name: value for name, value in given.items() if name in ContinualSettings.names()}
    with context:
        comparison = compare(
            source, rows, output,
            orders=orders or None, seeds=_seeds(seeds), alone=base.but(**shared) if fwt else None,
            tensorboard=tensorboard, progress=fields["progress"],
        )  # fmt: skip
    show(comparison_table(comparison), f"written to {output}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds: got {text!r}, expected numbers separated by commas") from None
    for seed in seeds:
        require_count("seeds", seed, least=0, most=MOST_SEED)
    return seeds
