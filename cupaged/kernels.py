"""Kernels compiled with NVRTC, kept in a cache on disk, loaded through CuPy."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupaged import source, tiles
from cupaged.errors import BackendUnavailableError
from cupaged.kernel_spec import Kernel, KernelConfig
from cupaged.spec import FLOAT8_DTYPES, SERVED_DTYPES, SERVED_HEAD_DIMS, Needs, Variant
from cupaged.tiles import TYPICAL_PAGE_SIZES

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

#: The oldest NVRTC whose C++17 and sm_90a the sources were compiled with.
MIN_NVRTC = (12, 0)

_NVRTC_WHEELS = "nvidia-cuda-nvrtc-cu12 (for cupy-cuda12x) or nvidia-cuda-nvrtc (cupy-cuda13x)"

_OPTIONS = ("-std=c++17", "-lineinfo")
_HASH_CHARS = 32

_locks: defaultdict[tuple[Kernel, int], threading.Lock] = defaultdict(threading.Lock)
# The kernel, kept alive, and its CUfunction.
_loaded: dict[tuple[Kernel, int], tuple[Any, int]] = {}
# Unloaded while CuPy can still do it, which at the interpreter's end it can't.
atexit.register(_loaded.clear)


#: Variants that models have: each alone, those that go together, and all at once.
_VARIANTS = (
    *(Variant(**{name: True}) for name in Variant._fields),
    Variant(window=True, soft_cap=True),
    Variant(window=True, custom_mask=True),
    Variant(window=True, soft_cap=True, custom_mask=True, alibi=True),
)


def configurations(arch: int) -> Iterator[KernelConfig]:
    """The kernel configurations that users of a GPU of compute capability `arch` will meet.

    Every plain one, every one for 8-bit K and V in pages of 16, and variants of heads of 128;
    of 8-bit keys' heads of 64 and 128 also rotations. The others, pages of other sizes and variants
    in other company, are compiled when asked for as all are.
    """
    found: dict[KernelConfig, None] = {}
    for dtype, head_dims in itertools.product(SERVED_DTYPES, SERVED_HEAD_DIMS):
        needs = [Needs(dtype, dtype, *head_dims, page_size) for page_size in TYPICAL_PAGE_SIZES]
        needs += [Needs(dtype, kv_dtype, *head_dims, 16) for kv_dtype in FLOAT8_DTYPES]
        if head_dims in ((64, 64), (128, 128)):
            needs.append(Needs(dtype, "float8_e4m3fn", *head_dims, 16, Variant(rope=True)))
        if head_dims == (128, 128):
            needs += [
                Needs(dtype, dtype, *head_dims, 16, variant, low_cap, scattered)
                for variant in _VARIANTS
                for low_cap in ((True, False) if variant.soft_cap else (False,))
                for scattered in ((True, False) if variant.window else (False,))
            ]
        for each, shape in itertools.product(needs, tiles.SHAPES):
            config = tiles.kernel_config(arch, each, shape)
            found[config] = None
            if config.producer_warps and config.page_aligned and not any(each.variant):
                # For strides that tensor maps can't have.
                found[replace(config, page_aligned=False)] = None
    yield from found


def target(arch: int) -> str:
    """NVRTC's name for compute capability `arch` (major * 10 + minor)."""
    return "sm_90a" if arch == 90 else f"sm_{arch}"


@lru_cache(maxsize=1)
def nvrtc() -> Any:
    """CuPy's binding of NVRTC.

    Raises
    ------
    BackendUnavailableError
        CuPy or NVRTC is missing, or NVRTC is too old.
    """
    try:
        from cupy.cuda import nvrtc as binding
    except ImportError as error:
        raise BackendUnavailableError(
            f"the CUDA backend needs CuPy ({error}): pip install 'cupaged[cuda12]' for a driver of "
            "CUDA 12, 'cupaged[cuda13]' for CUDA 13; or pass host arrays to use the reference "
            "backend"
        ) from error
    try:
        version = binding.getVersion()
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendUnavailableError(
            f"the CUDA backend needs NVRTC, which CuPy can't load ({reason}): "
            f"pip install {_NVRTC_WHEELS}"
        ) from error
    if version < MIN_NVRTC:
        raise BackendUnavailableError(
            f"NVRTC is {_dotted(version)}, expected at least {_dotted(MIN_NVRTC)}: "
            f"pip install --upgrade {_NVRTC_WHEELS}"
        )
    return binding


