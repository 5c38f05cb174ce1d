"""The cascade on a GPU, against the plain formula over the keys of all levels."""

from __future__ import annotations

from typing import Any

import batches
import cascades
import numpy as np
import pytest
from cascades import Cascade
from gpu_calls import to_gpu, to_host
from hypothesis import given, settings
from hypothesis import strategies as st

import cupaged
from cupaged.cascade import MultiLevelCascadeAttentionWrapper

pytestmark = pytest.mark.gpu

Results = tuple[np.ndarray, np.ndarray]


def wrapper_for(cascade: Cascade, **options: Any) -> MultiLevelCascadeAttentionWrapper:
    return MultiLevelCascadeAttentionWrapper(
        cascade.num_levels, kv_layout=cascade.flat.kv_layout, backend="cuda", **options
    )


def run(wrapper: MultiLevelCascadeAttentionWrapper, cascade: Cascade) -> Results:
    """Run on the GPU into poisoned arrays; out and LSE on the host."""
    there = cascade.on(to_gpu).flat
    out = to_gpu(cascade.flat.poisoned_out().storage)
    lse = to_gpu(cascade.flat.poisoned_lse().storage)
    assert wrapper.run(there.q, there.cache, out=out, lse=lse) is out
    return to_host(out), to_host(lse)


@settings(max_examples=60)
@given(cascades.calls(), st.sampled_from(batches.Q_FORMS))
def test_random_cascades_equal_the_formula(
    cp: Any, call: tuple[Cascade, bool], out_form: str
) -> None:
    cascade, causal = call
    wrapper = wrapper_for(cascade)
    cascade.plan(wrapper, causal=causal)
    there = cascade.on(to_gpu).flat
    out, lse = wrapper.run(there.q, there.cache, return_lse=True)
    assert isinstance(out, cp.ndarray)
    assert isinstance(lse, cp.ndarray)
    cascades.check(cascade, to_host(out), to_host(lse), causal=causal)
    view = cascade.flat.poisoned_out(out_form).on(to_gpu)
    given_lse = cascade.flat.poisoned_lse(strided=True).on(to_gpu)
    wrapper.run(there.q, there.cache, out=view.array, lse=given_lse.array)
    on_host, lse_on_host = view.on(to_host), given_lse.on(to_host)
    cascades.check(cascade, on_host.array, lse_on_host.array, causal=causal)
    assert np.isnan(on_host.outside()).all()
    assert np.isnan(lse_on_host.outside()).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoding_over_a_long_prefix(
    cp: Any, rng: np.random.Generator, dtype: str, head_dim: int, page_size: int, causal: bool
) -> None:
    """A row each, and a few; and the same bits again."""
    cascade = cascades.build(
        rng,
        [1] * 40 + [5, 2],
        [[4000], [*rng.integers(1, 80, 40), 40, 7]],
        [[42]],
        page_size=page_size,
        group=4,
        head_dim=head_dim,
        dtype=dtype,
    )
    wrapper = wrapper_for(cascade)
    cascade.plan(wrapper, causal=causal)
    first, again = run(wrapper, cascade), run(wrapper, cascade)
    cascades.check(cascade, *first, causal=causal)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_three_levels(cp: Any, rng: np.random.Generator, causal: bool) -> None:
    """A system prompt, documents, and questions about them; some of each without keys."""
    cascade = cascades.build(
        rng,
        [30, 1, 4, 200, 6],
        [[900], [800, 0, 33], [90, 1, 4, 300, 6]],
        [[3], [2, 1, 2]],
        group=2,
        head_dim=128,
    )
    wrapper = wrapper_for(cascade)
    cascade.plan(wrapper, causal=causal)
    cascades.check(cascade, *run(wrapper, cascade), causal=causal)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_level_without_keys_changes_no_bit(cp: Any, rng: np.random.Generator, empty: int) -> None:
    kv_len = [[0], [0, 0]]
    kv_len[1 - empty] = [[70], [30, 1]][1 - empty]
    cascade = cascades.build(rng, [2, 3], kv_len, [[2]])
    wrapper = wrapper_for(cascade)
    cascade.plan(wrapper)
    out, lse = run(wrapper, cascade)
    alone = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="cuda")
    alone.plan(*cascade.level(1 - empty), *cascade.flat.geometry)
    there = cascade.on(to_gpu).flat
    expected, expected_lse = alone.run(there.q, there.cache, return_lse=True)
    assert out.tobytes() == to_host(expected).tobytes()
    assert lse.tobytes() == to_host(expected_lse).tobytes()


