"""What counts as a correct run of CUDA kernels on a GPU, and how it reaches recorded.json."""

import json
import textwrap
from pathlib import Path

import gpu_check
import gpu_record
import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.cuda_kernels import common

ROOT = Path(__file__).parents[2]
HALF, SINGLE = "bfloat16", "float32"


def case(op="route", dtype=HALF, rows=1, outcome="passed"):
    return {"op": op, "dtype": dtype, "rows": rows, "outcome": outcome}


def result(*cases, correctness=(), **named):
    return {
        "kind": "gpu_check",
        "quick": False,
        "cuda sources": {"route": "0a1b", "mixed_lora": "2c3d"},
        "cuda tests": {"cases": dict(enumerate(cases))},
        "correctness": dict(correctness),
        **named,
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    file = tmp_path / "recorded.json"
    file.write_text("{}")
    monkeypatch.setattr(common, "RECORDED", file)
    return file


class TestRecord:
    def test_by_op_dtype_and_rows(self):
        given = result(
            case(), case(rows=3), case(dtype=SINGLE, rows=64), case("mixed_lora", rows=5)
        )
        assert gpu_record.of(given) == {
            "route": {"source": "0a1b", "ran": {HALF: [1, 4], SINGLE: [64]}},
            "mixed_lora": {"source": "2c3d", "ran": {HALF: [16]}},
        }

    @pytest.mark.parametrize("outcome", ["failed", "skipped", "not run"])
    def test_every_case_of_a_class_must_pass(self, outcome):
        given = result(case(), case(outcome=outcome), case(rows=4), case("mixed_lora"))
        record = gpu_record.of(given)
        assert record["route"]["ran"] == {HALF: [4]}
        assert record["mixed_lora"]["ran"] == {HALF: [1]}

    @pytest.mark.parametrize("outcome", ["failed", "skipped", "not run"])
    def test_cases_without_rows_count_for_the_whole_op(self, outcome):
        general = case(dtype=None, rows=None, outcome=outcome)
        assert gpu_record.of(result(case(), general, case("mixed_lora"))).keys() == {"mixed_lora"}

    def test_more_rows_than_any_class_are_not_recorded(self):
        assert gpu_record.of(result(case(rows=65))) == {}

    def test_what_another_check_found_wrong_is_not_recorded(self):
        cases = case(), case("mixed_lora")
        for name, kept in (
            ("route_cuda", ["mixed_lora"]),
            ("ours_cuda", ["route"]),
            ("route", ["route", "mixed_lora"]),  # the Triton kernel
        ):
            given = result(*cases, correctness={name: {"ok": False, "cases": []}})
            assert list(gpu_record.of(given)) == kept
        pairs = {"ok": False, "cases": [{"wrong": ["ours_cuda"]}]}
        given = result(*cases, correctness={"pairs of mixed_lora": pairs})
        assert list(gpu_record.of(given)) == ["route"]

    def test_nothing_without_tests_or_without_cuda(self):
        assert gpu_record.of(result()) == {}
        assert gpu_record.of({**result(case()), "cuda tests": None}) == {}
        assert gpu_record.of({**result(case()), "cuda sources": {}}) == {}


class TestMerging:
    def test_the_same_source_gains_and_another_replaces(self, recorded):
        old = {"source": "0a1b", "ran": {HALF: [1], SINGLE: [4]}}
        recorded.write_text(json.dumps({"route": old, "mixed_lora": {**old, "source": "old"}}))
        gpu_record.merge(gpu_record.of(result(case(rows=16), case("mixed_lora"))))
        assert json.loads(recorded.read_text()) == {
            "route": {"source": "0a1b", "ran": {HALF: [1, 16], SINGLE: [4]}},
            "mixed_lora": {"source": "2c3d", "ran": {HALF: [1]}},
        }

    def test_from_a_file_of_another_machine(self, recorded, tmp_path, monkeypatch, capsys):
        file = tmp_path / "2026-12-01-abc-correctness.json"
        file.write_text(json.dumps(result(case())))
        monkeypatch.setattr("sys.argv", ["", "--record-from", str(file)])
        assert gpu_check.main() == 0  # without a GPU
        assert "route: bfloat16 [1]" in capsys.readouterr().out
        assert json.loads(recorded.read_text())["route"]["ran"] == {HALF: [1]}

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (json.dumps({"kind": "cpu_check"}), "expected a file written by gpu_check"),
            (json.dumps(result(case(), quick=True)), "expected a full run"),
            ("{", "Expecting"),
            (None, "No such file"),
        ],
    )
    def test_from_another_file(self, recorded, tmp_path, monkeypatch, capsys, content, reason):
        file = tmp_path / "file.json"
        if content is not None:
            file.write_text(content)
        monkeypatch.setattr("sys.argv", ["", "--record-from", str(file)])
        assert gpu_check.main() == 1
        assert reason in capsys.readouterr().out
        assert recorded.read_text() == "{}"

    def test_the_record_decides_what_is_chosen(self, recorded, monkeypatch):
        monkeypatch.setattr(common, "unavailable", lambda index=None: None)
        monkeypatch.setattr(common, "source_digest", lambda op: "2c3d")
        gpu_record.merge(gpu_record.of(result(case("mixed_lora", rows=2))))
        chosen = {
            (dtype, rows): dispatch._backend("cuda").unchosen(
                "mixed_lora", torch.device("cuda"), rows, dtype
            )
            for dtype in common.DTYPES
            for rows in (1, 2, 4, 5)
        }
        assert {key for key, reason in chosen.items() if reason is None} == {
            (common.DTYPES[1], 2),
            (common.DTYPES[1], 4),
        }