def compile_cubin(kernel: Kernel, arch: int, extra: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Compile one kernel. Needs NVRTC, but neither a GPU nor a driver.

    Parameters
    ----------
    kernel : Kernel
    arch : int
        Compute capability, major * 10 + minor.
    extra : tuple of str
        More options, e.g. for reports.

    Returns
    -------
    cubin : bytes
    log : str
        What the compiler said.

    Raises
    ------
    BackendUnavailableError
        NVRTC is missing, too old, or doesn't know `arch`.
    """
    binding = nvrtc()
    if arch not in binding.getSupportedArchs():
        raise BackendUnavailableError(
            f"NVRTC {_dotted(binding.getVersion())} can't compile for compute capability "
            f"{arch // 10}.{arch % 10}: pip install --upgrade {_NVRTC_WHEELS}"
        )
    program = binding.createProgram(source.render(kernel), f"{kernel.name}.cu", [], [])
    try:
        binding.compileProgram(program, [f"-arch={target(arch)}", *_OPTIONS, *extra])
        # CuPy's binding takes the last byte for a string's end and drops it (seen in 14.2): with it
        # the ELF's last header is cut short. A zero too many does no harm.
        return binding.getCUBIN(program) + b"\0", binding.getProgramLog(program).rstrip("\0")
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program).rstrip("\0")
        raise RuntimeError(f"NVRTC refused {kernel.name} for {target(arch)}:\n{log}") from error
    finally:
        binding.destroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept: `CUPAGED_CACHE_DIR`, or the user's cache folder."""
    chosen = os.environ.get("CUPAGED_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cupaged"


def private_folder() -> Path:
    """The cache folder, made and found to be the user's alone; else a new one for this process."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Another user who can write here could hand this one any code to run.
        status = folder.stat()
        mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if mine and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(_process_folder().name)


@lru_cache(maxsize=1)
def _process_folder() -> TemporaryDirectory[str]:
    """A folder that goes with the process."""
    import tempfile  # which takes longer to import than this package, and is seldom needed

    return tempfile.TemporaryDirectory(prefix="cupaged-")


def _key(kernel: Kernel, arch: int) -> str:
    """Changes with anything that could change the compiled kernel."""
    parts = (source.render(kernel), target(arch), *_OPTIONS, _dotted(nvrtc().getVersion()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_HASH_CHARS]


def _digest(cubin: bytes) -> str:
    return hashlib.sha256(cubin).hexdigest()[:_HASH_CHARS]


def find_cached(kernel: Kernel, arch: int) -> Path | None:
    """The cached cubin of a kernel, verified; None where there is none.

    An entry's name holds the key of its source and the digest of its content, so that one that
    was damaged doesn't match its name, and is no entry.
    """
    for path in private_folder().glob(f"{kernel.name}-{_key(kernel, arch)}-*.cubin"):
        try:
            if path.stem.endswith(f"-{_digest(path.read_bytes())}"):
                return path
        except OSError:
            continue
    return None


def _store(kernel: Kernel, arch: int, cubin: bytes) -> Path:
    """Write a cubin under its final name in one step, whoever else is writing it."""
    import tempfile

    folder = private_folder()
    path = folder / f"{kernel.name}-{_key(kernel, arch)}-{_digest(cubin)}.cubin"
    descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def cubin_path(kernel: Kernel, arch: int) -> Path:
    """The compiled kernel on disk: found in the cache, or compiled and stored there."""
    found = find_cached(kernel, arch)
    return found if found is not None else _store(kernel, arch, compile_cubin(kernel, arch)[0])


def is_loaded(kernel: Kernel, device: int) -> bool:
    """Whether a kernel is loaded on CUDA device `device`."""
    return (kernel, device) in _loaded


def load(kernel: Kernel, arch: int, device: int) -> int:
    """The kernel's `CUfunction`, loaded on CUDA device `device`, the current one.

    Compiled at most once, however many threads ask for it at the same time.
    """
    key = (kernel, device)
    found = _loaded.get(key)
    if found is None:
        with _locks[key]:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(kernel, arch)
    return found[1]


def _load(kernel: Kernel, arch: int) -> tuple[Any, int]:
    import cupy

    module = cupy.RawModule(path=str(cubin_path(kernel, arch)))
    function = module.get_function(kernel.entry)
    function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function, function.kernel.ptr


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
