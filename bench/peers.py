"""Other attention libraries beside cupaged's prefill, in one process and on the same numbers.

Each is imported only when asked for, and says in one line why it can't take part.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import time
from typing import Any

import numpy as np
from contender import AttentionRunner, Contender, Factory, Runner, UnavailableError
from flashinfer_peers import FlashInferPrefill
from problem import Attention
from timing import Call, CudaDevice, NotCapturableError, Pending, torch_on
from torch_runner import TorchRunner
from workloads import Workload

#: FlashAttention-3's calls are chained inside one XLA program that takes about so long, in µs, at
#: the rate assumed below: the program's own start must be small beside it.
CHAIN_MICROSECONDS = 4000.0
CHAIN_TFLOPS = 300.0
CHAIN_CALLS = (8, 64)

#: What every call of this script says to FlashAttention-3's XLA target; it wants all of them.
FA3_ATTRIBUTES: dict[str, Any] = dict.fromkeys(
    ("max_seqlen_q_has_value", "max_seqlen_k_has_value", "softmax_scale_has_value"), True
) | {
    "pack_gqa_val": False,
    "pack_gqa_has_value": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "is_rotary_interleaved": False,
    "num_splits": 1,
    "sm_margin": 0,
}


class Sdpa(Contender):
    """PyTorch's scaled_dot_product_attention, on contiguous, unpaged tensors."""

    def __init__(self, device: CudaDevice, dtype: str, backend: str) -> None:
        self.torch = torch_on(device)
        self.version = f"torch {self.torch.__version__}"
        from torch.nn.attention import SDPBackend

        if backend == "cudnn":
            self.backend = SDPBackend.CUDNN_ATTENTION
            self.version += f", cuDNN {self.torch.backends.cudnn.version()}"
        else:
            self.backend = SDPBackend.FLASH_ATTENTION
        self.name = f"sdpa-{backend}"

    def unfit(self, workload: Workload) -> str | None:
        return sdpa_unfit(workload)

    def prepare(self, problem: Attention) -> Runner:
        return SdpaRunner(problem, self.torch, self.backend)


def sdpa_unfit(workload: Workload) -> str | None:
    """Why scaled_dot_product_attention can't do a workload as one dense call."""
    if workload.paged_only:
        return "unpaged"
    if len(set(workload.qo_lens)) > 1 or len(set(workload.kv_lens)) > 1:
        return "dense: requests of equal length only"
    if workload.causal and workload.qo_lens != workload.kv_lens:
        return "its causal mask is aligned to the top left"
    return None


