"""Which keys find the paraphrases of an edit, and leave other questions alone.

    python benchmarks/country_facts.py package/countries.json MODEL_DIR FACTS_DIR
    python benchmarks/editing_keys.py MODEL_DIR FACTS_DIR --encoder ENCODER_DIR

No edit is made: the prompts of `edits.jsonl` are keys, and all other prompts are looked up among
them. Keys are compared that are made by a sentence encoder and by the mean of a low layer, each as
it is and with a projection. The projection is trained on the first `--groups` facts of
`tuning.jsonl`. The radius of all is chosen on its other facts, so that the mean of the paraphrases
found and of the other questions left alone is the largest. The facts are others than those of the
edits, but asked in the same wordings. The result goes to `benchmarks/results/<machine>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import environment, save
from torch import Tensor

from sapt_fast.editing.data import EditRow, Probe, Reader
from sapt_fast.methods.edits.keys import HiddenKeys, SentenceKeys, features_of
from sapt_fast.methods.edits.projector import ProjectedKeys

_PATTERN = r"<\|im_start\|>user\n(.*?)<\|im_end\|>"
_RADII = torch.linspace(0.02, 1.6, 80)

Function = Callable[[list[Tensor]], Tensor]


def distances(function: Function, rows: Sequence[EditRow], untouched: Sequence[Probe]) -> Any:
    """Returns the distances from the keys of edits [E, D].

    Returns:
        own [P]: of each paraphrase from its edit's; nearest [P] bool: whether that is the nearest.
        local [L], other [U]: of the locality prompts and of untouched ones from the nearest key.
    """
    keys = features_of(function, [row.prompt for row in rows])
    owners = torch.tensor([i for i, row in enumerate(rows) for _ in row.paraphrases])
    asked = features_of(function, [text for row in rows for text in row.paraphrases])
    pairs = torch.cdist(asked, keys)
    own = pairs.gather(1, owners[:, None])[:, 0]
    local = [probe.prompt for row in rows for probe in row.locality]
    far = [torch.cdist(features_of(function, texts), keys).amin(1)
           for texts in (local, [probe.prompt for probe in untouched])]  # fmt: skip
    return own, pairs.argmin(1) == owners, *far


def radius_of(function: Function, rows: Sequence[EditRow]) -> float:
    """Returns the radius at which most paraphrases are found and most other questions are not."""
    others = [Probe(row.prompt) for row in rows]
    own, nearest, local, _ = distances(function, rows, others)
    keys = features_of(function, [row.prompt for row in rows])
    apart = torch.cdist(keys, keys).fill_diagonal_(float("inf")).amin(1)
    wrong = torch.cat([local, apart])
    scores = [
        ((own <= radius) & nearest).float().mean() + (wrong > radius).float().mean()
        for radius in _RADII
    ]
    return float(_RADII[int(torch.stack(scores).argmax())])


def row_of(name: str, function: Function, given: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the table: shares of prompts."""
    radius = radius_of(function, given["held"])
    own, nearest, local, other = distances(function, given["edits"], given["untouched"])
    return {
        "keys": name,
        "radius": radius,
        "nearest": nearest.float().mean().item(),
        "paraphrases_found": ((own <= radius) & nearest).float().mean().item(),
        "same_country_left_alone": (local > radius).float().mean().item(),
        "untouched_left_alone": (other > radius).float().mean().item(),
    }


def main() -> None:
    """Compares the keys and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("facts", type=Path, metavar="FACTS_DIR")
    parser.add_argument("--encoder", required=True, metavar="DIR")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--untouched", type=int, default=100)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(options.model).eval()
    encoder: Any = transformers.AutoModel.from_pretrained(options.encoder)
    words: Any = transformers.AutoTokenizer.from_pretrained(options.encoder)
    reader = Reader(model, tokenizer, chat=True)
    tuning = reader.edits(options.facts / "tuning.jsonl")
    given = {
        "edits": reader.edits(options.facts / "edits.jsonl")[: options.edits],
        "untouched": reader.probes(options.facts / "untouched.jsonl")[: options.untouched],
        "held": tuning[options.groups :],
    }
    fitted = tuning[: options.groups]
    groups = [[row.prompt, *row.paraphrases] for row in fitted]
    others = [probe.prompt for row in fitted for probe in row.locality]
    every = [prompt for group in groups for prompt in group] + others
    sentences = SentenceKeys(encoder, words, tokenizer, _PATTERN)
    hidden = HiddenKeys(model, options.layer, tokenizer, _PATTERN)
    hidden.fit(every, components=min(64, len(every) - 8))
    functions: dict[str, Function] = {
        "sentence encoder": sentences,
        "sentence encoder, projected": ProjectedKeys(sentences).fit(groups, others),
        "low layer": hidden,
        "low layer, projected": ProjectedKeys(hidden.features).fit(groups, others),
    }
    rows = []
    for name, function in functions.items():
        rows.append(row_of(name, function, given))
        print({k: v if k == "keys" else round(v, 3) for k, v in rows[-1].items()}, flush=True)
    counts = {name: getattr(options, name) for name in ("edits", "groups", "untouched", "layer")}
    result = {"environment": environment("cpu"), "only": "editing-keys", **counts, "rows": rows}
    print(save(result, options.output))


if __name__ == "__main__":
    main()
