"""gpu_check in small on the CPU, kernels interpreted: it must run at its first call on a GPU."""

import json
from dataclasses import dataclass, replace

import cases
import checks
import decode_pair
import gpu_check
import gpu_targets
import measure
import op_checks
import pytest
import torch
from cases import mix_experts as experts
from cases import topk_keys as topk_cases
from cases.mix_experts import ExpertsCase
from cases.mix_prompts import PromptCase
from cases.nearest_key import NearestKeyCase
from cases.route import RouterCase
from cases.topk_keys import TopKeysCase
from op_case import OpCase
from providers import Providers

from sapt_fast import dispatch
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.grouped_experts import grouping_pays

pytestmark = pytest.mark.skipif(
    not common.INTERPRETED, reason="the rehearsal needs interpreted kernels (TRITON_INTERPRET=1)"
)
OPS = {case.op for case in op_checks.checked(True, "triton")}
PASSED = {op: {"ok": True, "cases": []} for op in OPS}
WRONG = {"ok": False, "cases": []}


@dataclass(frozen=True)
class Spoiled(OpCase):
    """A case whose kernel is wrong by one per cent, or raises."""

    raises: bool = False
    op: str = "spoiled"
    trains: tuple[str, ...] = ("x",)

    def inputs(self, dtype, device):
        return {"x": torch.linspace(1, 2, 7, dtype=dtype, device=device)}

    def run(self, inputs, backend):
        if backend != "reference" and self.raises:
            raise RuntimeError("no such kernel")
        return {"y": inputs["x"].square() * (1.0 if backend == "reference" else 1.01)}


@pytest.mark.slow
@pytest.mark.thorough
def test_every_op_is_checked_in_every_dtype():
    report = op_checks.correctness("cpu", op_checks.checked(True, "triton"))
    assert report.keys() == OPS
    # Layers are checked elsewhere.
    with_kernels = {op for op in dispatch.ops() if "triton" in dispatch.backends(op)}
    assert with_kernels - OPS == {"mixed_lora"}
    for op, row in report.items():
        assert row["ok"], (op, [case for case in row["cases"] if not case["ok"]])
        assert {case["dtype"] for case in row["cases"]} == {str(d) for d in op_checks.DTYPES}
        for case in row["cases"]:
            assert any(name.startswith("d_") for name in case["errors"])


def test_a_wrong_kernel_fails_in_its_output_and_its_gradient():
    report = op_checks.correctness("cpu", [Spoiled()], dtypes=(torch.float32,))
    assert not report["spoiled"]["ok"]
    errors = report["spoiled"]["cases"][0]["errors"]
    assert errors["y"] == pytest.approx(0.01, rel=1e-3)
    assert errors["d_x"] == pytest.approx(0.01, rel=1e-3)


def test_a_kernel_that_raises_is_wrong_and_the_others_are_checked():
    right = PromptCase(1, 2, 16, 2, 1)
    report = op_checks.correctness("cpu", [Spoiled(raises=True), right], dtypes=(torch.float32,))
    assert not report["spoiled"]["ok"]
    assert report["spoiled"]["cases"][0]["raised"] == "RuntimeError: no such kernel"
    assert report["mix_prompts"]["ok"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index.roll(1, 1),  # another order
        lambda index: index[:, :1].expand_as(index),  # one key many times
    ],
    ids=["order", "twice"],
)
def test_a_wrong_index_of_a_search_is_noticed(spoil, monkeypatch):
    search = topk_cases.topk_keys

    def wrong(*given, backend, **named):
        scores, index = search(*given, backend=backend, **named)
        return scores, index if backend == "reference" else spoil(index).contiguous()

    monkeypatch.setattr(topk_cases, "topk_keys", wrong)
    report = op_checks.correctness("cpu", [TopKeysCase(3, 60, 16, 5)], dtypes=(torch.float32,))
    assert not report["topk_keys"]["ok"]
    assert report["topk_keys"]["cases"][0]["errors"]["scores"] < 1e-5


@pytest.fixture
def bare(monkeypatch) -> list[tuple[str, str]]:
    """The kernels that would have run, op and backend; none does."""
    given = []

    def nothing(case, inputs, backend):
        given.append((case.op, backend))
        return lambda: None

    for kind in {type(timed.quick) for timed in cases.gathered("TIMED")}:
        monkeypatch.setattr(kind, "bare", nothing)
    return given


def speed(gate):
    """What is measured when all ops are."""
    *_, last = op_checks.speed("cpu", True, gate, repeats=2)
    return last


