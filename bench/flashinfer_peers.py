"""FlashInfer's paged attention, by the modules that are built ahead: float16, head_dim 128.

`shared/peers/prepare.sh` builds them; compiling one takes minutes, so nothing is compiled here.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from abc import abstractmethod
from typing import Any

from contender import Contender, Factory, Planner, Runner, UnavailableError, plan_call
from decode_contender import decode_plan_call, queries_each
from problem import Attention
from timing import Call, CudaDevice, torch_on
from torch_runner import TorchRunner
from workloads import PageTable, Workload

WORKSPACE_BYTES = 256 << 20

DTYPE = "float16"
HEAD_DIM = 128


def import_flashinfer() -> Any:
    """FlashInfer, which shall not begin to compile.

    Raises
    ------
    ImportError
        It is not installed.
    """
    os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    import flashinfer

    return flashinfer


class FlashInfer(Contender):
    """One of its paged wrappers."""

    def __init__(self, device: CudaDevice, dtype: str, name: str) -> None:
        if dtype != DTYPE:
            raise UnavailableError(f"its prebuilt modules are {DTYPE}")
        self.torch = torch_on(device)
        self.flashinfer = import_flashinfer()
        self.version = f"flashinfer {self.flashinfer.__version__}"
        self.name = f"flashinfer-{name}"
        self.workspace = self.torch.zeros(WORKSPACE_BYTES, dtype=self.torch.uint8, device="cuda")

    @abstractmethod
    def wrapper(self, workload: Workload) -> Any:
        """A wrapper of its own for a workload."""

    @abstractmethod
    def plan_call(self, wrapper: Any, workload: Workload, table: PageTable) -> Call:
        """A wrapper's `plan()` for a table of tensors, which has the arguments of cupaged's."""

    def unfit(self, workload: Workload) -> str | None:
        if workload.dtype not in ("", DTYPE):
            return f"its prebuilt modules are {DTYPE}"
        if workload.head_dim != HEAD_DIM:
            return f"its prebuilt modules are head_dim {HEAD_DIM}"
        return None

    def prepare(self, problem: Attention) -> Runner:
        wrapper = self.wrapper(problem.workload)
        self.plan_call(wrapper, problem.workload, self.on_torch(problem.table))()
        return FlashInferRunner(problem, self.torch, wrapper)

    def planner(self, workload: Workload, dtype: str) -> Planner | None:
        wrapper = self.wrapper(workload)
        return lambda table: self.plan_call(wrapper, workload, self.on_torch(table))

    def on_torch(self, table: PageTable) -> Any:
        """The table with tensors, on the host as well, for arrays."""
        names = ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
        tensors = {name: self.torch.from_numpy(getattr(table, name)) for name in names}
        return dataclasses.replace(table, **tensors)


class FlashInferRunner(TorchRunner):
    def __init__(self, problem: Attention, torch: Any, wrapper: Any) -> None:
        super().__init__(problem, torch)
        self.wrapper = wrapper
        self.q = torch.from_dlpack(problem.q)
        self.layers = [(torch.from_dlpack(k), torch.from_dlpack(v)) for k, v in problem.layers]
        self.out = torch.empty_like(self.q)

    def call(self) -> None:
        self.wrapper.run(self.q, self.layers[self.next_layer()], out=self.out)


class FlashInferPrefill(FlashInfer):
    """Its prefill wrapper, by the name of its backend."""

    def __init__(self, device: CudaDevice, dtype: str, backend: str) -> None:
        super().__init__(device, dtype, backend)
        self.backend = backend

    def wrapper(self, workload: Workload) -> Any:
        return self.flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace, workload.kv_layout, backend=self.backend
        )

    def plan_call(self, wrapper: Any, workload: Workload, table: PageTable) -> Call:
        return plan_call(wrapper, workload, DTYPE, table)


class FlashInferVerify(FlashInferPrefill):
    """The same for several query tokens a request; one is for the decode wrapper."""

    def unfit(self, workload: Workload) -> str | None:
        if queries_each(workload) == 1:
            return "one query a request is for its decode wrapper"
        return super().unfit(workload)


class FlashInferDecode(FlashInfer):
    """Its decode wrapper, on tensor cores ("tc") or on CUDA cores ("cc")."""

    def __init__(self, device: CudaDevice, dtype: str, tensor_cores: bool) -> None:
        super().__init__(device, dtype, "tc" if tensor_cores else "cc")
        self.tensor_cores = tensor_cores

    def unfit(self, workload: Workload) -> str | None:
        if not self.tensor_cores and queries_each(workload) > 1:
            return "several queries a request are for its tensor cores"
        return super().unfit(workload)

    def wrapper(self, workload: Workload) -> Any:
        return self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, workload.kv_layout, use_tensor_cores=self.tensor_cores
        )

    def plan_call(self, wrapper: Any, workload: Workload, table: PageTable) -> Call:
        return decode_plan_call(wrapper, workload, DTYPE, table)


DECODE_PEERS: dict[str, Factory] = {
    "flashinfer-tc": functools.partial(FlashInferDecode, tensor_cores=True),
    "flashinfer-cc": functools.partial(FlashInferDecode, tensor_cores=False),
    "flashinfer-fa2": functools.partial(FlashInferVerify, backend="fa2"),
    "flashinfer-fa3": functools.partial(FlashInferVerify, backend="fa3"),
}
