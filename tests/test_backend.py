"""Plans on the device that runs them: divided anew where its kernels have other tiles."""

from __future__ import annotations

from typing import Any

import batches
import numpy as np
import oracle
import pytest
from compiler import plain_kernel
from oracle import Formula
from small_call import Wrapper

from cupaged import backend, cuda, reference, schedule, tiles
from cupaged import devices as devices_room
from cupaged.backend import Plan
from cupaged.spec import HOST_MODEL, DeviceModel

#: Compute capability 9.0 is what the host plans for; the others are of the other classes.
OTHERS = {"medium": 80, "small": 89, "large": 100, "newer than the table": 130}
OPTIONS: list[dict[str, Any]] = [{}, {"fixed_split_size": 3}, {"disable_split_kv": True}]


class HostDevicePlan:
    """A `DevicePlan` that stays on the host."""

    def __init__(self, planned: Any, page_indices: Any, device: int, workspace: Any) -> None:
        self.schedule = planned
        self.page_indices = page_indices
        self.device = device
        self.workspace = workspace


def run_on_host(
    plan: HostDevicePlan,
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    factors: Any,
    sinks: Any,
) -> None:
    reference.run(plan.schedule, plan.page_indices, q, k, v, out, lse, *factors, sinks)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, DeviceModel]:
    """CUDA devices by number, to be filled in; the reference backend does their work."""
    models: dict[int, DeviceModel] = {}
    monkeypatch.setattr(devices_room, "device_model", models.__getitem__)
    monkeypatch.setattr(backend, "DevicePlan", HostDevicePlan)
    monkeypatch.setattr(cuda, "run", run_on_host)
    return models


def host_plan(batch: batches.Batch, **options: Any) -> Plan:
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper, causal=True, **options)
    plan = wrapper._plan
    assert plan.schedule.device == HOST_MODEL
    return plan


def run_on(plan: Plan, device: int, batch: batches.Batch) -> None:
    """Run a plan of the host's on a device, and hold the result to the contract."""
    formula = Formula(causal=True)
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    scale = formula.logit_scale(batch.head_dim) * np.log2(np.e)
    plan.run(device, 0, (batch.q, *batch.cache, out, lse), (scale, 1.0, 1.0))
    oracle.check_all(batch, formula, out, lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "free"))
@pytest.mark.parametrize("arch", OTHERS.values(), ids=OTHERS)
def test_a_plan_run_on_another_class_of_device_is_divided_anew(
    rng: np.random.Generator,
    devices: dict[int, DeviceModel],
    arch: int,
    options: dict[str, Any],
    head_dim: int,
) -> None:
    batch = batches.build(rng, [2, 90], [700, 300], group=2, head_dim=head_dim)
    plan = host_plan(batch, **options)
    before = plan.schedule
    devices[3] = DeviceModel(num_sms=20, arch=arch)
    found = plan.on_device(3)
    assert found.device == 3
    assert found.page_indices is plan.page_indices
    assert found.schedule.device == devices[3]
    configs = {plain_kernel(arch, "float16", head_dim, 16, shape) for shape in tiles.SHAPES}
    assert {launch.config for launch in found.schedule.launches} <= configs
    expected = schedule.build(before.spec, before.lengths, devices[3], **options)
    for launch, same in zip(found.schedule.launches, expected.launches, strict=True):
        assert launch.config == same.config
        assert launch.grid == same.grid
        assert launch.items.tobytes() == same.items.tobytes()
    run_on(plan, 3, batch)
    assert plan.on_device(3) is found
    assert plan.schedule is before


def test_a_plan_run_on_the_same_class_of_device_stays(
    rng: np.random.Generator, devices: dict[int, DeviceModel]
) -> None:
    """Whatever its number of multiprocessors: the grid walks any number of items."""
    batch = batches.build(rng, [2, 90], [700, 300], group=2)
    plan = host_plan(batch)
    devices[0] = DeviceModel(num_sms=20, arch=HOST_MODEL.arch)
    assert plan.on_device(0).schedule is plan.schedule
    run_on(plan, 0, batch)


def test_every_device_has_a_plan_of_its_own(
    rng: np.random.Generator, devices: dict[int, DeviceModel]
) -> None:
    batch = batches.build(rng, [2, 90], [700, 300], group=2, head_dim=128)
    plan = host_plan(batch)
    for device, arch in enumerate((90, 80, 86, 120)):
        devices[device] = DeviceModel(num_sms=100, arch=arch)
        run_on(plan, device, batch)
    configs = [
        {launch.config for launch in plan.on_device(device).schedule.launches} for device in devices
    ]
    assert configs[0] != configs[1] != configs[2]
    assert configs[2] == configs[3]
