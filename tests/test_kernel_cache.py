"""Keys and entries of the cache of compiled kernels, under several threads and processes."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiler import plain_kernel
from processes import race
from stand_ins import FakeModule, FakeNvrtc, install

from cupaged import kernels, source
from cupaged.errors import BackendUnavailableError
from cupaged.kernel_spec import KernelConfig
from cupaged.spec import Variant

pytestmark = pytest.mark.usefixtures("nothing_remembered")

CONFIG = plain_kernel(90, "float16", 128, 16)
OTHER = plain_kernel(90, "bfloat16", 128, 16)

# Keys


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
    configs = list(kernels.configurations(90))
    assert len({kernels._key(config, 90) for config in configs}) == len(configs)
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
        if field.name == "family" or not field.compare:
            continue
        value = getattr(CONFIG, field.name)
        if field.name == "variant":
            for name in Variant._fields:
                other = replace(CONFIG, variant=Variant(**{name: True}))
                assert kernels._key(other, 90) != before, name
            continue
        if field.name in ("dtype", "kv_dtype"):
            changed: Any = {"dtype": "bfloat16", "kv_dtype": "float8_e5m2"}[field.name]
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


# Entries


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


# Threads, devices and processes


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


RACE_IMPORTS = "from cupaged import kernels, tiles; from cupaged.spec import Needs"
RACE = """
config = tiles.kernel_config(90, Needs("float16", "float16", 64, 64, 16), "short")
print(kernels.cubin_path(config, 90), flush=True)
"""


def test_two_processes_race_for_one_entry() -> None:
    """Both compile, both end up with the one whole entry, and nothing else is left."""
    try:
        kernels.nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    found = set(race(RACE_IMPORTS, RACE, 2))
    config = plain_kernel(90, "float16", 64, 16, "short")
    assert found == {str(kernels.find_cached(config, 90))}
    assert [str(path) for path in kernels.cache_folder().iterdir()] == list(found)
    assert np.fromfile(found.pop(), "S4", 1)[0] == b"\x7fELF"
