"""What a kernel is launched with: the parameters as it will read them, without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compiler import plain_kernel

from cupaged import cuda, flash_attn, tensor_maps
from cupaged.device_plan import ReadyLaunch, arguments_with
from cupaged.door import Append, Batch, Planned, Rows
from cupaged.kernel_spec import PARAMS_DTYPE
from cupaged.spec import AttentionSpec
from cupaged.transform import Transform

PAGES, PAGE_SIZE, HEADS, DIM = 5, 16, 2, 64
FIELDS = PARAMS_DTYPE.names
#: What a plan decides, between what a call decides, and numbers to know them by.
PLAN_FIELDS = FIELDS[FIELDS.index("items") : FIELDS.index("sinks")]
PLANNED = tuple(range(101, 101 + len(PLAN_FIELDS)))
SIZE = tensor_maps.TENSOR_MAP_BYTES
MAPS = b"k" * SIZE + b"v" * SIZE
SPEC = AttentionSpec(4, HEADS, DIM, PAGE_SIZE, False, 0.125, "float16", "NHD")


class Array:
    """A device array of 16-bit elements, or of `itemsize` bytes, as far as a launch looks."""

    def __init__(self, address: int, shape: tuple[int, ...], itemsize: int = 2) -> None:
        host = np.empty(shape, f"u{itemsize}")
        self.data = SimpleNamespace(ptr=address)
        self.strides, self.shape = host.strides, shape

    def __len__(self) -> int:
        return self.shape[0]


class Launches:
    """What stands in for the driver: reads a launch's parameters while it may."""

    def __init__(self) -> None:
        self.found: list[SimpleNamespace] = []
        self.addresses: list[int] = []
        self.during: Any = None

    def __call__(self, function: int, *sizes: int) -> None:
        *grid, shared, stream, arguments, extra = sizes
        assert extra == 0
        if self.during is not None:
            call, self.during = self.during, None
            call()
        pointers = (ctypes.c_uint64 * 3).from_address(arguments)
        params = ctypes.string_at(pointers[0], PARAMS_DTYPE.itemsize)
        self.addresses.append(arguments)
        self.found.append(
            SimpleNamespace(
                function=function,
                grid=tuple(grid),
                shared=shared,
                stream=stream,
                params=np.frombuffer(params, PARAMS_DTYPE)[0],
                maps=ctypes.string_at(pointers[1], SIZE) + ctypes.string_at(pointers[2], SIZE),
            )
        )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    module = SimpleNamespace(cuda=SimpleNamespace(driver=SimpleNamespace(launchKernel=found)))
    monkeypatch.setattr(cuda, "cupy", lambda: module)
    monkeypatch.setattr(cuda, "is_recorded", lambda stream: False)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What tensor maps were asked for; all can be made."""
    found: list[tuple[Any, ...]] = []

    def pair(*arguments: Any) -> bytes:
        found.append(arguments)
        return MAPS

    monkeypatch.setattr(tensor_maps, "pair", pair)
    return found


def plan_of(box_rows: int = 16, heads_first: bool = False) -> Any:
    config = plain_kernel(90, "float16", DIM, PAGE_SIZE)
    return SimpleNamespace(
        stream=SimpleNamespace(ptr=7),
        page_shape=(PAGE_SIZE, HEADS, DIM, DIM),
        heads_first=heads_first,
        ragged=False,
        kv_itemsize=2,
        transform=Transform(SPEC),
        launches=(
            ReadyLaunch(33, config, 3, 128, 4096, box_rows, PLANNED, arguments_with(PLANNED)),
        ),
        without_maps=lambda other, recorded: 44 if other is config and not recorded else None,
    )


def tensors(heads_first: bool = False) -> tuple[Any, ...]:
    inner = (HEADS, PAGE_SIZE) if heads_first else (PAGE_SIZE, HEADS)
    return (
        Array(1 << 20, (9, 4, DIM)),
        Array(1 << 21, (PAGES, *inner, DIM)),
        Array(1 << 22, (PAGES, *inner, DIM + 8)),
        Array(1 << 23, (9, 5, DIM)),
    )


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_kernel_finds_every_parameter(
    launches: Launches, asked: list[tuple[Any, ...]], heads_first: bool
) -> None:
    lse = Array(1 << 24, (9, 4), 4)
    plan = plan_of(heads_first=heads_first)
    cuda.run(plan, 7, *tensors(heads_first), lse, (-0.5, 3.0, 0.25))
    (launch,) = launches.found
    assert (launch.function, launch.shared, launch.stream) == (33, 4096, 7)
    assert launch.grid == (3, 1, 1, 128, 1, 1)
    assert launch.maps == MAPS
    params = {name: launch.params[name].tolist() for name in FIELDS}
    token, head = (DIM, PAGE_SIZE * DIM) if heads_first else (HEADS * DIM, DIM)
    wide = DIM + 8
    assert params == {
        **dict(zip(("q", "k", "v", "out", "lse"), (1 << n for n in range(20, 25)), strict=True)),
        "q_stride_row": 4 * DIM,
        "q_stride_head": DIM,
        "k_stride_page": PAGE_SIZE * HEADS * DIM,
        "k_stride_token": token,
        "k_stride_head": head,
        "v_stride_page": PAGE_SIZE * HEADS * wide,
        "v_stride_token": token // DIM * wide,
        "v_stride_head": head // DIM * wide,
        "out_stride_row": 5 * DIM,
        "out_stride_head": DIM,
        "lse_stride_row": 4,
        "lse_stride_head": 1,
        **dict(zip(PLAN_FIELDS, PLANNED, strict=True)),
        "sinks": 0,
        "negate_logits": 1,
        "logit_scale": 0.5,
        "inner_scale": 0,
        "cap_square": 0,
        "cap_ratio": [0, 0],
        "v_scale": 3.0,
        "lse_scale": 0.25,
    }
    k = [1 << 21, (PAGE_SIZE * HEADS * DIM * 2, token * 2, head * 2)]
    v = [1 << 22, tuple(n // DIM * wide for n in k[1])]
    shape = (PAGES, (PAGE_SIZE, HEADS, DIM, DIM))
    assert asked == [(k[0], v[0], *shape, *k[1], *v[1], 16)]


def test_without_an_lse_and_with_a_scale_of_zero(
    launches: Launches, asked: list[tuple[Any, ...]]
) -> None:
    cuda.run(plan_of(box_rows=0), 7, *tensors(), None, (0.0, 1.0, 1.0))
    (launch,) = launches.found
    assert launch.params["lse"] == 0
    assert launch.params["negate_logits"] == 0
    assert launch.params["logit_scale"] == np.finfo(np.float32).smallest_normal
    assert launch.function == 33
    assert asked == []


def test_the_kernel_without_maps_serves_where_there_are_none(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_maps, "pair", lambda *arguments: None)
    cuda.run(plan_of(), 7, *tensors(), None, (1.0, 1.0, 1.0))
    assert launches.found[0].function == 44


def unaligned(form: str) -> Array:
    """Pages on a device of which no kernel can read a row."""
    if form == "address":
        return Array((1 << 21) + 8, (PAGES, PAGE_SIZE, HEADS, DIM))
    return Array(1 << 21, (PAGES, PAGE_SIZE, HEADS, DIM + 1))


@pytest.mark.parametrize("names", [("k cache", "v cache"), ("k_cache", "v_cache")])
@pytest.mark.parametrize("form", ["address", "strides"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_unaligned_cache_is_named(which: int, form: str, names: tuple[str, str]) -> None:
    _, *cache, _ = tensors()
    cache[which] = unaligned(form)
    with pytest.raises(ValueError) as raised:
        cuda.check_aligned(*cache, names)
    assert str(raised.value) == (
        f"{names[which]} begins at address {cache[which].data.ptr:#x} with strides "
        f"{cache[which].strides} in bytes, expected multiples of 16"
    )


def test_strides_that_say_nothing_are_no_matter() -> None:
    cuda.check_aligned(*tensors()[1:3])
    cache = [Array(1 << 21, (PAGES, PAGE_SIZE, 1, DIM)) for _ in "kv"]
    for x in cache:
        x.strides = (*x.strides[:2], 6, 2)
    cuda.check_aligned(*cache)


def test_a_cache_that_attention_refuses_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flash_attn, "append_paged_kv_cache", lambda *arguments: pytest.fail("was written to")
    )
    append = Append(*[np.zeros(1, np.int64)] * 5)
    plan = Planned(None, Batch(None, Rows(np.zeros(1, np.int64)), append), -1, 0, ())  # type: ignore[arg-type]
    new = np.zeros((1, 1, HEADS, DIM), np.float16)
    _, fine, _, _ = tensors()
    for names, cache in (
        ("k_cache", (unaligned("address"), fine)),
        ("v_cache", (fine, unaligned("strides"))),
    ):
        with pytest.raises(ValueError, match=f"^{names} begins at address "):
            flash_attn._append_new(plan, (new, new), *cache)


def test_calls_after_each_other_share_memory_and_calls_at_once_do_not(
    launches: Launches, asked: list[tuple[Any, ...]]
) -> None:
    """The driver lets other threads run: what it reads must stay as it is."""
    plan = plan_of()

    def call(scale: float) -> None:
        cuda.run(plan, 7, *tensors(), None, (scale, 1.0, 1.0))

    call(1.0)
    launches.during = lambda: call(3.0)
    call(2.0)
    call(4.0)
    assert [launch.params["logit_scale"] for launch in launches.found] == [1.0, 3.0, 2.0, 4.0]
    first, within, around, last = launches.addresses
    assert first == around != within
    assert last in (around, within)
    for launch in launches.found:
        assert tuple(launch.params[name].item() for name in PLAN_FIELDS) == PLANNED
