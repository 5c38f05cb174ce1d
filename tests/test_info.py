"""`python -m cupaged info`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from processes import NO_GPU, run_module, run_python

import cupaged
from cupaged import __main__ as command
from cupaged import append_cuda, devices, info, kernels, merge_cuda


class Runtime:
    """CUDA's runtime as CuPy shows it, on a machine of one's wishes."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def getDeviceCount(self) -> int:  # noqa: N802
        return len(self.capabilities)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        major, minor = self.capabilities[device]
        return {
            "name": f"GPU number {device}".encode(),
            "major": major,
            "minor": minor,
            "multiProcessorCount": 7 + device,
            "totalGlobalMem": (3 + device) << 30,
        }


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    module = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime(*capabilities)))
    monkeypatch.setattr(devices, "cupy", lambda: module)


def test_info_without_a_gpu(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    done = run_module("info", CUPAGED_CACHE_DIR=str(tmp_path), **NO_GPU)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\S+(?: \S+)?) {2,}(.*)$", done.stdout, re.MULTILINE))
    assert found["cupaged"] == cupaged.__version__
    assert found["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["NumPy"] == np.__version__
    assert {"ml_dtypes", "CuPy", "NVRTC", "PyTorch", "JAX"} <= found.keys()
    assert re.match("unavailable: .*(install|host arrays)", found["CUDA backend"])
    assert found["cache folder"] == f"{tmp_path} (usable)"
    assert found["kernels"].startswith("not looked for")


def test_info_without_cupy_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['cupy'] = None\n"
        "from cupaged.__main__ import main; sys.exit(main(['info']))"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^CUDA backend +unavailable: .*pip install 'cupaged\[", done.stdout, re.MULTILINE
    )
    assert "NVRTC         not loaded" in done.stdout


def test_info_imports_no_framework() -> None:
    script = (
        "import sys; from cupaged.info import info; info()\n"
        "print({'torch', 'jax'} & sys.modules.keys())"
    )
    done = run_python("-c", script)
    assert done.stdout == "set()\n", done.stderr


def test_info_lists_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5), (6, 1))
    text = info.info()
    assert "cuda:0        GPU number 0, compute capability 7.5, 7 SMs, 3.0 GiB; too old" in text
    assert "cuda:1        GPU number 1, compute capability 6.1, 8 SMs, 4.0 GiB; too old" in text
    assert "kernels       not looked for" in text


def test_info_counts_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="compiling needs CuPy and NVRTC")
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path))
    pretend(monkeypatch, (8, 0), (9, 0), (9, 0))
    every = list(kernels.configurations(90))
    rest = len(append_cuda.KERNELS) + len(merge_cuda.KERNELS) + 2  # those for planning
    kernels.cubin_path(every[0], 90)
    lines = info.info().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("kernels"))
    others = len(list(kernels.configurations(80)))
    assert re.match(f"kernels +0 of {others + rest} compiled for sm_80;", lines[begin])
    assert re.match(f"kernels +1 of {len(every) + rest} compiled for sm_90a;", lines[begin + 1])
    assert [line.strip() for line in lines[begin + 2 :]] == [every[0].name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
def test_info_tells_of_a_cache_that_others_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path))
    assert f"{tmp_path} (not usable: " in info.info()


@pytest.mark.gpu
def test_info_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^cuda:0 .* compute capability \d+\.\d, \d+ SMs, [\d.]+ GiB$", text, re.MULTILINE
    )
    assert re.search(r"^CUDA driver +\d+\.\d$", text, re.MULTILINE)
    assert re.search(r"^kernels +\d+ of \d+ compiled for sm_", text, re.MULTILINE)
