"""The command `sapt-fast`: reads options and calls what is in `sapt_fast.commands`.

Modules that import torch are imported by the command that needs them.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sapt_fast.commands.deferred import DeferredCommand
from sapt_fast.commands.layer_size import LayerSize
from sapt_fast.commands.options import is_given, option, with_fields
from sapt_fast.commands.output import is_first_process, show
from sapt_fast.version import __version__

_UsageError: Any = typer.BadParameter.__base__  # typer does not export it

app = typer.Typer(
    name="sapt-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sapt-fast {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Continual learning with SAPT: a pool of LoRA adapters that share attention."""


@app.command(cls=DeferredCommand)
def train() -> Callable[..., None]:
    """Learn a sequence of tasks; writes checkpoints, metrics, a table and a heat map.

    To resume an interrupted run, repeat the command.
    """
    from sapt_fast.commands.train import train_command

    return train_command


@app.command(cls=DeferredCommand)
def compare() -> Callable[..., None]:
    """Compare strategies over seeds and orders: one table, score matrices, curves and heat maps.

    Finished runs are kept, so strategies and seeds can be added by a later command. On the
    generated tasks (--benchmark demo) settings default to those of `sapt-fast demo`.
    """
    from sapt_fast.commands.compare import compare_command

    return compare_command


@app.command(cls=DeferredCommand)
def edit() -> Callable[..., None]:
    """Edit single facts of a model one after another; writes metrics, a table and curves.

    The answers are measured by generation after every few edits: those of the edits so far, of
    their paraphrases, and of prompts that must not change. To resume an interrupted run, repeat the
    command.
    """
    from sapt_fast.commands.edit import edit_command

    return edit_command


@app.command(cls=DeferredCommand)
def answer() -> Callable[..., None]:
    """Answer a question in points that are written in parallel, where that suits it.

    The model first writes a skeleton, then all points at once (Skeleton-of-Thought). A router
    decides which questions are answered so. On a terminal the points grow side by side. The answer
    goes to the standard output, all else to the standard error.
    """
    from sapt_fast.commands.answer import answer_command

    return answer_command


@app.command(name="train-router", cls=DeferredCommand)
def train_router() -> Callable[..., None]:
    """Train the classifier that decides which questions are answered by Skeleton-of-Thought.

    On the package's questions, 'tiny' takes about a minute on one core. An interrupted training
    starts again. The confusion tables are also written to report.json in --output.
    """
    from sapt_fast.commands.train_router import train_router_command

    return train_router_command


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    model: Annotated[str | None, option("The base model, if it has moved.")] = None,
    data: Annotated[str | None, option("The benchmarks' folder, if it has moved.")] = None,
    device: Annotated[
        str | None, option("'cpu' or 'cuda'.", default="the device of the run's settings")
    ] = None,
    eval_batch_size: Annotated[
        int | None, option("Rows of a batch.", default="that of the run's settings")
    ] = None,
    progress: Annotated[bool, option("Show progress bars.")] = True,
) -> None:
    """Compute the metrics of a finished run again from its checkpoints."""
    from sapt_fast.commands.evaluate import show_evaluation

    show_evaluation(
        run,
        model=model,
        data=data,
        device=device,
        eval_batch_size=eval_batch_size,
        progress=progress,
    )


@app.command()
def demo(
    output: Annotated[Path, option("Folder for the runs.")] = Path("sapt_demo"),
    seed: Annotated[int, option("Seed of the rows, the weights and the order of training.")] = 0,
    progress: Annotated[bool, option("Show progress bars of each training.")] = False,
) -> None:
    """Learn six generated tasks with SAPT and with one shared LoRA; about a minute on a CPU."""
    from sapt_fast.commands.demo import demo_tables, run_demo

    results = run_demo(output, seed=seed, progress=progress)
    show(*demo_tables(results), f"attention heat map: {output / 'sapt' / 'attention.png'}")


bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
@with_fields([field.name for field in fields(LayerSize)], LayerSize)
def bench(
    context: typer.Context,
    device: Annotated[str, option("'cpu' or 'cuda'.")] = "cpu",
    dtype: Annotated[str, option("'float32', 'bfloat16' or 'float16'.")] = "float32",
    seconds: Annotated[float, option("Seconds of each measurement.")] = 0.5,
    **size: int,
) -> None:
    """Time one mixed layer in every backend against the layer without adapters."""
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if is_given(context, name)]
        if given:
            raise ValueError(f"{given[0]}: `bench {context.invoked_subcommand}` does not take it")
        return
    from sapt_fast.commands.bench import show_times

    show_times(LayerSize(**size), device, dtype, seconds)


@bench_app.command()
def tune(
    widths: Annotated[
        str, option("Widths of the layers, D (square) or D_INxD_OUT, separated by commas.")
    ] = "768,1024,2048,4096,5120,8192,1024x4096,4096x1024,4096x11008,11008x4096",
    ranks: Annotated[str, option("Total ranks, separated by commas.")] = "16,64,256,1024",
    rows: Annotated[
        str, option("Rows of a batch, separated by commas.")
    ] = "16,256,2048,8192,32768",
    dtypes: Annotated[
        str, option("bfloat16, float16 or float32, separated by commas.")
    ] = "bfloat16",
    output: Annotated[
        Path | None, option("Write the table here, not where later runs look for it.")
    ] = None,
) -> None:
    """Time the GEMM variants of a mixed layer on this GPU and record the fastest.

    Later runs read the table from the folder in SAPT_FAST_ROUTES, which defaults to
    sapt_fast/routes in the user's cache folder (XDG_CACHE_HOME or ~/.cache); the file is named
    after the GPU. Without a table, a cost model chooses.
    """
    from sapt_fast.commands.tune import tune_routes

    tune_routes(widths, ranks, rows, dtypes, output)


@app.command()
def doctor() -> None:
    """Show what this machine has, and which backend each op uses and why."""
    from sapt_fast.commands.doctor import backend_table, environment_table

    show(environment_table(), backend_table())


def main() -> None:
    """Entry point; prints expected errors as one line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if is_first_process():
        for part in ("sapt_fast.continual", "sapt_fast.editing"):
            logging.getLogger(part).setLevel(logging.INFO)
    try:
        sys.exit(app(standalone_mode=False))
    except typer.BadParameter as error:
        typer.echo(f"error: {_bad_parameter(error, sys.argv[1:])}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except _UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _bad_parameter(error: typer.BadParameter, arguments: list[str]) -> str:
    """The option, the value that it got and what the parser says, which leaves one of them out."""
    option, context = error.param, error.ctx
    if option is None or option.name is None or context is None:
        return error.format_message()
    given = (context.default_map or {}).get(option.name)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in option.opts:
            given = value if equals else "".join(arguments[place + 1 : place + 2])
    if given is None:
        return error.format_message()
    return f"{option.name}: got {given!r}, expected another value ({error.message})"


if __name__ == "__main__":
    main()