def test_index_arrays_on_the_device_and_a_workspace(cp: Any, rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [4, 2, 1], [[3000], [900, 20, 0]], [[3]], group=4)
    wrapper = wrapper_for(cascade, float_workspace_buffer=cp.empty(64 << 20, np.uint8))
    there = [[cp.asarray(x) for x in levels] for levels in cascade.index_arrays]
    wrapper.plan(*there, *cascade.flat.geometry)
    cascades.check(cascade, *run(wrapper, cascade))


def test_auto_serves_both_kinds_of_array(cp: Any, rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [4, 2, 1], [[300], [90, 20, 0]], [[3]])
    wrapper = MultiLevelCascadeAttentionWrapper(2)
    cascade.plan(wrapper)
    cascades.check(cascade, *run(wrapper, cascade))
    cascades.check(cascade, wrapper.run(cascade.flat.q, cascade.flat.cache))


def test_planning_anew_while_work_is_in_flight(cp: Any, rng: np.random.Generator) -> None:
    """The plans that are dropped, and the states of the levels, have not been used yet."""
    work = []
    for _ in range(12):
        kv_len = [[int(rng.integers(0, 900))], rng.integers(0, 90, 5).tolist()]
        work.append(cascades.build(rng, rng.integers(0, 9, 5).tolist(), kv_len, [[5]], group=2))
    there = [cascade.on(to_gpu).flat for cascade in work]
    cp.cuda.Device().synchronize()
    results = []
    with cp.cuda.Stream(non_blocking=True) as stream:
        wrapper = wrapper_for(work[0])
        for cascade, flat in zip(work, there, strict=True):
            cascade.plan(wrapper)
            results.append(wrapper.run(flat.q, flat.cache, return_lse=True))
        stream.synchronize()
    for cascade, (out, lse) in zip(work, results, strict=True):
        cascades.check(cascade, to_host(out), to_host(lse))


# Other frameworks