def test_speed_of_every_op_and_its_targets(clock):
    result, targets = speed(PASSED)
    size = op_checks.COPIED_BYTES_QUICK
    assert result["copy_bytes_per_second"] == pytest.approx(2 * size / 1e-3)
    assert len(result["rows"]) == len(cases.gathered("TIMED"))
    for row in result["rows"]:
        assert {"ours", "ours_graph", "torch"} == row["ms"].keys()
        assert row["peak_bytes"].keys() == {"ours", "torch"}
        # the graph takes two milliseconds by this clock, the copy one
        expected = row["moved_bytes"] / (2 * size) * 1e-3 / 2e-3
        assert row["share_of_copy"] == {"ours": pytest.approx(expected)}
    values = {row["what"]: row["value"] for row in targets}
    assert values.pop("topk_keys: extra memory / that of the scores") is None  # on a GPU
    assert values.pop("nearest_key (cuda): share of copy bandwidth") is None  # likewise
    assert len(values) == 7
    assert all(value is not None for value in values.values())
    assert values["router under a graph: milliseconds"] == 2.0
    assert values["nearest_key: ours / torch"] == pytest.approx(1 / 3)


def test_a_rival_that_raises_costs_its_own_time(clock, monkeypatch):
    timed = [row for row in cases.gathered("TIMED") if row.quick.op == "route"]
    monkeypatch.setattr(cases, "gathered", lambda name: timed)
    monkeypatch.setattr(RouterCase, "rivals", lambda case, inputs: {"torch": _raises})
    monkeypatch.setattr(RouterCase, "bare", lambda case, inputs, backend: lambda: None)
    [row] = speed(PASSED)[0]["rows"]
    assert row["failed"] == {"torch": "RuntimeError: out of memory"}
    assert row["ms"].keys() == {"ours", "ours_graph"}


def test_cuda_kernels_are_timed_beside_those_of_triton(clock, bare):
    gate = {**PASSED, "nearest_key_cuda": {"ok": True}, "route_cuda": {"ok": False}}
    result, targets = speed(gate)
    assert [op for op, backend in bare if backend == "cuda"] == ["nearest_key"]
    [row] = [row for row in result["rows"] if row["op"] == "nearest_key"]
    assert list(row["ms"]) == ["ours", "ours_graph", "cuda", "cuda_graph", "torch"]
    values = {row["what"]: row["value"] for row in targets}
    both = [f"nearest_key{by}: share of copy bandwidth" for by in ("", " (cuda)")]
    assert values[both[0]] == pytest.approx(2 * values[both[1]])  # by this clock


def test_no_speed_where_correctness_failed(clock, bare):
    gate = {**PASSED, "topk_keys": {"ok": False}, "route": {"ok": False}}
    result, targets = speed(gate)
    rows = {row["op"]: row for row in result["rows"]}
    assert "ms" not in rows["topk_keys"]
    assert "ms" not in rows["route"]
    assert "ms" in rows["mix_prompts"]
    assert not {"topk_keys", "route"} & {op for op, _ in bare}
    values = {row["what"]: row["value"] for row in targets}
    assert values["router under a graph: milliseconds"] is None
    assert values["topk_keys: share of copy bandwidth"] is None


def test_both_ways_of_mix_experts(clock):
    rows = list(op_checks.expert_ways("cpu", True, PASSED, repeats=2))
    assert [row["pairs_per_expert"] for row in rows] == [32.0]
    assert {"gathered_ms", "grouped_ms", "grouped"} <= rows[0].keys()
    assert list(op_checks.expert_ways("cpu", True, {}, repeats=2)) == []


def test_the_sizes_reach_both_ways_of_mix_experts():
    def grouped(case, element_size=2):
        pairs = case.rows * case.k
        return grouping_pays(pairs, case.experts, case.rank, 2 * case.width, element_size)

    assert [grouped(timed.full) for timed in experts.TIMED] == [False, True]
    for checked in (experts.CHECKED_QUICK, experts.CHECKED):
        assert {grouped(case) for case in checked} == {False, True}
        assert {grouped(case, 4) for case in checked} == {False, True}


def test_moved_bytes_by_hand():
    dtype = torch.bfloat16
    assert TopKeysCase(1, 10, 8, 2).moved_bytes(dtype) == 11 * 8 * 2 + 2 * 12
    assert NearestKeyCase(1, 10, 8).moved_bytes(dtype) == 11 * 8 * 2 + 12
    # prompts 2x3, mixed 3, embeddings 5 in and 5 out, of 8 columns
    assert PromptCase(1, 5, 8, 2, 3).moved_bytes(dtype) == (6 + 3 + 10) * 8 * 2
    assert PromptCase(1, 5, 8, 2, 3, from_ids=True).moved_bytes(dtype) == 19 * 16 + 40
    # keys 2, down and up of width 4, norm; 5 ids and rows
    expected = 8 * (2 + 8 + 2) * 2 + 5 * (8 + 16)
    assert RouterCase(1, 5, 8, 2, hidden=4).moved_bytes(dtype) == expected
    # one row and one choice: two factors of rank 3, x and delta
    assert ExpertsCase(1, 1, 9, 3, 8).moved_bytes(dtype) == 2 * 8 * 4 * 2 + 12