class TestOneSectionWithRecord:
    """`--only decode --record`, with stand-ins for the GPU tests and the section."""

    @pytest.fixture
    def run(self, recorded, tmp_path, monkeypatch):
        def run(*cases, pairs_wrong=(), ok=True):
            def section(quick, guard, result):
                [kept] = (tmp_path / "out").glob("*/*.json")
                assert json.loads(kept.read_text())["recorded"]  # before the section begins
                pairs = {"ok": not pairs_wrong, "cases": [{"wrong": list(pairs_wrong)}]}
                result["correctness"]["pairs of mixed_lora"] = pairs
                yield

            monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
            monkeypatch.setitem(gpu_check.SECTIONS, "decode", section)
            monkeypatch.setattr(gpu_record, "sources", lambda: {"mixed_lora": "2c3d", "route": "0"})
            tests = {"ok": ok, "said": "3 passed", "cases": dict(enumerate(cases))}
            monkeypatch.setattr(gpu_record, "run", lambda timeout: tests)
            given = ["", "--only", "decode", "--record", "--out", str(tmp_path / "out")]
            monkeypatch.setattr("sys.argv", given)
            status = gpu_check.main()
            [file] = (tmp_path / "out").glob("*/*-decode.json")
            return status, json.loads(file.read_text()), json.loads(recorded.read_text())

        return run

    def test_right(self, run):
        status, written, here = run(case("mixed_lora"))
        assert status == 0
        assert here == {"mixed_lora": {"source": "2c3d", "ran": {HALF: [1]}}}
        assert written["recorded"] == here
        assert written["cuda sources"] == {"mixed_lora": "2c3d", "route": "0"}

    def test_a_failed_test_fails_the_run_and_leaves_the_others_recorded(self, run):
        status, _, here = run(case("mixed_lora"), case(outcome="failed"), ok=False)
        assert (status, list(here)) == (1, ["mixed_lora"])

    def test_what_the_section_finds_wrong_is_taken_back(self, run):
        status, written, here = run(case("mixed_lora"), case(), pairs_wrong=["ours_cuda"])
        assert (status, list(here), list(written["recorded"])) == (1, ["route"], ["route"])


