"""The package as a user gets it: built, installed away from the checkout, and run there.

Needs the package registry, for what builds and runs a wheel.
"""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What a build may look at; `tests` and `bench`, so that it could take them by mistake.
TREE = ("pyproject.toml", "README.md", "LICENSE", "cupaged", "kernels_cu", "tests", "bench")

#: What making a wrapper must not bring along, though it could.
FOREIGN = ("cupy", "torch", "jax", "numba")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, with no way back to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def check(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, if it went well."""
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    work = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    once = ("--retries", "0", "--timeout", "20")
    reached = run(*pip, "download", *once, "--no-deps", "-d", "probe", "hatchling", cwd=work)
    if reached.returncode:
        pytest.skip(f"no package registry: {reached.stdout.strip().splitlines()[-1]}")
    tree = work / "tree"
    tree.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    check(run(*pip, "wheel", "--no-deps", "--wheel-dir", work / "dist", ".", cwd=tree))
    (built,) = (work / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean virtual environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment").resolve()
    check(run(sys.executable, "-m", "venv", folder / "venv", cwd=folder))
    check(run(python_of(folder / "venv"), "-m", "pip", "install", wheel, cwd=folder))
    return folder / "venv"


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "cupaged").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    expected |= {
        f"cupaged/kernels_cu/{path.name}": path.read_bytes()
        for path in (ROOT / "kernels_cu").iterdir()
    }
    assert "cupaged/py.typed" in expected
    assert any(name.endswith(".cu") for name in expected)
    assert any(name.endswith(".cuh") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name
        }
    assert sorted(held) == sorted(expected)
    assert held == expected


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "cupaged"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) >= {"cuda12", "cuda13", "test", "bench"}
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_it_needs_numpy_and_ml_dtypes_alone(environment: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import distributions\n"
        "print(*(found.metadata['Name'] for found in distributions()))"
    )
    printed = check(run(python_of(environment), "-c", code, cwd=tmp_path))
    assert set(printed.split()) - {"pip", "setuptools"} == {"cupaged", "numpy", "ml_dtypes"}


def test_the_installed_package_does_the_main_job(environment: Path, tmp_path: Path) -> None:
    printed = check(run(python_of(environment), "-m", "cupaged", cwd=tmp_path))
    assert printed.splitlines()[-1].startswith("PASSED: ")
    assert "reference backend on the host" in printed


def test_the_installed_package_finds_its_own_sources(environment: Path, tmp_path: Path) -> None:
    code = "from cupaged import source; print(source.folder(), source.__file__, sep='\\n')"
    folder, module = check(run(python_of(environment), "-c", code, cwd=tmp_path)).splitlines()
    assert Path(folder) == Path(module).parent / "kernels_cu"
    assert environment in Path(folder).parents


def test_it_imports_no_framework(environment: Path, tmp_path: Path) -> None:
    """Empty modules stand in for the frameworks, so that an import would succeed and be seen."""
    for name in FOREIGN:
        (tmp_path / f"{name}.py").touch()
    code = (
        "import sys, cupaged\n"
        "cupaged.BatchPrefillWithPagedKVCacheWrapper()\n"
        "print(*sorted(sys.modules))\n"
        f"for name in {FOREIGN}: __import__(name)\n"
        "print(*sorted(sys.modules))"
    )
    printed = check(run(python_of(environment), "-c", code, cwd=tmp_path)).splitlines()
    before, after = (set(line.split()) for line in printed)
    assert "cupaged" in before
    assert not before & set(FOREIGN)
    assert after > set(FOREIGN)
