"""The decode wrapper on a GPU, against the plain formula and against prefill."""

from __future__ import annotations

import itertools
from typing import Any

import batches
import decode_calls
import numpy as np
import oracle
import pytest
import strategies
from decode_calls import DECODING, Decode, Decoder, build
from gpu_calls import (
    FAMILIES,
    Results,
    families,
    run,
    same_bits,
    served_by,
    to_gpu,
    to_host,
    told,
)
from gpu_calls import attention as prefill
from hypothesis import given, settings
from oracle import Formula

from cupaged.shape_choice import SHORT_MAX_ROWS

pytestmark = pytest.mark.gpu
both_families = pytest.mark.usefixtures("family")


def planned(batch: batches.Batch, formula: Formula = DECODING, **options: Any) -> Decoder:
    return decode_calls.planned(batch, formula, "cuda", **options)


def attention(batch: batches.Batch, formula: Formula = DECODING, **options: Any) -> Results:
    """Plan and run into poisoned arrays; out and LSE on the host."""
    return run(planned(batch, formula, **options), batch, formula)


def check(batch: batches.Batch, formula: Formula = DECODING, **options: Any) -> Decoder:
    """Plan, run, and hold the result to the formula."""
    decoder = planned(batch, formula, **options)
    oracle.check_all(batch, formula, *run(decoder, batch, formula))
    return decoder


# What is served


@both_families
@given(decode_calls.calls(max_batch=8, max_kv=500, max_page=130))
@settings(max_examples=120)
def test_random_calls_equal_the_formula(cp: Any, drawn: tuple[strategies.Call, int]) -> None:
    call, q_len = drawn
    kv_layout = call.build_options["kv_layout"]
    decoder = Decoder(q_len, kv_layout=kv_layout, backend="cuda")
    strategies.check_call(call, decoder, to_gpu, to_host)


@pytest.mark.parametrize("group", decode_calls.GROUPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_everything_that_is_served(
    cp: Any, rng: np.random.Generator, head_dim: int, dtype: str, group: int
) -> None:
    """Every layout of the cache, page sizes of every kind, one row and several, every family."""
    page_sizes = itertools.cycle(rng.permutation([1, 2, 5, 16, 24, 32, 64, 128]).tolist())
    for kv_layout, cache_form, q_len in itertools.product(
        ("NHD", "HND"), batches.CACHE_FORMS, (1, int(rng.integers(2, 9)))
    ):
        page_size = next(page_sizes)
        batch = build(
            rng,
            rng.integers(0, 300, 7).tolist(),
            q_len,
            page_size=page_size,
            num_kv_heads=2,
            group=group,
            head_dim=head_dim,
            dtype=dtype,
            kv_layout=kv_layout,
            cache_form=cache_form,
        )
        expected = oracle.expect(batch, DECODING)
        split_size = max(int(rng.integers(20, 150)) // page_size, 1)
        for family in families() if q_len * group > SHORT_MAX_ROWS else FAMILIES[1:]:
            with (
                served_by(family),
                told(f"{family}, {kv_layout}, {cache_form}, q_len {q_len}, pages of {page_size}"),
            ):
                for options in ({"disable_split_kv": True}, {"fixed_split_size": split_size}):
                    decoder = planned(batch, **options)
                    (launch,) = decoder.schedule.launches
                    assert launch.config.family == family
                    oracle.check_expected(expected, *run(decoder, batch, DECODING))


@both_families
@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 64, 256])
@pytest.mark.parametrize(("group", "q_len"), [(4, 1), (4, 8), (12, 5)])
def test_keys_end_around_the_ends_of_pages_and_tiles(
    cp: Any, rng: np.random.Generator, group: int, q_len: int, page_size: int
) -> None:
    """Of both shapes of query tile: 12 * 5 rows take the long one."""
    edges = {16, 32, 64, 80, 128, 192, page_size, 2 * page_size}
    kv_len = sorted({n + d for n in edges for d in (-1, 0, 1)})
    batch = build(rng, kv_len, q_len, page_size=page_size, group=group, head_dim=128)
    check(batch)
    check(batch, fixed_split_size=-(-100 // page_size))


@pytest.mark.parametrize("q_len", range(1, decode_calls.MOST_Q_LEN + 1))
def test_rows_of_a_request_see_up_to_their_own_key(
    cp: Any, rng: np.random.Generator, q_len: int
) -> None:
    """A last key of Inf reaches each request's last row, and no other."""
    batch = build(rng, [200, q_len, q_len + 1, 63, 64, 65], q_len, group=4)
    k, _ = batch.keys_and_values()
    for r, kv_len in enumerate(batch.kv_len):
        k[batch.slot(r, kv_len - 1)] = np.inf
    for options in ({}, {"fixed_split_size": 1}):
        out, lse = attention(batch, **options)
        broken = np.isnan(out.astype(np.float32)).any(axis=(1, 2))
        assert broken.reshape(-1, q_len).tolist() == [[False] * (q_len - 1) + [True]] * 6
        oracle.check_all(batch, DECODING, out, lse)


@both_families
@pytest.mark.parametrize(
    ("kv_len", "group", "q_len"),
    [([30_000], 4, 1), ([9_000, 20], 8, 4), ([3_000] * 3, 12, 8), ([20_000, 0, 5_000], 1, 1)],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_requests_are_split_and_merged(
    cp: Any, rng: np.random.Generator, kv_len: list[int], group: int, q_len: int, head_dim: int
) -> None:
    batch = build(rng, kv_len, q_len, num_kv_heads=2, group=group, head_dim=head_dim)
    decoder = check(batch)
    assert any(launch.num_merges for launch in decoder.schedule.launches)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_batch_of_many_requests(cp: Any, rng: np.random.Generator, page_size: int) -> None:
    """More pieces of work than thread blocks."""
    kv_len = np.minimum(rng.lognormal(4.5, 1.0, 300).astype(int), 1000).tolist()
    batch = build(rng, kv_len, num_kv_heads=4, group=2, head_dim=64, page_size=page_size)
    (launch,) = check(batch).schedule.launches
    assert len(launch.items) * 4 > 2 * launch.grid


@both_families
@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}])
def test_scales(cp: Any, rng: np.random.Generator, options: dict[str, Any], lse_base: str) -> None:
    batch = build(rng, [70, 90, 0], 6, group=8, magnitude=2.0)
    for sm_scale in (-0.2, 0.0, 2.0):
        formula = Formula(True, sm_scale, q_scale=0.5, k_scale=1.5, v_scale=-3.0, lse_base=lse_base)
        check(batch, formula, **options)


