"""The whole call on a second GPU, while the first is the current one."""

from __future__ import annotations

from typing import Any

import batches
import numpy as np
import oracle
import pytest
from gpu_calls import Wrapper, planned, to_gpu, to_host
from oracle import Formula

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("two_gpus")]


def split_batch(rng: np.random.Generator) -> batches.Batch:
    return batches.build(rng, [40, 1, 0, 9], [700, 300, 20, 0], group=2, head_dim=128)


def second(cp: Any, x: np.ndarray) -> Any:
    with cp.cuda.Device(1):
        return to_gpu(x)


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 4}])
def test_arrays_choose_the_device(
    cp: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    """Host index arrays plan for the current device; the tensors are on the other one."""
    batch = split_batch(rng)
    wrapper = planned(batch, Formula(), **options)
    there = batch.on(lambda x: second(cp, x))
    here = batch.on(to_gpu)
    for on_gpu, device in ((there, 1), (here, 0), (there, 1)):
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
        assert (out.device.id, lse.device.id, cp.cuda.runtime.getDevice()) == (device, device, 0)
        oracle.check_all(batch, Formula(), to_host(out), to_host(lse))


def test_a_workspace_chooses_the_device(cp: Any, rng: np.random.Generator) -> None:
    batch = split_batch(rng)
    workspace = second(cp, np.zeros(1 << 22, np.uint8))
    wrapper = planned(batch, Formula(), fixed_split_size=4, workspace=workspace)
    on_gpu = batch.on(lambda x: second(cp, x))
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
    on_gpu = batch.on(to_gpu)
    with pytest.raises(ValueError, match=r"^float_workspace_buffer is on cuda:1, expected cuda:0"):
        wrapper.run(on_gpu.q, on_gpu.cache)


def test_torch_tensors(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    batch = split_batch(rng)
    wrapper = Wrapper()
    batch.plan(wrapper)
    on_gpu = batch.on(lambda x: torch.from_numpy(np.ascontiguousarray(x)).to("cuda:1"))
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    assert (out.device.index, lse.device.index) == (1, 1)
    assert torch.cuda.current_device() == cp.cuda.runtime.getDevice() == 0
    oracle.check_all(batch, Formula(), out.cpu().numpy(), lse.cpu().numpy())


def test_arrays_on_two_devices_are_refused(cp: Any, rng: np.random.Generator) -> None:
    batch = split_batch(rng)
    wrapper = planned(batch, Formula())
    here, there = batch.on(to_gpu), batch.on(lambda x: second(cp, x))
    with pytest.raises(ValueError, match=r"^k cache is on cuda:1, expected cuda:0 as q is$"):
        wrapper.run(here.q, there.cache)
