"""Functions that `torch.compile` calls without looking into them: the eager result, two graphs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cupaged
from cupaged import flash_attn
from cupaged.opaque import opaque

ON = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]
GEOMETRY = (4, 2, 64, 16)


@pytest.fixture
def pytorch() -> Iterator[Any]:
    """PyTorch, whose compiler forgets what it has seen."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    yield torch
    torch._dynamo.reset()


class Draws:
    """What the calls below read beside the queries."""

    def __init__(self, torch: Any, rng: np.random.Generator, on: str) -> None:
        self.torch, self.device = torch, "cuda" if on == "gpu" else "cpu"
        self.backend = "cuda" if on == "gpu" else "reference"
        self.rng = rng
        self.k, self.v = self.halves(20, 2, 64), self.halves(20, 2, 64)
        self.cache = (self.halves(5, 16, 2, 64), self.halves(5, 16, 2, 64))
        self.state = self.halves(9, 4, 64)
        self.lse = torch.from_numpy(rng.standard_normal((2, 9, 4)).astype(np.float32))
        self.lse = self.lse.to(self.device)
        self.cascade = _cascade(self)

    def halves(self, *shape: int) -> Any:
        values = self.rng.standard_normal(shape).astype(np.float16)
        return self.torch.from_numpy(values).to(self.device)

    def ints(self, *values: int) -> Any:
        return self.torch.tensor(values, dtype=self.torch.int32, device=self.device)


def _append(d: Draws, q: Any) -> Any:
    cache = tuple(x.clone() for x in d.cache)
    rows, indices, positions = q[:3, :2].contiguous(), d.ints(0, 0, 1), d.ints(0, 1, 0)
    cupaged.append_paged_kv_cache(
        *(rows, rows, indices, positions, cache, d.ints(4, 1), d.ints(0, 1, 2), d.ints(2, 1))
    )
    return cache[0]


def _merge_in_place(d: Draws, q: Any) -> Any:
    v, s = q.clone(), d.lse[0].clone()
    cupaged.merge_state_in_place(v, s, d.state, d.lse[1])
    return v


def _cascade(d: Draws) -> Any:
    """Planned outside."""
    wrapper = cupaged.MultiLevelCascadeAttentionWrapper(2, backend=d.backend)
    wrapper.plan(
        *([[0, 9], [0, 3, 8, 9]], [[0, 2], [0, 1, 2, 2]], [[4, 1], [0, 2]], [[16], [16, 3, 0]]),
        *GEOMETRY,
    )
    return wrapper


CALLS: dict[str, Callable[[Draws, Any], Any]] = {
    "single prefill": lambda d, q: cupaged.single_prefill_with_kv_cache(
        q, d.k, d.v, causal=True, backend=d.backend
    ),
    "single decode": lambda d, q: cupaged.single_decode_with_kv_cache(q[0], d.k, d.v),
    "merge_state": lambda d, q: cupaged.merge_state(q, d.lse[0], d.state, d.lse[1])[0],
    "merge_state_in_place": _merge_in_place,
    "merge_states": lambda d, q: cupaged.merge_states(
        d.torch.stack([q, d.state], 1), d.torch.stack([d.lse[0], d.lse[1]], 1)
    )[0],
    "append": _append,
    "cascade": lambda d, q: d.cascade.run(q, d.cache),
    "flash_attn varlen": lambda d, q: flash_attn.flash_attn_varlen_func(
        q, d.k, d.v, d.ints(0, 3, 9), d.ints(0, 10, 20), 6, 10, causal=True
    ),
    "flash_attn kvcache": lambda d, q: flash_attn.flash_attn_with_kvcache(
        q[None], d.k[None], d.v[None], causal=True
    ),
}


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_equals_the_eager_one(
    rng: np.random.Generator, pytorch: Any, name: str, on: str
) -> None:
    """Each graph but the caller's own two would be one of the library's frames."""
    draws, call, graphs = Draws(pytorch, rng, on), CALLS[name], []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def between(q: Any) -> Any:
        return call(draws, q * 2) * 2

    compiled = pytorch.compile(between, backend=compiler)
    for _ in range(2):
        q = draws.halves(9, 4, 64)
        expected = between(q)
        assert pytorch.isfinite(expected).all()
        assert pytorch.equal(compiled(q), expected)
    for graph in graphs:
        assert "numpy" not in graph.code
        for node in graph.graph.nodes:
            path = node.meta.get("stack_trace") or ""
            assert "/cupaged/" not in path.replace("\\", "/") or "torch_ops" in path


def test_a_frame_below_is_not_compiled(pytorch: Any) -> None:
    seen = []

    def below(x: Any) -> Any:
        seen.append(pytorch.compiler.is_compiling() or pytorch._dynamo.is_compiling())
        return x + 1

    @opaque
    def function(x: Any) -> Any:
        return below(x) * 3

    graphs = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = pytorch.compile(lambda x: function(x * 2) - 5, backend=compiler)
    assert compiled(pytorch.ones(3)).tolist() == [4.0] * 3
    assert [len(targets) for targets in graphs] == [1, 1]  # the multiplication, the subtraction
    assert seen == [False]


def test_a_warning_is_of_the_callers_line(pytorch: Any) -> None:
    """With PyTorch's compiler there, whose frames are between."""
    q, k = pytorch.zeros(3, 2, 64).half(), pytorch.zeros(2, 2, 64).half()
    with pytest.warns(cupaged.CupagedWarning) as found:
        cupaged.single_prefill_with_kv_cache(q, k, k, causal=True)
    assert found[0].filename == __file__


def test_name_signature_and_documentation_stay() -> None:
    run = cupaged.merge_state
    assert run.__name__ == "merge_state"
    assert run.__doc__ is not None
    assert list(inspect.signature(run).parameters) == ["v_a", "s_a", "v_b", "s_b"]


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    assert opaque(lambda x: x + 1)(2) == 3
    assert "torch" not in sys.modules
