"""A quiet MLflow client that gives up soon, and its failures as sentences.

Only this module, `run`, `flavour`, `transfer` and `store` import mlflow (2.5 s); gate, promote and bundle must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
from mlflow import MlflowClient
from mlflow import environment_variables as variables
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client

from noria.errors import RegistryError

UNREACHABLE = ("failed with exception", "Max retries exceeded", "Connection refused")


def connect(uri: str) -> MlflowClient:
    """A client of the MLflow server at `uri`; nothing is sent yet.

    MLflow reads its options from the environment at each call: values that the user set stay as they are.
    """
    quick = {
        variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES: 2,
        variables.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR: 1,
        variables.MLFLOW_HTTP_REQUEST_TIMEOUT: 30,
        variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR: False,
        variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
        variables.MLFLOW_DISABLE_TELEMETRY: True,
    }
    for variable, value in quick.items():
        if not variable.is_set():
            variable.set(value)
    set_telemetry_client()  # mlflow starts its telemetry on import; this makes it read the switch
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def answered(uri: str, doing: str) -> Iterator[None]:
    """Turn MLflow's failures while `doing` (for example "registering taxi") into RegistryError."""
    try:
        yield
    except requests.ConnectionError:
        raise _unreachable(uri, doing) from None
    except (MlflowException, requests.RequestException) as error:
        if any(part in str(error) for part in UNREACHABLE):
            raise _unreachable(uri, doing) from None
        raise RegistryError(f"MLflow at {uri} refused while {doing}: {' '.join(str(error).split())[:500]}") from None


def is_absent(error: MlflowException) -> bool:
    """Whether MLflow says that a model, version, alias or experiment does not exist."""
    code = str(error.error_code)
    return code == "RESOURCE_DOES_NOT_EXIST" or (code == "INVALID_PARAMETER_VALUE" and "not found" in str(error))


def already_there(error: MlflowException) -> bool:
    """Whether MLflow says that somebody made it before."""
    return str(error.error_code) == "RESOURCE_ALREADY_EXISTS"


def _unreachable(uri: str, doing: str) -> RegistryError:
    return RegistryError(
        f"The MLflow server at {uri} does not answer (while {doing}). "
        "Start it with `noria up`, or correct NORIA_MLFLOW_URI."
    )
