"""``forescale devices``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from forescale.cli import options
from forescale.cli.console import console, fraction_bar, print_json, table
from forescale.cli.units import seconds, si, size

if TYPE_CHECKING:
    from forescale.core.cluster import Cluster, Device, Link


def devices(devices: options.Devices = None, json: options.Json = False) -> None:
    """The devices of this machine: measured speed and memory, and the links between them."""
    with fraction_bar("measuring") as progress:
        from forescale.profile.devices import core_sharing, find_cluster, measure_devices

        cluster = measure_devices(find_cluster(devices), progress=progress)
    if json:
        print_json(cluster_as_json(cluster))
        return
    _show(cluster)
    if (warning := core_sharing(cluster)) is not None:
        console(stderr=True).print(f"note: {warning}")


def cluster_as_json(cluster: Cluster) -> dict[str, object]:
    links = [{"between": pair, **asdict(link)} for pair, link in cluster.links.items()]
    return {
        "devices": [asdict(device) for device in cluster.devices],
        "default_link": asdict(cluster.default_link),
        "links": links,
    }


def _show(cluster: Cluster) -> None:
    found = table("Devices", "device", "kind", "cores", ">FLOP/s (float32)", ">memory bandwidth", ">memory")
    for device in cluster.devices:
        found.add_row(
            device.name,
            device.kind,
            _where(device),
            si(device.flops_per_s, "FLOP/s"),
            size(device.memory_bandwidth_bytes_per_s) + "/s",
            size(device.memory_bytes),
        )
    console().print(found)
    if len(cluster.devices) > 1:
        links = table("Links", "between", ">bandwidth", ">latency", "transfers")
        for pair, link in cluster.links.items():
            links.add_row(" and ".join(pair), *_link_cells(link))
        links.add_row("all others" if cluster.links else "all", *_link_cells(cluster.default_link))
        console().print(links)


def _where(device: Device) -> str:
    return ",".join(map(str, device.cores)) if device.cores else f"index {device.index}"


def _link_cells(link: Link) -> tuple[str, str, str]:
    how = "take both ends' compute time" if link.occupies_device else "overlap with compute"
    return size(link.bandwidth_bytes_per_s) + "/s", seconds(link.latency_s), how
