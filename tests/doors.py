"""What the tests of the doors share: xFormers' masks, frameworks, what a call must return."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from formula import Formula
from oracle import assert_close, assert_lse_close, attend, plain_same_dtype

from cupaged import door

Array = np.ndarray[Any, Any]

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FRAMEWORKS = ("numpy", "torch", "jax")


@lru_cache(maxsize=1)
def _real_masks() -> ModuleType | str:
    """XFormers' module of masks, or why there is none.

    The file alone: what is around it wants the CUDA build of PyTorch that it was made for.
    """
    if importlib.util.find_spec("torch") is None:
        return "could not import 'torch', which xFormers' masks need"
    package = importlib.util.find_spec("xformers")
    if package is None or package.origin is None:
        return "could not import 'xformers': pip install --no-deps xformers==0.0.35"
    path = Path(package.origin).parent / "ops" / "fmha" / "attn_bias.py"
    spec = importlib.util.spec_from_file_location("xformers_masks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def real_masks() -> ModuleType:
    """XFormers' module of masks; skips the test where xFormers is not installed."""
    found = _real_masks()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[door.Call]:
    """Forget the plans that are kept; the list of what is planned from now on."""
    door._plans.clear()
    calls: list[door.Call] = []
    plan = door._plan

    def counted(call: door.Call, *rest: Any) -> door.Planned:
        calls.append(call)
        return plan(call, *rest)

    monkeypatch.setattr(door, "_plan", counted)
    return calls


def given_as(x: Array, kind: str) -> Any:
    """An array of NumPy's as an array of a framework's, on the host."""
    if kind == "numpy":
        return x
    if kind == "torch":
        torch = pytest.importorskip("torch")
        if x.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())
    jax = pytest.importorskip("jax")
    return jax.device_put(x, jax.devices("cpu")[0])


def to_numpy(x: Any, kind: str) -> Array:
    """The reverse, having seen that it is of that kind."""
    if kind == "numpy":
        assert type(x) is np.ndarray
        return x
    if kind == "torch":
        import torch

        assert type(x) is torch.Tensor
        if x.dtype is torch.bfloat16:
            return x.contiguous().view(torch.int16).numpy().view(DTYPES["bfloat16"])
        return x.numpy()
    import jax

    assert isinstance(x, jax.Array)
    return np.asarray(x)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def seen_keys(masks: ModuleType, bias: Any, shape: tuple[int, int]) -> Array:
    """Bool [queries, keys]: what a bias of xFormers' leaves visible."""
    return np.asarray(bias.materialize(shape).numpy() == 0)


def check(
    got: Array,
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    blocks: list[tuple[int, int]],
    lse: Array | None = None,
    **formula: Any,
) -> None:
    """Hold a result to the contract, block of rows by block.

    Parameters
    ----------
    got : [rows, num_heads, head_dim]
    q : [rows, num_heads, head_dim]
    k, v : [keys, num_kv_heads, head_dim]
    seen : bool [rows, keys]
        What each row sees of all keys.
    blocks : list of (int, int)
        Each request's rows.
    lse : float32 [rows, num_heads], optional
        Natural.
    """
    assert sum(end - begin for begin, end in blocks) == len(got) == len(q)
    for begin, end in blocks:
        if begin == end:
            continue
        rows = slice(begin, end)
        options = Formula(custom_mask=(seen[rows],), lse_base="ln", **formula)
        out, expected_lse = attend(q[rows], k, v, options)
        plain = plain_same_dtype(q[rows], k, v, options)
        what = f"rows {begin}..{end - 1}"
        assert_close(got[rows], out, plain, seen[rows].any(axis=1), what)
        if lse is not None:
            assert_lse_close(lse[rows], expected_lse, what=f"lse of {what}")
