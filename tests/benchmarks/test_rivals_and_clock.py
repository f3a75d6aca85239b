"""The benchmarks' rival is compiled for each layer, and their clock sees the kernels alone."""

from dataclasses import dataclass
from types import SimpleNamespace

import measure
import op_checks
import pytest
import torch
from op_cases import TopKeysCase
from providers import Layer, Providers

from sapt_fast import dispatch
from sapt_fast.triton_kernels import common


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


@dataclass(frozen=True)
class Tied(TopKeysCase):
    """Two keys of equal scores lead."""

    def inputs(self, dtype, device):
        given = super().inputs(dtype, device)
        given["query"][:, 1:3] = 0.0
        given["keys"][4:6] = 9.0 * given["query"].sign()[:1]
        given["keys"][4, 1] = given["keys"][5, 2] = 3.0
        return given


@pytest.mark.skipif(not common.INTERPRETED, reason="needs interpreted kernels")
def test_a_search_may_exchange_equal_keys(monkeypatch):
    kernel = dispatch.kernels("topk_keys", "triton")
    search = kernel.topk_keys_fwd

    def exchanged(*given):
        scores, index = search(*given)
        assert index[0, :2].tolist() == [4, 5]
        return scores, index[:, [1, 0, 2, 3, 4]]

    monkeypatch.setattr(kernel, "topk_keys_fwd", exchanged)
    report = op_checks.correctness("cpu", [Tied(1, 60, 16, 5)], dtypes=(torch.float32,))
    [case] = report["topk_keys"]["cases"]
    assert case["ok"], case
