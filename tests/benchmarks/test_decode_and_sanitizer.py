"""Decoding steps of a pair, and the sanitizer's verdict with a stand-in for the tool."""

import time
from dataclasses import replace

import checks
import decode_pair
import gpu_check
import pytest
import sanitizer
import torch
from providers import Layer, Providers

pytestmark = pytest.mark.usefixtures("clock")
LAYER = Layer(3, 1, 32, 32, 6, 4, torch.float32)


@pytest.fixture
def backend(monkeypatch):
    """One backend of ours, whatever this build has."""
    monkeypatch.setattr(
        decode_pair.DecodePair, "ours", lambda pair: {"ours_cuda": lambda: pair._ours("reference")}
    )


@pytest.mark.usefixtures("backend")
class TestPair:
    def test_times_and_errors(self):
        row = decode_pair.times(LAYER, repeats=2)
        assert list(row["ms"]) == ["base", "peft", "ours_cuda"]
        assert (row["ok"], row["failed"]) == (True, {})
        assert len(row["errors"]["ours_cuda"]) == 2
        assert decode_pair.chosen(row) == "ours_cuda"

    def test_rivals_compute_the_same_pair(self):
        """PEFT weighs all adapters alike: with weights of one it is the same."""
        pair = decode_pair.DecodePair(LAYER)
        pair.mixture.fill_(1.0)
        rivals = pair.rivals()
        assert max(pair.errors(rivals["peft"])) < 1e-5
        assert min(pair.errors(rivals["base"])) > 0.1

    def test_few_adapters_carry_weight(self):
        pair = decode_pair.DecodePair(LAYER, carrying=2)
        assert (pair.mixture != 0).sum(1).tolist() == [2] * 3
        few = decode_pair.DecodePair(replace(LAYER, adapters=2))
        assert max(pair.errors(pair.ours()["ours_cuda"])) < 1e-5
        assert min(few.errors(pair.ours()["ours_cuda"])) > 0.1  # other weights, other adapters

    def test_a_wrong_backend_is_not_timed(self, monkeypatch):
        right = decode_pair.mix
        monkeypatch.setattr(
            decode_pair, "mix", lambda *given, **named: [1.01 * y for y in right(*given, **named)]
        )
        row = decode_pair.times(LAYER, repeats=2)
        assert not row["ok"]
        assert row["wrong"] == ["ours_cuda"]
        assert list(row["ms"]) == ["base", "peft"]
        assert row["errors"]["ours_cuda"] == [pytest.approx(0.01, rel=0.01)] * 2

    def test_a_rival_that_raises_is_named(self, monkeypatch):
        captured = []

        def capture(run, device):
            captured.append(run)
            if len(captured) == 3:  # ours is first
                raise RuntimeError("cannot be captured")
            return run

        monkeypatch.setattr(decode_pair, "replayed", capture)
        row = decode_pair.times(LAYER, repeats=2)
        assert row["failed"] == {"peft": "RuntimeError: cannot be captured"}
        assert row["ok"]
        assert list(row["ms"]) == ["base", "ours_cuda"]
        assert row["wrong"] == []

    def test_a_rival_that_cannot_be_built_costs_its_row(self, monkeypatch):
        def other_internals(providers, dtype):
            raise TypeError("update_layer() got an unexpected keyword argument")

        monkeypatch.setattr(Providers, "_make_peft", other_internals)
        row = decode_pair.times(LAYER, repeats=2)
        assert "unexpected keyword" in row["failed"].pop("peft")
        assert (row["failed"], row["ok"]) == ({}, True)
        assert list(row["ms"]) == ["base", "ours_cuda"]
        checked = checks.correctness([], [LAYER])
        assert checked
        assert all(verdict["ok"] for verdict in checked.values())
        times = checks.layer_times(LAYER, checked, repeats=1, training=True, compiled=False)
        assert times["failed"].keys() == {"peft", "peft_default"}
        assert {"base", "stacked", "released", *checked} <= times["ms"].keys()

    def test_section_and_targets(self, monkeypatch):
        monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
        result = gpu_check.collect(quick=True, only="decode")
        assert result["failures"] == []
        assert result["correctness"]["pairs of mixed_lora"]["ok"]
        assert [row["carrying"] for row in result["decode"]] == [None, 4, None]
        values = {row["what"]: row["value"] for row in result["targets"]}
        assert values == {
            "decode of a pair, graph, B 1: ours_cuda / base linears": 3.0,
            "decode of a pair, graph, B 1: PEFT loop / ours_cuda": pytest.approx(2 / 3),
            "decode, B 1, ours_cuda: 4 of 64 adapters carry weight / 4 adapters": 1.0,
        }

    def test_the_sizes_of_the_targets(self):
        sizes = {(r.width, r.out, r.adapters, r.rank, r.dtype) for r in gpu_check.PAIRS}
        assert sizes == {(4096, 4096, 15, 4, torch.bfloat16)}
        assert {row.batch for row in gpu_check.PAIRS} >= {1, 16}


class TestSanitizer:
    @pytest.fixture
    def tool(self, tmp_path, monkeypatch):
        """Puts a compute-sanitizer on the PATH that prints and exits as it is told."""

        def put(printed: str, status: int = 0):
            script = tmp_path / "compute-sanitizer"
            script.write_text(
                f"#!/bin/sh\necho \"$@\" > {tmp_path}/given\ncat <<'END'\n{printed}\nEND\n"
                f"echo ${{PYTORCH_NO_CUDA_MEMORY_CACHING:-cached}} >> {tmp_path}/given\n"
                f"exit {status}\n"
            )
            script.chmod(0o755)

        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
        put.given = lambda: (tmp_path / "given").read_text()
        return put

    @pytest.mark.parametrize(
        ("printed", "status", "ok"),
        [
            ("90 passed in 9s\n========= ERROR SUMMARY: 0 errors", 0, True),
            (
                "90 passed in 9s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)",
                0,
                True,
            ),
            ("90 passed in 9s\n========= ERROR SUMMARY: 2 errors", 86, False),
            ("90 passed in 9s\n========= RACECHECK SUMMARY: 1 hazard displayed", 0, False),
            ("1 failed, 89 passed in 9s\n========= ERROR SUMMARY: 0 errors", 1, False),
            ("90 skipped in 9s\n========= ERROR SUMMARY: 0 errors", 0, False),
            ("========= Error: no device", 0, False),
        ],
    )
    def test_verdict(self, tool, printed, status, ok):
        tool(printed, status)
        row = sanitizer.run("racecheck")
        assert row["ok"] is ok
        assert printed.splitlines()[-1].strip("= ") in row["said"]

    def test_what_is_run(self, tool):
        tool("")
        sanitizer.run("memcheck")
        assert "--tool memcheck" in tool.given()
        assert "kernel_substring=sapt_fast" in tool.given()
        assert tool.given().splitlines()[-1] == "1"
        sanitizer.run("racecheck")
        assert "captured_graph" not in tool.given()
        assert tool.given().splitlines()[-1] == "cached"

    def test_it_is_ended_when_its_time_is_up(self, tool, tmp_path):
        tool("")
        (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nsleep 60 & sleep 60\n")
        began = time.monotonic()
        assert sanitizer.run("racecheck", 0.3) == {"ok": None, "said": "not done after 0 s"}
        assert time.monotonic() - began < 30

    def test_no_such_tool(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        row = sanitizer.run("memcheck")
        assert row["ok"] is None
        assert "not found" in row["said"]
