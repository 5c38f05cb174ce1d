"""Tensor maps: what the driver is asked to encode, and the caches that none can be made for."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cupaged import tensor_maps

ADDRESS = 1 << 32


@dataclass
class Driver:
    """What stands in for `cuTensorMapEncodeTiled`: keeps what it is asked, numbers its answers."""

    status: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        target: int,
        element: int,
        rank: int,
        address: int,
        dims: Any,
        steps: Any,
        box: Any,
        element_steps: Any,
        *modes: int,
    ) -> int:
        assert target % 64 == 0
        self.calls.append(
            {
                "element": element,
                "address": address,
                "dims": tuple(dims),
                "steps": tuple(steps),
                "box": tuple(box),
                "element_steps": tuple(element_steps),
                "modes": modes,
            }
        )
        assert rank == len(dims) == len(steps) + 1 == len(box) == len(element_steps)
        ctypes.memset(target, len(self.calls), tensor_maps.TENSOR_MAP_BYTES)
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Driver()
    monkeypatch.setattr(tensor_maps, "_driver_encode", lambda: found)
    tensor_maps.pair.cache_clear()
    yield found
    tensor_maps.pair.cache_clear()


@pytest.mark.parametrize("page_size", [8, 16, 24, 48, 128, 192, 256, 1000])
@pytest.mark.parametrize("cta_tile_kv", [64, 80, 128, 192])
def test_a_box_divides_the_page_and_the_tile(page_size: int, cta_tile_kv: int) -> None:
    """The largest power of two that does, so that no box reaches over a page's end."""
    powers = [1 << n for n in range(12)]
    dividing = [n for n in powers if page_size % n == 0 and cta_tile_kv % n == 0]
    assert tensor_maps.box_rows(page_size, cta_tile_kv) == max(dividing)


