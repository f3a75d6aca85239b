"""`sapt-fast answer`: one question, answered in points that are written side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sapt_fast.checks import MOST_SEED, require_choice, require_count, require_number
from sapt_fast.commands.answer_view import progress_of
from sapt_fast.commands.options import option
from sapt_fast.continual.data.models import DTYPES, load_model, load_tokenizer
from sapt_fast.continual.run.processes import require_device
from sapt_fast.generation.events import Done, Event, SkeletonAnswer
from sapt_fast.generation.router.classifier import ClassifierRouter
from sapt_fast.generation.router.decision import Decision, Router, require_question
from sapt_fast.generation.router.prompt import PromptRouter
from sapt_fast.generation.server import ServerError, ServerModel
from sapt_fast.generation.settings import SkeletonSettings
from sapt_fast.generation.skeleton import stream_skeleton_of_thought

__all__ = ["answer_command"]

_MODES = ("auto", "always", "never")
_LENGTHS, _SAMPLING, _MACHINE = "Lengths", "Sampling", "Machine"


def answer_command(
    model: Annotated[
        str,
        option(
            "Folder or name of a transformers model, causal or encoder-decoder; with --server its "
            "name there."
        ),
    ],
    question: Annotated[
        str | None,
        typer.Argument(help="The question; left out, it is read from the standard input."),
    ] = None,
    server: Annotated[
        str | None,
        option(
            "URL of an OpenAI-compatible server, such as http://localhost:8000/v1. The key is "
            "read from OPENAI_API_KEY."
        ),
    ] = None,
    adapters: Annotated[
        Path | None, option("Folder of adapters or edits that sapt_fast has saved for this model.")
    ] = None,
    sot: Annotated[
        str,
        option(
            "'always': answer in points that are written in parallel (Skeleton-of-Thought); "
            "'never': ordinary decoding; 'auto': as the router decides."
        ),
    ] = "auto",
    router: Annotated[
        Path | None,
        option(
            "For --sot auto: a folder that `sapt-fast train-router` has written.",
            default="the model itself is asked",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        option("Print a JSON object: the answer, its points, the decision, counts.", "--json"),
    ] = False,
    progress: Annotated[
        bool, option("Show on the standard error how the answer grows.")
    ] = True,
    max_tokens: Annotated[
        int, option("Tokens of an answer by ordinary decoding.", panel=_LENGTHS)
    ] = 512,
    skeleton_tokens: Annotated[int, option("Tokens of the skeleton.", panel=_LENGTHS)] = 160,
    point_tokens: Annotated[int, option("Tokens of each point.", panel=_LENGTHS)] = 128,
    max_points: Annotated[
        int, option("Further points of a skeleton are left out.", panel=_LENGTHS)
    ] = 20,
    batch: Annotated[
        int | None,
        option(
            "Points that are decoded at a time.",
            panel=_LENGTHS,
            default="as many as fit into half of the free memory",
        ),
    ] = None,
    sample: Annotated[bool, option("Sample; else greedy search.", panel=_SAMPLING)] = False,
    temperature: Annotated[
        float | None,
        option("Temperature of sampling.", panel=_SAMPLING, default="the model's own"),
    ] = None,
    top_k: Annotated[
        int | None,
        option("Sample from this many tokens.", panel=_SAMPLING, default="the model's own"),
    ] = None,
    top_p: Annotated[
        float | None,
        option("Sample from this probability.", panel=_SAMPLING, default="the model's own"),
    ] = None,
    seed: Annotated[int, option("Seed of sampling.", panel=_SAMPLING)] = 0,
    device: Annotated[
        str | None, option("'cpu' or 'cuda'.", panel=_MACHINE, default="a GPU if there is one")
    ] = None,
    dtype: Annotated[
        str | None,
        option("'float32', 'bfloat16' or 'float16'.", panel=_MACHINE, default="float32"),
    ] = None,
) -> None:  # fmt: skip
    """Decides, answers, and prints the answer on the standard output."""
    question = _question(question)
    require_choice("sot", sot, _MODES)
    if router is not None and sot != "auto":
        raise ValueError(f"router: got {str(router)!r}, but --sot is {sot!r}; expected 'auto'")
    here = {"adapters": adapters, "batch": batch, "device": device, "dtype": dtype}
    for name, given in here.items():
        if server is not None and given is not None:
            raise ValueError(f"{name}: got {str(given)!r}, but the model is on a server")
    dtype = dtype or "float32"
    require_choice("dtype", dtype, DTYPES)
    require_device(device)
    counts = {
        "max_tokens": max_tokens, "skeleton_tokens": skeleton_tokens,
        "point_tokens": point_tokens, "max_points": max_points,
    }  # fmt: skip
    for name, value in counts.items():
        require_count(name, value)
    if batch is not None:
        require_count("batch", batch)
    _require_sampling(sample, temperature, top_k, top_p, seed)
    settings = SkeletonSettings(
        max_plain_tokens=max_tokens, max_skeleton_tokens=skeleton_tokens,
        max_point_tokens=point_tokens, max_points=max_points,
        batch="auto" if batch is None else batch, do_sample=sample, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    trained = None if router is None else ClassifierRouter.from_pretrained(router)
    if server is None:
        source, tokenizer = _load(model, adapters, device, dtype)
    else:
        source, tokenizer = ServerModel(server, model), None
    try:
        decision = _decided(sot, trained or PromptRouter.of_model(source, tokenizer), question)
        if progress:
            kind = "points" if decision.skeleton else "ordinary decoding"
            typer.echo(f"{kind}: {decision.reason}", err=True)
        events = stream_skeleton_of_thought(
            source, tokenizer, question,
            settings=settings, mode="skeleton" if decision.skeleton else "plain",
            reason=decision.reason,
        )  # fmt: skip
        answer = _shown(events, progress)
    except ServerError as error:
        raise ConnectionError(f"server: {server} gave no answer: {error}") from error
    _print(answer, decision, as_json)
    if answer.failed:
        raise typer.Exit(1)


def _load(model: str, adapters: Path | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Returns a model of this machine, and its tokenizer."""
    from torch.cuda import is_available

    from sapt_fast.loading import load_pretrained

    loaded, tokenizer = load_model(model, "auto", dtype, None), load_tokenizer(model)
    if adapters is not None:
        load_pretrained(loaded, adapters)
    return loaded.to(device or ("cuda" if is_available() else "cpu")).eval(), tokenizer


