"""Which version of a model answers a request that names none. Pure: chance is an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import fsum

ROUTE_HEADER = b"x-forescale-route"
"""Its value may choose a version, as the route says."""

SESSION_HEADER = b"x-forescale-session"
"""Requests with the same value are answered by the same version, as long as no share becomes smaller."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the requests to one model go.

    Attributes:
        version: gets whatever nothing else is said about.
        shares: of those requests, from 0 to 1, that go to other versions instead.
        header: versions by the value of ``ROUTE_HEADER``.
        shadows: versions that get copies of a share of what others answer; nobody sees their answers.

    Raises:
        ValueError: a share is out of range, or all together are more than everything.
    """

    version: str
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    header: Mapping[str, str] = field(default_factory=dict[str, str])
    shadows: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for share in (*self.shares.values(), *self.shadows.values()):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"a share is {share}, not from 0 to 1")
        if fsum(self.shares.values()) > 1.0 + _ROUNDING:
            raise ValueError(f"the shares are {fsum(self.shares.values())} together")

    def choose(self, header: str | None, chance: float) -> str:
        """The version for a request.

        Args:
            header: what the request says in ``ROUTE_HEADER``.
            chance: uniform from 0 to 1 (excluded).
        """
        if header is not None and header in self.header:
            return self.header[header]
        for version, share in self.shares.items():
            if chance < share:
                return version
            chance -= share
        return self.version

    def choose_by(self, headers: Mapping[bytes, bytes], chance: Callable[[], float]) -> str:
        """The version for a request with these headers; ``chance`` is asked where they do not decide."""
        if not (self.shares or self.header):
            return self.version
        header, session = headers.get(ROUTE_HEADER), headers.get(SESSION_HEADER)
        return self.choose(
            None if header is None else header.decode("latin-1"),
            chance() if session is None else self._place(session),
        )

    def _place(self, session: bytes) -> float:
        """From 0 to 1 (excluded), like chance; another place where other versions are new."""
        salt = "/".join(self.shares).encode()
        return int.from_bytes(blake2b(session, digest_size=6, key=salt[:64]).digest()) / (1 << 48)

    def copies(self, answered_by: str, chance: float) -> tuple[str, ...]:
        """The versions that get a copy of a request which another one answers; ``chance`` as above."""
        return tuple(
            version for version, share in self.shadows.items() if version != answered_by and chance < share
        )

    def versions(self) -> frozenset[str]:
        """All that it may send requests to."""
        return frozenset({self.version, *self.shares, *self.header.values(), *self.shadows})

    def without(self, version: str, heir: str) -> Route:
        """The same without a version that is served no more; ``heir`` gets what it was the default for."""
        return Route(
            version=heir if self.version == version else self.version,
            shares={each: share for each, share in self.shares.items() if each != version},
            header={value: each for value, each in self.header.items() if each != version},
            shadows={each: share for each, share in self.shadows.items() if each != version},
        )