# The empty cases


@both_families
@pytest.mark.parametrize(("group", "q_len"), [(3, 1), (3, 5), (12, 5)])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 1}, {"disable_split_kv": True}])
def test_rows_without_keys_are_zero(
    cp: Any, rng: np.random.Generator, options: dict[str, Any], group: int, q_len: int
) -> None:
    batch = build(rng, [0, 50, 2, 0], q_len, group=group)
    out, lse = attention(batch, **options)
    oracle.check_all(batch, DECODING, out, lse)
    for r, kv_len in enumerate(batch.kv_len):
        unseen = slice(r * q_len, r * q_len + max(q_len - kv_len, 0))
        assert (out[unseen] == 0).all()
        assert np.isneginf(lse[unseen]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_request_at_all_is_an_empty_result(
    cp: Any, rng: np.random.Generator, dtype: str
) -> None:
    batch = batches.build(rng, [], [], dtype=dtype)
    on_gpu = batch.on(to_gpu)
    out, lse = planned(batch).run(on_gpu.q, on_gpu.cache, return_lse=True)
    assert isinstance(out, cp.ndarray)
    assert (out.shape, out.dtype) == ((0, 2, 64), batches.DTYPES[dtype])
    assert (lse.shape, lse.dtype) == ((0, 2), np.float32)


def test_a_cache_without_pages(cp: Any, rng: np.random.Generator) -> None:
    batch = build(rng, [0, 0], 3, spare_pages=0)
    out, lse = attention(batch)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


# The same bits


@both_families
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}, {"disable_split_kv": True}])
@pytest.mark.parametrize(("group", "q_len"), [(4, 1), (4, 8), (8, 6)])
def test_it_is_prefill_of_as_many_rows(
    cp: Any, rng: np.random.Generator, group: int, q_len: int, options: dict[str, Any]
) -> None:
    kv_len = [5000, 0, 3, *rng.integers(1, 900, 20).tolist()]
    batch = build(rng, kv_len, q_len, group=group, head_dim=128)
    # A row that sees all keys does so with and without the mask, which prefill of one row lacks.
    formula = Formula(causal=q_len > 1)
    assert same_bits(attention(batch, **options), prefill(batch, formula, **options))