def _question(given: str | None) -> str:
    if given is None:
        if sys.stdin.isatty():
            raise ValueError(
                "question: got none, expected text, as an argument or on the standard input"
            )
        given = sys.stdin.read()
    require_question(given)
    return given.strip()


def _require_sampling(
    sample: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> None:
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in given.items():
        if value is not None and not sample:
            raise ValueError(f"{name}: got {value}, but greedy search has none; add --sample")
    if temperature is not None:
        require_number("temperature", temperature, positive=True)
    if top_k is not None:
        require_count("top_k", top_k)
    if top_p is not None:
        require_number("top_p", top_p, most=1.0, positive=True)
    require_count("seed", seed, least=0, most=MOST_SEED)


def _decided(sot: str, router: Router, question: str) -> Decision:
    """The router's decision, or that of --sot."""
    if sot == "auto":
        return router.decide(question)
    return Decision(sot == "always", None, f"--sot {sot}")


def _print(answer: SkeletonAnswer, decision: Decision, as_json: bool) -> None:
    """Prints the answer; what went wrong goes to the standard error."""
    for note in answer.notes:
        typer.echo(f"note: {note}", err=True)
    for index, error in answer.failed:
        typer.echo(f"error: point {index + 1} has no answer: {error}", err=True)
    if as_json:
        content = {**asdict(answer), "decision": asdict(decision)}
        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        typer.echo(answer.text)


def _shown(events: Iterator[Event], progress: bool) -> SkeletonAnswer:
    """Shows the events and returns the answer; an interrupt ends the view and the answer."""
    with closing(events), progress_of(progress) as show_event:  # type: ignore[type-var]
        for event in events:
            show_event(event)
            if isinstance(event, Done):
                return event.answer
    raise AssertionError("the last event is Done")
