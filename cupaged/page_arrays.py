"""The arrays of K and V that a cache's pages lie in: allocated here, or the caller's own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupaged import arrays, devices, validate_page, validate_run
from cupaged.spec import DTYPES, AttentionSpec
from cupaged.streams import order_after
from cupaged.validate import what

#: What the caller makes of a layer: `(k, v)`.
Layer = tuple[Any, Any]


class PageArrays:
    """K and V of every layer, and their bits by page.

    Parameters
    ----------
    layers : list of (array, array)
        Each `(k, v)`, as `run()` takes them.
    by_page : list of array
        NumPy or CuPy arrays whose first axis are pages, over the same memory.
    device : int or None
        CUDA device; None is the host.
    """

    def __init__(self, layers: list[Layer], by_page: list[Any], device: int | None) -> None:
        self.layers = tuple(layers)
        self.device = device
        # As integers: CuPy's own kernels for 16-bit floats need CUDA's headers, which need not be
        # installed.
        self._bits = [pages.view(f"u{pages.itemsize}") for pages in by_page]
        # One array of each framework, whose streams a copy has to be ordered with.
        self._owners = list({arrays.framework(x): x for layer in layers for x in layer}.values())

    def copy(self, copies: Iterable[tuple[int, int]], beside: Any) -> None:
        """Copy pages, (from, to) each, in all layers; on the stream of the owner of the arrays.

        That is where appending writes, too. `beside` stands for the framework of what is appended
        and attended to: what is pending there may still read the pages that are written here.
        """
        home, *others = self._owners
        if self.device is not None:
            others.append(beside)
            for other in others:
                order_after(other, home, self.device)
        current, _ = arrays.on_stream_of(home, self.device)
        with current:
            for source, target in copies:
                for pages in self._bits:
                    pages[target] = pages[source]
        if self.device is not None:
            for other in others:
                order_after(home, other, self.device)


def allocate(spec: AttentionSpec, num_pages: int, num_layers: int, device: object) -> PageArrays:
    """Arrays of zeros, of NumPy or on a CUDA device.

    Zeros, since there are kernels of others that multiply unused slots by 0.
    """
    place = _device(device)
    axes = (spec.page_size, spec.num_kv_heads)
    inner = axes if spec.kv_layout == "NHD" else axes[::-1]
    shape = (num_layers, 2, num_pages, *inner, spec.head_dim_qk)
    dtype = DTYPES[spec.dtype]
    bits = np.dtype(f"u{dtype.itemsize}")
    if place is None:
        pages = np.zeros(shape, bits).view(dtype)
    else:
        cp = devices.cupy()
        with cp.cuda.Device(place):
            pages = cp.zeros(shape, bits).view(dtype)
    # One array: a page's bits of all layers are then copied at once.
    by_page = pages.transpose(2, 0, 1, 3, 4, 5)
    return PageArrays([(layer[0], layer[1]) for layer in pages], [by_page], place)


def wrap(caches: Any, spec: AttentionSpec, num_pages: int, num_layers: int) -> PageArrays:
    """The caller's own arrays.

    Parameters
    ----------
    caches : list or tuple
        A layer each: `(k, v)`, or one array `[num_pages, 2, ...]`.

    Raises
    ------
    TypeError, ValueError
        Names the layer.
    """
    if not isinstance(caches, list | tuple):
        raise TypeError(f"caches is {what(caches)}, expected a list: (k, v) of each layer")
    if len(caches) != num_layers:
        raise ValueError(
            f"caches has length {len(caches)}, expected {num_layers} = num_layers: "
            "(k, v) of each layer"
        )
    layers: list[Layer] = []
    by_page: list[Any] = []
    for index, given in enumerate(caches):
        try:
            k, v = _imported(given, spec, num_pages)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"caches[{index}]: {error}") from None
        layers.append(
            tuple(given) if isinstance(given, list | tuple) else (given[:, 0], given[:, 1])
        )
        by_page += (k, v)
    device = arrays.device_id(by_page[0])
    for i, pages in enumerate(by_page):
        found = arrays.device_id(pages)
        if found != device:
            raise ValueError(
                f"caches[{i // 2}]: {'kv'[i % 2]} cache is on {validate_run.place(found)}, "
                f"expected {validate_run.place(device)} as the k cache of layer 0 is"
            )
    # Those that share memory mostly lie next to each other.
    order = sorted(range(len(by_page)), key=lambda i: validate_run.address(by_page[i]))
    for other, i in itertools.pairwise(order):
        if validate_run.share_memory(by_page[other], by_page[i]):
            other, i = sorted((other, i))
            raise ValueError(
                f"caches[{i // 2}]: {'kv'[i % 2]} cache and the {'kv'[other % 2]} cache of layer "
                f"{other // 2} share memory, expected elements of their own"
            )
    return PageArrays(layers, by_page, device)


def _imported(given: Any, spec: AttentionSpec, num_pages: int) -> Layer:
    """A layer's K and V as NumPy or CuPy arrays, checked."""
    if isinstance(given, list | tuple):
        if len(given) != 2:
            raise ValueError(f"{len(given)} arrays, expected two: (k, v)")
        imported: Any = tuple(
            arrays.import_tensor(validate_page.writable(x, name), name)
            for x, name in zip(given, ("k cache", "v cache"), strict=True)
        )
    else:
        imported = arrays.import_tensor(
            validate_page.writable(given, "paged_kv_cache"), "paged_kv_cache"
        )
    k, v, found = validate_run.cache(imported, spec)
    if found != num_pages:
        raise ValueError(f"k cache holds {found} pages, expected {num_pages} = num_pages")
    if arrays.device_id(k) == arrays.device_id(v):  # else that is yet to be said
        validate_run.own_memory(k, v)
    return k, v


def _device(device: object) -> int | None:
    """The CUDA device that is meant; None for the host."""
    if device is None:
        return None
    root = type(device).__module__.partition(".")[0]
    number: int | None = None
    if root == "cupy" and hasattr(device, "id"):
        number = int(device.id)
    elif isinstance(device, (int, np.integer)) and not isinstance(device, bool):
        number = int(device)
    elif isinstance(device, str) or root == "torch":
        if str(device) == "cpu":
            return None
        match = re.fullmatch(r"cuda(?::(\d+))?", str(device))
        if match is None:
            raise ValueError(f"device = {str(device)!r}, expected 'cpu', 'cuda' or 'cuda:0'")
        if match[1] is not None:
            number = int(match[1])
    else:
        raise TypeError(
            f"device is {what(device)}, expected None, an int, 'cpu', 'cuda' or 'cuda:0'"
        )
    runtime = devices.cupy().cuda.runtime
    if number is None:
        return int(runtime.getDevice())
    count = runtime.getDeviceCount()
    if not 0 <= number < count:
        raise ValueError(
            f"device = {number}, expected 0..{count - 1}, the CUDA devices that there are"
        )
    return number
