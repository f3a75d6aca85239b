"""Memorises facts of a small chat model in experts, and compares with LoRA and full tuning.

    npm pack world-countries@5.1.0 && tar xzf world-countries-5.1.0.tgz
    python benchmarks/memory_facts.py MODEL_DIR package/countries.json --output DIR [--quick]

Half of the facts are true ones that the model does not know, half are random numbers of invented
people; "permuted" are the same questions with the answers exchanged. All is measured by generation:
exact answers, paraphrases in nearly the same and in other words, and questions whose answers must
not change (about the same names, in the same words, and others); and the perplexity of plain text
(the package's licence) behind its first tokens. Look-up settings are chosen on other facts, and so
are the rates of LoRA and full tuning. Each part that is there is kept, so the command resumes. The
result goes to `benchmarks/results/<machine>`.

The model is that of `benchmarks/smollm2.py`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from country_facts import answers
from measure import environment, save, write
from memory_data import Fact, Question, Questions, questions
from torch import Tensor, nn

import sapt_fast
from sapt_fast.methods.edits.fitting import losses_of
from sapt_fast.methods.edits.texts import EditTexts, held_below
from sapt_fast.methods.mome import MomeConfig

_PATTERN = r"<\|im_start\|>user\n(.*?)<\|im_end\|>"
_ROUTERS = ((64, 0.0), (128, 1.0), (256, 0.5))  # components and whitening
_FALSE = 0.01  # the largest share of the untouched tuning questions on which experts may act
_RATES = {"LoRA": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "full tuning": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
_LEAST = 3  # rates that are tried
_CAPACITY = ((1, 1.0), (4, 1.0), (16, 1.0), (4, 0.25), (16, 0.25), (16, 0.0625))  # k, share of N
_LAYER = 20
_BATCH = 16
_WINDOW, _CONTEXT = 256, 64
Pairs = list[tuple[list[int], list[int]]]


class Experiment:
    """The model, the questions, and the parts that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
        auto: Any = transformers.AutoModelForCausalLM
        self.base = auto.from_pretrained(options.model).eval()
        options.output.mkdir(parents=True, exist_ok=True)
        self._routers: dict[tuple[int, float], Any] = {}
        self._asked: dict[str, str] = self.part("asked", dict)
        counts = (options.facts, options.tuning, options.untouched)
        self.data: Questions = questions(options.countries, counts, self._misses)
        text = (options.countries.parent / "LICENSE").read_text()
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        count = min(len(ids) // _WINDOW, options.windows)
        self.text = torch.tensor(ids[: count * _WINDOW]).view(count, _WINDOW)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a part's result, which is computed unless its file is there."""
        file = self.options.output / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            begun = time.perf_counter()
            write(file, json.dumps(make()))
            print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        return json.loads(file.read_text())

    def _misses(self, prompts: list[str], targets: list[str]) -> list[bool]:
        new = [prompt for prompt in prompts if prompt not in self._asked]
        self._asked |= dict(zip(new, answers(self.base, self.tokenizer, new), strict=True))
        write(self.options.output / "asked.json", json.dumps(self._asked))
        said = [self._asked[prompt].casefold() for prompt in prompts]
        return [t.casefold() not in text for t, text in zip(targets, said, strict=True)]

    def ids(self, question: str) -> list[int]:
        """Returns the tokens of a question in the chat template."""
        chat = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def pairs(self, facts: Sequence[Fact], targets: Sequence[str] | None = None) -> Pairs:
        """Returns prompts and targets as tokens."""
        given = [fact.target for fact in facts] if targets is None else targets
        tokens = [self.tokenizer(text, add_special_tokens=False).input_ids for text in given]
        end = self.tokenizer.eos_token_id
        prompts = [self.ids(fact.prompt) for fact in facts]
        return [(p, [*t, end]) for p, t in zip(prompts, tokens, strict=True)]

    # --- measures ---

    @torch.no_grad()
    def said(self, model: Any, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """Returns greedy answers of at most `count` tokens, to the end token."""
        pad, found = self.tokenizer.pad_token_id, []
        for start in range(0, len(prompts), _BATCH):
            part = prompts[start : start + _BATCH]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            rows = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
            for row in rows[:, width:].tolist():
                end = self.tokenizer.eos_token_id
                found.append(row[: row.index(end) + 1] if end in row else row)
        return found

    def exact(self, model: Any, prompts: Sequence[list[int]], pairs: Pairs) -> list[bool]:
        """Returns which generated answers are exactly the targets."""
        longest = max(len(target) for _, target in pairs)
        said = self.said(model, prompts, longest)
        return [row == target for row, (_, target) in zip(said, pairs, strict=True)]

    def paraphrases(self, model: Any, facts: Sequence[Fact], pairs: Pairs) -> dict[str, float]:
        """Returns the share of exact answers to both paraphrases."""
        found = {}
        for kind in ("near", "far"):
            prompts = [self.ids(getattr(fact, kind)) for fact in facts]
            found[kind] = statistics.fmean(self.exact(model, prompts, pairs))
        return found

    def untouched(self, model: Any) -> dict[str, Any]:
        """Returns answers to the untouched questions, and the perplexity of plain text."""
        prompts = [self.ids(question.prompt) for question in self.data.untouched]
        return {"said": self.said(model, prompts, 12), "perplexity": self._perplexity(model)}

    @torch.no_grad()
    def _perplexity(self, model: Any) -> float:
        losses = []
        for row in self.text.split(4):
            labels = row.clone()
            labels[:, :_CONTEXT] = -100
            losses.append(float(model(input_ids=row, labels=labels).loss))
        return float(torch.tensor(losses).mean().exp())

    def damage(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Returns changed answers by group, accuracy before and after, and perplexities."""
        asked = self.data.untouched
        changed = [a != b for a, b in zip(before["said"], after["said"], strict=True)]
        groups = {question.group for question in asked}
        return {
            "changed": statistics.fmean(changed),
            "changed_by_group": {
                group: statistics.fmean(
                    c for c, question in zip(changed, asked, strict=True) if question.group == group
                )
                for group in sorted(groups)
            },
            "accuracy": [self._accuracy(asked, part["said"]) for part in (before, after)],
            "perplexity": [before["perplexity"], after["perplexity"]],
        }

    def _accuracy(self, asked: Sequence[Question], said: Sequence[list[int]]) -> float:
        texts = self.tokenizer.batch_decode([*said], skip_special_tokens=True)
        return statistics.fmean(
            question.answer.casefold() in text.casefold()
            for question, text in zip(asked, texts, strict=True)
            if question.answer is not None
        )

    # --- experts ---

    def memory(self, **fields: Any) -> Any:
        """Returns a copy of the model with an empty memory."""
        settings = {"num_experts": self.options.experts, "pattern": _PATTERN, **fields}
        model = sapt_fast.patch(copy.deepcopy(self.base), MomeConfig(**settings))
        model.mome.tokenizer = self.tokenizer
        key = model.mome.config.components, model.mome.config.whitening
        held = self._routers.get(key)
        if held is None:
            model.mome.fit_router([self.ids(text) for text in self.data.router])
            self._routers[key] = model.mome.router.state_dict()
        else:
            model.mome.router.load_state_dict(held)
        return model

    def look_up(self) -> dict[str, Any]:
        """Chooses components, threshold and ratio on the tuning facts, by look-ups alone."""
        facts, asked = self.data.tuning, self.data.tuning_untouched
        best: dict[str, Any] = {"found": -1.0}
        for components, whitening in _ROUTERS:
            handle = self.memory(components=components, whitening=whitening).mome
            groups = [[f.prompt for f in facts], [f.near for f in facts], [f.far for f in facts]]
            groups.append([question.prompt for question in asked])
            keys, *others = (
                handle.queries([torch.tensor(self.ids(text)) for text in part]) for part in groups
            )
            found = [_nearest(query, keys) for query in others]
            own = torch.arange(len(facts))
            for threshold, ratio in itertools.product(
                (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
            ):
                acts = [(score >= threshold) & (share <= ratio) for score, share, _ in found]
                right = [a & (at == own) for a, (*_, at) in zip(acts[:2], found[:2], strict=True)]
                share = float(torch.stack(right).float().mean())
                if float(acts[2].float().mean()) <= _FALSE and share > best["found"]:
                    best = {
                        "found": share,
                        "config": {
                            "components": components, "whitening": whitening,
                            "threshold": threshold, "ratio": ratio,
                        },
                    }  # fmt: skip
        return best

    def memorised(
        self, look_up: dict[str, Any], facts: Sequence[Fact], pairs: Pairs, name: str, **fields: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns a model with the facts, and what `memorise` reports."""
        model = self.memory(**look_up["config"], **fields)
        begun = time.process_time()
        report = model.mome.memorise(
            pairs, folder=self.options.output / "memorise" / name.replace(" ", "-"), progress=False
        )
        spent = time.process_time() - begun
        return model, {
            "facts": len(facts), "epochs": report.epochs, "unfitted": len(report.unfitted),
            "loss": statistics.fmean(report.losses), "collisions": report.collisions,
            "cpu_seconds": spent, "seconds": report.seconds,
        }  # fmt: skip

    def experts(self, look_up: dict[str, Any], base: dict[str, Any], permuted: bool) -> Any:
        """All facts at once; with `permuted`, answers are exchanged among facts of a kind."""
        facts = self.data.facts
        targets = _permuted(facts) if permuted else [fact.target for fact in facts]
        pairs = self.pairs(facts, targets)
        name = "permuted" if permuted else "all"
        model, result = self.memorised(look_up, facts, pairs, name)
        result |= self._recalled(model, facts, pairs)
        result |= {"paraphrases": self.paraphrases(model, facts, pairs)}
        return result | self.damage(base, self.untouched(model))

    def _recalled(self, model: Any, facts: Sequence[Fact], pairs: Pairs) -> dict[str, float]:
        right = self.exact(model, [prompt for prompt, _ in pairs], pairs)
        by_kind = {
            "true": [r for r, fact in zip(right, facts, strict=True) if fact.known],
            "random": [r for r, fact in zip(right, facts, strict=True) if not fact.known],
        }
        return {"exact": statistics.fmean(right)} | {
            f"exact_{kind}": statistics.fmean(values) for kind, values in by_kind.items() if values
        }

    def capacity(self, look_up: dict[str, Any]) -> list[dict[str, Any]]:
        """Loss and exact answers of some facts over k and N, from enough experts to too few."""
        facts = self.data.tuning
        pairs = self.pairs(facts)
        rows = []
        for k, share in _CAPACITY:
            experts = max(k, len(facts), round(len(facts) * k * share))
            model, result = self.memorised(
                look_up, facts, pairs, f"capacity {k} {experts}", k=k, num_experts=experts
            )
            result |= self._recalled(model, facts, pairs)
            rows.append({"k": k, "num_experts": experts, **result})
        return rows

    def batches(self) -> list[list[Fact]]:
        """Returns the facts as five batches."""
        size = len(self.data.facts) // 5
        return [self.data.facts[i * size : (i + 1) * size] for i in range(5)]

    def sequence_of_experts(self, look_up: dict[str, Any], base: dict[str, Any]) -> Any:
        """Five batches one after another."""
        model, begun = self.memory(**look_up["config"]), time.process_time()

        def learn(pairs: Pairs) -> int:
            return int(model.mome.memorise(pairs, progress=False).epochs)

        return self._sequence(model, learn, base, begun)

    def _sequence(
        self, model: Any, learn: Callable[[Pairs], int], base: dict[str, Any], begun: float
    ) -> dict[str, Any]:
        parts = self.batches()
        pairs = [self.pairs(part) for part in parts]
        epochs, once = [], []
        for number, given in enumerate(pairs):
            epochs.append(learn(given))
            right = self.exact(model, [prompt for prompt, _ in given], given)
            once.append(statistics.fmean(right))
            if number == 0:
                first = {"paraphrases": self.paraphrases(model, parts[0], given), "exact": once[0]}
                first |= self.damage(base, self.untouched(model))
        end = [statistics.fmean(self.exact(model, [p for p, _ in g], g)) for g in pairs]
        return {
            "epochs": epochs, "exact_at_once": once, "exact_at_the_end": end, "first_batch": first,
            "end": self.damage(base, self.untouched(model)),
            "cpu_seconds": time.process_time() - begun,
        }  # fmt: skip

    # --- rivals ---

    def tuned(self, method: str, base: dict[str, Any]) -> Any:
        """Chooses a rate on the tuning facts, then learns five batches one after another."""
        tried = self._tried(method)
        chosen = min(tried, key=lambda rate: tried[rate])
        result = self.part(f"{method} at {chosen:g}", lambda: self._learned(method, chosen, base))
        return {"rates": {str(rate): row for rate, row in tried.items()}, "rate": chosen, **result}

    def _tried(self, method: str) -> dict[float, tuple[int, float]]:
        """Returns epochs and loss by rate; tries higher rates until the best is not the last."""
        pairs, tried = self.pairs(self.data.tuning), {}
        for rate in _RATES[method]:
            made = self.part(
                f"{method} {rate:g}", lambda r=rate: self._tune(*self._rival(method), pairs, r)
            )
            tried[rate] = made[0], made[1]
            if len(tried) >= _LEAST and min(tried.values()) < tried[rate]:
                break
        return tried

    def _learned(self, method: str, rate: float, base: dict[str, Any]) -> dict[str, Any]:
        """Five batches one after another at a rate."""
        model, parameters = self._rival(method)
        begun = time.process_time()

        def learn(given: Pairs) -> int:
            return self._tune(model, parameters, given, rate)[0]

        return self._sequence(model, learn, base, begun)

    def _rival(self, method: str) -> tuple[Any, list[nn.Parameter]]:
        model = copy.deepcopy(self.base).requires_grad_(False)
        if method == "full tuning":
            parameters = [*model.model.layers[_LAYER].mlp.parameters()]
            return model, [p.requires_grad_(True) for p in parameters]
        import peft

        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
            layers_to_transform=[*range(_LAYER, len(model.model.layers))],
        )  # fmt: skip
        peft.get_peft_model(model, config)
        return model, [p for p in model.parameters() if p.requires_grad]

    def _tune(
        self, model: Any, parameters: list[nn.Parameter], pairs: Pairs, rate: float
    ) -> tuple[int, float]:
        """Trains until the mean loss is `until`; returns the epochs and the last mean loss."""
        optimizer = torch.optim.Adam(parameters, lr=rate)
        tensors = [(torch.tensor(p), torch.tensor(t)) for p, t in pairs]
        parts = [tensors[i : i + _BATCH] for i in range(0, len(tensors), _BATCH)]
        batches = [_Batch(model, part) for part in parts]
        mean = float("inf")
        for epoch in range(self.options.epochs + 1):
            losses = []
            for batch in batches:
                found = batch.losses()
                losses += found.tolist()
                if epoch < self.options.epochs:
                    optimizer.zero_grad()
                    found.mean().backward()
                    optimizer.step()
            mean = statistics.fmean(losses)
            if mean <= self.options.until:
                break
        return epoch, mean


class _Batch:
    """Facts of which the blocks below the trained ones run once."""

    def __init__(self, model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.texts = EditTexts(model, [p for p, _ in pairs], [t for _, t in pairs], labelled=True)
        self.held: dict[int, Any] = {}

    def losses(self) -> Tensor:
        """Returns the mean cross-entropy of each target, [B]."""
        texts = self.texts
        positions = (texts.mask.cumsum(1) - 1).clamp(min=0)
        with held_below(texts.model, f"model.layers.{_LAYER}.mlp", self.held), torch.enable_grad():
            logits = texts.model(
                input_ids=texts.ids, attention_mask=texts.mask, position_ids=positions,
                use_cache=False, logits_to_keep=texts.labels.shape[1],
            ).logits  # fmt: skip
        return losses_of(logits, texts.labels)


def _nearest(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best score, the share of distances, and the nearest key, each [B]."""
    scores, at = (query @ keys.T).topk(2, 1)
    distance = (2 - 2 * scores).clamp(min=0).sqrt()
    return scores[:, 0], distance[:, 0] / distance[:, 1], at[:, 0]


def _permuted(facts: Sequence[Fact]) -> list[str]:
    """Returns the targets, exchanged at random among the facts of a kind."""
    draw, targets = random.Random(1), [fact.target for fact in facts]
    for kind in sorted({fact.kind for fact in facts}):
        places = [place for place, fact in enumerate(facts) if fact.kind == kind]
        for place, other in zip(places, _shifted(places, draw), strict=True):
            targets[place] = facts[other].target
    return targets


def _shifted(places: list[int], draw: random.Random) -> Iterator[int]:
    order = places[:]
    draw.shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return (following[place] for place in places)


def main() -> None:
    """Runs every part and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("countries", type=Path, metavar="COUNTRIES_JSON")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="40 facts and 60 questions")
    parser.add_argument("--facts", type=int)
    parser.add_argument("--tuning", type=int)
    parser.add_argument("--untouched", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--experts", type=int, default=100_000)
    parser.add_argument("--until", type=float, default=0.02)
    parser.add_argument("--epochs", type=int, default=30, help="of LoRA and full tuning, at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sizes = {"facts": (40, 200), "tuning": (20, 40), "untouched": (60, 300), "windows": (4, 16)}
    for name, (quick, whole) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    torch.set_num_threads(options.threads)
    experiment = Experiment(options)
    part = experiment.part
    base = part("base", lambda: experiment.untouched(experiment.base))
    look_up = part("look up", experiment.look_up)
    parts = {
        "experts": lambda: experiment.experts(look_up, base, False),
        "experts in sequence": lambda: experiment.sequence_of_experts(look_up, base),
        "experts permuted": lambda: experiment.experts(look_up, base, True),
        "full tuning": lambda: experiment.tuned("full tuning", base),
        "LoRA": lambda: experiment.tuned("LoRA", base),
        "capacity": lambda: experiment.capacity(look_up),
    }
    rows = {name: part(name, make) for name, make in parts.items()}
    counts = {name: getattr(options, name) for name in (*sizes, "experts", "until", "epochs")}
    result = {
        "environment": environment("cpu"), "only": "memory-facts", **counts,
        "look_up": look_up, "parts": rows,
        "sample": [fact._asdict() for fact in experiment.data.facts[:4]],
    }  # fmt: skip
    print(save(result, Path(__file__).parent / "results"))


if __name__ == "__main__":
    main()
