"""The README tells the truth: its examples run, its errors are raised, its plan is today's.

`PYTHONPATH=. python tests/test_readme.py` writes today's plan into it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupaged
from cupaged import support

README = Path(__file__).resolve().parent.parent / "README.md"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Names = dict[str, Any]


def blocks(language: str) -> list[str]:
    """What stands between the README's fences of a language."""
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


#: The examples by what they import first: numpy, on which the others build, cupy, torch, jax.numpy;
#: cupaged, the life of requests; torch.cuda, a graph; cupaged.flash_attn, the doors.
EXAMPLES = {block.split()[1]: block for block in blocks("python")}


def run_example(name: str) -> Names:
    """Run the first example and then another one; returns what they have defined."""
    names: Names = {}
    for each in dict.fromkeys(("numpy", name)):
        exec(EXAMPLES[each], names)
    return names


def check(names: Names, out: np.ndarray, lse: np.ndarray | None = None) -> None:
    """Hold an example's result, on the host, to the formula."""
    batch = names["batch"]
    q, cache = (names[name].astype(out.dtype) for name in ("q", "cache"))
    formula = oracle.Formula(causal=True)
    assert out.shape == (46, 32, 128)
    for r, keys in enumerate((70, 33, 40)):
        rows = slice(*batch["qo_indptr"][r : r + 2])
        pages = batch["paged_kv_indices"][slice(*batch["paged_kv_indptr"][r : r + 2])]
        k, v = (oracle.gather(cache[:, i], "NHD", pages, keys, 16) for i in range(2))
        expected, expected_lse = oracle.attend(q[rows], k, v, formula)
        plain = oracle.plain_same_dtype(q[rows], k, v, formula)
        seen = np.ones(len(expected), np.bool_)
        oracle.assert_close(out[rows], expected, plain, seen, f"out of request {r}")
        if lse is not None:
            oracle.assert_lse_close(lse[rows], expected_lse, f"lse of request {r}")


def on_host(x: Any) -> np.ndarray:
    """A NumPy or CuPy array, on the host."""
    return x if isinstance(x, np.ndarray) else x.get()


def check_torch(names: Names, device: str) -> None:
    torch, out = names["torch"], names["out"]
    assert isinstance(out, torch.Tensor)
    assert out.device.type == device
    assert out.dtype == torch.bfloat16
    check(names, out.cpu().view(torch.int16).numpy().view(BFLOAT16))


def check_jax(names: Names, platform: str) -> None:
    import jax

    out = names["out"]
    assert isinstance(out, jax.Array)
    assert {device.platform for device in out.devices()} == {platform}
    check(names, np.asarray(out))


def test_every_example_is_run_here() -> None:
    first = ["numpy", "cupy", "torch", "jax.numpy", "cupaged", "torch.cuda"]
    assert list(EXAMPLES) == [*first, "cupaged.flash_attn"]


def test_the_numpy_example() -> None:
    names = run_example("numpy")
    assert type(names["out"]) is np.ndarray
    assert names["out"].dtype == np.float16
    check(names, names["out"])


def test_the_torch_example_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_torch(run_example("torch"), "cpu")


def test_the_jax_example_on_the_host() -> None:
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        check_jax(run_example("jax.numpy"), "cpu")


