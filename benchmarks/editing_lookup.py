"""How long it takes to look an edit up, by the number of edits, and what a decode step costs then.

    python benchmarks/editing_lookup.py [--keys 1000 10000 100000] [--repeats 20]

Three parts:

- search: `nearest_key` in C++ against `torch.cdist` and against a matrix product with norms that
  were computed before, which rounds near keys to the same distance;
- decoding: a prompt's forward and a decode step of a small decoder-only model with a table of so
  many edits, one of which acts, against the model without edits. A decode step searches nothing;
- the bytes that the search moves on a GPU, by formula, beside the least: the keys once.

Run it on a machine that does nothing else. The result goes to `benchmarks/results/<machine>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from cases._keys import Search
from cases.nearest_key import nearest_key_passes
from checks import target
from measure import environment, interleaved_ms, save
from passes import total_bytes
from torch import Tensor

import sapt_fast
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.ops import nearest_key

WIDTHS, QUERIES = (384, 768), (1, 32)
_LIMITS = {1_000: 1.0, 100_000: 40.0}  # milliseconds, one query of width 384
_PROMPT, _VALUE = 32, 256  # tokens, width of a value
_SPLITS = 264  # shares of the keys on a GPU, at most two for each multiprocessor


@torch.no_grad()
def search(count: int, width: int, queries: int, repeats: int) -> dict[str, Any]:
    """Times one look-up of `queries` prompts in `count` keys, in milliseconds."""
    draws = torch.Generator().manual_seed(0)
    keys = torch.randn(count, width, generator=draws)
    query = keys[torch.randint(count, (queries,), generator=draws)]
    query = query + 0.1 * torch.randn(queries, width, generator=draws)
    radii, norms = torch.full((count,), 10.0), keys.square().sum(1)

    def by_product() -> tuple[Tensor, Tensor]:
        square, index = torch.addmm(norms, query, keys.T, alpha=-2).min(1)
        return (square + query.square().sum(1)).clamp(min=0).sqrt(), index

    functions: dict[str, Callable[[], Any]] = {
        "nearest_key": lambda: nearest_key(query, keys, radii, backend="cpu"),
        "cdist": lambda: torch.cdist(query, keys).min(1),
        "product": by_product,
    }
    found = functions["nearest_key"]()[0]
    for name in ("cdist", "product"):
        if not torch.equal(functions[name]()[1], found):
            raise RuntimeError(f"search: {name} finds other keys than nearest_key")
    times = interleaved_ms(functions, "cpu", repeats=repeats)
    return {"keys": count, "width": width, "queries": queries, "ms": times}


def _model(count: int, width: int) -> tuple[Any, Tensor]:
    """Returns a model with so many edits, and a prompt on which one acts."""
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=_VALUE,
        intermediate_size=2 * _VALUE,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(1000, (1, _PROMPT))
    if count:
        sapt_fast.patch(model, GraceConfig(keys="function", radius=1.0))
        keys = torch.randn(count, width)
        model.grace.look_up_by(lambda texts: keys[:1].expand(len(texts), -1))
        (book,) = model.grace.books().values()
        edits = model.grace.log.add([*torch.arange(count)[:, None]], [torch.ones(1).long()] * count)
        values = torch.randn(count, 1, _VALUE)
        book.add(keys, [*values], torch.ones(count), edits)
        model.grace.follow_edits()
    return model, prompt


@torch.no_grad()
def decoding(count: int, width: int, repeats: int) -> dict[str, Any]:
    """Times a prompt's forward and a decode step, with and without a table of edits."""
    functions: dict[str, Callable[[], Any]] = {}
    for name, (model, prompt) in {"edited": _model(count, width), "base": _model(0, width)}.items():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        token = prompt[:, :1]

        def step(model: Any = model, cache: Any = cache, token: Tensor = token) -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        functions[f"{name}, prompt"] = lambda m=model, p=prompt: m(input_ids=p, use_cache=True)
        functions[f"{name}, step"] = step
    times = interleaved_ms(functions, "cpu", repeats=repeats)
    return {"keys": count, "width": width, "ms": times}


def gpu_bytes(count: int, width: int, queries: int) -> dict[str, Any]:
    """The bytes that the GPU kernel moves, by formula, and the least: each float32 key once."""
    sizes = Search(queries, count, width, splits=_SPLITS, itemsize=4)
    moved, least = total_bytes(nearest_key_passes(sizes)), sizes.keys + sizes.query + 12 * queries
    return {"keys": count, "width": width, "queries": queries, "moved": moved, "least": least}


def _targets(searches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in searches:
        limit = _LIMITS.get(row["keys"])
        if limit is not None and (row["width"], row["queries"]) == (384, 1):
            name = f"look-up in {row['keys']} keys, M 1, D 384, ms"
            found.append(target(name, row["ms"]["nearest_key"]["median"], limit))
    return found


def main() -> None:
    """Measures everything and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [(count, width, m) for count in options.keys for width in WIDTHS for m in QUERIES]
    searches, steps = [], []
    for count, width, queries in sizes:
        searches.append(search(count, width, queries, options.repeats))
        shown = {name: round(ms["median"], 3) for name, ms in searches[-1]["ms"].items()}
        print(f"{count} keys, D {width}, M {queries}: {shown} ms", flush=True)
    for count in options.keys:
        steps.append(decoding(count, WIDTHS[0], options.repeats))
        shown = {name: round(ms["median"], 3) for name, ms in steps[-1]["ms"].items()}
        print(f"{count} edits: {shown} ms", flush=True)
    result = {
        "environment": environment("cpu"),
        "only": "editing-lookup",
        "search": searches,
        "decoding": steps,
        "gpu_bytes": [gpu_bytes(*size) for size in sizes],
        "targets": _targets(searches),
    }
    print(save(result, options.output))


if __name__ == "__main__":
    main()
