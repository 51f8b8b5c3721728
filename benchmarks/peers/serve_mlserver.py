"""MLServer with a custom runtime and adaptive batching: writes its two settings files and becomes `mlserver start`."""

import json
import os
import sys
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from scoring import NAME, PORT, open_session


class OnnxRuntime(MLModel):
    """The custom runtime of its documentation."""

    async def load(self):
        self.session = open_session()
        return True

    async def predict(self, payload):
        scores = self.session.run(None, {"x": NumpyCodec.decode_input(payload.inputs[0])})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", scores)])


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    ports = {"http_port": PORT, "grpc_port": PORT + 1, "metrics_port": PORT + 2}
    server = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}
    model = {
        "name": NAME,
        "implementation": "serve_mlserver.OnnxRuntime",
        "max_batch_size": 64,
        "max_batch_time": 0.001,
    }
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    command = str(Path(sys.executable).with_name("mlserver"))
    os.execv(command, [command, "start", str(folder)])
