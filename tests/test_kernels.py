"""Rendering, compiling and keeping kernels, and what is said where that can't be done.

NVRTC and CuPy are stood in for, so that these run anywhere; one test compiles for real where NVRTC
is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cupaged import cuda, heuristics, kernels, source
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DEVICE_STRUCTS, KernelConfig

CONFIG = heuristics.kernel_config(90, "float16", 128, True, "long")
OTHER = heuristics.kernel_config(90, "bfloat16", 128, True, "long")


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


def install(patch: pytest.MonkeyPatch, binding: types.ModuleType) -> types.ModuleType:
    """Make `binding` what `from cupy.cuda import nvrtc` finds."""
    cupy, cupy_cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.cuda = cupy_cuda
    cupy_cuda.nvrtc = binding
    for name, module in (("cupy", cupy), ("cupy.cuda", cupy_cuda), (binding.__name__, binding)):
        patch.setitem(sys.modules, name, module)
    return cupy


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No kernel is loaded or cached, and what stood in for CuPy is forgotten afterwards."""
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "_locks", defaultdict(threading.Lock))
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (kernels.nvrtc, cuda.cupy, cuda.device_model, source.folder, source._inlined)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    binding = FakeNvrtc()
    install(monkeypatch, binding)
    return binding


NVRTC_WHEELS = "nvidia-cuda-nvrtc-cu12 (for cupy-cuda12x) or nvidia-cuda-nvrtc (cupy-cuda13x)"


def check_unavailable(message: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        call(*args)
    assert str(raised.value) == message


# Sources


def test_a_rendered_source_is_whole() -> None:
    """One text, with no file left to include and every header in it once."""
    text = source.render(CONFIG)
    assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)
    for header in source.folder().glob("*.cuh"):
        begins = re.findall(rf'^#line 1 "{header.name}"$', text, re.MULTILINE)
        assert len(begins) <= 1, header.name
    assert '#line 1 "prefill_sm80.cu"' in text
    assert "__global__" in text
    assert kernels.KERNEL_NAME in text


def test_line_directives_point_at_the_real_lines() -> None:
    """Whatever the compiler says of a line is found there in the file that it names."""
    name, number = "", 0
    checked = 0
    for line in source.render(CONFIG).splitlines():
        directive = re.match(r'^#line (\d+) "(.+)"$', line)
        if directive:
            number, name = int(directive[1]), directive[2]
            continue
        if name and line.strip() and not line.startswith("static_assert(sizeof"):
            original = (source.folder() / name).read_text().splitlines()
            if number <= len(original):
                assert line == original[number - 1], f"{name}:{number}"
                checked += 1
        number += 1
    assert checked > 300


def test_constants_of_a_configuration_are_in_its_prologue() -> None:
    text = source.prologue(CONFIG)
    for constant in (
        "constexpr int HEAD_DIM = 128;",
        f"constexpr int CTA_TILE_Q = {CONFIG.cta_tile_q};",
        f"constexpr int CTA_TILE_KV = {CONFIG.cta_tile_kv};",
        f"constexpr int NUM_THREADS = {CONFIG.num_threads};",
        "constexpr bool PAGE_ALIGNED = true;",
        "#define CUPAGED_BFLOAT16 0",
    ):
        assert constant in text
    assert "#define CUPAGED_BFLOAT16 1" in source.prologue(OTHER)


def test_device_structs_are_checked_field_by_field() -> None:
    text = source.layout_checks()
    for struct, dtype in DEVICE_STRUCTS.items():
        assert f"static_assert(sizeof({struct}) == {dtype.itemsize});" in text
        for field in dtype.names:
            assert f"{struct}*)0)->{field}))" in text


def test_missing_sources_say_where_they_were_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "cupaged"
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    with pytest.raises(FileNotFoundError) as raised:
        source.folder()
    assert str(raised.value) == (
        f"cupaged's CUDA sources are missing: looked for {package / 'kernels_cu'} and "
        f"{tmp_path / 'kernels_cu'}; reinstall cupaged"
    )


def test_sources_inside_the_package_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "cupaged"
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    for folder in (package / "kernels_cu", tmp_path / "kernels_cu"):
        folder.mkdir(parents=True)
    assert source.folder() == package / "kernels_cu"


# Configurations and keys