def strides(kv_layout: str, page_size: int, heads: int, head_dim: int, spare: int) -> Any:
    """Bytes between pages, tokens and heads, with `spare` elements behind every row."""
    row = (head_dim + spare) * 2
    if kv_layout == "NHD":
        return page_size * heads * row, heads * row, row
    return heads * page_size * row, row, page_size * row


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("spare", [0, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [8, 16, 48])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_box_holds_the_tokens_of_a_head(
    driver: Driver, heads: int, page_size: int, head_dim: int, spare: int, kv_layout: str
) -> None:
    """Every element of every box, at the coordinates that the producer asks for."""
    shape = (5, page_size, heads, head_dim)
    steps = page, token, head = strides(kv_layout, page_size, heads, head_dim, spare)
    rows = tensor_maps.box_rows(page_size, 128)
    found = tensor_maps.pages(ADDRESS, shape, steps, rows)
    assert found == bytes([1]) * tensor_maps.TENSOR_MAP_BYTES
    (call,) = driver.calls
    assert call["address"] == ADDRESS
    assert call["element"] == 1  # 16 bits
    assert call["element_steps"] == (1, 1, 1, 1, 1)
    panel = 32 if head_dim == 96 else 64
    swizzle = 2 if head_dim == 96 else 3  # over 64 bytes, over 128
    assert call["modes"] == (0, swizzle, 3, 0)  # zeros beyond the tensor

    box = call["box"]
    assert box[0] == panel
    assert np.prod(box) == rows * head_dim
    # Bytes from the box's corner, in the order in which shared memory receives them:
    # [groups, panels, tokens of a group, elements of a panel].
    c0, c1, c2, c3 = (np.arange(length) for length in box[:4])
    groups, panels, tokens = c3[:, None, None, None], c2[:, None, None], c1[:, None]
    by_token, by_panel, by_group, _ = call["steps"]
    inner = groups * by_group + panels * by_panel + tokens * by_token + c0 * 2
    row, element = groups * 8 + tokens, panels * panel + c0
    for number in range(shape[0]):
        for kv_head in range(heads):
            for first in range(0, page_size, rows):
                corner = (0, 0, kv_head * (head // 2 // panel), first // 8, number)
                ends = np.add(corner, box)
                assert (ends <= call["dims"]).all(), "a box reaches beyond the tensor"
                begin = np.dot(corner[1:], call["steps"])
                wanted = number * page + (first + row) * token + kv_head * head + element * 2
                np.testing.assert_array_equal(begin + inner, wanted)
    # Where the producer looks for what is no key, there is nothing: zeros.
    assert call["dims"][3] == page_size // 8


def test_a_head_of_its_own_may_have_any_stride(driver: Driver) -> None:
    for head in (8, -640, 10**6 + 16):
        assert tensor_maps.pages(ADDRESS, (4, 16, 1, 128), (4096, 256, head), 16) is not None
    assert [call["dims"] for call in driver.calls] == [(64, 8, 2, 2, 4)] * 3


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((4, 16, 2, 64), (16 * 272, 272, 136)),  # heads no multiple of 128 bytes apart
        ((4, 16, 2, 64), (16 * 384, 384, 192)),
        ((4, 16, 2, 96), (16 * 448, 448, 224)),  # or of 64
        ((4, 16, 2, 64), (4096, 256, -128)),
        ((4, 16, 2, 64), (4096, -256, 128)),
        ((4, 16, 2, 64), (-4096, 256, 128)),
        ((0, 16, 2, 64), (4096, 256, 128)),
    ],
)
def test_a_cache_that_the_copy_engine_can_not_address(
    driver: Driver, shape: tuple[int, int, int, int], steps: tuple[int, int, int]
) -> None:
    """It isn't even asked."""
    assert tensor_maps.pages(ADDRESS, shape, steps, 16) is None
    assert driver.calls == []


def test_a_cache_that_the_driver_refuses(driver: Driver) -> None:
    driver.status = 1
    assert tensor_maps.pages(ADDRESS, (4, 16, 2, 64), (4096, 256, 128), 16) is None
    assert len(driver.calls) == 1


def pair(**changes: Any) -> bytes | None:
    """The maps of two caches of 4 pages of 16 tokens, 2 heads of 64 elements each."""
    arguments = {
        "k_address": ADDRESS,
        "v_address": 2 * ADDRESS,
        "num_pages": 4,
        "page_shape": (16, 2, 64, 64),
        "k_page": 4096,
        "k_token": 256,
        "k_head": 128,
        "v_page": 8192,
        "v_token": 128,
        "v_head": 2048,
        "rows": 16,
        **changes,
    }
    return tensor_maps.pair(*arguments.values())


def test_the_maps_of_k_and_v_come_together_and_once(driver: Driver) -> None:
    size = tensor_maps.TENSOR_MAP_BYTES
    assert pair() == pair() == bytes([1]) * size + bytes([2]) * size
    k, v = driver.calls
    assert (k["address"], k["steps"]) == (ADDRESS, (256, 128, 8 * 256, 4096))
    assert (v["address"], v["steps"]) == (2 * ADDRESS, (128, 128, 8 * 128, 8192))
    assert k["dims"] == (64, 8, 2, 2, 4)
    assert v["dims"] == (64, 8, 2048 // 128 + 1, 2, 4)
    # Anything else is another map.
    assert pair(num_pages=5) != pair(v_address=3 * ADDRESS) != pair()
    assert len(driver.calls) == 6


def test_heads_of_k_and_v_may_have_different_widths(driver: Driver) -> None:
    changes = {"k_page": 12288, "k_token": 768, "k_head": 384, "v_token": 512, "v_head": 256}
    assert pair(page_shape=(16, 2, 192, 128), **changes) is not None
    k, v = driver.calls
    assert (k["dims"], k["box"]) == ((64, 8, 6, 2, 4), (64, 8, 3, 2, 1))
    assert (v["dims"], v["box"]) == ((64, 8, 4, 2, 4), (64, 8, 2, 2, 1))


@pytest.mark.parametrize("change", [{"k_head": 136}, {"v_token": -128}, {"num_pages": 0}])
def test_one_without_the_other_is_none(driver: Driver, change: dict[str, int]) -> None:
    assert pair(**change) is None
