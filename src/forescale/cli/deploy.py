"""``forescale deploy``, ``undeploy`` and ``status``."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options, rollouts
from forescale.cli.console import console, print_json, table
from forescale.cli.console import status as spinner
from forescale.cli.models import connect
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import RenderableType

    from forescale.api.client import Client

_REFRESH_S = 1.0

Model = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="VERSION: a number or an alias.")]
Least = Annotated[
    int, typer.Option("--min", min=0, metavar="N", help="Replicas at least. 0: none while nothing is asked.")
]
Most = Annotated[
    int | None, typer.Option("--max", min=1, metavar="N", help="Replicas at most. Default: as many as --min.")
]
Latency = Annotated[
    float | None,
    typer.Option("--latency-ms", min=0.001, metavar="MS", help="In which requests are to be answered."),
]
Priority = Annotated[
    int,
    typer.Option(
        "--priority",
        min=1,
        max=1000,
        metavar="N",
        help="Class, from 1 (first) on, in which models get replicas when there is no room for all.",
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(
        "--max-batch", min=1, metavar="N", help="Most rows of a request and of a batch. Default: 32."
    ),
]
MaxWait = Annotated[
    float | None,
    typer.Option(
        "--max-wait-ms",
        min=0.0,
        metavar="MS",
        help="How long a batch waits for more rows though a replica is free. Default: not at all.",
    ),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        "--timeout-s",
        min=0.001,
        metavar="S",
        help="When requests that name no time are refused. Default: 30.",
    ),
]
Queue = Annotated[
    int | None, typer.Option("--queue", min=1, metavar="N", help="Most requests that wait. Default: 10000.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Most threads of a replica on CPUs. Default: as many as its device has cores.",
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Return when it serves, or say why it cannot.")]
Timeout = Annotated[
    float, typer.Option("--wait-s", min=0.1, metavar="S", help="Longest wait of --wait, in seconds.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Keep showing it, until Ctrl-C.")]


def deploy(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    context: typer.Context,
    model: Model,
    min: Least = 1,  # noqa: A002 - the option's name
    max: Most = None,  # noqa: A002
    latency_ms: Latency = None,
    priority: Priority = 10,
    max_batch: MaxBatch = None,
    max_wait_ms: MaxWait = None,
    timeout_s: RequestTimeout = None,
    queue: Queue = None,
    threads: Threads = None,
    canary: rollouts.Canary = None,
    shadow: rollouts.Shadow = None,
    blue_green: rollouts.BlueGreen = False,
    stage_s: rollouts.StageTime = None,
    proof_s: rollouts.ProofTime = 300.0,
    min_requests: rollouts.MinRequests = 100,
    patience_s: rollouts.Patience = 3600.0,
    max_errors: rollouts.MaxErrors = "1%",
    max_slowdown: rollouts.MaxSlowdown = 1.5,
    check: rollouts.CheckName = None,
    manual: rollouts.Manual = False,
    wait: Wait = False,
    wait_s: Timeout = 300.0,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Serves a version of a model, in place of the one that is served; no request is lost."""
    rollout = rollouts.wanted(canary=canary, shadow=shadow, blue_green=blue_green)
    rollouts.refuse_others(context, is_rollout=rollout is not None)
    with connect(url) as client:
        name, version = _reference(client, model)
        if rollout is not None:
            rollouts.roll_out(
                client,
                name,
                version,
                rollout,
                wait_s=wait_s if wait else None,
                json=json,
                stage_s=stage_s,
                proof_s=proof_s,
                min_requests=min_requests,
                patience_s=patience_s,
                max_error_fraction=rollouts.share(max_errors, "--max-errors"),
                max_slowdown=max_slowdown,
                check=check,
                is_manual=manual,
            )
            return
        deployment = client.deploy(
            name,
            version,
            min_replicas=min,
            max_replicas=max,
            latency_ms=latency_ms,
            priority=priority,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            timeout_s=timeout_s,
            queue=queue,
            max_threads=threads,
        )
        label = f"{name}@{deployment['version']}"
        if wait:
            with spinner() as say:
                said = ""
                for deployment in client.wait(name, wait_s):
                    if said != (said := f"{label}: {_progress(deployment)}"):
                        say(said)
    if json:
        print_json(deployment)
    elif wait:
        console().print(
            f"{label} serves at {client.url}/v2/models/{name}/infer", markup=False, soft_wrap=True
        )
    else:
        more = deployment["short"] or "see forescale status"
        console().print(f"{label} is deployed; {more}", markup=False, soft_wrap=True)