def test_torch_tensors(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    cascade = cascades.build(
        rng, [1, 50, 2], [[1000], [1, 400, 7]], [[3]], dtype="bfloat16", head_dim=128
    )

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)

    wrapper = MultiLevelCascadeAttentionWrapper(2)
    cascade.plan(wrapper, q_data_type=torch.bfloat16, causal=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = cascade.on(tensor).flat
        out, lse = wrapper.run(there.q, there.cache, return_lse=True)
        assert isinstance(out, torch.Tensor)
        assert isinstance(lse, torch.Tensor)
        values = out.cpu().view(torch.int16).numpy().view(batches.DTYPES["bfloat16"])
        cascades.check(cascade, values, lse.cpu().numpy(), causal=True)


def test_jax_arrays(cp: Any, jax: Any, rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [1, 50, 2], [[1000], [1, 400, 7]], [[3]])
    device = jax.devices("gpu")[0]
    there = cascade.on(lambda x: jax.device_put(x, device)).flat
    wrapper = MultiLevelCascadeAttentionWrapper(2)
    cascade.plan(wrapper)
    out = wrapper.run(there.q, there.cache)
    assert isinstance(out, jax.Array)
    cascades.check(cascade, np.asarray(out))


# CUDA graphs


def family(rng: np.random.Generator, num_rows: int, group: int = 4) -> list[Cascade]:
    """Cascades over caches of one size, of at most `num_rows` rows; the first one has them all."""
    found = []
    for qo_len in ([2] * (num_rows // 2), [1] * (num_rows - 3), [3, 0, 1], [0]):
        own = [int(rng.integers(n, n + 60)) for n in qo_len]
        pages = [-(-n // 16) for n in own]
        shared = int(rng.integers(100, 700))
        found.append(
            cascades.build(
                rng,
                qo_len,
                [[shared], own],
                [[len(own)]],
                group=group,
                spare_pages=300 - sum(pages) - -(-shared // 16),
            )
        )
    return found


def buffers(cp: Any, kind: str, num_rows: int) -> dict[str, Any]:
    """What a constructor takes for CUDA graphs of two levels of at most so many requests."""
    if kind == "own":
        return {"max_batch_size_arr": [1, num_rows], "max_num_pages_arr": [60, 300]}
    sizes = {
        "qo_indptr_buf_arr": (2, num_rows + 1),
        "paged_kv_indptr_buf_arr": (2, num_rows + 1),
        "paged_kv_indices_buf_arr": (60, 300),
        "paged_kv_last_page_len_buf_arr": (1, num_rows),
    }
    return {name: [cp.zeros(n, np.int32) for n in lengths] for name, lengths in sizes.items()}


@pytest.mark.parametrize("kind", ["own", "given"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_graph_follows_the_plan(
    cp: Any, rng: np.random.Generator, kind: str, causal: bool
) -> None:
    """Rows that a plan does not have are left as they are."""
    num_rows = 12
    first, *others = family(rng, num_rows)
    there = first.on(to_gpu).flat
    out = to_gpu(first.flat.poisoned_out().storage)
    lse = to_gpu(first.flat.poisoned_lse().storage)
    wrapper = wrapper_for(first, use_cuda_graph=True, **buffers(cp, kind, num_rows))
    assert wrapper.is_cuda_graph_enabled
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        first.plan(wrapper, causal=causal)
        stream.begin_capture()
        wrapper.run(there.q, there.cache, out=out, lse=lse)
        graph = stream.end_capture()
        for cascade in (first, *others, first):
            flat, rows = cascade.flat, cascade.flat.nnz_qo
            cascade.plan(wrapper, causal=causal)
            if rows:
                there.q[:rows].view(np.uint16).set(np.ascontiguousarray(flat.q).view(np.uint16))
            for target, source in zip(there.cache, flat.cache, strict=True):
                target.view(np.uint16).set(source.view(np.uint16))
            cp.cuda.runtime.memsetAsync(out.data.ptr, 0xFF, out.nbytes, stream.ptr)
            cp.cuda.runtime.memsetAsync(lse.data.ptr, 0xFF, lse.nbytes, stream.ptr)
            graph.launch()
            stream.synchronize()
            found, found_lse = to_host(out), to_host(lse)
            cascades.check(cascade, found[:rows], found_lse[:rows], causal=causal)
            assert (found[rows:].view(np.uint16) == 0xFFFF).all()
            assert (found_lse[rows:].view(np.uint32) == 0xFFFFFFFF).all()
    too_long = cascades.build(rng, [2] * 7, [[30], [9] * 7], [[7]], group=4)
    with pytest.raises(ValueError, match=r"^level 0: the batch has 14 rows of q, expected at most"):
        too_long.plan(wrapper, causal=causal)


def test_a_torch_graph_follows_the_plan(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    first, second, *_ = family(rng, 12)

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x).cuda()

    there = first.on(tensor).flat
    wrapper = wrapper_for(first, use_cuda_graph=True, **buffers(cp, "own", 12))
    first.plan(wrapper)
    wrapper.run(there.q, there.cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = wrapper.run(there.q, there.cache, return_lse=True)
    for cascade in (first, second):
        rows = cascade.flat.nnz_qo
        cascade.plan(wrapper)
        torch.cuda.synchronize()
        there.q[:rows].copy_(torch.from_numpy(np.ascontiguousarray(cascade.flat.q)))
        for target, source in zip(there.cache, cascade.flat.cache, strict=True):
            target.copy_(torch.from_numpy(source))
        graph.replay()
        torch.cuda.synchronize()
        cascades.check(cascade, out[:rows].cpu().numpy(), lse[:rows].cpu().numpy())


def test_a_capture_needs_use_cuda_graph(cp: Any, rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [4, 2], [[300], [90, 20]], [[2]])
    there = cascade.on(to_gpu).flat
    wrapper = wrapper_for(cascade)
    with cp.cuda.Stream(non_blocking=True) as stream:
        cascade.plan(wrapper)
        wrapper.run(there.q, there.cache)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="construct the wrapper with use_cuda_graph="):
                wrapper.run(there.q, there.cache)
        finally:
            stream.end_capture()
