"""The device doctor's report: a table, or JSON, and what is to be done where a check fails."""

import json

import pytest
import torch

from evaluation import device as doctor
from scripts import check_device
from tests.helpers.runs import run_script


def test_a_cpu_is_fine():
    status, said, error = run_script("scripts/check_device.py", "--device=cpu", "--json")
    found = json.loads(said)
    assert (status, error, found["device"], found["passed"]) == (0, "", "cpu", True)
    assert list(found["checks"]) == list(doctor.CHECKS)
    assert found["checks"]["generation"]["float32"]["error"] < 1e-5


def test_what_fails_is_named_with_a_way_out(monkeypatch, capsys):
    def wrong(device, dtype):
        if dtype == torch.bfloat16:
            raise RuntimeError("no such kernel")
        return 1e-9

    monkeypatch.setattr(doctor, "dtypes_of", lambda _: [torch.float32, torch.bfloat16])
    checks = {"sums": wrong, "products": lambda *_: 0.0125, "roots": lambda *_: 1.0}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr("sys.argv", ["check_device.py", "--device=cpu"])
    with pytest.raises(SystemExit) as end:
        check_device.main()
    said, error = capsys.readouterr()
    table = [line.split() for line in said.splitlines()[2:] if line]
    assert table == [
        ["float32", "bfloat16"],
        ["sums", "0.000%", "FAILED"],
        ["products", "1.250%", "FAILED", "1.250%"],
        ["roots", "100.000%", "FAILED", "100.000%", "FAILED"],
    ]
    assert end.value.code == 1 and error.splitlines() == [
        "sums, bfloat16: no such kernel",
        "4 of 6 checks failed: do not trust float32, bfloat16 here",
    ]


def test_nan_is_no_number_of_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"roots": lambda *_: float("nan")})
    monkeypatch.setattr("sys.argv", ["check_device.py", "--device=cpu", "--json"])
    with pytest.raises(SystemExit):
        check_device.main()
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["checks"]["roots"]["float32"]
    assert (found["error"], found["message"], found["passed"]) == (None, "NaN or infinity", False)
