"""fuzz.py in small: it runs clean, it names what is wrong, and a crash does not end it."""

import json
import os
import signal

import fuzz
import fuzz_ops
import pytest
import torch

from sapt_fast import dispatch

module = dispatch.kernels("mixed_lora", "reference")
pytest.importorskip("sapt_fast._C", reason="built without native kernels")


def test_it_knows_every_op():
    assert {op for op, _ in fuzz_ops.MAKERS.values()} == set(dispatch.ops())


def report(capsys, *arguments):
    """The exit status and the JSON line."""
    status = fuzz.main(["--no-child", *arguments])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_short_run_is_clean(capsys):
    status, found = report(capsys, "--calls", "300", "--seed", "2")
    assert status == 0, found["failed"]
    assert set(found["by_op"]) == set(fuzz_ops.MAKERS)
    assert found["calls"] == 300
    assert sum(row["right"] for row in found["by_op"].values()) > 200
    assert sum(row["refused"] for row in found["by_op"].values()) > 20


def test_a_wrong_value_fails_by_name(capsys, monkeypatch):
    right = module.mixed_lora_fwd

    def wrong(*arguments):
        return [(y * 1.01, h) for y, h in right(*arguments)]

    monkeypatch.setattr(module, "mixed_lora_fwd", wrong)
    given = ("--calls", "60", "--backend", "reference", "--seed", "3")
    status, found = report(capsys, *given)
    assert status == 1
    assert {row["op"] for row in found["failed"]} <= {"mixed_lora", "mixed_lora_linear"}
    first = found["failed"][0]
    assert "output 0" in first["error"]
    assert first["repeat"].endswith(f"--only {first['seed']} --backend reference")
    status, again = report(capsys, "--only", str(first["seed"]), "--backend", "reference")
    assert status == 1
    assert again["failed"][0]["error"] == first["error"]
    monkeypatch.setattr(module, "mixed_lora_fwd", right)
    assert report(capsys, "--only", str(first["seed"]), "--backend", "reference")[0] == 0


def test_a_wrong_gradient_fails_by_name(capsys, monkeypatch):
    right = module.mixed_lora_bwd

    def wrong(*arguments):
        dx, d_mixture, factors = right(*arguments)
        return dx, d_mixture, [(a, None if b is None else -b) for a, b in factors]

    monkeypatch.setattr(module, "mixed_lora_bwd", wrong)
    status, found = report(capsys, "--calls", "60", "--op", "mixed_lora", "--backend", "reference")
    assert status == 1
    assert all("gradient of lora_b" in row["error"] for row in found["failed"])


@pytest.mark.parametrize("change", ["accepts", "hides"])
def test_bad_input_must_be_refused_by_name(change, capsys, monkeypatch):
    def careless(query, keys, k, metric="dot", backend=None):
        if change == "hides":
            raise ValueError("something is wrong")
        return torch.zeros(1, 1), torch.zeros(1, 1)

    draw, make = fuzz_ops.MAKERS["topk_keys"]

    def made(*arguments):
        call = make(*arguments)
        call.function = careless
        return call

    monkeypatch.setitem(fuzz_ops.MAKERS, "topk_keys", (draw, made))
    status, found = report(capsys, "--calls", "40", "--op", "topk_keys")
    assert status == 1
    want = "accepted" if change == "accepts" else "names no argument"
    assert any(want in row["error"] for row in found["failed"])


@pytest.mark.slow
def test_a_crash_is_a_failure_and_the_run_goes_on(monkeypatch, capsys):
    """The child that is started here dies on its third call."""
    script = (
        "import fuzz, os, signal, sys\n"
        "one = fuzz._one\n"
        "def dies(seed, *rest):\n"
        "    record = one(seed, *rest)\n"
        "    if seed == 2: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return record\n"
        "fuzz._one = dies\n"
        "sys.exit(fuzz.main())\n"
    )
    folder = os.path.dirname(fuzz.__file__)
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, path]))
    monkeypatch.setattr(fuzz, "_CHILD", ["-c", script])
    status = fuzz.main(["--calls", "5", "--op", "reflection_loss"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1
    assert [row["seed"] for row in found["failed"]] == [2]
    assert found["failed"][0]["op"] == "reflection_loss"
    assert f"status -{int(signal.SIGSEGV)}" in found["failed"][0]["error"]
    assert found["calls"] == 5