@pytest.mark.parametrize("arch", [*sorted(heuristics._SHARED_CLASS), 130])
def test_configurations_fit_their_architecture(arch: int) -> None:
    configs = list(kernels.configurations(arch))
    assert len({config.name for config in configs}) == len(set(configs)) == len(configs) == 24
    limit = heuristics.SHARED_LIMIT[heuristics.tile_class(arch)]
    for config in configs:
        assert config.shared_bytes <= limit
        assert config.num_threads <= 1024
        assert config.cta_tile_q % (16 * config.warps_q) == 0
        assert config.cta_tile_kv % (16 * config.warps_kv) == 0


def test_the_key_changes_with_a_header(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvrtc: FakeNvrtc
) -> None:
    """A comment is enough: no edited header can be served from an old entry."""
    copy = tmp_path / "kernels_cu"
    shutil.copytree(source.folder(), copy)
    monkeypatch.setattr(source, "folder", lambda: copy)
    before = kernels._key(CONFIG, 90)
    assert kernels._key(CONFIG, 90) == before
    header = copy / "types.cuh"
    header.write_text(header.read_text() + "// edited\n")
    source._inlined.cache_clear()
    assert kernels._key(CONFIG, 90) != before


def test_the_key_changes_with_all_that_matters(
    monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc
) -> None:
    keys = {kernels._key(config, 90) for config in kernels.configurations(90)}
    assert len(keys) == 24
    before = kernels._key(CONFIG, 90)
    assert kernels._key(CONFIG, 80) != before
    nvrtc.version = (13, 0)
    assert kernels._key(CONFIG, 90) != before
    nvrtc.version = (12, 9)
    monkeypatch.setattr(kernels, "_OPTIONS", (*kernels._OPTIONS, "-G"))
    assert kernels._key(CONFIG, 90) != before


def test_every_field_of_a_configuration_is_in_its_key(nvrtc: FakeNvrtc) -> None:
    """Except the family, which names the file."""
    before = kernels._key(CONFIG, 90)
    for field in fields(KernelConfig):
        if field.name == "family":
            continue
        value = getattr(CONFIG, field.name)
        if field.name == "dtype":
            changed: Any = "bfloat16"
        else:
            changed = (not value) if isinstance(value, bool) else value * 2
        other = replace(CONFIG, **{field.name: changed})
        assert kernels._key(other, 90) != before, field.name


def test_targets(nvrtc: FakeNvrtc) -> None:
    """Hopper's own instructions need sm_90a; the others go by their number."""
    assert [kernels.target(arch) for arch in (80, 89, 90, 120)] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_120",
    ]
    kernels.compile_cubin(CONFIG, 90, extra=("--ptxas-options=-v",))
    assert nvrtc.options[0] == "-arch=sm_90a"
    assert nvrtc.options[-1] == "--ptxas-options=-v"


# The cache


def test_a_kernel_is_compiled_once_and_then_found(nvrtc: FakeNvrtc) -> None:
    assert kernels.find_cached(CONFIG, 90) is None
    path = kernels.cubin_path(CONFIG, 90)
    assert path.parent == kernels.cache_folder()
    nvrtc.fails = True
    assert kernels.cubin_path(CONFIG, 90) == path == kernels.find_cached(CONFIG, 90)
    assert kernels.find_cached(OTHER, 90) is None
    assert kernels.find_cached(CONFIG, 80) is None


def test_the_cache_folder_is_private(nvrtc: FakeNvrtc) -> None:
    path = kernels.cubin_path(CONFIG, 90)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(nvrtc: FakeNvrtc, mode: int) -> None:
    """Whoever can write there could hand this user any code to run."""
    folder = kernels.cache_folder()
    kernels.cubin_path(CONFIG, 90)
    folder.chmod(mode)
    assert kernels.find_cached(CONFIG, 90) is None
    path = kernels.cubin_path(OTHER, 90)
    try:
        assert path.parent != folder
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert len(list(folder.iterdir())) == 1
    finally:
        shutil.rmtree(path.parent)
        kernels._process_folder.cache_clear()


def test_a_folder_of_another_user_is_not_used(
    nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.cubin_path(CONFIG, 90)
    folder = kernels.cache_folder()
    owner = folder.stat().st_uid
    monkeypatch.setattr(kernels.os, "getuid", lambda: owner + 1)
    path = kernels.cubin_path(CONFIG, 90)
    try:
        assert path.parent != folder
    finally:
        shutil.rmtree(path.parent)
        kernels._process_folder.cache_clear()


def test_a_folder_that_cannot_be_made_is_not_used(
    nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "file" / "cache"))
    path = kernels.cubin_path(CONFIG, 90)
    try:
        assert path.is_file()
        assert kernels.cubin_path(CONFIG, 90) == path  # kept for the rest of the process
    finally:
        shutil.rmtree(path.parent)
        kernels._process_folder.cache_clear()


