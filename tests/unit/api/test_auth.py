"""Tokens: who has none is told so and changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from forescale.api.auth import TokenCheck, read_tokens
from forescale.core.errors import InvalidInput

TOKENS = ("correct-horse-battery", "the-next-token-to-come")


async def answered(path: str, authorization: str | None) -> int:
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        sent.append({"status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any: ...

    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    await TokenCheck(app, TOKENS)({"type": "http", "path": path, "headers": headers}, receive, send)
    if sent[0]["status"] == 401:
        assert b"FORESCALE_TOKEN" in sent[1]["body"]
        assert (b"www-authenticate", b'Bearer realm="forescale"') in sent[0]["headers"]
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer correct-horse-batter", 401),
        ("Bearer \xff\xfe", 401),
        ("Basic correct-horse-battery", 401),
        ("correct-horse-battery", 401),
        ("Bearer correct-horse-battery", 200),
        ("bearer the-next-token-to-come", 200),
    ],
)
def test_only_those_with_a_token_get_in(authorization: str | None, status: int) -> None:
    assert asyncio.run(answered("/api/v1/models", authorization)) == status
    assert asyncio.run(answered("/openapi.json", authorization)) == 200


def test_tokens_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("\n".join(("", *TOKENS, "")))
    assert read_tokens(file) == TOKENS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n\n", "holds no token"),
        (b"too-short", "token 1 must be at least 16"),
        (b"correct-horse-battery\nwith a space between", "token 2 must be"),
        ("s\u00e4mtliche-token-umlaute".encode(), "token 1 must be"),
        (b"\xff\xfe\x00\x01", "not a text file"),
    ],
)
def test_files_that_hold_no_tokens_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=told):
        read_tokens(file)
    with pytest.raises(InvalidInput, match="No such file"):
        read_tokens(tmp_path / "absent")
