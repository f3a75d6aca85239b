"""Makes edits one after another, measures in between, and resumes after an interruption."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.checks import require_folder
from sapt_fast.editing.answers import Examiner, matches
from sapt_fast.editing.bar import progress_bar
from sapt_fast.editing.data import EditRow, Probe, Tokens, digest, require_agreement
from sapt_fast.editing.editors.base import Editor, Pair
from sapt_fast.editing.editors.registry import editor_type, options_of
from sapt_fast.editing.metrics import mean, measure, questions, untouched
from sapt_fast.editing.report import write_report
from sapt_fast.editing.settings import EditingSettings
from sapt_fast.editing.state import EDITED, Progress, RunFolder
from sapt_fast.methods.edits.handle import evaluating
from sapt_fast.methods.run_header import model_header
from sapt_fast.pools.own import is_inside, own_paths

__all__ = ["run_edits"]

logger = logging.getLogger(__name__)

_SAMPLES = 16  # values of a parameter, or keys, that tell one from another


def run_edits(
    model: Any,
    rows: Sequence[EditRow],
    output: str | os.PathLike[str],
    settings: EditingSettings | None = None,
    *,
    method: str = "grace",
    options: Mapping[str, Any] | None = None,
    upstream: Sequence[Probe] = (),
    text: Tokens | None = None,
    look_up_by: Callable[[list[Tensor]], Tensor] | None = None,
    resume: bool = True,
    progress: bool = False,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes edits in sequence and writes a report; afterwards the model is as before.

    A run that was interrupted resumes from its last save, and ends with the same bits.

    Args:
        model: a transformers model.
        rows: the edits, from `Reader.edits`.
        output: the run's folder.
        settings: how to run; None for the defaults.
        method: a name of `editors.registry.EDITORS`.
        options: those of the method's options that differ from the defaults.
        upstream: prompts that no edit should touch, from `Reader.probes`.
        text: tokens of a plain text, whose perplexity is measured.
        look_up_by: what prompts are looked up by, for GRACE and MELO with `keys="function"`, such
            as `methods.edits.keys.SentenceKeys`.
        resume: whether a run in the folder is resumed, else it is an error.
        progress: whether to show a progress bar.
        source: noted in run.json; where model and data came from.

    Returns:
        The content of report.json.

    Raises:
        ValueError: if there is no edit, two edits of a batch contradict each other, an option does
            not fit, or the folder holds another run. Nothing has changed then.
        FileExistsError: if the folder holds other files, or a run and `resume` is False.
    """
    settings = settings or EditingSettings()
    chosen_options = options_of(method, options)
    rows = _chosen(rows, settings)
    if not rows:
        raise ValueError("rows: got none, expected at least one edit")
    require_agreement(rows, settings.batch)
    require_folder("output", output)
    with evaluating(model):
        examiner = _examiner(model, rows, settings)
        if text is not None:
            examiner.require_text(text)
        description = {
            "method": method,
            "options": asdict(chosen_options),
            "settings": asdict(settings),
            "edits": {"count": len(rows), "digest": digest(rows)},
            "upstream": {"count": len(upstream), "digest": digest(upstream)},
            "text": None if text is None else sha256(str(text).encode()).hexdigest(),
            "model": _fingerprint(model),
            "encoder": None,
            "source": dict(source or {}),
        }
        encoder = getattr(look_up_by, "encoder", None)
        if isinstance(encoder, nn.Module):
            description["encoder"] = _fingerprint(encoder)
        elif look_up_by is not None:
            description["encoder"] = _keys_of(look_up_by, rows)
        with _seeded(settings.seed, model):
            editor = editor_type(method)(model, chosen_options)
        folder = RunFolder(Path(output))
        try:
            if look_up_by is not None:
                editor.look_up_by(look_up_by)
            elif getattr(chosen_options, "keys", None) == "function":
                raise ValueError("keys: got 'function', expected look_up_by with it")
            folder.open(description, resume=resume)
            _log_header(model, method, chosen_options, rows, settings)
            run = _Run(editor, examiner, rows, upstream, text, settings, folder)
            run.begin()
            run.go(progress)
            return run.finish(description)
        finally:
            folder.close()
            editor.close()


