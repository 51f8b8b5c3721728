"""A bundle as an MLflow model: the ONNX flavour, so that standard tools load it, answering on raw columns."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlflow.onnx
import onnx
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema

from registry.bundle import Contents

NEEDED = ("mlflow", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "orjson", "pandas", "pyarrow")
EXAMPLE_ROWS = 5


def save(folder: Path, contents: Contents, model: Model) -> None:
    """Write the files of the ONNX flavour into `folder` (absent so far); `registry.bundle.write` adds the rest."""
    parsed = onnx.ModelProto.FromString(contents.model)
    mlflow.onnx.save_model(
        parsed,
        folder,
        mlflow_model=model,
        signature=signature(contents),
        input_example=example(contents),
        pip_requirements=requirements(),
        save_as_external_data=False,
        onnx_execution_providers=["CPUExecutionProvider"],
    )
    model.flavors["python_function"]["loader_module"] = "registry.pyfunc"
    model.save(str(folder / "MLmodel"))


def signature(contents: Contents) -> ModelSignature:
    """Raw columns in; `score`, and `action` where there are bands, out.

    Inputs are declared as "any", since MLflow's own checks stand in the way of raw data: they refuse a whole number for
    a double, an id with missing values and a time with a zone, and turn a missing Arrow string into "<NA>". The loader
    checks by the schema, and the model's description states the kinds.
    """
    outputs = [ColSpec(DataType.double, "score")]
    if contents.bands.otherwise is not None:
        outputs.append(ColSpec(DataType.string, "action"))
    columns = [ColSpec(AnyType(), column.name, required=column.required) for column in contents.schema.columns]
    return ModelSignature(Schema(columns), Schema(outputs))


def example(contents: Contents) -> pd.DataFrame:
    """A few reference rows, raw."""
    records = contents.proof.records[:EXAMPLE_ROWS]
    return pd.DataFrame({name: [record.get(name) for record in records] for name in contents.schema.names})


def requirements() -> list[str]:
    """What the model needs, as installed here; left out, MLflow loads the model in a new process to infer it."""
    found = []
    for name in NEEDED:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found
