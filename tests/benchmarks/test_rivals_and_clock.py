"""What a measurement rests on: rivals compiled for each layer, numbers in which an error shows, a
clock that sees the kernels alone."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import checks
import gpu_check
import measure
import op_checks
import pytest
import torch
from cases.topk_keys import TopKeysCase
from providers import Layer, Providers

from sapt_fast import dispatch
from sapt_fast.triton_kernels.blocks import common


def test_the_compiled_rival_knows_the_sizes_of_every_layer(monkeypatch):
    compile_with, graphs = torch.compile, []

    def recorded(graph, inputs):
        graphs.append([size for t in inputs for size in t.shape])
        return graph

    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, mode, **options: compile_with(function, backend=recorded, **options),
    )
    widths = range(16, 26)  # more layers than one function may be compiled for
    for width in widths:
        layer = Layer(2, 3, width, width + 8, 3, 4, torch.float32)
        providers = Providers(layer, training=False)
        with torch.no_grad():
            torch.testing.assert_close(providers.stacked_compiled(), providers.stacked())
            providers.stacked_compiled()
    assert len(graphs) == len(widths)
    for width, sizes in zip(widths, graphs, strict=True):
        assert all(type(size) is int for size in sizes)
        assert width in sizes


@pytest.mark.parametrize("rival", ["base", "stacked"])
def test_the_rivals_by_onednn_compute_the_same(rival):
    results = []
    for name in (rival, f"{rival}_onednn"):
        providers = Providers(Layer(2, 3, 24, 40, 3, 4, torch.float32), training=True)
        y = providers.forward()[name]()
        y.backward(providers.grad)
        results.append([y.detach(), *(leaf.grad for leaf in providers.leaves)])
    for ours, plain in zip(*results, strict=True):
        if plain is None:  # the base alone reads no adapter
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    "layer", [row for row in gpu_check.TRAINING + gpu_check.DECODE if row.width <= 4096], ids=str
)
def test_a_layer_without_its_adapters_would_be_noticed(layer):
    providers = Providers(replace(layer, batch=2, tokens=2, dtype=torch.float32), training=True)
    results = []
    for forward in (providers.stacked, providers.forward()["base"]):
        y = forward()
        results.append((y.detach(), *torch.autograd.grad(y, providers.x, providers.grad)))
    largest = max(checks.FLOOR.values())
    for with_adapters, without in zip(*results, strict=True):
        assert checks._error(without, with_adapters) > 10 * largest


def test_the_gpu_clock_starts_after_the_flush_and_a_lead(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 1.0

    flush = SimpleNamespace(zero_=lambda: order.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: flush)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("lead"))
    times = measure.interleaved_ms({"f": lambda: order.append("call")}, "cuda", repeats=2)
    assert times == {"f": {"p20": 1.0, "median": 1.0, "p80": 1.0}}
    turn = ["flush", "lead", "event", "call", "event", "wait"]
    assert order == [*["call"] * 3, *turn * 2]


@pytest.mark.parametrize("ms", [0.9, 5e3])
def test_a_turn_on_the_cpu_follows_a_call_of_its_own(ms, monkeypatch):
    order = []

    def turn(function, calls):
        order.append(f"timed {function()}")
        return ms

    monkeypatch.setattr(measure, "_turn_ms", turn)
    functions = {name: lambda name=name: order.append(name) or name for name in "abc"}
    measure.interleaved_ms(functions, "cpu", repeats=4, warmup=1)
    turns = order[2 * len(functions) :]
    assert len(turns) == 3 * 4 * len(functions)
    for own, call, timed in zip(turns[::3], turns[1::3], turns[2::3], strict=True):
        assert (call, timed) == (own, f"timed {own}")


def test_the_time_of_an_import_is_that_beyond_the_first(tmp_path, monkeypatch):
    (tmp_path / "slow_first.py").write_text("import time; time.sleep(1.0)")
    (tmp_path / "slow_second.py").write_text("import time; time.sleep(0.2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seconds = measure.import_seconds("slow_second", after="slow_first", repeats=1)
    assert 0.2 <= seconds < 1.0


@dataclass(frozen=True)
class Tied(TopKeysCase):
    """The keys 4 and 5 are equally good for the only query, and `better` others are better."""

    better: int = 0

    def inputs(self, dtype, device):
        given = super().inputs(dtype, device)
        signs = given["query"].sign()
        given["query"][:, 1:3] = 0.0
        given["keys"][4:6] = 9.0 * signs
        given["keys"][4, 1] = given["keys"][5, 2] = 3.0
        given["keys"][10 : 10 + self.better] *= 0.1
        given["keys"][10 : 10 + self.better] += 12.0 * signs
        return given


@pytest.mark.skipif(not common.INTERPRETED, reason="needs interpreted kernels")
@pytest.mark.parametrize("better", [0, 4], ids=["first and second", "last and left out"])
def test_a_search_may_exchange_equal_keys(better, monkeypatch):
    kernel = dispatch.kernels("topk_keys", "triton")
    search = kernel.topk_keys_fwd

    def exchanged(*given):
        scores, index = search(*given)
        assert index[0, better] == 4
        return scores, torch.where(index == 4, 5, torch.where(index == 5, 4, index))

    monkeypatch.setattr(kernel, "topk_keys_fwd", exchanged)
    case = Tied(1, 60, 16, 5, better=better)
    report = op_checks.correctness("cpu", [case], dtypes=(torch.float32,))
    [checked] = report["topk_keys"]["cases"]
    assert checked["ok"], checked
