"""What ``profile`` and ``plan`` share: a task measured on devices, without training it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from forescale.cli.console import status
from forescale.cli.task_file import load_task

if TYPE_CHECKING:
    from forescale.control.costs import ProfiledCosts
    from forescale.engine.train.task import TrainingTask
    from forescale.plan.cluster_file import ClusterFile

_LOOKED_AT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTask:
    """A task's costs on some devices.

    Attributes:
        task: its batches are the first ones, as a list.
        bindings: the graph's symbols in those batches.
    """

    task: TrainingTask
    costs: ProfiledCosts
    bindings: tuple[Mapping[str, int], ...]


def measure_task(file: str, devices: int | None) -> MeasuredTask:
    """Loads and measures; shows on standard error what it is doing."""
    with redirect_stdout(sys.stderr), status() as say:  # what the task prints is no result
        say("loading the task")
        task = load_task(file)
        from forescale.control.preparation import profile_task
        from forescale.profile.devices import find_cluster

        task = replace(task, batches=list(islice(task.batches, _LOOKED_AT)))
        folder = Path(tempfile.mkdtemp(prefix="forescale-"))
        costs, bindings = profile_task(task, find_cluster(devices), folder, say)
        shutil.rmtree(folder)  # only when all went well: an error may point to the workers' output there
    return MeasuredTask(task=task, costs=costs, bindings=bindings)


def rate_task_file(file: str, cluster: ClusterFile) -> MeasuredTask:
    """Loads a task, with its costs on the devices of a cluster file; shows what it is doing."""
    with redirect_stdout(sys.stderr), status() as say:
        say("loading the task")
        task = load_task(file)
        from forescale.control.preparation import rate_task
        from forescale.plan.cluster_devices import devices_of, rates_of

        task = replace(task, batches=list(islice(task.batches, _LOOKED_AT)))
        costs, bindings = rate_task(task, devices_of(cluster), rates_of(cluster), say)
    return MeasuredTask(task=task, costs=costs, bindings=bindings)
