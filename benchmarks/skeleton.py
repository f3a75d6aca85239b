"""Skeleton-of-Thought against ordinary decoding of the same number of tokens.

    python benchmarks/skeleton.py MODEL_DIR [--quick] [--points 4 8] [--tokens 64] [--repeats 3]
        [--threads 2]

MODEL_DIR contains a causal model with a chat template (`benchmarks/smollm2.py` makes one). The
skeleton is given: the model decodes its tokens, but each is replaced by that of a text with as many
points as are measured. Every point has exactly `--tokens` tokens. So times are compared at equal
numbers of tokens, whatever the model would answer.

- speedup_n: time of ordinary decoding of n * tokens tokens, over that of an answer of n points,
  skeleton included, end to end. Ordinary decoding is the faster one of `model.generate` and of our
  own loop.
- of_model_n: the speed-up over `1 / (N_s/N + (t_B/t_1)/B)`. N_s are the skeleton's tokens, N the
  points'. t_1 and t_B are steps of plain transformers with a `DynamicCache`, of one row and of n
  rows, at the length in the middle of an answer.
- prefill_tokens_saved: at the largest n, the tokens that the original code reads, which prefills
  every prompt whole, less those that ours reads. For the same prompts.
- tokens_differ: tokens of the points that are not those of `generate` on each point alone.

The last line is a JSON object. The result goes to `benchmarks/results/<machine>`, but that of
`--quick` is only printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, environment, interleaved_ms, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor

from sapt_fast.generation import SkeletonSettings
from sapt_fast.generation.local import LocalAnswer
from sapt_fast.generation.prompts import TokenPrompts, plain_messages, skeleton_messages

QUESTION = "How can I sleep better?"
TITLES = (
    "Keep a regular sleep schedule",
    "Avoid caffeine in the evening",
    "Keep the bedroom dark",
    "Put screens away before bed",
    "Exercise during the day",
    "Eat a light dinner",
    "Relax before going to bed",
    "Get sunlight in the morning",
    "Limit long daytime naps",
    "Keep the bedroom cool",
    "Use a comfortable mattress",
    "Write down your worries",
    "Avoid alcohol before sleep",
    "Take a warm bath",
    "Read a quiet book",
    "See a doctor if needed",
)


class Given(LogitsProcessor):
    """Makes a model write given tokens.

    Args:
        tokens: the last one ends the text.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._left = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._left.pop(0)] = torch.inf
        return scores


