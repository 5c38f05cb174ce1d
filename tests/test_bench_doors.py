"""The benchmark of the doors as a script."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import bench_doors
import pytest
import report
import timing
from processes import run_python

ROOT = Path(__file__).resolve().parent.parent
#: Ways to call through each framework's door.
DOORS = {"numpy": 2, "torch": 3, "jax": 3}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "bench" / "bench_doors.py"), *arguments)


def test_quick_goes_through_every_door_there_is(tmp_path: Path) -> None:
    path = tmp_path / "doors.json"
    done = run_script("--quick", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["header"]["backend"] == "reference"
    assert result["header"]["product_sha256"] == report.product_hash(ROOT)
    there = {name: count for name, count in DOORS.items() if importlib.util.find_spec(name)}
    assert result["header"]["contenders"].keys() == there.keys() - {"numpy"}
    rows = result["rows"]
    assert [row["workload"].partition(",")[0] for row in rows] == [
        name for name, count in there.items() for _ in range(count)
    ]
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["value"] > 0
        assert row["workload"] in done.stdout


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent() -> None:
        raise timing.NoDeviceError("no CUDA device: none")

    monkeypatch.setattr(bench_doors, "NullStream", absent)
    path = tmp_path / "doors.json"
    assert bench_doors.main(["--json", str(path)]) == 2
    assert capsys.readouterr().err == "no CUDA device: none; --quick needs no GPU\n"
    assert not path.exists()


def test_a_door_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed() -> None:
        raise ValueError("closed")

    doors = [("a", closed), ("b", lambda: None)]
    monkeypatch.setattr(bench_doors, "doors", lambda *arguments: doors)
    assert bench_doors.main(["--quick"]) == 1
    a, b = capsys.readouterr().out.splitlines()[1:]
    assert a.split() == ["a", "failed", "ValueError:", "closed"]
    assert b.split()[0] == "b"
    assert b.endswith("us  2 calls in a row, not waited for")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "doors.json"
    done = run_script("--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["header"]["gpu"]
    assert result["rows"][0]["workload"] == "cupy, run() into a given output"
    assert {row["status"] for row in result["rows"]} == {"ok"}