def test_where_the_cache_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPAGED_CACHE_DIR")
    monkeypatch.setattr(kernels.os, "name", "posix")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernels.cache_folder() == Path("/somewhere/cupaged")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert kernels.cache_folder() == Path("/home/me/.cache/cupaged")


@pytest.mark.parametrize("damage", ["shortened", "changed", "emptied", "lengthened"])
def test_a_damaged_entry_is_a_miss(nvrtc: FakeNvrtc, damage: str) -> None:
    path = kernels.cubin_path(CONFIG, 90)
    whole = path.read_bytes()
    broken = {
        "shortened": whole[:-1],
        "changed": bytes([whole[0] ^ 1]) + whole[1:],
        "emptied": b"",
        "lengthened": whole + b"\0",
    }[damage]
    path.write_bytes(broken)
    assert kernels.find_cached(CONFIG, 90) is None
    again = kernels.cubin_path(CONFIG, 90)
    assert again.read_bytes() == whole
    assert kernels.find_cached(CONFIG, 90) == again


def test_an_entry_that_cannot_be_read_is_a_miss(nvrtc: FakeNvrtc) -> None:
    path = kernels.cubin_path(CONFIG, 90)
    path.unlink()
    path.mkdir()
    assert kernels.find_cached(CONFIG, 90) is None


def test_an_entry_appears_in_one_step(nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is written it has another name; if that fails, nothing is left."""
    seen: list[list[str]] = []
    real = kernels.os.replace

    def watched(temporary: str, path: Path) -> None:
        assert Path(temporary).parent == path.parent
        assert Path(temporary).read_bytes().startswith(b"cubin of ")
        seen.append(sorted(entry.suffix for entry in path.parent.iterdir()))
        assert kernels.find_cached(CONFIG, 90) is None
        real(temporary, path)

    monkeypatch.setattr(kernels.os, "replace", watched)
    path = kernels.cubin_path(CONFIG, 90)
    assert seen == [[".tmp"]]
    path.unlink()

    def refused(temporary: str, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(kernels.os, "replace", refused)
    with pytest.raises(OSError, match="disk full"):
        kernels.cubin_path(CONFIG, 90)
    assert list(path.parent.iterdir()) == []


class FakeModule:
    """A `cupy.RawModule` of a file that must be whole by now."""

    loaded: ClassVar[list[FakeModule]] = []

    def __init__(self, path: str) -> None:
        assert Path(path).read_bytes().startswith(b"cubin of ")
        self.max_dynamic_shared_size_bytes = 0
        self.loaded.append(self)

    def get_function(self, name: str) -> FakeModule:
        assert name == kernels.KERNEL_NAME
        return self

    @property
    def kernel(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(ptr=id(self))


def test_several_threads_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch, FakeNvrtc())
    cupy.RawModule = FakeModule
    monkeypatch.setattr(FakeModule, "loaded", [])
    compiled: list[KernelConfig] = []

    def slowly(config: KernelConfig, arch: int, extra: tuple[str, ...] = ()) -> tuple[bytes, str]:
        compiled.append(config)
        time.sleep(0.05)
        return b"cubin of " + config.name.encode(), ""

    monkeypatch.setattr(kernels, "compile_cubin", slowly)
    got: list[int] = []
    together = threading.Barrier(8)

    def ask(config: KernelConfig) -> None:
        together.wait()
        got.append(kernels.load(config, 90, 0))

    threads = [threading.Thread(target=ask, args=(c,)) for c in (CONFIG, OTHER) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(config.name for config in compiled) == sorted([CONFIG.name, OTHER.name])
    modules = FakeModule.loaded
    assert len(modules) == 2
    assert sorted(got) == sorted([id(module) for module in modules] * 4)
    assert all(module.max_dynamic_shared_size_bytes == CONFIG.shared_bytes for module in modules)


def test_another_device_loads_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is loaded once a device and compiled once for all."""
    binding = FakeNvrtc()
    cupy = install(monkeypatch, binding)
    cupy.RawModule = FakeModule
    monkeypatch.setattr(FakeModule, "loaded", [])
    first = kernels.load(CONFIG, 90, 0)
    binding.fails = True
    second = kernels.load(CONFIG, 90, 1)
    assert first != second
    assert kernels.load(CONFIG, 90, 0) == first
    assert len(FakeModule.loaded) == 2


# What is missing


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


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_cupy(monkeypatch)
    message = (
        "the CUDA backend needs CuPy (No module named 'cupy'): "
        "pip install 'cupaged[cuda12]' for a driver of CUDA 12, 'cupaged[cuda13]' for CUDA 13; "
        "or pass host arrays to use the reference backend"
    )
    check_unavailable(message, kernels.nvrtc)
    check_unavailable(message, cuda.cupy)


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = FakeNvrtc()
    install(monkeypatch, binding)

    def refuse() -> tuple[int, int]:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12: cannot open\nand how to mend it")

    binding.getVersion = refuse
    check_unavailable(
        "the CUDA backend needs NVRTC, which CuPy can't load "
        f"(CuPy failed to load libnvrtc.so.12: cannot open): pip install {NVRTC_WHEELS}",
        kernels.nvrtc,
    )


def test_an_old_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvrtc(version=(11, 8)))
    check_unavailable(
        f"NVRTC is 11.8, expected at least 12.0: pip install --upgrade {NVRTC_WHEELS}",
        kernels.nvrtc,
    )


