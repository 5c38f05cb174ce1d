"""Who appends: cupaged and FlashInfer; and plain copies of as many bytes to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from append_problem import Append
from check import POISON_BITS, Verdict
from contender import Contender, Cupaged, Factory, Runner
from flashinfer_peers import import_flashinfer
from timing import Call, CudaDevice, HostDevice, torch_on
from torch_runner import record
from workloads import Workload

#: Ways of copying as many bytes.
COPIES = ("memcpy", "copy-kernel")


class AppendRunner(Runner):
    """Appends to the problem's own caches: `append` takes the layer's number."""

    def __init__(self, problem: Append, append: Callable[[int], object]) -> None:
        super().__init__(problem)
        self.problem = problem
        self.append = append

    def call(self) -> None:
        self.append(self.next_layer())

    def poison(self) -> None:
        self.problem.reset()

    def verdict(self, rng: np.random.Generator) -> Verdict:
        return self.problem.verify(self.layer)


class CupagedAppend(Contender):
    """The library's append, by index arrays that all calls share, as a step's layers do.

    On the device they can be recorded into a CUDA graph; on the host a single call waits for
    nothing.
    """

    def __init__(self, device: HostDevice, on_host: bool) -> None:
        import cupaged

        self.version = cupaged.__version__
        self.cupaged = cupaged
        self.on_host = on_host
        self.name = Cupaged.name + "-host" * on_host

    def unfit(self, workload: Workload) -> str | None:
        return None

    def indices(self, problem: Append) -> tuple[Any, ...]:
        """`append_indptr`, and the cache's `indices`, `indptr` and `last_page_len`."""
        table = problem.table
        arrays = table.qo_indptr, table.kv_indices, table.kv_indptr, table.last_page_len
        return arrays if self.on_host else tuple(problem.device.put(array) for array in arrays)

    def places(self, problem: Append, indices: tuple[Any, ...]) -> Any:
        """`batch_indices` and `positions` of the tokens, as the library finds them."""
        append_indptr, _, kv_indptr, last_page_len = indices
        seq_lens = self.cupaged.get_seq_lens(kv_indptr, last_page_len, problem.table.page_size)
        return self.cupaged.get_batch_indices_positions(
            append_indptr, seq_lens, len(problem.batch_indices)
        )

    def prepare(self, problem: Append) -> Runner:
        indices = self.indices(problem)
        places = self.places(problem, indices)
        cache_indices = indices[1:]

        def append(layer: int) -> None:
            this = problem.layers[layer]
            self.cupaged.append_paged_kv_cache(
                this.key, this.value, *places, (this.k_cache, this.v_cache), *cache_indices
            )

        return AppendRunner(problem, append)


class FlashInferAppend(Contender):
    """FlashInfer's append, where its module is built ahead."""

    name = "flashinfer"

    def __init__(self, device: CudaDevice, dtype: str) -> None:
        self.torch = torch_on(device)
        flashinfer = import_flashinfer()
        self.version = f"flashinfer {flashinfer.__version__}"
        # Loads the module, and fails here where that would have to be compiled.
        flashinfer.page.get_page_module()
        self.append = flashinfer.append_paged_kv_cache

    def unfit(self, workload: Workload) -> str | None:
        return None

    def prepare(self, problem: Append) -> Runner:
        def tensor(array: Any) -> Any:
            return self.torch.from_dlpack(array)

        table = problem.table
        places = [tensor(problem.device.put(a)) for a in (problem.batch_indices, problem.positions)]
        cache_indices = [
            tensor(problem.device.put(array))
            for array in (table.kv_indices, table.kv_indptr, table.last_page_len)
        ]
        layers = [
            (tensor(one.key), tensor(one.value), (tensor(one.k_cache), tensor(one.v_cache)))
            for one in problem.layers
        ]

        def append(layer: int) -> None:
            key, value, caches = layers[layer]
            self.append(key, value, *places, caches, *cache_indices)

        return TorchAppendRunner(problem, append, self.torch)


class TorchAppendRunner(AppendRunner):
    def __init__(self, problem: Append, append: Callable[[int], object], torch: Any) -> None:
        super().__init__(problem, append)
        self.torch = torch

    def capture(self, calls: int) -> Call:
        return record(self.torch, self.call, calls)


class Copy(Contender):
    """Copies as many bytes from one place to another: by the platform, or by a plain kernel."""

    version = "the benchmark's own"

    def __init__(self, device: HostDevice, name: str) -> None:
        self.name = name
        self.copy = device.copy if name == "memcpy" else device.copy_by_kernel

    def unfit(self, workload: Workload) -> str | None:
        return None

    def prepare(self, problem: Append) -> Runner:
        return CopyRunner(problem, self.copy)


class CopyRunner(Runner):
    def __init__(self, problem: Append, copy: Callable[[Any, Any], None]) -> None:
        super().__init__(problem)
        self.copy = copy
        xp = problem.device.xp
        self.sources = [
            xp.concatenate([problem.rows(layer.key), problem.rows(layer.value)])
            for layer in problem.layers
        ]
        self.targets = [xp.empty_like(source) for source in self.sources]

    def call(self) -> None:
        layer = self.next_layer()
        self.copy(self.targets[layer], self.sources[layer])

    def poison(self) -> None:
        for target in self.targets:
            target.fill(POISON_BITS)

    def verdict(self, rng: np.random.Generator) -> Verdict:
        same = bool((self.targets[self.layer] == self.sources[self.layer]).all())
        return Verdict(same, 0.0, 0.0, "" if same else "the copy is another")


APPEND_PEERS: dict[str, Factory] = {"flashinfer": FlashInferAppend}