class Bench:
    """One model.

    Args:
        folder: of the model.
        tokens: of each point.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.eval()
        self.tokens = tokens

    def settings(self, points: int) -> SkeletonSettings:
        lines = [f"{n}. {title}" for n, title in enumerate(TITLES[:points], 1)]
        skeleton = self.tokenizer("\n".join(lines).removeprefix("1."), add_special_tokens=False)
        given = [*skeleton["input_ids"], self.tokenizer.eos_token_id]
        return SkeletonSettings(
            max_skeleton_tokens=len(given),
            max_point_tokens=self.tokens,
            max_plain_tokens=self.tokens * points,
            min_tokens=self.tokens * points,
            stop_at_next=False,
            skeleton_processors=[Given(given)],
            batch=points,
        )

    def answer(self, points: int) -> LocalAnswer:
        """An answer of n points."""
        return self._written(points, "skeleton")

    def plain(self, points: int) -> LocalAnswer:
        """As many tokens as n points have, by our own loop."""
        return self._written(points, "plain")

    def _written(self, points: int, mode: str) -> LocalAnswer:
        answer = LocalAnswer(self.model, self.tokenizer, QUESTION, self.settings(points))
        for _ in answer.skeleton() if mode == "skeleton" else answer.plain(""):
            pass
        texts = answer.texts
        assert len(texts) == (points if mode == "skeleton" else 1)
        assert sum(len(text.tokens) for text in texts) == self.tokens * points
        return answer

    def generate(self, points: int) -> None:
        """The same number of tokens by `generate`."""
        prompt = TokenPrompts(self.tokenizer, self.settings(points).prompts)
        ids = prompt.of(plain_messages(self.settings(points).prompts, QUESTION))
        self._generated(ids, self.tokens * points)

    def _generated(self, ids: list[int], new: int) -> list[int]:
        inputs = torch.tensor([ids])
        out: Tensor = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens

    def differing(self, answer: LocalAnswer) -> int:
        """How many tokens of an answer's points `generate` does not write for each point alone."""
        count = 0
        for text in answer.texts:
            alone = self._generated(text.prompt, self.tokens)
            count += sum(a != b for a, b in zip(text.tokens, alone, strict=True))
        return count

    def steps(self, points: int, length: int, repeats: int) -> dict[str, float]:
        """Milliseconds of a step of plain transformers, of one row and of n rows."""
        functions: dict[str, Callable[[], object]] = {}
        for name, rows in (("t_1", 1), ("t_B", points)):
            cache = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model(torch.full((1, length), 5), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(rows)
            functions[name] = _step(self.model, cache, torch.full((rows, 1), 5))
        found = interleaved_ms(functions, "cpu", repeats=repeats)
        return {name: times["median"] for name, times in found.items()}

    def measure(self, points: int, repeats: int) -> dict[str, Any]:
        """All figures of n points."""
        functions: dict[str, Callable[[int], Any]] = {
            "skeleton": self.answer, "plain": self.plain, "generate": self.generate,
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats):  # in turns, so that a disturbance meets all of them
            for name, function in functions.items():
                begin = time.perf_counter()
                function(points)
                seconds[name].append(time.perf_counter() - begin)
        answer = self.answer(points)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        prefilled, generated = answer.counts()
        new = self.tokens * points
        length = len(answer.texts[0].prompt) + self.tokens // 2
        steps = self.steps(points, length, max(5, 5 * repeats))
        model = 1 / ((generated - new) / new + steps["t_B"] / steps["t_1"] / points)
        speedup = min(median["plain"], median["generate"]) / median["skeleton"]
        settings = self.settings(points)
        first = skeleton_messages(settings.prompts, QUESTION)
        first_prompt = TokenPrompts(self.tokenizer, settings.prompts).of(
            first, settings.prompts.skeleton_opening
        )
        whole = len(first_prompt) + sum(len(text.prompt) for text in answer.texts)
        return {
            "points": points,
            "tokens_per_point": self.tokens,
            "skeleton_tokens": generated - new,
            "seconds": seconds,
            "stages": answer.seconds,
            "step_ms": steps,
            "speedup": speedup,
            "model": model,
            "of_model": speedup / model,
            "prefill_tokens": prefilled,
            "prefill_tokens_whole": whole,
            "tokens_differ": self.differing(answer),
        }


def _step(model: Any, cache: DynamicCache, ids: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def step() -> object:
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1).tolist()

    return step


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of the last line."""
    found: dict[str, Any] = {}
    for row in rows:
        found[f"speedup_{row['points']}"] = round(row["speedup"], 3)
        found[f"of_model_{row['points']}"] = round(row["of_model"], 3)
    largest = rows[-1]
    found["prefill_tokens_saved"] = largest["prefill_tokens_whole"] - largest["prefill_tokens"]
    found["tokens_differ"] = sum(row["tokens_differ"] for row in rows)
    return found


def line(row: dict[str, Any]) -> str:
    """Returns a row for the terminal."""
    times = ", ".join(f"{n} {statistics.median(t):.2f} s" for n, t in row["seconds"].items())
    steps = ", ".join(f"{name} {ms:.1f} ms" for name, ms in row["step_ms"].items())
    return (
        f"{row['points']:2} points: {times}; speed-up {row['speedup']:.2f}, model "
        f"{row['model']:.2f} ({steps}); read {row['prefill_tokens']} tokens, whole prompts "
        f"{row['prefill_tokens_whole']}; {row['tokens_differ']} tokens differ"
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a causal model with a chat template")
    parser.add_argument("--quick", action="store_true", help="few tokens; nothing is recorded")
    parser.add_argument("--points", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, help="of each point [default: 64, quick: 8]")
    parser.add_argument("--repeats", type=int, help="of each time [default: 3, quick: 1]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(given)
    if not all(2 <= points <= len(TITLES) for points in chosen.points):
        parser.error(f"--points: got {chosen.points}, expected numbers from 2 to {len(TITLES)}")
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.model, chosen.tokens or (8 if chosen.quick else 64))
    bench.answer(2)  # warms up
    rows = []
    for points in sorted(chosen.points):
        rows.append(bench.measure(points, chosen.repeats or (1 if chosen.quick else 3)))
        print(line(rows[-1]), flush=True)
    if chosen.quick:
        print("not recorded")
    else:
        command = " ".join(["python", "benchmarks/skeleton.py", *(given or sys.argv[1:])])
        about = {"environment": environment("cpu"), "only": "skeleton", "command": command}
        print(save({**about, "rows": rows, **summary(rows)}, chosen.out))
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
