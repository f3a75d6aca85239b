"""Mixtures of LoRA experts against one LoRA on text of several domains, on a CPU.

    python benchmarks/mixed_domains.py --model SMOLLM2_DIR --data CL_Benchmark --work DIR

continues to train SmolLM2-135M on texts of six domains at once: reviews, news, dialogues and
encyclopedia articles of CL_Benchmark, and this project's code and documentation. Adapters are in
the feed-forward layers of the two upper blocks; the states below are computed once. What is
measured is the perplexity on held-out texts, by domain. The rivals of the mixture (MixLoRA's gate)
are one LoRA with as many parameters, and the same LoRA trained for the same CPU time, that is for
more steps. The bar is the model without adapters. All learning rates are chosen alike, by the loss
on dev texts with seed 0, and the grid grows until the best is inside.

Every run is a file under --work: a script that was ended goes on with the same command, on the same
commit, whose files are among the texts. The result is written at the end.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import measure
import torch
from continual_protocol import Grid
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sapt_fast
from sapt_fast import GatedConfig
from sapt_fast.continual.data.rows import read_split

UPPER, TOKENS, BATCH, EVAL_BATCH = 2, 64, 8, 16
SIZES = {"train": 96, "dev": 16, "test": 48}  # texts of TOKENS tokens for each domain
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK = 8, 4
RATES = Grid("learning_rate", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3))
METHODS = ("mixlora", "hydralora", "lora, same parameters", "lora, same time")
BENCHMARK_DOMAINS = {
    "reviews": ("Long_Sequence", "amazon"),
    "news": ("Long_Sequence", "agnews"),
    "encyclopedia": ("Long_Sequence", "boolq"),
    "dialogue": ("SuperNI", "task1572_samsum_summary"),
}
OWN_DOMAINS = {"code": "sapt_fast/**/*.py", "documentation": "docs/**/*.md"}
DOMAINS = (*BENCHMARK_DOMAINS, *OWN_DOMAINS)


def documents(data: str) -> dict[str, list[str]]:
    """Returns the documents of each domain, shuffled by a fixed seed."""
    found = {
        name: list(dict.fromkeys(row.input for row in read_split(data, *place)))
        for name, place in BENCHMARK_DOMAINS.items()
    }
    for name, pattern in OWN_DOMAINS.items():
        found[name] = [path.read_text() for path in sorted(measure.ROOT.glob(pattern))]
    for name, texts in found.items():
        random.Random(name).shuffle(texts)
    return found


def chunks(texts: Sequence[str], tokenizer: Any) -> dict[str, Tensor]:
    """Returns token ids [N, TOKENS] of each split; no document is in two splits."""
    rest, made = iter(texts), {}
    for split, count in SIZES.items():
        ids: list[int] = []
        while len(ids) < count * TOKENS:
            # At most eight chunks of a document, so that a split has several.
            ids += tokenizer(next(rest))["input_ids"][: 8 * TOKENS]
            ids.append(tokenizer.eos_token_id)
        made[split] = torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)
    return made


class Data:
    """Texts of all domains with their states below the upper blocks.

    Args:
        options: of the command.

    Attributes:
        ids: by split, [domains * N, TOKENS], the domains one after the other.
        states: by split, [domains * N, TOKENS, D] bfloat16.
        model: the upper blocks, final norm and head.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        whole: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        whole.requires_grad_(False)
        texts = documents(options.data)
        split = [chunks(texts[name], tokenizer) for name in DOMAINS]
        self.ids = {name: torch.cat([made[name] for made in split]) for name in SIZES}
        digest = hashlib.sha256(b"".join(self.ids[n].numpy().tobytes() for n in SIZES)).hexdigest()
        file = options.work / f"states-{digest[:12]}.safetensors"
        if not file.exists():
            options.work.mkdir(parents=True, exist_ok=True)
            states = {name: self._states(whole, ids) for name, ids in self.ids.items()}
            save_file(states, draft := file.with_suffix(".draft"))
            draft.replace(file)
        self.states, self.digest = load_file(file), digest[:12]
        whole.model.layers = whole.model.layers[-UPPER:]
        whole.config.num_hidden_layers = UPPER
        self.model = whole

    @torch.no_grad()
    def _states(self, whole: Any, ids: Tensor) -> Tensor:
        kept: list[Tensor] = []
        layer = whole.model.layers[-UPPER]
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: kept.append((args or (kwargs["hidden_states"],))[0].bfloat16()),
            with_kwargs=True,
        )
        for part in ids.split(EVAL_BATCH):
            whole.model(input_ids=part, use_cache=False)
        hook.remove()
        return torch.cat(kept)

    def loss(self, model: Any, split: str, rows: Tensor) -> Tensor:
        """Returns the mean loss of the next tokens of some texts, a scalar."""
        states = self.states[split][rows].float()
        out = model(inputs_embeds=states, labels=self.ids[split][rows], use_cache=False)
        loss: Tensor = out.loss
        return loss

    @torch.no_grad()
    def losses(self, model: Any, split: str) -> dict[str, float]:
        """Returns the mean loss of each domain."""
        model.eval()
        rows = torch.arange(len(self.ids[split])).split(SIZES[split])
        return {
            name: fmean(float(self.loss(model, split, p)) for p in part.split(EVAL_BATCH))
            for name, part in zip(DOMAINS, rows, strict=True)
        }


