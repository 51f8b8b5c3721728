"""Cases about the server and its models: health, metadata, readiness, versions."""

from __future__ import annotations

import orjson

from benchmarks.conformance.suite import Case, expect, fine, same
from benchmarks.conformance.wire import NUMPY, Server, samples, tensor


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case("health", "live is 200", lambda server: _status(server, "/v2/health/live")),
        Case("health", "ready is 200", lambda server: _status(server, "/v2/health/ready")),
        Case("health", "live has the body {live: true}", _live_body, is_open=True),
        Case("health", "a model is ready", lambda server: _status(server, "/v2/models/same_fp32/ready")),
        Case("health", "ready names the model", _ready_body, is_open=True),
        Case("health", "an unknown model is not ready", lambda server: _unknown(server, "/v2/models/nobody/ready")),
        Case("metadata", "the server's name, version, extensions", _server),
        Case("metadata", "the server names the binary extension", _extensions, is_open=True),
        Case("metadata", "an unknown model is an error", lambda server: _unknown(server, "/v2/models/nobody")),
        Case("metadata", "the error has the protocol's form", _error_form),
        Case("metadata", "name and platform of a model", _named),
        Case("metadata", "two inputs and two outputs", _two),
        Case("metadata", "fixed sizes are numbers", lambda server: _shape(server, "fixed", [2, 3])),
        Case("metadata", "free sizes are -1", lambda server: _shape(server, "free", [-1, -1])),
        Case("versions", "metadata lists versions as strings", _versions),
        Case("versions", "metadata of a version", _of_version),
        Case("versions", "a version is ready", _version_ready),
        Case("versions", "a version infers and says so", _version_infers),
        Case("versions", "without a version one is chosen and named", _chosen),
        Case("versions", "an unknown version's metadata is an error", lambda server: _missing(server, "")),
        Case("versions", "an unknown version is not ready", lambda server: _missing(server, "/ready")),
        Case("versions", "an unknown version does not infer", _missing_infer),
        Case("versions", "a version that is no number is an error", _odd_version),
    ]
    for datatype in NUMPY:
        found.append(
            Case("metadata", f"datatype and shape of {datatype}", lambda server, one=datatype: _typed(server, one))
        )
    return found


def _status(server: Server, path: str) -> None:
    status = server.get(path).status_code
    expect(status == 200, f"status {status}")


def _unknown(server: Server, path: str) -> None:
    status = server.get(path).status_code
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _live_body(server: Server) -> None:
    expect(server.get("/v2/health/live").json() == {"live": True}, "it has another body")


def _ready_body(server: Server) -> None:
    content = server.get("/v2/models/same_fp32/ready").json()
    expect(content == {"name": "same_fp32", "ready": True}, str(content))


def _server(server: Server) -> None:
    content = server.get("/v2").json()
    expect(isinstance(content["name"], str) and isinstance(content["version"], str), str(content))
    expect(all(isinstance(one, str) for one in content["extensions"]), "extensions are not strings")


def _extensions(server: Server) -> None:
    found = server.get("/v2").json()["extensions"]
    expect("binary_tensor_data" in found, f"extensions {found}")


def _error_form(server: Server) -> None:
    content = server.get("/v2/models/nobody").json()
    expect(isinstance(content.get("error"), str), str(content))


def _named(server: Server) -> None:
    content = server.get("/v2/models/same_fp32").json()
    expect(content["name"] == "same_fp32" and isinstance(content["platform"], str), str(content))


def _two(server: Server) -> None:
    content = server.get("/v2/models/add_sub").json()
    expect({one["name"] for one in content["inputs"]} == {"a", "b"}, "inputs")
    expect({one["name"] for one in content["outputs"]} == {"sum", "difference"}, "outputs")


def _shape(server: Server, model: str, shape: list[int]) -> None:
    content = server.get(f"/v2/models/{model}").json()
    for one in (*content["inputs"], *content["outputs"]):
        expect([int(size) for size in one["shape"]] == shape, f"{one['name']} has the shape {one['shape']}")


def _typed(server: Server, datatype: str) -> None:
    content = server.get(f"/v2/models/same_{datatype.lower()}").json()
    for one in (*content["inputs"], *content["outputs"]):
        expect(one["datatype"] == datatype, f"{one['name']} is {one['datatype']}")
        expect(list(one["shape"]) == [-1, 3], f"{one['name']} has the shape {one['shape']}")


def _version(server: Server) -> str:
    versions = server.get("/v2/models/same_fp32").json().get("versions") or ["1"]
    return str(versions[0])


def _versions(server: Server) -> None:
    versions = server.get("/v2/models/same_fp32").json()["versions"]
    expect(versions and all(isinstance(one, str) for one in versions), str(versions))


def _of_version(server: Server) -> None:
    content = server.get(f"/v2/models/same_fp32/versions/{_version(server)}").json()
    expect(content["name"] == "same_fp32", str(content)[:80])


def _version_ready(server: Server) -> None:
    _status(server, f"/v2/models/same_fp32/versions/{_version(server)}/ready")


BODY = orjson.dumps({"inputs": [tensor("x", "FP32", samples("FP32"))]})


def _version_infers(server: Server) -> None:
    version = _version(server)
    reply = fine(server.post(f"/v2/models/same_fp32/versions/{version}/infer", BODY))
    expect(reply.content.get("model_version") == version, f"model_version {reply.content.get('model_version')}")
    same(reply.outputs.get("y"), samples("FP32"))


def _chosen(server: Server) -> None:
    reply = fine(server.post("/v2/models/same_fp32/infer", BODY))
    expect(reply.content.get("model_name") == "same_fp32", "another model_name")
    expect(isinstance(reply.content.get("model_version"), str), "no model_version")


def _missing(server: Server, end: str) -> None:
    _unknown(server, f"/v2/models/same_fp32/versions/999999{end}")


def _missing_infer(server: Server) -> None:
    status = server.post("/v2/models/same_fp32/versions/999999/infer", BODY).status
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _odd_version(server: Server) -> None:
    status = server.post("/v2/models/same_fp32/versions/newest/infer", BODY).status
    expect(400 <= status < 500, f"status {status}, expected 4xx")
