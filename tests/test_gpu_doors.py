"""The doors of other libraries on a GPU: streams, frameworks, and plans that are kept."""

from __future__ import annotations

from typing import Any

import doors
import ml_dtypes
import numpy as np
import pytest
from biases import KINDS, Drawn, drawn_biases
from doors import check, drawn
from gpu_calls import to_gpu, to_host
from hypothesis import HealthCheck, given, settings

from cupaged import door
from cupaged.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from cupaged.xformers import attn_bias as twins
from cupaged.xformers import memory_efficient_attention_forward as attention

Array = np.ndarray[Any, Any]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning"),
]


@pytest.fixture(autouse=True)
def nothing_planned(monkeypatch: pytest.MonkeyPatch) -> list[door.Call]:
    return doors.count_plans(monkeypatch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_xformers_twins(cp: Any, rng: np.random.Generator, name: str, dtype: str) -> None:
    @settings(max_examples=4, suppress_health_check=list(HealthCheck), database=None)
    @given(drawn_biases(name, longest=150))
    def under(case: Drawn) -> None:
        q = drawn(rng, (1, case.num_queries, 4, 64), dtype)
        k, v = (drawn(rng, (1, case.num_keys, 4, 64), dtype) for _ in range(2))
        case.poison(k[0], v[0])
        out = attention(*(to_gpu(x) for x in (q, k, v)), case.bias(twins, case.table))
        assert isinstance(out, cp.ndarray)
        check(to_host(out)[0], q[0], k[0], v[0], case.seen(), case.blocks)

    under()


@pytest.mark.parametrize("on_device", [True, False])
def test_cupy_decoding(cp: Any, rng: np.random.Generator, on_device: bool) -> None:
    """Lengths counted up in place on the device are read again."""
    q, new = (drawn(rng, (3, 1, 8, 128), "bfloat16") for _ in range(2))
    new = new[:, :, :2].copy()
    k, v = (drawn(rng, (3, 64, 2, 128), "bfloat16") for _ in range(2))
    lengths: Any = np.array([0, 17, 60], np.int32)
    lengths = cp.asarray(lengths) if on_device else lengths
    caches = [to_gpu(x) for x in (k, v)]
    for step in range(3):
        out, lse = flash_attn_with_kvcache(
            *(to_gpu(q), *caches, to_gpu(new), to_gpu(new)),
            cache_seqlens=lengths,
            causal=True,
            return_softmax_lse=True,
        )
        now = np.array([0, 17, 60]) + step
        for b in range(3):
            k[b, now[b]] = v[b, now[b]] = new[b, 0]
            seen = np.ones((1, now[b] + 1), np.bool_)
            own = slice(0, now[b] + 1)
            own_lse = lse.get()[b].T
            check(to_host(out)[b], q[b], k[b, own], v[b, own], seen, [(0, 1)], own_lse)
        assert (to_host(caches[0]) == k).all()
        lengths += 1


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_an_unaligned_cache_is_not_written(cp: Any, which: str) -> None:
    q = cp.zeros((2, 1, 2, 64), np.float16)
    caches = {name: cp.zeros((2, 8, 2, 64), np.float16) for name in ("k_cache", "v_cache")}
    caches[which] = cp.zeros((2, 8, 2, 65), np.float16)[..., :64]
    new = to_gpu(np.ones((2, 1, 2, 64), np.float16))
    with pytest.raises(ValueError, match=f"^{which} begins at address 0x"):
        flash_attn_with_kvcache(q, **caches, k=new, v=new, cache_seqlens=1)
    assert all((to_host(x) == 0).all() for x in caches.values())


def test_torch_counts_changes(
    cp: Any, torch: Any, rng: np.random.Generator, nothing_planned: list[door.Call]
) -> None:
    """An index tensor on the device is read when it has changed, and not for every layer."""
    q, k = drawn(rng, (6, 4, 64), "float16"), drawn(rng, (40, 4, 64), "float16")
    q_gpu, k_gpu = (torch.from_numpy(x).cuda() for x in (q, k))
    cu_q = torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 20, 40], dtype=torch.int32, device="cuda")
    for count, split in ((1, 20), (1, 20), (2, 9), (3, 20)):
        if int(cu_k[1]) != split:
            cu_k[1] = split
        out, lse, _ = flash_attn_varlen_func(
            *(q_gpu, k_gpu, k_gpu, cu_q, cu_k, 4, 40), causal=True, return_attn_probs=True
        )
        seen = np.zeros((6, 40), np.bool_)
        for rows, keys in ((range(2), range(split)), (range(2, 6), range(split, 40))):
            for i in rows:
                seen[i, keys.start : keys.stop - (rows.stop - 1 - i)] = True
        check(out.cpu().numpy(), q, k, k, seen, [(0, 2), (2, 6)], lse.cpu().numpy().T)
        assert len(nothing_planned) == count
    with torch.inference_mode():
        untracked = cu_k.clone()
        for split in (9, 30):
            untracked[1] = split
            got = flash_attn_varlen_func(q_gpu, k_gpu, k_gpu, cu_q, untracked, 4, 40)
            seen = np.zeros((6, 40), np.bool_)
            seen[:2, :split] = seen[2:, split:] = True
            check(got.cpu().numpy(), q, k, k, seen, [(0, 2), (2, 6)])


def test_torch_stream_is_worked_on(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    """What is pending on PyTorch's own stream comes first, and a copy of bfloat16 is made there."""
    whole = drawn(rng, (2, 4, 600, 64), "bfloat16")  # heads first: rows of all batches are no axis
    bits = torch.from_numpy(whole.view(np.int16)).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros((2, 4, 600, 64), dtype=torch.bfloat16, device="cuda")
        torch.cuda._sleep(50_000_000)
        x.view(torch.int16).copy_(bits, non_blocking=True)
        turned = x.transpose(1, 2)
        out = attention(turned, turned, turned, twins.LowerTriangularMask())
        del turned, x
    stream.synchronize()
    got = out.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    seen = np.tri(600, dtype=np.bool_)
    for b in range(2):
        rows = whole[b].transpose(1, 0, 2)
        check(got[b], rows, rows, rows, seen, [(0, 600)])


def test_capturing_is_refused(cp: Any, rng: np.random.Generator) -> None:
    q = to_gpu(drawn(rng, (1, 4, 2, 64), "float16"))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        attention(q, q, q)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                attention(q, q, q)
        finally:
            stream.end_capture()