def adapted(base: nn.Module, method: str) -> tuple[Any, list[nn.Parameter]]:
    """Returns a copy of the model with a method's adapters, and what trains."""
    model: Any = copy.deepcopy(base)
    if method in ("mixlora", "hydralora"):
        shared = {"lora_dropout": 0.0, "lora_alpha": 2 * RANK, "r": RANK, "num_experts": EXPERTS}
        made = GatedConfig.mixlora if method == "mixlora" else GatedConfig.hydralora
        sapt_fast.patch(model, made(**{**shared, "target_modules": FEED_FORWARD}))
        return model, list(model.gated.trainable_parameters())
    from peft import LoraConfig, get_peft_model

    rank = rank_of_lora(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=FEED_FORWARD)
    model = get_peft_model(model, config)
    return model, [p for p in model.parameters() if p.requires_grad]


def rank_of_lora(base: Any) -> int:
    """Returns the rank at which one LoRA has the parameters of the mixture, its routers included.

    It is rounded up: the LoRA never has fewer.
    """
    layers = [m for n, m in base.named_modules() if n.split(".")[-1] in FEED_FORWARD]
    widths = sum(layer.in_features + layer.out_features for layer in layers)
    mixture = EXPERTS * RANK * widths + EXPERTS * sum(layer.in_features for layer in layers)
    return math.ceil(mixture / widths)


def trained(data: Data, method: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Trains a method; returns its losses on dev and test texts, and what it cost."""
    torch.manual_seed(seed)
    model, parameters = adapted(data.model, method)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    model.train()
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randint(len(data.ids["train"]), (BATCH,), generator=draws)
        optimizer.zero_grad()
        data.loss(model, "train", rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    seconds = time.process_time() - start
    return {
        "dev": data.losses(model, "dev"),
        "test": data.losses(model, "test"),
        "steps": steps,
        "rate": rate,
        "seconds of training": seconds,
        "trained parameters": sum(p.numel() for p in parameters),
    }


class Experiment:
    """The runs of the command, each kept in a file.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.data = options, Data(options)
        self.methods: list[str] = options.methods.split(";")
        self.seeds = [int(seed) for seed in options.seeds.split(",")]

    def run(self, method: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
        """Returns a run that is kept; makes it first if there is none."""
        name = method.replace(", ", "-").replace(" ", "_")
        label = f"{rate:g}-{steps}-seed{seed}.json"
        path = self.options.work / f"cells-{self.data.digest}" / name / label
        if not path.exists():
            found = trained(self.data, method, rate, steps, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            measure.write(path, json.dumps(found, indent=1) + "\n")
            loss = fmean(found["test"].values())
            print(
                f"{method} {label}: test {loss:.3f}, {found['seconds of training']:.0f} s",
                flush=True,
            )
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept

    def steps(self, method: str) -> int:
        """Returns the steps of a method; of "same time", in the CPU time of the mixture's steps.

        The mixture's time is measured once, in its first run of the tuning.
        """
        steps: int = self.options.steps
        if method != "lora, same time":
            return steps
        middle = RATES.first[len(RATES.first) // 2]
        mixture, lora = (
            self.run(name, middle, steps, 0)["seconds of training"]
            for name in ("mixlora", "lora, same parameters")
        )
        return max(1, round(steps * mixture / lora))

    def tuned(self, method: str) -> tuple[float, dict[float, float]]:
        """Returns the best learning rate, and the loss on dev texts by rate."""
        scores: dict[float, float] = {}
        for rate in RATES.tried(scores):
            found = self.run(method, rate, self.steps(method), 0)
            scores[rate] = -fmean(found["dev"].values())
        best = max(scores, key=lambda rate: scores[rate])
        return best, {rate: -score for rate, score in scores.items()}

    def all(self) -> dict[str, Any]:
        """Makes all runs; returns their losses and perplexities."""
        result: dict[str, Any] = {"base": self.data.losses(self.data.model, "test"), "methods": {}}
        for method in self.methods:
            rate, tuning = self.tuned(method)
            runs = {s: self.run(method, rate, self.steps(method), s) for s in self.seeds}
            result["methods"][method] = {"rate": rate, "dev loss": tuning, "runs": runs}
        return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a table of perplexities, means over seeds."""
    yield f"| | {' | '.join(DOMAINS)} | all | steps | trained | CPU seconds |"
    yield "|---" * (len(DOMAINS) + 5) + "|"
    yield f"| base model | {_perplexities([result['base']])} | 0 | 0 | 0 |"
    for method, found in result["methods"].items():
        runs = list(found["runs"].values())
        seconds = fmean(run["seconds of training"] for run in runs)
        yield (
            f"| {method} | {_perplexities([run['test'] for run in runs])} | {runs[0]['steps']} | "
            f"{runs[0]['trained parameters']:,} | {seconds:.0f} |"
        )


def _perplexities(losses: Sequence[dict[str, float]]) -> str:
    means = [fmean(loss[name] for loss in losses) for name in DOMAINS]
    return " | ".join(f"{math.exp(value):.2f}" for value in (*means, fmean(means)))


def main(given: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="folder of SmolLM2-135M, or of another LLaMA"
    )
    parser.add_argument(
        "--data", required=True, help="folder that holds Long_Sequence/ and SuperNI/"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/mixed_domains"))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    result = Experiment(options).all()
    about = {
        "only": "mixed-domains",
        "command": shlex.join(["python", *(sys.argv if given is None else given)]),
        "environment": measure.environment("cpu"),
        "settings": {"upper": UPPER, "tokens": TOKENS, "batch": BATCH, "texts": SIZES,
                     "experts": EXPERTS, "rank": RANK},
    }  # fmt: skip
    path = measure.save({**about, **result}, options.out)
    print("\n".join([*table(result), str(path)]))
    return path


if __name__ == "__main__":
    main()