class _Run:
    """One run; arguments as in `run_edits`."""

    def __init__(
        self,
        editor: Editor,
        examiner: Examiner,
        rows: Sequence[EditRow],
        upstream: Sequence[Probe],
        text: Tokens | None,
        settings: EditingSettings,
        folder: RunFolder,
    ) -> None:
        self.editor, self.examiner, self.settings, self.folder = editor, examiner, settings, folder
        self.rows, self.upstream, self.text = rows, upstream, text
        self.progress = Progress()

    def begin(self) -> None:
        """Continues from the last save; a new run asks first what must not change."""
        saved = self.folder.load()
        if saved is not None:
            self.progress, tensors = saved
            history = [_pair(row) for row in self.rows[: self.progress.done]]
            self.editor.restore(tensors, history)
            self.progress.resumed |= self.progress.done < len(self.rows)
            return
        prompts = untouched(self.rows, self.upstream)
        answers = self.examiner.answers(prompts)
        self.progress.before = list(zip(prompts, answers, strict=True))
        self._measure()
        self._save()

    def go(self, shown: bool) -> None:
        """Makes the edits that are left."""
        progress, settings = self.progress, self.settings
        with progress_bar(len(self.rows), progress.done, shown) as advance:
            while progress.done < len(self.rows):
                before = progress.done
                self._edit(self.rows[before : before + settings.batch])
                now = progress.done
                last = now == len(self.rows)
                if last or now // settings.every > before // settings.every:
                    self._measure()
                if last or now // settings.save_every > before // settings.save_every:
                    self._save()
                advance(now, self._success("generated"))

    def finish(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the report, and the edits if the method can save them."""
        exported = self.editor.export(self.folder.path / EDITED)
        progress = self.progress
        content = {
            **description,
            "size": self.editor.size(),
            "edited": EDITED if exported else None,
            **{k: v for k, v in asdict(progress).items() if k not in ("done", "before")},
        }
        write_report(self.folder.path, content)
        return content

    def _edit(self, rows: Sequence[EditRow]) -> None:
        """Makes one batch of edits, and asks at once."""
        progress, start = self.progress, time.perf_counter()
        with _seeded(self.settings.seed + progress.done, self.editor.model):
            outcomes = self.editor.edit([_pair(row) for row in rows])
        seconds = time.perf_counter() - start
        progress.edit_seconds += seconds
        with self._asking():
            answers = self.examiner.answers([row.prompt for row in rows])
            forced: list[Any] = [None] * len(rows)
            if self.settings.teacher_forcing:
                forced = self.examiner.forced([(row.prompt, row.target) for row in rows])
        for row, outcome, answer, share in zip(rows, outcomes, answers, forced, strict=True):
            progress.records.append(
                {
                    "place": row.place,
                    "outcome": outcome,
                    "generated": matches(answer, row.target),
                    "forced": share,
                    "seconds": seconds / len(rows),
                }
            )
        progress.done += len(rows)

    def _measure(self) -> None:
        progress = self.progress
        asked = questions(self.rows[: progress.done], self.upstream, dict(progress.before))
        with self._asking():
            found = measure(
                self.examiner,
                asked,
                teacher_forcing=self.settings.teacher_forcing,
                known=dict(progress.before) if progress.done == 0 else None,
            )
            point: dict[str, Any] = {"edits": progress.done, **found}
            if self.text is not None:
                window = self.settings.window
                point["perplexity"] = self.examiner.perplexity(self.text, window)
        for kind in ("generated", "forced"):
            point[kind] = {"success": self._success(kind), **point[kind]}
        progress.points.append(point)

    def _success(self, kind: str) -> float | None:
        shares = [record[kind] for record in self.progress.records]
        return mean([share for share in shares if share is not None])

    @contextmanager
    def _asking(self) -> Iterator[None]:
        start = time.perf_counter()
        with self.editor.measuring():
            yield
        self.progress.measure_seconds += time.perf_counter() - start

    def _save(self) -> None:
        self.folder.save(self.progress, self.editor.state())


def _log_header(
    model: Any, method: str, options: Any, rows: Sequence[EditRow], settings: EditingSettings
) -> None:
    logger.info("%s", model_header(model, model.device))
    steps = getattr(options, "steps", None)
    logger.info(
        "%s, %d edits in batches of %d%s",
        method, len(rows), settings.batch, "" if steps is None else f", at most {steps} steps each",
    )  # fmt: skip


def _fingerprint(model: Any) -> dict[str, str]:
    """The model's class, and a digest of a few values of each of its parameters."""
    found, own = sha256(), own_paths(model)
    for name, parameter in model.named_parameters():
        if is_inside(name, own):
            continue
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        values = flat[places.to(flat.device)].double().tolist() if flat.numel() else []
        found.update(f"{name} {tuple(parameter.shape)} {values}".encode())
    return {"class": type(model).__name__, "digest": found.hexdigest()}


def _keys_of(
    look_up_by: Callable[[list[Tensor]], Tensor], rows: Sequence[EditRow]
) -> dict[str, str]:
    """The class of what prompts are looked up by, and a digest of the keys of a few of them."""
    keys = look_up_by([torch.tensor(row.prompt) for row in rows[:_SAMPLES]])
    digest_of_keys = sha256(str(keys.double().tolist()).encode()).hexdigest()
    return {"class": type(look_up_by).__name__, "digest": digest_of_keys}


def _chosen(rows: Sequence[EditRow], settings: EditingSettings) -> list[EditRow]:
    """The edits in the order in which they are made."""
    chosen = list(rows)
    if settings.order_seed is not None:
        random.Random(settings.order_seed).shuffle(chosen)
    return chosen[: settings.limit]


def _examiner(model: Any, rows: Sequence[EditRow], settings: EditingSettings) -> Examiner:
    longest = max(len(row.target) for row in rows)
    return Examiner(model, settings.eval_batch, max(longest, settings.answer_tokens))


def _pair(row: EditRow) -> Pair:
    return torch.tensor(row.prompt), torch.tensor(row.target)


@contextmanager
def _seeded(seed: int, model: Any) -> Iterator[None]:
    """Seeds torch; afterwards its random state is as before."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
