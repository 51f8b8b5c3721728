"""Asks a server with the kserve package's clients, unmodified; test_kserve_client.py runs it in its own environment.

    python ask_kserve.py http://127.0.0.1:8000 127.0.0.1:8001

The server holds `plus`: FP32 x, [n, 3] -> y = x + 1. Prints a line for each way that was right; ends with 1 otherwise.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelMetadataRequest, ServerMetadataRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput

ARRAY = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)


def asked(*, binary: bool, outputs: bool | None = None) -> InferRequest:
    """A request, its data in JSON (or typed contents) or in bytes; `outputs`: whether they shall come as bytes."""
    sent = InferInput("x", list(ARRAY.shape), "FP32")
    sent.set_data_from_numpy(ARRAY, binary_data=binary)
    wanted = None if outputs is None else [RequestedOutput("y", {"binary_data": outputs})]
    return InferRequest("plus", [sent], request_id="q1", request_outputs=wanted)


def check(way: str, found: object, expected: object) -> None:
    """End where they differ."""
    if found != expected:
        sys.exit(f"{way}: {found!r} instead of {expected!r}")
    sys.stdout.write(way + "\n")


def answered(response: object) -> tuple[str, str, list[list[float]]]:
    """What an answer says."""
    return response.id, response.model_name, response.outputs[0].as_numpy().tolist()  # type: ignore[attr-defined]


async def rest(url: str, right: object) -> None:
    """The REST client."""
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    check("REST, live", await client.is_server_live(url), True)
    check("REST, ready", await client.is_server_ready(url), True)
    check("REST, the model is ready", await client.is_model_ready(url, "plus"), True)
    check("REST, another one is not", await client.is_model_ready(url, "nobody"), False)
    for binary in (False, True):
        for outputs in (None, False, True):
            found = await client.infer(url, asked(binary=binary, outputs=outputs), model_name="plus")
            check(f"REST, bytes in {binary}, bytes out {outputs}", answered(found), right)
    await client.close()


async def rpc(address: str, right: object) -> None:
    """The gRPC client; metadata by its stub, because the client has no method for it."""
    async with InferenceGRPCClient(address) as client:
        check("gRPC, live", await client.is_server_live(), True)
        check("gRPC, ready", await client.is_server_ready(), True)
        check("gRPC, the model is ready", await client.is_model_ready("plus"), True)
        for binary in (False, True):
            check(f"gRPC, bytes in {binary}", answered(await client.infer(asked(binary=binary))), right)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        server = await stub.ServerMetadata(ServerMetadataRequest())
        model = await stub.ModelMetadata(ModelMetadataRequest(name="plus"))
        shapes = [(one.name, one.datatype, list(one.shape)) for one in (*model.inputs, *model.outputs)]
        check("gRPC, metadata", (server.name, shapes), ("noria", [(name, "FP32", [-1, 3]) for name in "xy"]))


async def main(url: str, address: str) -> None:
    """Both."""
    right = ("q1", "plus", (ARRAY + 1).tolist())
    await rest(url, right)
    await rpc(address, right)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
