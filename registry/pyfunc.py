"""How MLflow's generic loader answers on a DataFrame of raw columns: by the schema, then the graph.

`mlflow.pyfunc.load_model("models:/taxi@champion")` imports this module by name. It needs noria; with mlflow alone,
`mlflow.onnx.load_model` returns the graph, to be fed tensors as `noria.schema` describes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from noria.runtime import SCORE, open_session, score
from noria.schema import ARROW, Column, Schema
from registry.bundle import Bundle


class RawModel:
    """A bundle that answers on DataFrames of n rows."""

    def __init__(self, folder: Path) -> None:
        """Raises BundleError when the bundle in `folder` is not whole."""
        self.bundle = Bundle.open(folder)
        self.session = open_session(self.bundle.model)

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`score` of each row, and `action` where the version has decision bands.

        A missing value is None, NaN, NaT or an absent optional column; a time is a datetime (UTC where it names no
        zone), ISO 8601, or whole seconds since 1970.

        Raises:
            SchemaError: a required column is missing, a value does not convert or is out of range.
        """
        schema = self.bundle.schema
        tensors = schema.tensors(_raw(frame, schema))
        schema.check(tensors)
        scores = score(self.session, tensors)
        answer = pd.DataFrame({SCORE: scores.astype("float64")}, index=frame.index)
        if self.bundle.bands.otherwise is not None:
            answer["action"] = self.bundle.bands.actions(scores)
        return answer


def _load_pyfunc(path: str) -> RawModel:
    """MLflow's entry point; `path` is the ONNX file of the bundle."""
    return RawModel(Path(path).parent)


def _raw(frame: pd.DataFrame, schema: Schema) -> pa.Table:
    return pa.table({column.name: _values(frame, column) for column in schema.columns})


def _values(frame: pd.DataFrame, column: Column) -> pa.ChunkedArray:
    if column.name not in frame.columns:
        return pa.chunked_array([pa.nulls(len(frame), ARROW[column.kind])])
    values = pa.Table.from_pandas(frame[[column.name]], preserve_index=False).column(0)
    if column.kind == "timestamp" and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return pc.multiply(values.cast(pa.int64()), 1_000_000)
    return values
