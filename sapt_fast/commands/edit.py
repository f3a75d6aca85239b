"""`sapt-fast edit`: sequential edits of a model, from files."""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from torch.cuda import is_available

from sapt_fast.checks import require_choice, require_folder
from sapt_fast.commands.options import given, option, with_fields
from sapt_fast.commands.output import show
from sapt_fast.continual.data.models import DTYPES
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.processes import require_device
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.editing.data import EditRow, Probe, Reader, Tokens
from sapt_fast.editing.editors.registry import EDITORS, editor_type, options_of
from sapt_fast.editing.keys import KeyOptions
from sapt_fast.editing.models import load_editable
from sapt_fast.editing.report import report_table
from sapt_fast.editing.run import run_edits
from sapt_fast.editing.settings import EditingSettings
from sapt_fast.files.reading import DATA_BYTES, read_bytes

__all__ = ["edit_command"]


def _method_options() -> type:
    """A dataclass of the options of all methods; the help names the methods and defaults."""
    found: dict[str, list[tuple[str, Field[Any], Any]]] = {}
    for method in EDITORS:
        kind = editor_type(method).Options
        hints = get_type_hints(kind)
        for one in fields(kind):
            found.setdefault(one.name, []).append((method, one, hints[one.name]))
    found.pop("target_modules")  # given as text
    made: list[Any] = []
    for name, uses in found.items():
        defaults: dict[Any, list[str]] = {}
        for method, one, _ in uses:
            defaults.setdefault(None if one.default is MISSING else one.default, []).append(method)
        shown = "; ".join(f"{', '.join(users)}: {value}" for value, users in defaults.items())
        texts = {"help": uses[0][1].metadata["help"], "default": shown}
        made.append((name, uses[0][2] | None, field(default=None, metadata=texts)))
    return make_dataclass("MethodOptions", made)


_METHOD = _method_options()
_METHOD_NAMES = [one.name for one in fields(_METHOD)]
_SETTING_NAMES = [one.name for one in fields(EditingSettings)]
_KEY_NAMES = [one.name for one in fields(KeyOptions)]
_PANELS = {
    "Data": ("edits", "upstream", "text", "chat", "limit", "order_seed"),
    "Method": ("method", "target_modules", *_METHOD_NAMES),
    "Keys": tuple(_KEY_NAMES),
    "Run": (
        "batch", "every", "save_every", "eval_batch", "answer_tokens", "teacher_forcing", "window",
        "seed", "resume",
    ),
    "Machine": ("device", "dtype", "attention", "progress"),
}  # fmt: skip


@with_fields(
    [*_SETTING_NAMES, *_METHOD_NAMES, *_KEY_NAMES, *_PANELS["Machine"]],
    EditingSettings, _METHOD, KeyOptions, Source, ContinualSettings,
    panels=_PANELS,
)  # fmt: skip
def edit_command(
    context: typer.Context,
    model: Annotated[str, option("Folder or name of a transformers model, or 'demo'.")],
    output: Annotated[
        Path, option("Folder of the run; an existing run in this folder is resumed.")
    ],
    edits: Annotated[
        Path,
        option(
            "JSONL, an edit a line: prompt, target, and optional lists paraphrases and locality; "
            "text, or lists of token ids. Or a file of zsRE.",
            panel="Data",
        ),
    ],
    upstream: Annotated[
        Path | None,
        option(
            "JSONL, a line for each prompt that no edit should touch: prompt, and optional "
            "target and group.",
            panel="Data",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        option("A file of plain text, whose perplexity is measured.", panel="Data"),
    ] = None,
    chat: Annotated[
        bool,
        option("Make each prompt a user's message in the model's chat template.", panel="Data"),
    ] = False,
    method: Annotated[str, option(f"{', '.join(EDITORS)}.", panel="Method")] = "grace",
    target_modules: Annotated[
        str | None,
        option(
            "Layers to edit: last parts of paths, separated by commas.",
            panel="Method",
            default="the last projection of an MLP, by the model's type",
        ),
    ] = None,
    resume: Annotated[
        bool, option("Resume the run in --output if there is one.", panel="Run")
    ] = True,
    **values: Any,
) -> None:
    """Runs `run_edits` with the options of the command line."""
    require_choice("method", method, EDITORS)
    require_choice("dtype", values["dtype"], DTYPES)
    require_device(values["device"])
    require_folder("output", output)
    settings = EditingSettings(**{name: values[name] for name in _SETTING_NAMES})
    options = given(context, {name: values[name] for name in _METHOD_NAMES})
    if target_modules is not None:
        options["target_modules"] = tuple(name.strip() for name in target_modules.split(","))
    looked_up = KeyOptions(**{name: values[name] for name in _KEY_NAMES})
    looked_up.complete(options, method)
    options_of(method, options)
    loaded, tokenizer = load_editable(model, values["dtype"], values["attention"])
    reader = Reader(loaded, tokenizer, chat)
    rows, probes, tokens = _data(reader, edits, upstream, text)
    place = values["device"] or ("cuda" if is_available() else "cpu")
    loaded.to(place).eval()
    keys = looked_up.function(reader, place)
    content = run_edits(
        loaded, rows, output, settings,
        method=method, options=options, upstream=probes, text=tokens, look_up_by=keys,
        resume=resume, progress=values["progress"],
        source={
            "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
            "dtype": values["dtype"],
            "chat": chat,
            **_named(edits=edits, upstream=upstream, text=text),
            **_named(**{name: values[name] for name in _KEY_NAMES}),
        },
    )  # fmt: skip
    if hasattr(keys, "save"):
        keys.save(output / "keys.safetensors")
    show(report_table(content), f"written to {output}")


def _data(
    reader: Reader, edits: Path, upstream: Path | None, text: Path | None
) -> tuple[list[EditRow], list[Probe], Tokens | None]:
    """Reads the files; a mistake in any of them is found before the run starts."""
    rows = reader.edits(edits)
    probes = [] if upstream is None else reader.probes(upstream)
    if text is None:
        return rows, probes, None
    if reader.tokenizer is None:
        raise ValueError(f"text: {text} needs a tokenizer, which the model does not have")
    try:
        content = read_bytes(text, DATA_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {text} is not UTF-8 at byte {error.start}") from None
    return rows, probes, tuple(reader.tokenizer(content, verbose=False).input_ids)


def _named(**given: Any) -> dict[str, Any]:
    """Returns values for JSON, paths as text."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