def test_an_nvrtc_that_does_not_know_the_gpu(nvrtc: FakeNvrtc) -> None:
    check_unavailable(
        "NVRTC 12.9 can't compile for compute capability 12.0: "
        f"pip install --upgrade {NVRTC_WHEELS}",
        kernels.compile_cubin,
        CONFIG,
        120,
    )


def test_a_source_that_nvrtc_refuses(nvrtc: FakeNvrtc) -> None:
    """A defect of the library's own: it comes with the compiler's words."""
    nvrtc.fails = True
    with pytest.raises(RuntimeError) as raised:
        kernels.compile_cubin(CONFIG, 90)
    assert str(raised.value) == f"NVRTC refused {CONFIG.name} for sm_90a:\nline 1: no"


def fake_runtime(**functions: Any) -> types.SimpleNamespace:
    error = type("CUDARuntimeError", (RuntimeError,), {})
    return types.SimpleNamespace(CUDARuntimeError=error, **functions)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch, FakeNvrtc())
    runtime = fake_runtime()

    def refuse() -> int:
        raise runtime.CUDARuntimeError("cudaErrorInsufficientDriver: too old")

    runtime.getDeviceCount = refuse
    cupy.cuda.runtime = runtime
    check_unavailable(
        "the CUDA backend finds no usable GPU (cudaErrorInsufficientDriver: too old): install an "
        "NVIDIA driver, or pass host arrays to use the reference backend",
        cuda.cupy,
    )


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch, FakeNvrtc())
    cupy.cuda.runtime = fake_runtime(getDeviceCount=lambda: 0)
    check_unavailable(
        "the CUDA backend finds no GPU: pass host arrays to use the reference backend", cuda.cupy
    )


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"major": 7, "minor": 5, "multiProcessorCount": 40, "name": b"Tesla T4"}
    cupy = install(monkeypatch, FakeNvrtc())
    cupy.cuda.runtime = fake_runtime(
        getDeviceCount=lambda: 2, getDeviceProperties=lambda device: properties
    )
    check_unavailable(
        "cuda:1 (Tesla T4) has compute capability 7.5, expected at least 8.0: "
        "pass host arrays to use the reference backend",
        cuda.device_model,
        1,
    )
    properties |= {"major": 8, "minor": 9}
    assert cuda.device_model(0).arch == 89
    assert cuda.device_model(0).num_sms == 40


def test_an_error_is_no_answer_to_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was missing can be installed while the process runs."""
    uninstall_cupy(monkeypatch)
    with pytest.raises(BackendUnavailableError):
        kernels.nvrtc()
    install(monkeypatch, FakeNvrtc())
    assert kernels.nvrtc().getVersion() == (12, 9)


# NVRTC itself


RACE = """
import sys
from cupaged import heuristics, kernels
config = heuristics.kernel_config(90, "float16", 64, True, "short")
print("ready", flush=True)
sys.stdin.readline()
print(kernels.cubin_path(config, 90), flush=True)
"""


def test_two_processes_race_for_one_entry() -> None:
    """Both compile, both end up with the one whole entry, and nothing else is left."""
    try:
        kernels.nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(kernels.__file__).parent.parent,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    found = {racer.communicate()[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    config = heuristics.kernel_config(90, "float16", 64, True, "short")
    assert found == {str(kernels.find_cached(config, 90))}
    assert [str(path) for path in kernels.cache_folder().iterdir()] == list(found)
    assert np.fromfile(found.pop(), "S4", 1)[0] == b"\x7fELF"
