"""Stand-ins for CuPy and NVRTC, so that what the library says and does runs anywhere."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest


class FakeNvrtc(types.ModuleType):
    """CuPy's binding of NVRTC, as far as the library uses it."""

    NVRTCError = type("NVRTCError", (RuntimeError,), {})

    def __init__(self, version: tuple[int, int] = (12, 9)) -> None:
        super().__init__("cupy.cuda.nvrtc")
        self.version = version
        self.options: list[str] = []
        self.fails = False

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return self.version

    def getSupportedArchs(self) -> list[int]:  # noqa: N802
        return [75, 80, 86, 89, 90]

    def createProgram(self, text: str, name: str, headers: list[str], names: list[str]) -> str:  # noqa: N802
        return text

    def compileProgram(self, program: str, options: list[str]) -> None:  # noqa: N802
        self.options = options
        if self.fails:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, program: str) -> bytes:  # noqa: N802
        return b"cubin of " + program[:200].encode()

    def getProgramLog(self, program: str) -> str:  # noqa: N802
        return "line 1: no"

    def destroyProgram(self, program: str) -> None:  # noqa: N802
        pass


class FakeModule:
    """A `cupy.RawModule` of a file that must be whole by now."""

    loaded: ClassVar[list[FakeModule]] = []

    def __init__(self, path: str) -> None:
        assert Path(path).read_bytes().startswith(b"cubin of ")
        self.max_dynamic_shared_size_bytes = 0
        self.loaded.append(self)

    def get_function(self, name: str) -> FakeModule:
        assert name.startswith("cupaged_")
        return self

    @property
    def kernel(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(ptr=id(self))


def install(patch: pytest.MonkeyPatch, binding: types.ModuleType) -> types.ModuleType:
    """Make `binding` what `from cupy.cuda import nvrtc` finds."""
    cupy, cupy_cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.cuda = cupy_cuda
    cupy_cuda.nvrtc = binding
    for name, module in (("cupy", cupy), ("cupy.cuda", cupy_cuda), (binding.__name__, binding)):
        patch.setitem(sys.modules, name, module)
    return cupy


class NoCupy:
    """Finds no CuPy, as where it is not installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")


def uninstall_cupy(patch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == "cupy" or name.startswith("cupy."):
            patch.delitem(sys.modules, name)
    patch.setattr(sys, "meta_path", [NoCupy, *sys.meta_path])