@both_families
@pytest.mark.parametrize("options", [{"fixed_split_size": 3}, {"disable_split_kv": True}])
@pytest.mark.parametrize(("group", "q_len"), [(4, 1), (4, 3), (12, 4)])
def test_bits_of_a_request_do_not_depend_on_its_batch(
    cp: Any, rng: np.random.Generator, group: int, q_len: int, options: dict[str, Any]
) -> None:
    kv_len = [2000, 300, 40, 2, *rng.integers(1, 600, 20).tolist()]
    batch = build(rng, kv_len, q_len, group=group, head_dim=128)
    out, lse = attention(batch, **options)
    for r in range(len(kv_len)):
        rows = slice(r * q_len, (r + 1) * q_len)
        alone = attention(batch.alone(r), **options)
        assert same_bits((out[rows], lse[rows]), alone), f"request {r}"


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 1}, {"disable_split_kv": True}])
def test_the_same_call_gives_the_same_bits(
    cp: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    batch = build(rng, [9000, 1500, 3000, 700, 0], group=4, head_dim=128)
    decoder = planned(batch, **options)
    first = run(decoder, batch, DECODING)
    oracle.check_all(batch, DECODING, *first)
    for _ in range(20):
        assert same_bits(run(decoder, batch, DECODING), first)
    assert same_bits(attention(batch, **options), first)


# Memory and kinds of array


def test_a_workspace_of_the_exact_size_and_no_byte_more(cp: Any, rng: np.random.Generator) -> None:
    batch = build(rng, [500, 300, 2], 2, group=2, head_dim=128)
    needed = planned(batch, fixed_split_size=4).schedule.workspace_bytes
    guard = 4096
    memory = cp.empty(needed + 2 * guard, np.uint8)
    cp.cuda.runtime.memset(memory.data.ptr, 0xFF, memory.nbytes)
    check(batch, fixed_split_size=4, workspace=memory[guard : guard + needed])
    after = memory.get()
    assert (after[:guard] == 0xFF).all()
    assert (after[-guard:] == 0xFF).all()
    assert not (after[guard:-guard] == 0xFF).all()
    with pytest.raises(ValueError, match=r"^float_workspace_buffer has \d+ bytes, expected at"):
        planned(batch, fixed_split_size=4, workspace=memory[guard : guard + needed - 1])


@pytest.mark.parametrize("form", batches.Q_FORMS)
def test_strided_q_and_out(cp: Any, rng: np.random.Generator, form: str) -> None:
    batch = build(rng, [50, 60, 5], 2, group=3, q_form=form)
    on_gpu = batch.on(to_gpu)
    out, lse = batch.poisoned_out(form).on(to_gpu), batch.poisoned_lse(strided=True).on(to_gpu)
    planned(batch).run(on_gpu.q, on_gpu.cache, out=out.array, lse=lse.array)
    on_host, lse_on_host = out.on(to_host), lse.on(to_host)
    oracle.check_all(batch, DECODING, on_host.array, lse_on_host.array)
    assert np.isnan(on_host.outside()).all()
    assert np.isnan(lse_on_host.outside()).all()


def test_index_arrays_on_the_device(cp: Any, rng: np.random.Generator) -> None:
    for dtype in (np.int32, np.int64):
        batch = build(rng, [50, 60, 2], 2, index_dtype=dtype)
        wrapper = Decode()
        arguments = map(cp.asarray, batch.index_arrays[1:])
        wrapper.plan(*arguments, *batch.geometry, q_len_per_req=2, non_blocking=False)
        on_gpu = batch.on(to_gpu)
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
        oracle.check_all(batch, DECODING, to_host(out), to_host(lse))


@pytest.mark.parametrize("use_tensor_cores", [False, True])
def test_torch_tensors(
    cp: Any, torch: Any, rng: np.random.Generator, use_tensor_cores: bool
) -> None:
    batch = build(rng, [50, 600, 2, 9], 2, group=4)
    wrapper = Decode(
        torch.empty(16 << 20, dtype=torch.uint8, device="cuda"), use_tensor_cores=use_tensor_cores
    )
    arguments = [torch.from_numpy(x) for x in batch.index_arrays[1:]]
    wrapper.plan(*arguments, *batch.geometry, data_type=torch.float16, q_len_per_req=2)
    on_gpu = batch.on(lambda x: torch.from_numpy(np.ascontiguousarray(x)).cuda())
    out, lse = wrapper.run_return_lse(on_gpu.q, on_gpu.cache)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    oracle.check_all(batch, DECODING, out.cpu().numpy(), lse.cpu().numpy())
    for dtype in (torch.bfloat16, "bfloat16"):
        wrapper.plan(*arguments, *batch.geometry, data_type=torch.bfloat16, q_data_type=dtype)
