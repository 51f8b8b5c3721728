"""What the small servers beside this file share: the model, opened as everyone opens it, and one JSON row in and out.

Runs in a peer's own environment: numpy, onnxruntime and orjson only. Not here: any server.
"""

import os

import numpy as np
import onnxruntime

PORT = int(os.environ.get("PORT", "0"))
MODEL = os.environ.get("MODEL", "")
NAME = "small"


def open_session():
    """One thread and no spinning: the server has one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def row_of(request):
    """The row of a v2 request."""
    tensor = request["inputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def reply(scores):
    """A v2 answer."""
    tensor = {"name": "y", "shape": list(scores.shape), "datatype": "FP32", "data": scores.ravel().tolist()}
    return {"model_name": NAME, "outputs": [tensor]}
