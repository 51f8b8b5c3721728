"""PyTriton: NVIDIA's Triton in front of a Python function, with its dynamic batching."""

import os
import sysconfig

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from scoring import NAME, PORT, open_session

session = open_session()
width, made = session.get_inputs()[0].shape[1], session.get_outputs()[0].shape[1]


@batch
def infer(x):
    """A batch of rows."""
    return {"y": session.run(None, {"x": x})[0]}


if __name__ == "__main__":
    # Triton's own Python must be this one's library, not an older one of the system with the same minor version.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    ports = {"http_port": PORT, "grpc_port": PORT + 1, "metrics_port": PORT + 2}
    with Triton(config=TritonConfig(http_address="127.0.0.1", grpc_address="127.0.0.1", **ports)) as triton:
        triton.bind(
            model_name=NAME,
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(width,))],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(made,))],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=100)),
        )
        triton.serve()
