"""A model with up to a million experts on one layer: it memorises facts and decodes.

Part of memory.py, in a process of its own, whose peak memory is that of all its models. The model
is that of `benchmarks/smollm2.py`; any decoder-only model of transformers will do.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sapt_fast
from sapt_fast.methods.mome import MomeConfig

# Keys, and what looks up. Facts have a key each; the others one for each of N experts.
KINDS = {
    "facts": {},
    "product": {"keys": "product"},
    "product, per token": {"keys": "product", "query": "token"},
    "exact": {"keys": "learned"},
}
_FACTS, _PROMPTS, _TOKENS, _COMPONENTS = 4, 24, 8, 16


def memory(base: Any, kind: str, experts: int) -> tuple[Any, dict[str, Any]]:
    """Returns a model that has memorised facts, and what that took."""
    settings = {"num_experts": experts, "components": _COMPONENTS, **KINDS[kind]}
    model = sapt_fast.patch(copy.deepcopy(base), MomeConfig(**settings))
    generator, most = torch.Generator().manual_seed(0), base.config.vocab_size
    texts = torch.randint(10, most, (_PROMPTS + _FACTS, 2, _TOKENS), generator=generator)
    pairs = [(prompt, target) for prompt, target in texts]
    given = pairs if "keys" in settings else [prompt for prompt, _ in pairs]
    model.mome.fit_router(given[_FACTS:])
    begun = time.perf_counter()
    report = model.mome.memorise(pairs[:_FACTS], until=0.1, progress=False)
    seconds = time.perf_counter() - begun
    exact = 0
    for prompt, target in pairs[:_FACTS]:
        ids = prompt[None]
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, do_sample=False
        )
        exact += said[0, _TOKENS:].tolist() == target.tolist()
    return model, {
        "kind": kind, "experts": experts, "facts": _FACTS, "exact": exact,
        "epochs": report.epochs, "memorise_seconds": seconds,
        "bank_bytes": sum(bank.nbytes for bank in model.mome.banks),
    }  # fmt: skip


@torch.no_grad()
def decoded(model: Any, prompt: Tensor) -> Callable[[], object]:
    """Returns a call that decodes one token behind a prompt [1, T]."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    token = prompt[:, -1:]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def measured(folder: str, counts: list[int], repeats: int) -> dict[str, Any]:
    """Memorises with each kind of keys and N, and decodes in turns.

    Returns:
        "rows": what memorising took; "ms": quantiles of a decoded token by kind and N, of the base
        model, of a search in N keys and of a copy of them; "peak_bytes": of the whole process.
    """
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.randint(10, base.config.vocab_size, (1, _TOKENS))
    rows, calls = [], {"token base": decoded(base, prompt)}
    for kind, count in itertools.product(KINDS, counts):
        model, row = memory(base, kind, count)
        rows.append(row)
        asked = torch.tensor([model.mome.facts[0].prompt])
        calls[f"token {kind} {count}"] = decoded(model, asked)
        if kind == "exact":
            keys = model.mome.lookup.index.present_keys()[0]
            to, query = torch.empty_like(keys), torch.randn(1, keys.shape[1])
            index, k = model.mome.lookup.index, model.mome.config.k
            calls[f"search {kind} {count}"] = lambda i=index, q=query, k=k: i.search(q, k)
            calls[f"copy {count}"] = lambda to=to, keys=keys: to.copy_(keys)
    with torch.inference_mode():
        times = measure.interleaved_ms(calls, "cpu", repeats=repeats)
    return {"rows": rows, "ms": times, "peak_bytes": measure.resident("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("repeats", type=int)
    parser.add_argument("experts", type=int, nargs="+")
    options = parser.parse_args()
    print(json.dumps(measured(options.model, options.experts, options.repeats)))


if __name__ == "__main__":
    main()