@pytest.mark.parametrize("on", ["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_life_of_a_request(monkeypatch: pytest.MonkeyPatch, on: str) -> None:
    """The last step, of the last layer, against the contiguous history of both that live."""
    if on == "gpu":
        example = EXAMPLES["cupaged"]
        changed = example.replace("None, np.asarray", '"cuda", __import__("cupy").asarray')
        assert changed != example
        monkeypatch.setitem(EXAMPLES, "cupaged", changed)
    histories: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"a": [], "b": [], "c": []}
    append, fork = cupaged.PagedKVCache.append, cupaged.PagedKVCache.fork

    def recorded(self: Any, requests: list[str], k: Any, v: Any, layer: int) -> None:
        append(self, requests, k, v, layer)
        if layer == 1:
            new = np.split(np.arange(len(k)), self.qo_indptr(requests)[1:-1])
            for request, mine in zip(requests, new, strict=True):
                histories[request].append((on_host(k)[mine], on_host(v)[mine]))

    def forked(self: Any, request: str, new: str) -> None:
        fork(self, request, new)
        histories[new] = list(histories[request])

    monkeypatch.setattr(cupaged.PagedKVCache, "append", recorded)
    monkeypatch.setattr(cupaged.PagedKVCache, "fork", forked)
    names = run_example("cupaged")
    assert names["living"] == ["a", "c"]
    formula = oracle.Formula()
    for r, request in enumerate(names["living"]):
        k, v = (np.concatenate(half) for half in zip(*histories[request], strict=True))
        assert len(k) == 140
        q, out = (on_host(names[name])[r : r + 1] for name in ("q", "out"))
        expected, _ = oracle.attend(q, k, v, formula)
        plain = oracle.plain_same_dtype(q, k, v, formula)
        oracle.assert_close(out, expected, plain, np.ones(1, np.bool_), request)


@pytest.mark.gpu
def test_the_graph_example() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    names = run_example("torch.cuda")
    q, out, pages = (names[name].cpu().numpy() for name in ("q", "out", "pages"))
    formula = oracle.Formula()
    for r, keys in enumerate((147, 160, 151)):
        k, v = (oracle.gather(pages[:, i], "NHD", range(10 * r, 64), keys, 16) for i in range(2))
        expected, _ = oracle.attend(q[r : r + 1], k, v, formula)
        plain = oracle.plain_same_dtype(q[r : r + 1], k, v, formula)
        seen = np.ones(1, np.bool_)
        oracle.assert_close(out[r : r + 1], expected, plain, seen, f"out of request {r}")


@pytest.mark.gpu
def test_the_cupy_example() -> None:
    cupy = pytest.importorskip("cupy")
    names = run_example("cupy")
    assert type(names["out"]) is type(names["lse"]) is cupy.ndarray
    check(names, names["out"].get(), names["lse"].get())


@pytest.mark.gpu
def test_the_torch_example_on_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    check_torch(run_example("torch"), "cuda")


@pytest.mark.gpu
def test_the_jax_example_on_a_gpu() -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")
    check_jax(run_example("jax.numpy"), "gpu")


def test_the_doors_example() -> None:
    names = run_example("cupaged.flash_attn")
    q, formula = names["q"], oracle.Formula(causal=True)
    for r, (qo, kv) in enumerate(zip(*map(pairwise, names["lengths"]), strict=True)):
        rows, keys = slice(*qo), slice(*kv)
        k, v = names["k"][keys], names["v"][keys]
        expected, _ = oracle.attend(q[rows], k, v, formula)
        plain = oracle.plain_same_dtype(q[rows], k, v, formula)
        seen = np.ones(len(expected), np.bool_)
        for name, out in (("ragged", names["from_ragged"]), ("bias", names["from_bias"][0])):
            oracle.assert_close(out[rows], expected, plain, seen, f"{name}, request {r}")
    for r, keys in enumerate((70, 33)):
        k, v = (
            oracle.gather(names["cache"][:, i], "NHD", names["table"][r], keys, 16) for i in (0, 1)
        )
        expected, _ = oracle.attend(names["newest"][r], k, v, formula)
        plain = oracle.plain_same_dtype(names["newest"][r], k, v, formula)
        seen = np.ones(1, np.bool_)
        oracle.assert_close(names["from_pages"][r], expected, plain, seen, f"pages, request {r}")


def unserved_calls() -> list[str]:
    text = README.read_text(encoding="utf-8")
    _, _, table = text.partition("| not served | such as |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert rows
    return [call for row in rows for call in re.findall("`(.+?)`", row.split("|")[2])]


@pytest.mark.parametrize("call", unserved_calls())
def test_what_is_not_served_says_so(call: str) -> None:
    names = run_example("numpy")
    attention = names["attention"]
    names |= {
        "plan": partial(attention.plan, **names["batch"]),
        "run": attention.run,
        "BatchPrefillWithPagedKVCacheWrapper": cupaged.BatchPrefillWithPagedKVCacheWrapper,
    }
    with pytest.raises(NotImplementedError):
        eval(call, names)


def test_the_table_of_what_is_served_is_that_of_dispatch() -> None:
    assert support.table() in README.read_text(encoding="utf-8")


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    """Of the error that a call raises."""
    with pytest.raises(ValueError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def test_the_errors_are_raised_as_they_stand(rng: np.random.Generator) -> None:
    attention = cupaged.BatchPrefillWithPagedKVCacheWrapper()
    good = {
        "qo_indptr": np.arange(7),
        "paged_kv_indptr": np.array([0, 23, 46, 69, 92, 115, 120]),
        "paged_kv_indices": rng.permutation(640)[:120],
        "paged_kv_last_page_len": np.full(6, 32),
        "num_qo_heads": 8,
        "num_kv_heads": 8,
        "head_dim_qk": 128,
        "page_size": 32,
    }
    too_long, too_high = good["paged_kv_last_page_len"].copy(), good["paged_kv_indices"].copy()
    too_long[3], too_high[117] = 40, 640
    q = np.zeros((6, 8, 128), np.float16)
    nhd, hnd = np.zeros((640, 32, 8, 128), np.float16), np.zeros((640, 8, 32, 128), np.float16)
    raised = [message(attention.plan, **good | {"paged_kv_last_page_len": too_long})]
    attention.plan(**good | {"paged_kv_indices": too_high})
    raised.append(message(attention.run, q, (nhd, nhd)))
    attention.plan(**good)
    raised.append(message(attention.run, q, (hnd, hnd)))
    assert blocks("text") == ["".join(f"{line}\n" for line in raised)]


def plan_block() -> tuple[str, str]:
    """The README's plan, and what the command above it prints today."""
    (block,) = blocks("console")
    command = block.partition("\n")[0]
    prompt, program, *arguments = command.split()
    assert (prompt, program) == ("$", "python")
    printed = subprocess.run(
        [sys.executable, *arguments], cwd=README.parent, capture_output=True, text=True, check=True
    )
    return block, f"{command}\n{printed.stdout}"


def test_the_plan_is_todays() -> None:
    block, today = plan_block()
    assert block == today, "`PYTHONPATH=. python tests/test_readme.py` brings the README up to date"


if __name__ == "__main__":
    block, today = plan_block()
    README.write_text(README.read_text(encoding="utf-8").replace(block, today), encoding="utf-8")