@pytest.mark.slow
def test_the_whole_report(clock, bare, monkeypatch, tmp_path, capsys):
    """The kernels of the ops run in the tests of their speed."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(checks, "_peak_in_a_process", lambda kind, step: 1)
    monkeypatch.setattr(Providers, "stacked_compiled", Providers.stacked)
    monkeypatch.setattr(op_checks, "correctness", lambda *_: PASSED)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", "--out", str(tmp_path)])
    status = gpu_check.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    [written] = tmp_path.glob("*/*.json")
    result = json.loads(written.read_text())
    assert result["correctness"].keys() >= OPS
    assert (result["status"], result["not_reached"]) == ("complete", [])
    assert list(result["seconds"]) == ["correctness", "decode", "ops", "layers", "steps"]
    assert all(row["what"] in printed for row in result["targets"])
    assert all(row["failed"] == {} for row in result["layers"] if "failed" in row)
    assert not any("stacked_compiled" in row["ms"] for row in result["layers"])


def _raises(*_, **__):
    raise RuntimeError("out of memory")


@pytest.fixture
def nothing_fits(monkeypatch):
    """Nothing of the layers and the steps can be measured; of the ops, no check succeeded."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    for module, names in (
        (checks, ("layer_times", "step_times")),
        (op_checks, ("graph_times",)),
        (decode_pair, ("times",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _raises)
    monkeypatch.setattr(op_checks, "correctness", lambda *_: {"route": dict(WRONG)})
    monkeypatch.setattr(op_checks, "copy_bytes_per_second", lambda *_: 1e12)


def test_an_op_that_cannot_be_timed_fails_the_run(nothing_fits, monkeypatch):
    monkeypatch.setattr(op_checks, "correctness", lambda *_: {"route": {"ok": True, "cases": []}})
    monkeypatch.setattr(op_checks, "_op_times", _raises)
    result = gpu_check.collect(quick=True, only="ops")
    [failure] = result["failures"]
    assert failure["section"].startswith("RouterCase")
    assert len(result["ops"]["rows"]) == len(cases.gathered("TIMED"))


def _right(trained, decoded=()):
    cases = [{"layer": str(layer)} for layer in (*trained, *decoded)]
    return {f"ours_{name}": {"ok": True, "cases": cases} for name in dispatch.BACKENDS}


def test_a_section_that_raises_leaves_the_others(nothing_fits, monkeypatch):
    monkeypatch.setattr(checks, "correctness", _right)
    result = gpu_check.collect(quick=True)
    assert {row["raised"] for row in result["failures"]} == {"RuntimeError: out of memory"}
    sections = [row["section"] for row in result["failures"]]
    assert [name.split(" of ")[0] for name in sections[:3]] == ["pair"] * 3
    assert all("B2 " in name or "B1 " in name for name in sections[3:8])
    assert sections[8:] == ["t5 step", "llama step", "K 2 and K 64"]
    assert all("not_measured" in row for row in result["ops"]["rows"])
    assert result["layers"] == []
    assert not result["correctness"]["route"]["ok"]
    assert result["correctness"]["ours_triton"]["ok"]


def test_no_layer_and_no_step_is_timed_where_correctness_failed(nothing_fits, monkeypatch):
    monkeypatch.setattr(checks, "correctness", _raises)
    result = gpu_check.collect(quick=True)
    sections = [row["section"] for row in result["failures"]]
    others = {name for name in sections if not name.startswith("pair of")}
    layers = [
        *gpu_check._odd_layers(),
        *(row for rows in gpu_check._layer_sizes(True) for row in rows),
    ]
    assert others == {f"correctness of {layer}" for layer in layers}
    assert (result["layers"], result["steps"]) == ([], [])


def test_a_layer_whose_check_raised_is_not_timed(nothing_fits, monkeypatch):
    def too_large(trained, decoded=()):
        return (
            _raises() if any(layer.tokens == 64 for layer in trained) else _right(trained, decoded)
        )

    monkeypatch.setattr(checks, "correctness", too_large)
    result = gpu_check.collect(quick=True, only="layers")
    sections = [row["section"] for row in result["failures"]]
    assert sum("T64 " in name for name in sections) == 1
    assert sum("T1 " in name for name in sections) == 2  # the times and those of the graph


def test_a_backend_that_raises_is_wrong_and_the_others_are_checked(monkeypatch):
    layer, reference = replace(gpu_check.SMALL, tokens=5), Providers.ours

    def forward(providers):
        run = lambda: reference(providers, "reference")  # noqa: E731
        return {"ours_cuda": _raises, "ours_triton": run}

    monkeypatch.setattr(Providers, "forward", forward)
    report = checks.correctness([layer])
    assert report["ours_cuda"]["cases"][0]["raised"] == "RuntimeError: out of memory"
    assert {name: row["ok"] for name, row in report.items()} == {
        "ours_cuda": False,
        "ours_triton": True,
    }


def test_a_rival_whose_step_raises_is_named(clock, monkeypatch):
    def provider(kind, step):
        return _raises() if kind == "released" else lambda: None

    monkeypatch.setattr(checks, "provider", provider)
    monkeypatch.setattr(checks, "_peak_in_a_process", lambda kind, step: 1)
    row = gpu_check._step_row(gpu_check.T5_LARGE, 2)
    assert row["failed"] == {"released": "RuntimeError: out of memory"}
    assert list(row["ms"]) == ["ours", "peft_one_lora"]
    targets = gpu_targets.step_targets(gpu_check.T5_LARGE, row)
    assert [target["value"] for target in targets] == [None, None]


def test_one_section_alone_is_kept_as_it_grows(nothing_fits, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["", "--quick", "--only", "ops", "--out", str(tmp_path)])
    kept = []

    def during(*_, **__):
        [file] = tmp_path.glob("*/*")
        kept.append((file.name, json.loads(file.read_text())))
        return iter(())

    monkeypatch.setattr(gpu_check.op_checks, "expert_ways", during)
    assert gpu_check.main() == 1  # the router is wrong
    [(name, part)] = kept
    assert name.endswith("-ops.json")
    assert (part["status"], part["only"]) == ("running", "ops")
    assert len(part["ops"]["rows"]) == len(cases.gathered("TIMED"))
    assert not part["correctness"]["route"]["ok"]
    [file] = tmp_path.glob("*/*")
    assert json.loads(file.read_text())["status"] == "complete"


def test_nothing_begins_when_the_time_is_up(nothing_fits, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checks, "correctness", _right)
    monkeypatch.setattr("sys.argv", ["", "--quick", "--budget", "100", "--out", str(tmp_path)])
    times = iter([0.0] * 6 + [1e3] * 99)  # over in the second part of the first section
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(gpu_check, "_check_ops", _raises)
    assert gpu_check.main() == 3
    [file] = tmp_path.glob("*/*.json")
    result = json.loads(file.read_text())
    assert result["not_reached"] == list(gpu_check.SECTIONS)
    assert result["status"] in capsys.readouterr().out
    assert "in correctness" in result["status"]
    assert len(gpu_check._checked_layers(result)) < len(gpu_check._odd_layers())


def test_a_copy_without_git_is_named(monkeypatch, tmp_path):
    package = measure.environment("cpu")["package"]
    (tmp_path / "sapt_fast").mkdir()
    (tmp_path / "sapt_fast" / "other.py").write_text("")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    about = measure.environment("cpu")
    assert (about["commit"], about["uncommitted_changes"]) == ("unknown", None)
    assert len(about["package"]) == len(package) == 16
    assert about["package"] != package
    monkeypatch.setenv("SAPT_FAST_COMMIT", "abc1234")
    file = measure.save({"environment": measure.environment("cpu"), "only": "ops"}, tmp_path)
    assert file.name.endswith("-abc1234-ops.json")
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no draft is left


def test_tf32_is_off_where_results_are_compared_and_reported(monkeypatch, request):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    torch.backends.cuda.matmul.allow_tf32 = True
    request.addfinalizer(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False))
    seen = []
    monkeypatch.setattr(checks, "_values", lambda *_: seen.append(measure.tf32()) or {})
    checks.correctness([gpu_check.SMALL])
    monkeypatch.setattr(op_checks, "_compare", lambda *_: seen.append(measure.tf32()) or {"ok": 1})
    op_checks.correctness("cpu", [PromptCase(1, 2, 16, 2, 1)])
    assert len(seen) >= 5
    for flags in seen:
        assert not flags["cuda.matmul.allow_tf32"]
        assert not flags["cudnn.allow_tf32"]
        assert flags["float32_matmul_precision"] == "highest"
    after = measure.tf32()
    assert after["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "1"
    assert after["cuda.matmul.allow_tf32"]
