from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forescale.control.preparation import profile_task
from forescale.core.cluster import DeviceKind
from forescale.profile.devices import find_cluster, measure_devices
from integration import training_tasks as tasks

pytestmark = pytest.mark.gpu


def test_capacity_leaves_room_for_the_runtime() -> None:
    (device,) = find_cluster(1).devices
    assert device.kind is DeviceKind.CUDA
    assert 0 < device.memory_bytes < torch.cuda.get_device_properties(0).total_memory


def test_a_model_is_timed_on_the_gpu(tmp_path: Path) -> None:
    costs, bindings = profile_task(tasks.gpt(), find_cluster(1), tmp_path, lambda _: None)
    (device,) = costs.cluster.devices
    assert device.flops_per_s > 0
    assert device.memory_bandwidth_bytes_per_s > 0
    found = costs.profile.microbatch_costs(bindings[0], [device])
    assert found["forward_s_DO"].sum() > 0
    assert found["backward_s_DO"].sum() > 0
    assert costs.profile.kinds[DeviceKind.CUDA].optimizer_s_per_byte > 0


def test_measuring_gives_the_memory_back() -> None:
    measure_devices(find_cluster(1), budget_s=0.1)
    assert torch.cuda.memory_reserved(0) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_link_between_gpus_is_measured_and_overlaps_with_computing() -> None:
    measured = measure_devices(find_cluster(2), budget_s=0.2)
    link = measured.links["cuda0", "cuda1"]
    assert link.bandwidth_bytes_per_s > 1e9
    assert 0 < link.latency_s < 1e-3
    assert not link.occupies_device
