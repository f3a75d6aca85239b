"""Which devices a build serves, and what calls for others say."""

import json
from types import SimpleNamespace

import pytest
import torch

from sapt_fast.cuda_kernels import common


@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        ("sm_80", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(10, 0), (8, 0)]),
        ("sm_100 compute_100", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
    ],
)
def test_which_devices_a_build_serves(monkeypatch, architectures, served, not_served):
    for capability in served + not_served:
        device = {"name": "a GPU", "capability": capability}
        report = {"error": "", "architectures": architectures.split(), "devices": [device]}
        native = SimpleNamespace(cuda_runtime=lambda report=report: report)
        monkeypatch.setattr(common, "native", lambda native=native: native)
        reason = common.unavailable()
        assert (reason is None) == (capability in served)
        assert reason is None or "SAPT_FAST_CUDA_ARCHS" in reason


def test_no_driver(monkeypatch):
    report = {"error": "no driver", "architectures": [], "devices": []}
    monkeypatch.setattr(common, "native", lambda: SimpleNamespace(cuda_runtime=lambda: report))
    assert "no driver" in str(common.unavailable())


def test_built_without_cuda(monkeypatch):
    def native():
        raise ImportError("built without CUDA")

    monkeypatch.setattr(common, "native", native)
    assert common.unavailable() == "built without CUDA"


def test_cpu_tensors():
    with pytest.raises(ValueError, match="need CUDA tensors, got device 'cpu'"):
        common.place(torch.device("cpu"))


def test_float64():
    with pytest.raises(TypeError, match="float64"):
        common.dtype_code(torch.float64)


SOURCES = {"mixed_lora": "0a1b", "route": "ffff"}


def test_a_changed_source_is_unrecorded(monkeypatch, tmp_path):
    report = {"compiled": True, "sources": {"mixed_lora": "0a1b", "route": "2c3d"}}
    monkeypatch.setattr(common, "native", lambda: SimpleNamespace(cuda_runtime=lambda: report))
    monkeypatch.setattr(common, "RECORDED", tmp_path / "recorded.json")
    ran = {"bfloat16": [1, 16]}
    record = {op: {"source": source, "ran": ran} for op, source in SOURCES.items()}
    common.RECORDED.write_text(json.dumps(record))
    assert common.unrecorded("mixed_lora") is None
    assert "has changed" in str(common.unrecorded("route"))
    assert "no correct run" in str(common.unrecorded("topk_keys"))
    for rows, known in {1: True, 2: False, 4: False, 5: True, 16: True, 17: False}.items():
        assert (common.unrecorded("mixed_lora", torch.bfloat16, rows) is None) == known
    assert "1 rows of float16" in str(common.unrecorded("mixed_lora", torch.float16, 1))


def test_the_record_names_ops():
    native = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
    if not native.cuda_runtime()["compiled"]:
        pytest.skip("built without CUDA")
    assert set(json.loads(common.RECORDED.read_text())) <= set(native.cuda_runtime()["sources"])
