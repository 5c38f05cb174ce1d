"""A paged key/value cache: whose tokens are in which pages, over plain arrays."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, cast

from cupaged import arrays, page_arrays, validate, validate_cache
from cupaged.page import append_paged_kv_cache
from cupaged.page_pool import EVERY_LAYER, Copies, PagePool, Request, counted
from cupaged.page_tables import Step
from cupaged.request_book import RequestBook
from cupaged.spec import SERVED_DTYPES, AttentionSpec, KVLayout


class PagedKVCache(RequestBook):
    """Keys and values of many requests in pages, and the bookkeeping of whose they are.

    A step of a model is `extend()` once a request, which counts the new tokens and finds them
    pages, then `append()` once a layer, which writes their keys and values.

    Parameters
    ----------
    num_pages, page_size : int
        Pages of the cache, tokens of a page.
    num_kv_heads, head_dim : int
    dtype : dtype or str
        "float16" or "bfloat16".
    num_layers : int
        Layers of the model. They share the page numbers; each has its own arrays.
    layout : {"NHD", "HND"}
        `[num_pages, page_size, num_kv_heads, head_dim]` or
        `[num_pages, num_kv_heads, page_size, head_dim]`.
    device : int or str, optional
        Where to allocate: NumPy arrays on the host by default, or for "cpu"; CuPy arrays on a
        CUDA device for its number, "cuda:1", or "cuda", the current one.
    caches : list of (array, array), optional
        The caller's own arrays instead: `(k, v)` of each layer, or both in one array
        `[num_pages, 2, ...]`. Of CuPy, PyTorch or NumPy, of any strides with a contiguous last
        axis, and apart. They are written in place.

    Attributes
    ----------
    layers : tuple of (array, array)
        `(k, v)` of each layer, as `run()` takes them: `run(q, cache.layers[layer])`.
    num_pages, page_size, num_kv_heads, head_dim, dtype, num_layers, layout
        As given; `dtype` is a name.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value.
    NotImplementedError
        A dtype that no backend serves.
    BackendUnavailableError
        A CUDA device without CuPy, NVRTC or a GPU.

    Notes
    -----
    A request is known by an id of the caller's choice, whatever is hashable. `len()`, `in` and
    iteration are over requests. A call that raises has changed nothing. Page numbers and lengths
    are on the host, and no call waits for a device; pages are written on the stream of the
    framework that the cache's arrays are of. Not thread-safe.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = "float16",
        num_layers: int = 1,
        layout: str = "NHD",
        *,
        device: Any = None,
        caches: Any = None,
    ) -> None:
        self.num_pages = validate.positive_int(num_pages, "num_pages")
        super().__init__(validate.positive_int(page_size, "page_size"))
        self.num_kv_heads = validate.positive_int(num_kv_heads, "num_kv_heads")
        self.head_dim = validate.positive_int(head_dim, "head_dim")
        self.dtype = arrays.dtype_name(dtype, "dtype")
        if self.dtype not in SERVED_DTYPES:
            raise NotImplementedError(
                f"dtype = {self.dtype}, served are {', '.join(SERVED_DTYPES)}"
            )
        self.num_layers = validate.positive_int(num_layers, "num_layers")
        self.layout = cast(KVLayout, validate.choice(layout, "layout", ("NHD", "HND")))
        if caches is not None and device is not None:
            raise ValueError("device and caches exclude each other: arrays have their own device")
        spec = AttentionSpec(
            num_qo_heads=self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=self.head_dim,
            page_size=self.page_size,
            causal=False,
            sm_scale=1.0,
            dtype=self.dtype,
            kv_layout=self.layout,
        )
        if caches is None:
            self._arrays = page_arrays.allocate(spec, self.num_pages, self.num_layers, device)
        else:
            self._arrays = page_arrays.wrap(caches, spec, self.num_pages, self.num_layers)
        self.layers = self._arrays.layers
        self._pool = PagePool(self.num_pages, self.page_size)
        self._step: Step | None = None
        self._beside: Any = _beside(self.layers[0][0])

    def __repr__(self) -> str:
        return (
            f"<PagedKVCache: {counted(len(self), 'request')}, {self.num_free_pages} of "
            f"{self.num_pages} pages of {self.page_size} tokens free, "
            f"{counted(self.num_layers, 'layer')} of {self.num_kv_heads} KV heads, "
            f"head_dim {self.head_dim}, {self.dtype}, {self.layout}>"
        )

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return self._pool.num_free

    # Requests come, grow, and go

    def add(self, request: Hashable, length: int = 0) -> None:
        """Begin a request.

        Parameters
        ----------
        request : hashable
            Its id from now on.
        length : int
            Tokens to begin with, as `extend(request, length)` would add them.

        Raises
        ------
        TypeError, ValueError
            No hashable id, or one that is in the cache; no such length.
        OutOfPagesError
            There are too few free pages for `length` tokens.
        """
        self._check_new(request, "request")
        count = validate_cache.count(length, "length", request)
        added = Request(request)
        if count:
            self._pool.extend([added], [count], "add()")
        self._requests[request] = added

    def extend(self, request: Any, n: Any) -> None:
        """Add tokens to a request; it gets pages for them, and they count in its length.

        Their keys and values are what `append()` writes next. Where it has not yet written the
        tokens of an earlier call at any layer, they are written with these.

        Parameters
        ----------
        request : hashable, or list of hashable
            Of a list, all are extended or none.
        n : int, or sequence of int
            Tokens for each.

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache, or twice in the list; no such count.
        RuntimeError
            The tokens of an earlier call have been appended at some layers and not at others.
        OutOfPagesError
            There are too few free pages for all of them.
        """
        if isinstance(request, list):
            found = self._find(request)
            validate_cache.once(found, "extend()")
            counts = validate_cache.counts(n, found)
        else:
            found = [self._find_one(request)]
            counts = [validate_cache.count(n, "n", request)]
        self._end_step()
        for each in found:
            if each.written not in (0, EVERY_LAYER):
                raise validate_cache.not_written(each, "extend()")
        self._copy(self._pool.extend(found, counts, "extend()"))

    def append(self, requests: Iterable[Hashable], k: Any, v: Any, layer: int = 0) -> None:
        """Write keys and values of the tokens that `extend()` or `add()` added, at a layer.

        Parameters
        ----------
        requests : iterable of hashable
            Each with new tokens that are not yet written at this layer, and once.
        k, v : array [nnz, num_kv_heads, head_dim]
            A row for each new token, in the order of `requests`, as q has them. Of the cache's
            dtype, and where the cache is.
        layer : int

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache, or twice; no such layer; an array that doesn't
            fit; a CUDA graph is being captured.
        RuntimeError
            A request has no new tokens at this layer.
        BackendUnavailableError
            Device arrays without a GPU or NVRTC that serve them.
        """
        index = validate_cache.layer(layer, self.num_layers)
        step = self._step_of(requests)
        if step.is_written(index):
            raise validate_cache.nothing_new(step, index)
        for name, x in (("k", k), ("v", v)):
            validate_cache.rows(x, name, step, self.num_kv_heads, self.head_dim)
        append_paged_kv_cache(
            k,
            v,
            step.batch_indices,
            step.positions,
            self.layers[index],
            step.plan_args.paged_kv_indices,
            step.plan_args.paged_kv_indptr,
            step.plan_args.paged_kv_last_page_len,
            self.layout,
        )
        step.write(index)
        self._beside = _beside(k)

    def mark_appended(self, requests: Iterable[Hashable]) -> None:
        """Count the new tokens of requests as written at every layer.

        For what is written by other means than `append()`: the caller's own kernel, a CUDA graph.

        Parameters
        ----------
        requests : iterable of hashable

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        found = self._find(requests)
        self._end_step()
        for request in found:
            request.written = EVERY_LAYER

    def fork(self, request: Hashable, new: Hashable) -> None:
        """Begin a request with the same tokens as another has.

        Full pages are shared; a part-filled last one is copied at every layer: both can go on.

        Parameters
        ----------
        request : hashable
        new : hashable
            The id of the new one.

        Raises
        ------
        TypeError, ValueError
            `request` is not in the cache; `new` is, or is not hashable.
        RuntimeError
            `request` has new tokens that are not yet appended.
        OutOfPagesError
            There is no free page for the copy.
        """
        source = self._find_one(request)
        self._check_new(new, "new")
        self._end_step()
        if source.new and source.written != EVERY_LAYER:
            raise validate_cache.not_written(source, "fork()")
        fork, copies = self._pool.fork(source, new)
        self._requests[new] = fork
        self._copy(copies)

    def truncate(self, request: Hashable, length: int) -> None:
        """Keep the first `length` tokens of a request; pages beyond them are given back.

        Parameters
        ----------
        request : hashable
        length : int
            0 to the request's own.

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache; no such length.
        """
        found = self._find_one(request)
        kept = validate_cache.count(length, "length", request)
        if kept > found.length:
            raise ValueError(
                f"length = {kept} (request {request!r}), expected 0..{found.length}, its length"
            )
        self._end_step()
        self._pool.truncate(found, kept)

    def free(self, request: Hashable) -> None:
        """End a request; pages that no other one holds are given back.

        Parameters
        ----------
        request : hashable

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        found = self._find_one(request)
        self._end_step()
        self._pool.truncate(found, 0)
        del self._requests[request]

    # What there is

    # How it is done

    def _step_of(self, requests: Iterable[Hashable]) -> Step:
        """The step of these requests: the present one, where the last call was for the same."""
        ids, step = tuple(validate_cache.ids(requests)), self._step
        try:
            # The hash first: what is no id has none, and may not be comparable either.
            same = step is not None and (step.hash, step.ids) == (hash(ids), ids)
        except TypeError:
            same = False
        if step is None or not same:
            found = self._find(ids)
            validate_cache.once(found, "append()")
            self._end_step()
            step = self._step = Step(ids, found, self.page_size)
        return step

    def _end_step(self) -> None:
        """Tell the requests what was appended, before any of them changes."""
        if self._step is not None:
            self._step.end(self.num_layers)
            self._step = None

    def _copy(self, copies: Copies) -> None:
        if copies:
            self._arrays.copy(copies, self._beside)


def _beside(x: Any) -> Any:
    """What stands for x in the question whose stream it is, without keeping its memory."""
    return x.new_empty(0) if arrays.framework(x) == "torch" else ()
