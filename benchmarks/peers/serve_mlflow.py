"""`mlflow models serve` with the ONNX flavour: saves the model as one, then becomes the command."""

import os
import sys
import tempfile
from pathlib import Path

import mlflow.onnx
import numpy as np
import onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from scoring import MODEL, PORT

if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="mlflow-") + "/model"
    model = onnx.load(MODEL)
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (-1, width), "x")]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, -1), "y")]),
    )
    one = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "execution_mode": "sequential"}
    mlflow.onnx.save_model(model, folder, signature=signature, onnx_session_options=one, pip_requirements=["mlflow"])
    command = str(Path(sys.executable).with_name("mlflow"))
    given = ["models", "serve", "-m", folder, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(PORT), "-w", "1"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.execv(command, [command, *given])