def undeploy(name: Annotated[str, typer.Argument(metavar="NAME")], url: options.Url = None) -> None:
    """Stops serving a model; requests under way are answered."""
    with connect(url) as client:
        client.undeploy(name)
    console().print(f"{name} is not deployed any more", markup=False)


def status(url: options.Url = None, watch: Watch = False, json: options.Json = False) -> None:
    """What is deployed, how far it is, and what its replicas do."""
    with connect(url) as client:
        if json:
            print_json({"deployments": client.deployments()})
            return
        out = console()
        if not watch:
            out.print(_picture(client))
            return
        if not out.is_terminal:
            raise typer.BadParameter("--watch needs a terminal; ask again and again with --json instead")
        from rich.live import Live

        with Live(_picture(client), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(_REFRESH_S)
                live.update(_picture(client), refresh=True)


def _reference(client: Client, text: str) -> tuple[str, str]:
    name, at, version = text.partition("@")
    if at and name and version:
        return name, version
    newest = client.model(name)["versions"][-1]["version"]
    raise InvalidInput(f"which version of {name}? the newest is {name}@{newest}")


def _progress(deployment: dict[str, Any]) -> str:
    replicas = [replica for replica in deployment["replicas"] if replica["version"] == deployment["version"]]
    ready = sum(replica["state"] == "serving" for replica in replicas)
    short = f"; {deployment['short']}" if deployment["short"] else ""
    return f"{deployment['state']}, {ready} of {deployment['scaling']['wanted']} replicas are ready{short}"


def _figure(per_s: float | None) -> str:
    return "" if per_s is None else f"{per_s:.3g}" if per_s < 1000 else f"{per_s:.0f}"


def _picture(client: Client) -> RenderableType:
    from rich.console import Group

    deployments = client.deployments()
    if not deployments:
        return f"nothing is deployed at {client.url}"
    shown = table(
        "Deployments",
        "model",
        "state",
        ">replicas",
        ">rows/s",
        ">expected",
        ">per replica",
        ">waiting",
        ">in flight",
        ">ok",
        ">refused",
        ">failed",
        "why",
    )
    replicas = table(
        "Replicas",
        "replica",
        "device",
        "process",
        ">others in it",
        ">threads",
        "state",
        ">lost",
        "last cause",
    )
    held = Counter(replica["process"] for found in deployments for replica in found["replicas"])
    for found in deployments:
        ready = sum(replica["state"] == "serving" for replica in found["replicas"])
        counts = found["requests"]
        shown.add_row(
            f"{found['model']}@{found['version']}",
            found["state"],
            f"{ready}/{found['scaling']['wanted']}",
            *(_figure(found["scaling"][name]) for name in ("rows_per_s", "peak_per_s", "capacity_per_s")),
            *(str(counts.get(name, 0)) for name in ("waiting", "in_flight", "ok", "refused", "failed")),
            found["error"] or found["short"] or found["scaling"]["reason"],
        )
        for replica in found["replicas"]:
            replicas.add_row(
                replica["name"],
                replica["device"],
                replica["process"] or "",
                str((replica["process"] and held[replica["process"]] - 1) or ""),
                str(replica["threads"] or ""),
                replica["state"],
                str(replica["attempts"] or ""),
                replica["cause"] or "",
            )
    rolled_out = rollouts.picture(deployments)
    return Group(shown, rolled_out, replicas) if rolled_out else Group(shown, replicas)
