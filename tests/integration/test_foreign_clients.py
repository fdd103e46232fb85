"""Clients that are not ours, unmodified: NVIDIA's ``tritonclient`` and KServe's Python SDK."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from served_app import served_app

X = np.array([[1, 2], [np.nan, np.inf]], np.float32)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_app(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        yield client


def tensor(values: np.ndarray, *, name: str = "x", binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), "FP32" if values.dtype == np.float32 else "INT32")
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def test_triton_asks_what_there_is(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("double", "7")
    assert not client.is_model_ready("absent")
    assert client.get_server_metadata()["name"] == "forescale"
    metadata = client.get_model_metadata("double")
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_triton_infers(
    client: triton.InferenceServerClient, *, binary_in: bool, binary_out: bool | None
) -> None:
    values = X if binary_in and binary_out is not False else np.array([[1, 2], [3.5, -4]], np.float32)
    wanted = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    answer = client.infer("double", [tensor(values, binary=binary_in)], outputs=wanted, request_id="7")
    np.testing.assert_array_equal(answer.as_numpy("y"), values * np.float32(2))
    told = answer.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("7", "double", "2")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(client: triton.InferenceServerClient, algorithm: str) -> None:
    values = np.zeros((500, 2), np.float32)
    answer = client.infer(
        "double",
        [tensor(values[:16])],
        model_version="1",
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
        priority=1,
        timeout=5_000_000,
    )
    np.testing.assert_array_equal(answer.as_numpy("y"), values[:16])


def test_triton_asks_without_waiting(client: triton.InferenceServerClient) -> None:
    pending = [client.async_infer("double", [tensor(X)]) for _ in range(3)]
    for one in pending:
        np.testing.assert_array_equal(one.get_result().as_numpy("y"), X * np.float32(2))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("values", "name", "where", "told"),
    [
        (np.ones((1, 3), np.float32), "x", ("double", ""), "[any, 2], not [1, 3]"),
        (np.ones((2,), np.float32), "x", ("double", ""), "[any, 2], not [2]"),
        (np.ones((1, 2), np.int32), "x", ("double", ""), "takes FP32, not 'INT32'"),
        (np.ones((1, 2), np.float32), "z", ("double", ""), "'x' is missing"),
        (np.ones((1, 2), np.float32), "x", ("double", "7"), "not '7'"),
        (np.ones((1, 2), np.float32), "x", ("absent", ""), "no model 'absent'"),
    ],
)
def test_triton_is_told_what_is_wrong(
    client: triton.InferenceServerClient,
    values: np.ndarray,
    name: str,
    where: tuple[str, str],
    told: str,
    *,
    binary: bool,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(where[0], [tensor(values, name=name, binary=binary)], model_version=where[1])
    assert told in str(caught.value)
    assert caught.value.status() in {"400", "404"}


def test_triton_asks_for_an_output_that_is_not_there(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no output 'z'"):
        client.infer("double", [tensor(X)], outputs=[triton.InferRequestedOutput("z")])


KSERVE = "kserve==0.21.0"


@pytest.fixture(scope="session")
def kserve_python(request: pytest.FixtureRequest) -> Path:
    """Python of an environment with KServe's SDK, whose pins are older than ours; made once, then kept."""
    folder = request.config.cache.mkdir(KSERVE)
    python, made = folder / "bin" / "python", folder / "made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "-q", "--no-compile", "--retries", "1", KSERVE]
        try:
            subprocess.run(install, check=True, timeout=200, capture_output=True, text=True)
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            pytest.skip(f"{KSERVE} cannot be installed: {said[-1]}")
        made.touch()
    return python


def test_kserves_sdk_works(url: str, kserve_python: Path) -> None:
    script = Path(__file__).with_name("kserve_script.py")
    command = [kserve_python, script, url]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert [told[name] for name in ("live", "ready", "double", "absent")] == [True, True, True, False]
    for name in ("json", "binary", "version", "wanted", "wanted as bytes"):
        assert told[name] == {"y": [[2, 4], [7, -8]]}, name
    for name, words in {
        "shape": "[any, 2], not [1, 4]",
        "shape of bytes": "[any, 2], not [1, 4]",
        "datatype": "takes FP32, not 'INT32'",
        "input": "'x' is missing",
        "output": "no output 'z'",
        "no version": "not '7'",
        "no model": "no model 'absent'",
    }.items():
        assert words in told[name]
        assert "404 Not Found" in told[name] if name.startswith("no ") else "400 Bad Request" in told[name]
