"""The trained router: an encoder that classifies the question."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from sapt_fast.checks import require_count, require_number
from sapt_fast.files.directories import read_directory, replace_directory
from sapt_fast.files.reading import DATA_BYTES, read_bytes, read_json
from sapt_fast.files.writing import write_json
from sapt_fast.generation.router.decision import Decision, require_question

__all__ = ["REPORT_FILE", "ROUTER_FILE", "ClassifierRouter", "require_free"]

ROUTER_FILE, REPORT_FILE = "skeleton_router.json", "report.json"
_VERSION = 1
_MOST_TOKENS = 512
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class ClassifierRouter:
    """Decides by a classifier: Skeleton-of-Thought if its probability is above a threshold.

    The classifier runs in float32. `train_router` trains one; the released router, a
    `RobertaForSequenceClassification`, fits as well.

    Args:
        model: a transformers model for sequence classification with two labels; label 1 means
            independent points.
        tokenizer: its tokenizer, with a pad token.
        threshold: in [0, 1]; 0.5 is the likelier label.
        max_length: tokens of a question that are read [default: the model's limit, at most 512].

    Raises:
        ValueError: if the model does not have two labels, the tokenizer has no pad token, or a
            number is out of range.
    """

    def __init__(
        self, model: Any, tokenizer: Any, threshold: float = 0.5, max_length: int | None = None
    ) -> None:
        labels = getattr(model.config, "num_labels", None)
        if labels != 2:
            raise ValueError(f"model: got {labels} labels, expected 2")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: got one without a pad token")
        require_number("threshold", threshold, most=1.0)
        limit = _token_limit(model, tokenizer)
        require_count("max_length", limit if max_length is None else max_length, most=limit)
        self.model, self.tokenizer = model.float().eval(), tokenizer
        self.threshold = float(threshold)
        self.max_length = max_length or limit

    def decide(self, question: str) -> Decision:
        """Returns the decision for one question.

        Raises:
            TypeError, ValueError: if the question is not text, or blank.
            ValueError: if the classifier returns NaN.
        """
        [score] = self.scores([question])
        skeleton = score > self.threshold
        relation = "above" if skeleton else "not above"
        return Decision(
            skeleton, score, f"the classifier gives {score:.3f}, {relation} {self.threshold:.3f}"
        )

    @torch.no_grad()
    def scores(self, questions: Sequence[str], batch_size: int = 32) -> list[float]:
        """Returns the probability of label 1 for each question.

        Raises:
            TypeError, ValueError: as `decide`.
        """
        for question in questions:
            require_question(question)
        self.model.eval()
        found: list[float] = []
        for start in range(0, len(questions), batch_size):
            inputs = self.encoded(questions[start : start + batch_size])
            with torch.autocast(self.model.device.type, enabled=False):
                logits = self.model(**inputs).logits
            found += logits.float().softmax(1)[:, 1].tolist()
        if any(score != score for score in found):
            raise ValueError("model: the classifier returns NaN; are its weights damaged?")
        return found

    def encoded(self, questions: Sequence[str]) -> Any:
        """Returns token ids and attention mask [B, T] on the model's device."""
        return self.tokenizer(
            list(questions),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.model.device)

    def save_pretrained(
        self, directory: str | os.PathLike[str], report: Mapping[str, Any] | None = None
    ) -> None:
        """Saves classifier, tokenizer and threshold, atomically; other files there stay.

        Args:
            directory: the folder; a router in it is replaced.
            report: written to report.json.

        Raises:
            NotADirectoryError, FileExistsError, OSError: as `replace_directory`.
        """
        with replace_directory(directory, _own_files) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if report is not None:
                write_json(folder / REPORT_FILE, report)
            digests = {name: _digest(folder / name) for name in sorted(os.listdir(folder))}
            write_json(
                folder / ROUTER_FILE,
                {
                    "version": _VERSION,
                    "threshold": self.threshold,
                    "max_length": self.max_length,
                    "files": digests,
                },
            )

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], device: Any = "cpu"
    ) -> ClassifierRouter:
        """Loads what `save_pretrained` has written; nothing is fetched.

        Raises:
            FileNotFoundError: if the folder, or a file of it, is missing.
            ValueError: if a file is damaged, or of a later version.
        """
        folder = Path(directory)
        if not folder.is_dir():
            kind = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(f"router: got {str(directory)!r}, which {kind}")
        try:
            return read_directory(folder, ROUTER_FILE, lambda found: cls._read(found, device))
        except FileNotFoundError as error:
            if (folder / ROUTER_FILE).exists():
                raise
            raise FileNotFoundError(
                f"router: got {str(directory)!r}, expected a folder that `sapt-fast train-router` "
                f"has written; it has no {ROUTER_FILE}"
            ) from error

    @classmethod
    def _read(cls, folder: Path, device: Any) -> ClassifierRouter:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = folder / ROUTER_FILE
        content = read_json(source)
        expected = {"version", "threshold", "max_length", "files"}
        if not isinstance(content, Mapping) or not expected <= content.keys():
            raise ValueError(f"{source}: expected an object with {', '.join(sorted(expected))}")
        if content["version"] != _VERSION:
            raise ValueError(f"{source}: version: got {content['version']!r}, expected {_VERSION}")
        if not isinstance(content["files"], Mapping) or not content["files"]:
            raise ValueError(f"{source}: files: expected digests by file name")
        for name, digest in content["files"].items():
            if Path(name).name != name:
                raise ValueError(f"{source}: files: got {name!r}, expected names of files")
            if _digest(folder / name) != digest:
                raise ValueError(f"{folder / name}: is damaged, or not the file that was saved")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **_LOCAL
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        try:
            return cls(model.to(device), tokenizer, content["threshold"], content["max_length"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def require_free(directory: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if a router cannot be saved in a folder, as another model is there."""
    folder = Path(directory)
    own = set(_own_files(folder)) if folder.is_dir() else set()
    for name in ("config.json", "model.safetensors", "tokenizer.json", REPORT_FILE):
        if name not in own and (folder / name).exists():
            raise FileExistsError(
                f"output: got {str(directory)!r}, whose {name} is not that of a router; expected "
                "another folder"
            )


def _token_limit(model: Any, tokenizer: Any) -> int:
    """Returns how many tokens the model can read, at most 512."""
    limit = min(_MOST_TOKENS, int(tokenizer.model_max_length))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return limit
    # RoBERTa counts positions from behind its pad token.
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return min(limit, positions - (0 if padding is None else padding + 1))


def _digest(path: Path) -> str:
    return sha256(read_bytes(path, DATA_BYTES)).hexdigest()


def _own_files(folder: Path) -> Iterable[str]:
    """Returns the files that an earlier save wrote; raises ValueError if they cannot be known."""
    source = folder / ROUTER_FILE
    if not source.exists():
        return ()
    content = read_json(source)
    files = content.get("files") if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping):
        raise ValueError(f"{source}: files: expected digests by file name")
    return (ROUTER_FILE, *files)