class SdpaRunner(TorchRunner):
    def __init__(self, problem: Attention, torch: Any, backend: Any) -> None:
        super().__init__(problem, torch)
        from torch.nn.attention import sdpa_kernel

        self.only = functools.partial(sdpa_kernel, backend)
        batch = problem.workload.batch

        # [batch, heads, len, head_dim] as a view of the tokens-first memory, which is how these
        # kernels take it without a copy.
        def dense(array: Any) -> Any:
            tokens, heads, dim = array.shape
            tensor = torch.from_dlpack(array)
            return tensor.view(batch, tokens // batch, heads, dim).transpose(1, 2)

        k, v = problem.unpaged()
        self.q, self.k, self.v = dense(problem.q), dense(k), dense(v)
        self.gqa = problem.workload.num_qo_heads != problem.workload.num_kv_heads

    def call(self) -> None:
        with self.only():
            out = self.torch.nn.functional.scaled_dot_product_attention(
                self.q,
                self.k,
                self.v,
                is_causal=self.problem.workload.causal,
                enable_gqa=self.gqa,
            )
        self.out = out.transpose(1, 2)


class FlashAttention3(Contender):
    """FlashAttention-3 in its JAX build: ragged, unpaged, one split."""

    name = "fa3"

    def __init__(self, device: CudaDevice, dtype: str) -> None:
        # XLA would take three quarters of the GPU's memory at its first use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        from flash_attn3_jax_lib import flash_api

        if jax.default_backend() != "gpu":
            raise UnavailableError(f"JAX runs on {jax.default_backend()}, not on the GPU")
        for name, target in flash_api.get_ffi_registrations().items():
            jax.ffi.register_ffi_target(name, target, platform="CUDA")
        self.version = (
            f"flash-attn3-jax {importlib.metadata.version('flash-attn3-jax')}, "
            f"jax {jax.__version__}"
        )
        self.jax = jax

    def unfit(self, workload: Workload) -> str | None:
        if workload.paged_only:
            return "unpaged"
        return None if workload.head_dim == 128 else "this build is head_dim 128"

    def prepare(self, problem: Attention) -> Runner:
        return FlashAttention3Runner(problem, self.jax)


def chain_length(flops: int) -> int:
    """How many FlashAttention-3 calls to put into one XLA program."""
    estimate = flops / (CHAIN_TFLOPS * 1e6)
    low, high = CHAIN_CALLS
    return int(min(high, max(low, CHAIN_MICROSECONDS / max(estimate, 1e-3))))


class FlashAttention3Runner(AttentionRunner):
    """Runs on XLA's own stream, where no event of ours can be recorded.

    So a sample is the host's time for a program of several calls less that for a program of one,
    over the calls in between.
    """

    waits = True

    def __init__(self, problem: Attention, jax: Any) -> None:
        super().__init__(problem)
        k, v = problem.unpaged()
        self.device.synchronize()
        kv_indptr = np.cumsum([0, *problem.workload.kv_lens]).astype(np.int32)
        self.args = (
            *(jax.dlpack.from_dlpack(array) for array in (problem.q, k, v)),
            jax.numpy.asarray(problem.table.qo_indptr),
            jax.numpy.asarray(kv_indptr),
        )
        self.length = chain_length(problem.workload.flops())
        self.one = jax.jit(lambda *args: self._chain(jax, 1, *args))
        self.many = jax.jit(lambda *args: self._chain(jax, self.length, *args))
        self.out: Any = None

    def _chain(self, jax: Any, calls: int, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
        jnp = jax.numpy
        workload = self.problem.workload
        longest_q = max(workload.qo_lens)
        results = [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((workload.batch, workload.num_qo_heads, longest_q), jnp.float32),
            jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32),  # partial outputs: there is no split
            jax.ShapeDtypeStruct((1, 1, 1), jnp.float32),
        ]
        # Of the side effect there is none; it keeps XLA from making one call of several.
        attention = jax.ffi.ffi_call("flash_mha_fwd", results, has_side_effect=True)
        absent, absent_int = jnp.zeros((0,), q.dtype), jnp.zeros((0,), jnp.int32)
        absent_float = jnp.zeros((0,), jnp.float32)
        optional = {
            "k_new, v_new, q_v": [absent] * 3,
            "cu_seqlens_q, cu_seqlens_k": [cu_q, cu_k],
            "cu_seqlens_k_new, seqused_q, seqused_k": [absent_int] * 3,
            "page_table, kv_batch_idx, leftpad_k": [absent_int] * 3,
            "rotary_cos, rotary_sin": [absent] * 2,
            "seqlens_rotary": [absent_int],
            "q_descale, k_descale, v_descale": [absent_float] * 3,
            "scheduler_metadata": [absent_int],
        }
        inputs = [q, k, v, *(array for group in optional.values() for array in group)]
        out = None
        for _ in range(calls):
            out, *_ = attention(
                *inputs,
                max_seqlen_q=longest_q,
                max_seqlen_k=max(workload.kv_lens),
                softmax_scale_val=workload.head_dim**-0.5,
                is_causal=workload.causal,
                **FA3_ATTRIBUTES,
            )
        return out

    def call(self) -> None:
        self.out = self.one(*self.args).block_until_ready()

    def poison(self) -> None:
        """A JAX array can't be written to; every call makes a new one."""

    def out_bits(self) -> Any:
        return self.device.xp.from_dlpack(self.out).view(np.uint16)

    def sample(self) -> Pending:
        self.device.synchronize()
        start = time.perf_counter()
        self.one(*self.args).block_until_ready()
        middle = time.perf_counter()
        self.many(*self.args).block_until_ready()
        end = time.perf_counter()
        microseconds = ((end - middle) - (middle - start)) * 1e6 / (self.length - 1)
        return lambda: microseconds

    def capture(self, calls: int) -> Call:
        raise NotCapturableError("XLA's stream; its µs are those of calls chained in one program")


PEERS: dict[str, Factory] = {
    "sdpa-flash": lambda device, dtype: Sdpa(device, dtype, "flash"),
    "sdpa-cudnn": lambda device, dtype: Sdpa(device, dtype, "cudnn"),
    "flashinfer-fa2": lambda device, dtype: FlashInferPrefill(device, dtype, "fa2"),
    "flashinfer-fa3": lambda device, dtype: FlashInferPrefill(device, dtype, "fa3"),
    "fa3": FlashAttention3,
}
