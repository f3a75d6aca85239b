"""The times of passes, and the table of every op."""

import csv

import cases
import roofline
from passes import Device, Pass, bound, total_seconds

from sapt_fast import dispatch


def test_time_is_the_longer_of_bytes_and_flops():
    device = Device("toy", bandwidth=10.0, flops=100.0)
    copy = Pass("copy", {"x": 30}, {"y": 20}, flops=10)
    product = Pass("product", {"x": 10}, {"y": 10}, flops=1000)
    assert (copy.seconds(device), product.seconds(device)) == (5.0, 10.0)
    assert total_seconds([copy, product], device) == 15.0
    assert bound([copy, product], device) == "arithmetic"
    assert bound([copy, copy, copy, product], device) == "memory"


def test_the_table_prints_every_op(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline.py", "--csv"])
    roofline.main()
    slow = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    monkeypatch.setattr(
        "sys.argv", ["roofline.py", "--csv", "--bandwidth", "8.6", "--flops", "1580"]
    )
    roofline.main()
    fast = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(fast) == len(slow) > 40
    for once, twice in zip(fast, slow, strict=True):
        assert float(twice["microseconds"]) > float(once["microseconds"])
    ops = {name for name, module in cases.modules().items() if hasattr(module, "roofline")}
    assert ops == {op for op in dispatch.ops() if "triton" in dispatch.backends(op)}
    for op in ops - {"route"}:
        assert any(row["op"].startswith(op) for row in slow), op
    assert any(row["op"].startswith("router head") for row in slow)
