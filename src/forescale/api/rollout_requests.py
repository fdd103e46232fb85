"""What a client asks about rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any
from urllib.parse import quote

from forescale.core.errors import ServerFailed

Object = dict[str, Any]
_POLL_S = 20.0


class RolloutRequests(ABC):
    """Part of ``Client``; raises what its other methods do."""

    _user: str
    _timeout_s: float

    @abstractmethod
    def _ask(self, method: str, path: str, **more: Any) -> Any: ...

    def roll_out(
        self,
        model: str,
        version: int | str,
        strategy: str,
        shares: Sequence[float] = (),
        **limits: Any,
    ) -> Object:
        """Let a version take over from the deployed one; the rollout.

        Args:
            strategy: ``canary``, ``shadow`` or ``blue-green``.
            shares: of requests (copies), from 0 to 1, stage by stage.
            limits: ``stage_s``, ``proof_s``, ``min_requests``, ``patience_s``, ``max_error_fraction``,
                ``max_slowdown``, ``check`` and ``is_manual``, as docs/serving.md describes them.
        """
        wanted = {"version": version, "strategy": strategy, "shares": list(shares), **limits}
        return self._ask("POST", f"{_of(model)}/rollout", params={"by": self._user}, json=wanted)

    def rollout(self, model: str) -> Object:
        """A model's rollout that runs, or else its last one."""
        return self._ask("GET", f"{_of(model)}/rollout")

    def promote(self, model: str, *, fully: bool = False) -> Object:
        """Let a rollout go on to its next stage, or (fully) end with the new version; the rollout."""
        asked = {"is_full": fully}
        return self._ask("POST", f"{_of(model)}/promote", params={"by": self._user}, json=asked)

    def roll_back(self, model: str) -> int:
        """Go back to the version before, in a rollout or after it; the number of that version."""
        return self._ask("POST", f"{_of(model)}/rollback", params={"by": self._user})["version"]

    def wait_for_rollout(self, model: str, timeout_s: float = 300.0) -> Iterator[Object]:
        """A model's rollout now and whenever it has changed, until the new version is promoted.

        Raises:
            ServerFailed: it is rolled back, or has not ended in time.
        """
        until_s = monotonic() + timeout_s
        patience: Object = {"timeout_s": 0.0}
        while True:
            found = self._ask(
                "GET", f"{_of(model)}/rollout", params=patience, timeout=self._timeout_s + _POLL_S
            )
            yield found
            label = f"{model}@{found['version']}"
            if found["state"] == "promoted":
                return
            if found["state"] == "rolled back":
                raise ServerFailed(f"{label} is rolled back: {found['reason']}")
            left_s = until_s - monotonic()
            if left_s <= 0:
                raise ServerFailed(f"{label} is still being rolled out after {timeout_s:g} s")
            patience = {"after": found["change"], "timeout_s": min(left_s, _POLL_S)}


def _of(model: str) -> str:
    return f"/deployments/{quote(model, safe='')}"
