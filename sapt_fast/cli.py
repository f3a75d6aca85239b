"""The command `sapt-fast`. Commands only read options; what they do is elsewhere."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

_UsageError: Any = typer.BadParameter.__base__  # typer has no name of its own for it

app = typer.Typer(
    name="sapt-fast",
    help="Continual learning with shared-attention adapters (SAPT), fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _option(help: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


_data = partial(_option, panel="Data")
_training = partial(_option, panel="Training")
_adapters = partial(_option, panel="Adapters and router")
_replay = partial(_option, panel="Replay")
_machine = partial(_option, panel="Machine")

# What several commands ask for.
Model = Annotated[str, _option("Folder or name of a transformers model, or 'demo'.")]
Benchmark = Annotated[str, _data("'superni', 'long_sequence', or 'demo' for generated tasks.")]
Data = Annotated[Path | None, _data("Folder that holds SuperNI/ or Long_Sequence/.")]
Dev = Annotated[
    str | None, _data("'from_train' splits dev rows off (default); 'released': dev.json.")
]
MaxTrain = Annotated[int | None, _data("Training rows kept of a task.")]
MaxEval = Annotated[int | None, _data("Dev and test rows kept of it.")]
Fwt = Annotated[bool, _training("Learn every task alone first, for forward transfer.")]
Device = Annotated[str | None, _machine("'cpu' or 'cuda' (a GPU where there is one).")]
Dtype = Annotated[str, _machine("Type of the weights (float32).")]
Progress = Annotated[bool, _machine("Progress bars (shown).")]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Lets the options in a file stand where the command line gives none."""
    if path is not None:
        from sapt_fast.commands.config_file import read_config

        known = {parameter.name for parameter in context.command.params} - {"config"}
        context.default_map = read_config(path, {name for name in known if name})
    return path


