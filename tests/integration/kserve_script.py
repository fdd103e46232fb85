"""What KServe's SDK gets from a server, as JSON; runs in an environment that has the SDK."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import (  # pyright: ignore[reportMissingImports]
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.infer_type import RequestedOutput  # pyright: ignore[reportMissingImports]

X = np.array([[1, 2], [3.5, -4]], np.float32)


def request(
    values: np.ndarray, *, name: str = "x", binary: bool = False, outputs: tuple[str, ...] = ()
) -> Any:
    tensor = InferInput(name, list(values.shape), "FP32" if values.dtype == np.float32 else "INT32")
    tensor.set_data_from_numpy(values, binary_data=binary)
    parameters = {"binary_data_output": binary}
    wanted = [RequestedOutput(output, parameters={"binary_data": binary}) for output in outputs]
    return InferRequest(
        model_name="double", infer_inputs=[tensor], parameters=parameters, request_outputs=wanted
    )


async def told(client: Any, url: str, *arguments: Any, **more: Any) -> Any:
    """Outputs, or the error that it raised."""
    try:
        answer = await client.infer(url, *arguments, **more)
    except Exception as error:  # noqa: BLE001 - the SDK raises what it likes
        return f"{type(error).__name__}: {error}"
    return {output.name: output.as_numpy().tolist() for output in answer.outputs}


async def look(url: str) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    try:
        return {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "double": await client.is_model_ready(url, "double"),
            "absent": await client.is_model_ready(url, "absent"),
            "json": await told(client, url, request(X), "double"),
            "version": await told(client, url, request(X), "double/versions/1"),
            "binary": await told(client, url, request(X, binary=True), "double"),
            "wanted": await told(client, url, request(X, outputs=("y",)), "double"),
            "wanted as bytes": await told(client, url, request(X, binary=True, outputs=("y",)), "double"),
            "shape": await told(client, url, request(X.reshape(1, 4)), "double"),
            "shape of bytes": await told(client, url, request(X.reshape(1, 4), binary=True), "double"),
            "datatype": await told(client, url, request(X.astype(np.int32)), "double"),
            "input": await told(client, url, request(X, name="z"), "double"),
            "output": await told(client, url, request(X, outputs=("z",)), "double"),
            "no version": await told(client, url, request(X), "double/versions/7"),
            "no model": await told(client, url, request(X), "absent"),
        }
    finally:
        await client.close()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(look(sys.argv[1]))))