class TestPlugin:
    @pytest.fixture
    def outcomes(self, tmp_path):
        """Runs test functions with the plugin, in this process."""

        def run(text, *options):
            file = tmp_path / f"test_{tmp_path.name}.py"  # modules are known by their names
            header = "import pytest, torch\nHALF = torch.bfloat16\n"
            file.write_text(header + textwrap.dedent(text))
            plugin = gpu_record.Outcomes(tmp_path / "outcomes.json")
            command = [
                "-q",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                str(tmp_path),
                "-c",
                "/dev/null",
            ]
            pytest.main([*command, *options, str(file)], plugins=[plugin])
            cases = json.loads(plugin.file.read_text())
            return {name.partition("::")[2]: case for name, case in cases.items()}

        return run

    def test_outcomes(self, outcomes):
        cases = outcomes(
            """
            @pytest.fixture
            def broken():
                yield
                raise RuntimeError

            @pytest.mark.kernels("route", rows="samples")
            @pytest.mark.parametrize("dtype", [HALF], ids=str)
            @pytest.mark.parametrize("samples", [1, 3])
            def test_right(samples, dtype): pass

            @pytest.mark.kernels
            @pytest.mark.parametrize("op", ["route"])
            def test_wrong(op): assert False

            @pytest.mark.kernels("route")
            def test_skipped(): pytest.skip("no CUDA")

            @pytest.mark.kernels("route")
            def test_broken(broken): pass

            @pytest.mark.kernels("route")
            def test_left_out(): pass

            def test_unmarked(): pass
            """,
            "-k",
            "not left_out",
        )
        assert cases == {
            "test_right[1-torch.bfloat16]": case(rows=1),
            "test_right[3-torch.bfloat16]": case(rows=3),
            "test_wrong[route]": case(dtype=None, rows=None, outcome="failed"),
            "test_skipped": case(dtype=None, rows=None, outcome="skipped"),
            "test_broken": case(dtype=None, rows=None, outcome="failed"),
            "test_left_out": case(dtype=None, rows=None, outcome="not run"),
        }

    def test_a_process_that_ends_leaves_what_it_did(self, outcomes, monkeypatch):
        monkeypatch.setattr(gpu_record.Outcomes, "pytest_sessionfinish", lambda self: None)
        cases = outcomes(
            """
            @pytest.mark.kernels("route")
            def test_first(): pass

            @pytest.mark.kernels("route")
            def test_second(): raise KeyboardInterrupt
            """
        )
        assert [row["outcome"] for row in cases.values()] == ["passed", "not run"]

    def test_every_call_that_dispatch_may_send_has_cases(self, tmp_path):
        """Collected from the GPU tests themselves; marked as skipped, nothing of them runs."""
        plugin = gpu_record.Outcomes(tmp_path / "outcomes.json")
        command = ["-q", "--collect-only", "-p", "no:cacheprovider", str(ROOT / gpu_record.TESTS)]
        pytest.main(command, plugins=[plugin])
        found = plugin.cases.values()
        ops = [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)]
        assert {row["op"] for row in found} == set(ops)
        for op in ops:
            narrow, wide = dispatch._rows()[op].few_rows
            for dtype in common.DTYPES:
                name = str(dtype).removeprefix("torch.")
                most = wide if name == SINGLE else narrow
                needed = {common.row_class(rows) for rows in range(1, most + 1)}
                rows = [row["rows"] for row in found if (row["op"], row["dtype"]) == (op, name)]
                assert needed <= {common.row_class(n) for n in rows}, (op, name)
        skipped = gpu_record.of(
            {
                **result(),
                "cuda sources": dict.fromkeys(ops, "0"),
                "cuda tests": {"cases": plugin.cases},
            }
        )
        assert skipped == {}


@pytest.mark.thorough
def test_gpu_tests_that_are_skipped_are_no_run(monkeypatch):
    """In a process of their own, as --record runs them: none can run here."""
    monkeypatch.setattr(gpu_record, "TESTS", f"{gpu_record.TESTS}::test_overlapping_launches")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = gpu_record.run(120)
    assert not run["ok"]
    assert [row["outcome"] for row in run["cases"].values()] == ["skipped"]
    assert "1 skipped" in run["said"]