@app.command()
def train(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, _option("Folder of the run; a run that is there goes on.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these options (max_train: 400); the command line goes before it.",
            callback=_read_config,
            is_eager=True,
        ),
    ] = None,
    benchmark: Benchmark = "superni",
    data: Data = None,
    order: Annotated[
        str | None, _data("A published order: superni-1 and -2, long_sequence-3 and -4.")
    ] = None,
    tasks: Annotated[
        str | None, _data("Task names separated by commas, in place of an order.")
    ] = None,
    kind: Annotated[
        str,
        _option(
            "'seq2seq', 'causal' or 'encoder' (inputs are matched to label strings); 'auto' goes "
            "by the model's architecture.",
        ),
    ] = "auto",
    dev: Dev = None,
    max_train: MaxTrain = None,
    max_eval: MaxEval = None,
    strategy: Annotated[
        str | None,
        _training(
            "The method: sapt (default), sapt_prompt, seqlora, joint, replay, generative_replay, "
            "ewc, lwf, olora, epi, lfpt5, l2p, progprompt, or single: each task alone."
        ),
    ] = None,
    strategy_options: Annotated[
        list[str] | None,
        _training(
            "NAME=VALUE, a setting of the method's own, such as strength=100; may be repeated.",
            "--strategy-option",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        _training(
            "Released settings to start from: t5-superni, t5-long_sequence, llama-superni, "
            "llama-long_sequence. They train under bfloat16 and take dev rows as released."
        ),
    ] = None,
    fwt: Fwt = False,
    alone: Annotated[Path | None, _training("alone.json of an earlier run, for the same.")] = None,
    learning_rate: Annotated[
        float | None, _training("Learning rate (3e-4).", "--learning-rate", "--lr")
    ] = None,
    key_learning_rate: Annotated[float | None, _training("Of the key (learning rate).")] = None,
    query_learning_rate: Annotated[
        float | None, _training("Of the query projection (learning rate).")
    ] = None,
    epochs: Annotated[float | None, _training("Passes over a task (10).")] = None,
    steps: Annotated[int | None, _training("Steps for each task, in place of epochs.")] = None,
    batch_size: Annotated[
        int | None, _training("Rows of a micro-batch, over all processes (8).")
    ] = None,
    accumulation: Annotated[int | None, _training("Micro-batches of a step (4).")] = None,
    weight_decay: Annotated[float | None, _training("Weight decay (0).")] = None,
    max_grad_norm: Annotated[float | None, _training("Gradient clipping (1), 0 for none.")] = None,
    max_source_length: Annotated[int | None, _training("Tokens of a prompt (512).")] = None,
    instruction_tokens: Annotated[
        int | None, _training("Tokens of the instruction an encoder reads (all).")
    ] = None,
    label_temperature: Annotated[
        float | None, _training("Divisor of an encoder's cosines with labels (0.05).")
    ] = None,
    max_target_length: Annotated[int | None, _training("Tokens of an answer (50).")] = None,
    save_steps: Annotated[
        float | None, _training("Steps between checkpoints; below 1, a share of them (0.1).")
    ] = None,
    load_best: Annotated[
        bool | None, _training("Keep the checkpoint with the least dev loss.")
    ] = None,
    metric: Annotated[
        str | None, _training("'rouge_l' or 'exact_match' (the benchmark's).")
    ] = None,
    scored: Annotated[
        str | None, _training("Rows that are scored: 'test' (default), 'dev' to choose by.")
    ] = None,
    eval_batch_size: Annotated[int | None, _training("Rows of a batch in evaluation (16).")] = None,
    seed: Annotated[int, _training("Seed of everything that is drawn (0).")] = 0,
    adapter: Annotated[str | None, _adapters("'lora' (default) or 'prompt'.")] = None,
    prompt_length: Annotated[int | None, _adapters("Rows of a prompt (10).")] = None,
    r: Annotated[int | None, _adapters("Rank of an adapter (8).", "--r")] = None,
    lora_alpha: Annotated[float | None, _adapters("Scaling is alpha / r (32).", "--alpha")] = None,
    lora_dropout: Annotated[
        float | None, _adapters("Dropout before the adapters (0).", "--dropout")
    ] = None,
    target_modules: Annotated[
        str | None, _adapters("Layers to adapt, separated by commas (query and value).")
    ] = None,
    autocast_adapter_dtype: Annotated[
        bool | None, _adapters("Keep adapters in float32 on half-precision weights.")
    ] = None,
    pooling: Annotated[
        str | None, _adapters("'mean' (default) or 'max' of the embeddings.")
    ] = None,
    standardize_query: Annotated[
        bool | None, _adapters("Standardise the pooled embedding.")
    ] = None,
    temperature: Annotated[
        float | None, _adapters("Divisor of the scores (sqrt of the width).")
    ] = None,
    key_init: Annotated[str | None, _adapters("'uniform' (default) or 'mean_query'.")] = None,
    own_key_loss: Annotated[float | None, _adapters("Weight of the own-key loss (0).")] = None,
    kl_ratio: Annotated[float | None, _replay("Weight of the reflection loss (0.5).")] = None,
    replay: Annotated[
        str | None,
        _replay(
            "'real' (default), 'generated' (pseudo-samples by a generator for each task), 'none', "
            "or a folder of pseudo-samples.",
            "--replay",
            "--replay-source",
        ),
    ] = None,
    generator: Annotated[
        list[str] | None,
        _replay("NAME=VALUE, a setting of the generators, such as steps=5000; may be repeated."),
    ] = None,
    replay_share: Annotated[
        float | None, _replay("Share of the inputs kept, at least one (0.02).")
    ] = None,
    replay_batch_size: Annotated[
        int | None, _replay("Replayed rows of each task (batch size).")
    ] = None,
    resume: Annotated[bool, _machine("Go on with the run in --output (default).")] = True,
    device: Device = None,
    dtype: Dtype = "float32",
    attention: Annotated[
        str | None, _machine("Attention of transformers: 'eager', 'sdpa', ... (the model's).")
    ] = None,
    bf16: Annotated[bool | None, _machine("Train under bfloat16 autocast.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _machine("Recompute activations in the backward pass.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Learn a sequence of tasks; writes checkpoints, metrics, a table and a heat map.

    Killed at any point and started again with the same options, it goes on where it was.
    """
    from sapt_fast.commands import train as runs
    from sapt_fast.continual.data.sources import Source
    from sapt_fast.continual.scores.tables import results_table
    from sapt_fast.continual.settings import ContinualSettings, parse_values

    options = dict(locals())
    if order is not None and tasks is not None:
        # Of two, the one in the file gives way.
        by_file = [n for n in ("order", "tasks") if _is_from_file(context, n)]
        if len(by_file) != 1:
            raise ValueError("order: give --order or --tasks, not both")
        order, tasks = (None, tasks) if by_file == ["order"] else (order, None)
    if steps is not None and epochs is not None:
        by_file = [n for n in ("steps", "epochs") if _is_from_file(context, n)]
        if len(by_file) != 1:
            raise ValueError("steps: give --steps or --epochs, not both")
        options[by_file[0]] = None
    if alone is not None and fwt:
        raise ValueError("alone: give --alone or --fwt, not both")
    if strategy == "single" and (alone is not None or fwt):
        name = "fwt" if fwt else "alone"
        raise ValueError(f"{name}: got --{name}, but strategy 'single' has no forward transfer")
    if _is_given(context, "generator") and replay != "generated":
        raise ValueError(f"generator: got {generator}, expected --replay generated with it")
    source = Source(
        model=model,
        benchmark=benchmark,
        data=None if data is None else str(data),
        tasks=order if tasks is None else tasks,
        dev=_dev(dev, benchmark, preset),
        max_train=max_train,
        max_eval=max_eval,
        dtype=dtype,
        kind=kind,
        attention=attention,
        seed=seed,
    )
    if target_modules is not None:
        options["target_modules"] = [name.strip() for name in target_modules.split(",")]
    options["strategy_options"] = parse_values(strategy_options or (), "strategy-option") or None
    options["generator"] = parse_values(generator or (), "generator") or None
    settings = ContinualSettings.of(
        preset, **{name: options[name] for name in ContinualSettings.names() if name in options}
    )
    if settings.strategy == "single":
        scores = runs.train_alone(source, settings, output, resume=resume)
        _show(*(f"{name}: {value:.2f}" for name, value in scores.items()))
    else:
        results = runs.train(source, settings, output, resume=resume, alone=alone or fwt)
        _show(results_table(results.tasks, results.scores, results.alone, metrics=results.metrics))
    _show(f"written to {output}")


@app.command()
def compare(
    model: Model,
    output: Annotated[Path, _option("Folder of the comparison; one that is there goes on.")],
    benchmark: Benchmark = "superni",
    data: Data = None,
    orders: Annotated[
        list[str] | None,
        _data(
            "A published order or task names separated by commas; may be repeated (all tasks).",
            "--order",
        ),
    ] = None,
    kind: Annotated[str, _option("Kind of model, as in `train`.")] = "auto",
    dev: Dev = None,
    max_train: MaxTrain = None,
    max_eval: MaxEval = None,
    strategies: Annotated[
        str,
        _training(
            "Methods of `train`, separated by commas; NAME=METHOD gives one another name, so that "
            "it can stand there twice (sapt,seqlora,joint,replay,ewc,lwf,olora,epi)."
        ),
    ] = "sapt,seqlora,joint,replay,ewc,lwf,olora,epi",
    seeds: Annotated[str, _training("Seeds, separated by commas (0).")] = "0",
    preset: Annotated[
        str | None, _training("Released settings to start from, as in `train`.")
    ] = None,
    values: Annotated[
        list[str] | None,
        _training(
            "NAME=VALUE for all methods, METHOD.NAME=VALUE for one: any setting of `train` "
            "(learning_rate, steps, r, ...) or option of the method; may be repeated.",
            "--set",
        ),
    ] = None,
    fwt: Fwt = True,
    tensorboard: Annotated[bool, _machine("Write the scores for TensorBoard too.")] = False,
    device: Device = None,
    dtype: Dtype = "float32",
    attention: Annotated[str | None, _machine("Attention of transformers, as in `train`.")] = None,
    progress: Progress = True,
) -> None:
    """Several methods, seeds and orders: one table, score matrices, curves and heat maps.

    Runs that are finished are not run again, so methods and seeds can be added. On the generated
    tasks (--benchmark demo) settings start from the demo's.
    """
    from sapt_fast.checks import MOST_SEED, require_count
    from sapt_fast.continual.compare.compare import compare as compare_runs
    from sapt_fast.continual.compare.compare import settings_of_rows
    from sapt_fast.continual.compare.report import comparison_table
    from sapt_fast.continual.data.sources import DEMO, Source
    from sapt_fast.continual.settings import ContinualSettings, parse_values

    source = Source(
        model=model,
        benchmark=benchmark,
        data=None if data is None else str(data),
        dev=_dev(dev, benchmark, preset),
        max_train=max_train,
        max_eval=max_eval,
        dtype=dtype,
        kind=kind,
        attention=attention,
    )
    base = ContinualSettings.of(preset)
    context: AbstractContextManager[None] = nullcontext()
    defaults = None
    if benchmark == DEMO and preset is None:
        from sapt_fast.commands.demo import STRATEGY_VALUES, demo_settings, tiny_model

        base, context, defaults = demo_settings(), tiny_model(), STRATEGY_VALUES
    base = base.but(device=device, progress=progress)
    given = parse_values(values or (), "set")
    rows = settings_of_rows(base, strategies.split(","), given, defaults)
    shared = {name: value for name, value in given.items() if name in ContinualSettings.names()}
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ValueError(f"seeds: got {seeds!r}, expected numbers separated by commas") from None
    for number in numbers:
        require_count("seeds", number, least=0, most=MOST_SEED)
    with context:
        comparison = compare_runs(
            source, rows, output,
            orders=orders or None, seeds=numbers, alone=base.but(**shared) if fwt else None,
            tensorboard=tensorboard, progress=progress,
        )  # fmt: skip
    _show(comparison_table(comparison), f"written to {output}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    model: Annotated[str | None, _option("The base model, if it has moved.")] = None,
    data: Annotated[str | None, _option("The benchmarks' folder, if it has moved.")] = None,
    device: Annotated[str | None, _option("'cpu' or 'cuda', in place of the run's.")] = None,
    eval_batch_size: Annotated[int | None, _option("Rows of a batch.")] = None,
    progress: Annotated[bool, _option("Progress bars (shown).")] = True,
) -> None:
    """Compute the metrics of a run again from its checkpoints."""
    from sapt_fast.commands import train as runs
    from sapt_fast.continual.scores.tables import results_table

    results, stored = runs.evaluate(
        run,
        model=model,
        data=data,
        device=device,
        eval_batch_size=eval_batch_size,
        progress=progress,
    )
    _show(results_table(results.tasks, results.scores, results.alone, metrics=results.metrics))
    _show(f"largest deviation from results.json: {results.deviation(stored):.3g}")


@app.command()
def demo(
    output: Annotated[Path, _option("Folder for the runs (sapt_demo).")] = Path("sapt_demo"),
    seed: Annotated[int, _option("Seed of rows, weights and order (0).")] = 0,
    progress: Annotated[bool, _option("Progress bars of each training (hidden).")] = False,
) -> None:
    """Learn six generated tasks with SAPT and with one shared LoRA; about a minute on a CPU."""
    from sapt_fast.commands.demo import demo_tables, run_demo

    results = run_demo(output, seed=seed, progress=progress)
    _show(*demo_tables(results), f"attention heat map: {output / 'sapt' / 'attention.png'}")


bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    batch: Annotated[int, typer.Option(help="Samples.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 128,
    inputs: Annotated[int, typer.Option(help="Input width of the layer.")] = 1024,
    outputs: Annotated[int, typer.Option(help="Output width of the layer.")] = 1024,
    tasks: Annotated[int, typer.Option(help="Adapters.")] = 15,
    rank: Annotated[int, typer.Option(help="Rank of each.")] = 4,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time for each measurement.")] = 0.5,
) -> None:
    """Time one mixed layer in every backend against the layer without adapters."""
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if _is_given(context, name)]
        if given:
            raise ValueError(f"{given[0]}: `bench {context.invoked_subcommand}` does not take it")
        return
    from sapt_fast.commands.bench import LayerSize, bench_table, time_layer
    from sapt_fast.continual.data.sources import torch_dtype

    size = LayerSize(batch, tokens, inputs, outputs, tasks, rank)
    for backward, title in ((False, "forward"), (True, "forward and backward")):
        times = time_layer(
            size, device=device, dtype=torch_dtype(dtype), backward=backward, seconds=seconds
        )
        _show(bench_table(size, times, f"{title}, {dtype} on {device}"))


@bench_app.command()
def tune(
    widths: Annotated[
        str, _option("d_in x d_out of the layers (square from 768 to 8192, and T5's, LLaMA's).")
    ] = "768,1024,2048,4096,5120,8192,1024x4096,4096x1024,4096x11008,11008x4096",
    ranks: Annotated[str, _option("Total ranks (16 to 1024).")] = "16,64,256,1024",
    rows: Annotated[str, _option("Rows of a batch (16 to 32768).")] = "16,256,2048,8192,32768",
    dtypes: Annotated[str, _option("bfloat16, float16, float32 (bfloat16).")] = "bfloat16",
    output: Annotated[Path | None, _option("File to write, in place of the one read.")] = None,
) -> None:
    """Time the routes of a mixed layer on this GPU and record which to take.

    Later runs find the table in the folder that SAPT_FAST_ROUTES names, by default
    sapt_fast/routes in the user's cache folder (XDG_CACHE_HOME or ~/.cache), under the name of
    the GPU. Without a table a cost model chooses.
    """
    from sapt_fast.checks import require_folder
    from sapt_fast.commands.tune import parse_grid, record_routes, routes_table, this_gpu

    grid = parse_grid(widths, ranks, rows, dtypes)
    if output is not None:
        require_folder("output", output.parent)
        if output.is_dir():
            raise IsADirectoryError(f"output: got {str(output)!r}, which is a folder")
    try:
        gpu = this_gpu()
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    path, measurements = record_routes(grid, gpu, output)
    _show(routes_table(measurements), f"written to {path}")


@app.command()
def doctor() -> None:
    """Show what this machine has and which backend each op will use, and why."""
    from sapt_fast.commands.doctor import backend_table, environment_table

    _show(environment_table(), backend_table())


def _dev(dev: str | None, benchmark: str, preset: str | None) -> str:
    """Where dev rows come from."""
    if dev is not None and benchmark == "demo":
        raise ValueError(f"dev: got {dev!r}, but the demo's tasks have dev rows of their own")
    if dev is not None:
        return dev
    return "from_train" if preset is None else "released"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _is_from_file(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def _show(*results: Any) -> None:
    """Prints lines and tables; of several processes, the first one does."""
    from rich.console import Console

    from sapt_fast.continual.run import processes

    if processes.is_first():
        for result in results:
            if isinstance(result, str):
                typer.echo(result)
            else:
                Console().print(result)


def main() -> None:
    """Entry point: errors a user can mend are told in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("sapt_fast.continual").setLevel(logging.INFO)
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
    """The option, what came and what the parser says of it, which leaves out one of them."""
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
