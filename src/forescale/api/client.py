"""A client for requests to models and for the management of what is served."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Self, cast
from urllib.parse import quote

import httpx
import numpy as np

from forescale.api.mlflow_models import SCHEME, fetched
from forescale.api.rollout_requests import RolloutRequests
from forescale.core.errors import (
    BadRequest,
    InvalidInput,
    ModelFailed,
    NotFound,
    NotServed,
    ServerFailed,
    TooBusy,
)
from forescale.engine.serve.arrays import DTYPES, Array, datatype_of
from forescale.engine.serve.formats import format_of
from forescale.registry.records import check_metrics

DEFAULT_URL = "http://127.0.0.1:8080"
_JSON_LENGTH = "Inference-Header-Content-Length"
_CHUNK_BYTES = 1 << 20
_POLL_S = 20.0

Object = dict[str, Any]
"""A JSON object, as docs/serving.md describes it."""


class Client(RolloutRequests):
    """Talks to one server.

    Args:
        url: of the server; None: what ``FORESCALE_URL`` says, or this machine's port 8080.
        timeout_s: longest wait for an answer; adding a model may take as long as it needs.
        user: who is written down for changes; None: the name of this process's user.
        token: shows the server that it is asked by who may; None: what ``FORESCALE_TOKEN`` says.

    Every method raises ``ServerFailed`` if the server cannot be reached or fails, and ``InvalidInput``
    (``NotFound``) if it refuses what it is asked.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout_s: float = 30.0,
        user: str | None = None,
        token: str | None = None,
    ) -> None:
        self.url = (url or os.environ.get("FORESCALE_URL") or DEFAULT_URL).rstrip("/")
        self._user = user or _user()
        self._timeout_s = timeout_s
        try:
            token = token or os.environ.get("FORESCALE_TOKEN")
            headers = {"authorization": f"Bearer {token}"} if token else {}
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers)
            if self._http.base_url.scheme not in {"http", "https"} or not self._http.base_url.host:
                raise httpx.InvalidURL("it must begin with http:// or https:// and a host")
        except httpx.InvalidURL as error:
            raise InvalidInput(f"{self.url!r} is not a server's URL: {error}") from error

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: int | str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """A model's outputs by name.

        Args:
            inputs: by name, each with a first axis of rows.
            version: None: the deployed one.
            priority: class, from 1 (first) on; 0: the model's own.
            timeout_s: an answer after that many seconds is of no use.

        Raises:
            BadRequest: the inputs do not fit the model.
            NotServed: nothing of that name is served.
            TooBusy: it could not be answered in time.
            ModelFailed: the model raised.
        """
        parameters: Object = {"binary_data_output": True, "priority": priority}
        if timeout_s is not None:
            parameters["timeout"] = max(1, round(timeout_s * 1e6))
        entries: list[Object] = []
        tail: list[bytes] = []
        for name, array in inputs.items():
            data = np.ascontiguousarray(array)
            described = {"name": name, "datatype": datatype_of(data), "shape": data.shape}
            entries.append({**described, "parameters": {"binary_data_size": data.nbytes}})
            tail.append(data.tobytes())
        head = json.dumps({"inputs": entries, "parameters": parameters}).encode()
        path = f"/v2/models/{_quoted(model)}" + ("" if version is None else f"/versions/{version}") + "/infer"
        answer = self._send(
            "POST", path, content=b"".join([head, *tail]), headers={_JSON_LENGTH: str(len(head))}
        )
        _raise_for_inference(answer)
        return _outputs(answer)

    def models(self) -> list[Object]:
        """All models with their versions' numbers, aliases and the deployed version."""
        return self._ask("GET", "/models")["models"]

    def model(self, model: str) -> Object:
        """A model's versions, aliases and the aliases' history."""
        return self._ask("GET", f"/models/{_quoted(model)}")

    def add_model(
        self,
        model: str,
        path: Path | str,
        *,
        format: str | None = None,  # noqa: A002 - the word for it
        options: Mapping[str, Any] | None = None,
        signature: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        commit: str | None = None,
    ) -> Object:
        """Add a file as a model's next version; the version.

        Args:
            path: of the file; or ``models:/NAME/NUMBER`` or ``models:/NAME@ALIAS`` of an MLflow registry,
                with the metrics and the commit that it knows, unless others are given.
            format: None: as the file's name ends.
            signature: ``inputs`` and ``outputs``, each a list of ``name``, ``datatype`` and ``shape`` (-1:
                any length), for formats whose files do not say it.
        """
        if str(path).startswith(SCHEME):
            with fetched(str(path)) as found:
                return self.add_model(
                    model,
                    found.path,
                    format=format or found.format,
                    options=options,
                    signature=signature,
                    metrics={**found.metrics, **(metrics or {})},
                    commit=commit or found.commit,
                )
        path = Path(path)
        check_metrics(metrics or {})
        query: dict[str, str] = {
            "format": format or format_of(path),
            "options": json.dumps(dict(options or {})),
            "metrics": json.dumps(dict(metrics or {})),
            "by": self._user,
        }
        if signature is not None:
            query["signature"] = json.dumps(dict(signature))
        if commit is not None:
            query["commit"] = commit
        try:
            size_bytes = path.stat().st_size
            with path.open("rb") as file:
                headers = {"content-type": "application/octet-stream", "content-length": str(size_bytes)}
                content = iter(lambda: file.read(_CHUNK_BYTES), b"")
                timeout = httpx.Timeout(self._timeout_s, read=None)
                where = f"/models/{_quoted(model)}/versions"
                return self._ask(
                    "POST", where, params=query, content=content, headers=headers, timeout=timeout
                )
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error

    def set_alias(self, model: str, alias: str, version: int | str) -> Object:
        """Let an alias point to a version (or to where another alias points)."""
        return self._ask("PUT", self._alias(model, alias), json={"version": version})

    def remove_alias(self, model: str, alias: str) -> Object:
        """Take an alias away."""
        return self._ask("DELETE", self._alias(model, alias))

    def deploy(  # noqa: PLR0913 - what a deployment says, each by its name
        self,
        model: str,
        version: int | str,
        *,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        latency_ms: float | None = None,
        priority: int = 10,
        max_batch: int | None = None,
        max_wait_ms: float | None = None,
        timeout_s: float | None = None,
        queue: int | None = None,
        max_threads: int | None = None,
    ) -> Object:
        """Ask for a version to be served; the deployment, with its ``state``.

        Args:
            min_replicas: 0: none while nothing is asked of it.
            max_replicas: None: as many as at least, and at least one.
            latency_ms: in which requests are to be answered.
            priority: class, from 1 (first) on, in which models get replicas when there is no room for all.
            max_batch: most rows of a request and of a batch; None: 32.
            max_wait_ms: how long a batch waits for more rows though a replica is free; None: not at all.
            timeout_s: after which requests that name no time are refused; None: 30.
            queue: most requests that wait; None: 10,000.
            max_threads: most threads of a replica on CPUs; None: as many as its device has cores.
        """
        wanted = {
            "version": version,
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "latency_ms": latency_ms,
            "priority": priority,
            "max_batch": max_batch,
            "max_wait_ms": max_wait_ms,
            "timeout_s": timeout_s,
            "queue": queue,
            "max_threads": max_threads,
        }
        return self._ask("PUT", f"/deployments/{_quoted(model)}", params={"by": self._user}, json=wanted)

    def undeploy(self, model: str) -> None:
        """Ask for a model not to be served any longer; requests under way are answered."""
        self._ask("DELETE", f"/deployments/{_quoted(model)}", params={"by": self._user})

    def deployments(self) -> list[Object]:
        """What is deployed, and how far it is."""
        return self._ask("GET", "/deployments")["deployments"]

    def wait(self, model: str, timeout_s: float = 300.0) -> Iterator[Object]:
        """A model's deployment now and whenever it has changed, until it serves.

        Raises:
            ServerFailed: its replicas cannot be started, or it does not serve in time.
        """
        until_s = monotonic() + timeout_s
        where = f"/deployments/{_quoted(model)}"
        found = self._ask("GET", where)
        while True:
            yield found
            if found["state"] == "serving":
                return
            if found["state"] == "failing":
                raise ServerFailed(f"{model}@{found['version']} cannot be served: {found['error']}")
            left_s = until_s - monotonic()
            if left_s <= 0:
                raise ServerFailed(f"{model}@{found['version']} does not serve after {timeout_s:g} s")
            patience = {"after": found["change"], "timeout_s": min(left_s, _POLL_S)}
            found = self._ask("GET", where, params=patience, timeout=self._timeout_s + _POLL_S)

    def events(self, after: int = 0) -> list[Object]:
        """What happened after the event of that number, oldest first."""
        return self._ask("GET", "/events", params={"after": after})["events"]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _alias(self, model: str, alias: str) -> str:
        return f"/models/{_quoted(model)}/aliases/{_quoted(alias)}?by={quote(self._user)}"

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        answer = self._send(method, f"/api/v1{path}", **more)
        if answer.is_success:
            return answer.json()
        message = _message(answer)
        if answer.status_code == NotServed.status:
            raise NotFound(message)
        if answer.is_client_error:
            raise InvalidInput(message)
        raise ServerFailed(f"{self.url}: {message}")

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **more)
        except httpx.ConnectError as error:
            raise ServerFailed(
                f"no server at {self.url}: start one with 'forescale serve', "
                "or say where it is with --url or FORESCALE_URL"
            ) from error
        except httpx.TimeoutException as error:
            raise ServerFailed(f"{self.url} did not answer in time") from error
        except httpx.HTTPError as error:
            raise ServerFailed(f"{self.url}: {error}") from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in some containers
        return f"user {os.getuid()}"


def _quoted(name: str) -> str:
    if not name:
        raise InvalidInput("a model's name is missing")
    return quote(name, safe="")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {answer.status_code}; is this a Forescale server?"


def _raise_for_inference(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    message, status = _message(answer), answer.status_code
    if status == NotServed.status:
        raise NotServed(message)
    if status == TooBusy.status:
        raise TooBusy(message, retry_after_s=float(answer.headers.get("retry-after", 1)))
    if answer.is_client_error:
        raise BadRequest(message, status=status)
    raise ModelFailed(message)


def _outputs(answer: httpx.Response) -> dict[str, Array]:
    body = answer.content
    at = int(answer.headers[_JSON_LENGTH])
    found: dict[str, Array] = {}
    for entry in cast(Object, json.loads(body[:at]))["outputs"]:
        dtype, size_bytes = DTYPES[entry["datatype"]], entry["parameters"]["binary_data_size"]
        values = np.frombuffer(body, dtype, count=size_bytes // dtype.itemsize, offset=at)
        found[entry["name"]] = values.reshape(entry["shape"])
        at += size_bytes
    return found
