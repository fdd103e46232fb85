"""``forescale plan GRAPH``: places the nodes of a graph whose costs are given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from forescale.cli.console import print_json, status
from forescale.cli.output import check_writable, write_text
from forescale.core.errors import InfeasiblePlan, InvalidInput

if TYPE_CHECKING:
    from forescale.plan.cluster_file import ClusterFile
    from forescale.plan.placement.baselines import Compared
    from forescale.plan.placement.certificate import Certificate
    from forescale.plan.placement.place import Placement
    from forescale.plan.placement.problem import PlacementProblem
    from forescale.plan.placement.reading import Format

THROUGHPUT, LATENCY = "throughput", "latency"
_TIME_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRequest:
    """What is asked of a graph.

    Attributes:
        graph_format: None to find out.
        devices: how many there are, if not as many as the graph says.
        memory_bytes: of each device that pays for transfers, if not as much as the graph says.
        bandwidth_bytes_per_time: between Piper's devices, likewise, in its unit of time.
        batch: values for the symbols of a captured model.
        objective: ``throughput`` or ``latency``.
        time_limit_s: for the certificate.
        own: a file with the user's own placement, to compare.
    """

    path: Path
    graph_format: str | None
    cluster: Path | None
    devices: int | None
    memory_bytes: float | None
    bandwidth_bytes_per_time: float | None
    batch: Mapping[str, int]
    contiguous: bool
    objective: str
    certify: bool
    time_limit_s: float | None
    compare: bool
    own: Path | None
    svg: Path | None
    json: bool

    @property
    def graph_options(self) -> tuple[str, ...]:
        """Options that only graphs have, of those that were given."""
        given = {
            "--format": self.graph_format is not None,
            "--cluster": self.cluster is not None,
            "--memory": self.memory_bytes is not None,
            "--bandwidth": self.bandwidth_bytes_per_time is not None,
            "--batch": bool(self.batch),
            "--free": not self.contiguous,
            "--objective": self.objective != THROUGHPUT,
            "--certify": self.certify,
            "--time-limit-s": self.time_limit_s is not None,
            "--compare": self.compare,
            "--own": self.own is not None,
        }
        return tuple(option for option, is_given in given.items() if is_given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An answer and what was asked about it.

    Attributes:
        time_unit: of the graph's costs.
        elapsed_s: time that placing took.
        certificate, compared: None if not asked for.
    """

    problem: PlacementProblem
    placement: Placement
    contiguous: bool
    time_unit: str
    elapsed_s: float
    certificate: Certificate | None = None
    compared: tuple[Compared, ...] | None = None


def place_graph(asked: GraphRequest) -> None:
    """Reads a graph, places it and shows the result."""
    _check(asked)
    try:
        _place(asked)
    except InfeasiblePlan as error:
        if asked.json:
            print_json({"feasible": False, "missing_bytes": error.short_bytes, "reason": str(error)})
        raise


def _place(asked: GraphRequest) -> None:
    from forescale.plan.placement.reading import TIME_UNIT, detect_format, format_named

    text = _read(asked.path)
    graph_format = detect_format(text) if asked.graph_format is None else format_named(asked.graph_format)
    if graph_format == "piper":
        _plan_jointly(asked, text)
        return
    if asked.bandwidth_bytes_per_time is not None:
        raise InvalidInput("--bandwidth is for Piper's graphs; of the others, the links are in --cluster")
    problem = _problem(asked, text, graph_format)
    placed = _placed(asked, problem, TIME_UNIT[graph_format])
    from forescale.cli import placement_view

    if asked.json:
        print_json(placement_view.as_json(placed))
    else:
        placement_view.show(placed)
    if asked.svg is not None:
        from forescale.plan.placement.picture import draw_placement

        write_text(asked.svg, draw_placement(placed.problem, placed.placement))


def _check(asked: GraphRequest) -> None:
    if asked.time_limit_s is not None and not asked.certify:
        raise InvalidInput("--time-limit-s is how long --certify may take; give both")
    if asked.own is not None and not asked.compare:
        raise InvalidInput("--own is compared with ours; add --compare")
    if asked.objective not in {THROUGHPUT, LATENCY}:
        raise InvalidInput(f"--objective is {THROUGHPUT} or {LATENCY}, not {asked.objective}")
    if asked.objective == LATENCY and asked.certify:
        raise InvalidInput("--certify is for throughput; there is no certificate of a latency")
    if asked.svg is not None:
        check_writable(asked.svg)


def _plan_jointly(asked: GraphRequest, text: str) -> None:
    from forescale.cli.joint import plan_jointly

    foreign = set(asked.graph_options) - {"--format", "--memory", "--bandwidth"}
    if foreign or asked.svg is not None:
        raise InvalidInput(f"{min(foreign, default='--svg')} is not for Piper's graphs")
    plan_jointly(
        text,
        devices=asked.devices,
        memory_bytes=asked.memory_bytes,
        bandwidth_bytes_per_time=asked.bandwidth_bytes_per_time,
        json=asked.json,
    )


def _problem(asked: GraphRequest, text: str, graph_format: Format) -> PlacementProblem:
    from forescale.plan.placement.reading import read_graph

    problem = read_graph(
        text,
        graph_format=graph_format,
        cluster=read_cluster_file(asked.cluster) if asked.cluster else None,
        devices=asked.devices,
        batch=asked.batch,
    )
    if asked.memory_bytes is None:
        return problem
    kinds = tuple(
        replace(kind, memory_bytes=asked.memory_bytes) if kind.pays_transfers else kind
        for kind in problem.kinds
    )
    return replace(problem, kinds=kinds)


def read_cluster_file(path: Path) -> ClusterFile:
    """A cluster file, with the profiles that ship with the package."""
    from forescale.plan.cluster_file import read_cluster

    profiles = files("forescale.plan").joinpath("profiles.toml").read_text(encoding="utf-8")
    return read_cluster(_read(path), profiles=profiles)


def _placed(asked: GraphRequest, problem: PlacementProblem, time_unit: str) -> Placed:
    from forescale.plan.placement.baselines import compare, read_assignment
    from forescale.plan.placement.certificate import certify, check_certifiable
    from forescale.plan.placement.latency import place_for_latency
    from forescale.plan.placement.place import place, placed_as

    own = read_assignment(problem, _read(asked.own)) if asked.own else None
    if asked.certify:
        check_certifiable(problem)
    started_s = time.perf_counter()
    planner = place_for_latency if asked.objective == LATENCY else place
    placement = planner(problem, contiguous=asked.contiguous)
    elapsed_s = time.perf_counter() - started_s
    certificate = None
    if asked.certify:
        limit_s = _TIME_LIMIT_S if asked.time_limit_s is None else asked.time_limit_s
        with status() as say:
            say(f"proving how good it is, for up to {limit_s:g} s")
            certificate = certify(problem, placement, contiguous=asked.contiguous, time_limit_s=limit_s)
        device_N = placement.device_N if certificate.device_N is None else certificate.device_N
        placement = placed_as(problem, device_N, lower_bound=certificate.lower_bound)
    return Placed(
        problem=problem,
        placement=placement,
        contiguous=asked.contiguous,
        time_unit=time_unit,
        elapsed_s=elapsed_s,
        certificate=certificate,
        compared=compare(problem, placement, own) if asked.compare else None,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}") from error
