"""Where things run: what is set, and its defaults.

*What* runs (workloads, policies) is code; *where* it runs is here. Every setting is an environment variable with the
prefix ``NORIA_``, for example ``NORIA_HOME=/srv/noria``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from noria.errors import SettingsError


class Settings(BaseSettings):
    """Attributes are the reference: name, default, meaning."""

    model_config = SettingsConfigDict(env_prefix="NORIA_", frozen=True, extra="ignore")

    home: Path = Path(".noria")
    """The one folder that holds everything noria writes: lake, MLflow, Prefect, Evidently, Ray, logs."""

    cache: Path = Path("~/.cache/noria")
    """Downloaded source data, shared by every home; safe to delete."""

    mlflow_uri: str = ""
    """Address of the MLflow server; empty: the one that `noria up` started in this home."""

    prefect_url: str = ""
    """Address of the Prefect API, ending in /api; empty: the one that `noria up` started in this home."""

    ray_address: str = ""
    """Address of a Ray cluster; empty: the one that `noria up` started, or a local one made for the process."""

    serving_url: str = ""
    """Address of noria's server; empty: the one that `noria up` started in this home."""

    providers: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """Where ONNX Runtime runs: `cuda` or `tensorrt` where there is none is an error at start; `auto` takes CUDA where
    there is a GPU, and never TensorRT, which builds engines for minutes."""

    gpu_device: int = Field(default=0, ge=0)
    """Which GPU, counted as CUDA counts them."""

    gpu_memory_mb: int = Field(default=0, ge=0)
    """Most GPU memory that one version's session may take; 0: no limit."""

    poll_seconds: float = Field(default=1.0, gt=0, le=3)
    """How often the server reads the aliases."""

    workers: int = Field(default=1, ge=1, le=256)
    """Worker processes of the server."""

    load_seconds: float = Field(default=60, gt=0)
    """How long a worker may take to load and prove one version; then the version is refused."""

    load_memory_mb: int = Field(default=0, ge=0)
    """Memory that a worker may hold while it loads; 0: half of what the machine, or its container, has, shared by
    the workers."""

    repository: str = ""
    """Folder of plain models, NAME/VERSION/model.onnx, that the server serves beside the workloads; empty: none."""

    workloads: str = "workloads.taxi:WORKLOAD,workloads.spam:WORKLOAD"
    """Import strings of the workloads that `noria up` deploys, separated by commas."""

    api_keys: str = ""
    """The server's keys file (`noria key add` writes it); empty: serving/keys.json in the home. Where it is named here
    it must be there, or nobody gets in; otherwise no file means that no key is asked for."""

    hosts: str = ""
    """Names by which clients call the server, separated by commas, beside loopback and the address that it listens on;
    `*`: any. Requests to another name are refused."""

    rate: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Requests a second that one key may ask for, where it has no rate of its own, or one address, where no key is
    asked for; 0: no limit."""

    access_log: str = ""
    """File that gets a JSON line for every answer of the server, `-` for standard output; empty: none."""

    batching: bool = True
    """False: every request runs alone, to measure what batching brings."""

    ack: Literal["fast", "durable"] = "fast"
    """When a prediction is answered: `fast`, and its log follows in the next tick (a killed process may lose what it
    answered in that moment, a power cut the last half second); `durable`, once the disk has it."""

    acks: str = Field(default="", pattern=r"^(\s*[\w.-]+\s*=\s*(fast|durable)\s*(,|$))*$")
    """The same for single workloads, for example `taxi=durable,spam=fast`."""

    ingest: bool = True
    """Whether a retrain first reads new rows from the workload's own source; false where all data comes by requests."""

    @property
    def root(self) -> Path:
        """The home folder as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def lake(self) -> Path:
        """Folder of the lake's tables."""
        return self.root / "lake"

    @property
    def evidently(self) -> Path:
        """Folder of the Evidently workspace."""
        return self.root / "evidently"

    @property
    def bundles(self) -> Path:
        """Folder where fetched bundles are kept, one folder a version."""
        return self.root / "bundles"

    @property
    def serving(self) -> Path:
        """Folder of the server's state: what should serve, what serves, the log not yet in the lake."""
        return self.root / "serving"

    @property
    def keys_file(self) -> Path:
        """The server's keys file, as an absolute path."""
        return Path(self.api_keys).expanduser().absolute() if self.api_keys else self.serving / "keys.json"

    @property
    def downloads(self) -> Path:
        """Folder of downloaded source data."""
        return self.cache.expanduser().absolute()

    @property
    def engines(self) -> Path:
        """Folder of TensorRT's engines, shared by every home: what is in it is keyed by GPU, driver and model."""
        return self.downloads / "engines"

    @property
    def imports(self) -> tuple[str, ...]:
        """The import strings of `workloads`, one by one."""
        return tuple(part.strip() for part in self.workloads.split(",") if part.strip())


class TracingSettings(BaseSettings):
    """Traces, by OpenTelemetry's own names, for example OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318.

    What is not here (headers, certificates, timeouts, queue sizes, resource attributes) the exporter reads by itself.
    """

    model_config = SettingsConfigDict(env_prefix="OTEL_", frozen=True, extra="ignore", env_ignore_empty=True)

    exporter_otlp_endpoint: str = ""
    """Base address of a collector that speaks OTLP over HTTP; traces are off without one."""

    exporter_otlp_traces_endpoint: str = ""
    """Whole address for traces, where it is another one."""

    exporter_otlp_protocol: Literal["http/protobuf"] = "http/protobuf"
    """How the collector is spoken to; there is no other way here."""

    traces_exporter: Literal["otlp", "none"] = "otlp"
    """`none`: off."""

    sdk_disabled: bool = False
    """`true`: off."""

    traces_sampler: Literal[
        "always_on", "always_off", "traceidratio",
        "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
    ] = "parentbased_traceidratio"  # fmt: skip
    """Which requests are traced; `parentbased`: as the client said in its `traceparent`, where it sent one."""

    traces_sampler_arg: float = Field(default=0.01, ge=0, le=1)
    """Share of requests that is traced, for the samplers `traceidratio`."""

    service_name: str = "noria"
    """Under which name the collector shows this server."""

    @property
    def on(self) -> bool:
        """Whether requests are traced at all."""
        address = self.exporter_otlp_traces_endpoint or self.exporter_otlp_endpoint
        return bool(address) and not self.sdk_disabled and self.traces_exporter != "none"

    @property
    def share(self) -> float:
        """Share of the requests that is traced when nobody decided before."""
        shares = {"always_on": 1.0, "always_off": 0.0, "traceidratio": self.traces_sampler_arg}
        return shares[self.traces_sampler.removeprefix("parentbased_")]

    @property
    def follows_parent(self) -> bool:
        """Whether what the client decided counts."""
        return self.traces_sampler.startswith("parentbased_")


def load_settings(**changes: object) -> Settings:
    """Settings from the environment, with `changes` on top.

    Raises:
        SettingsError: a value is malformed; the sentence names the variable.
    """
    try:
        return Settings(**changes)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _unusable("NORIA_", error) from None


def load_tracing() -> TracingSettings:
    """How to trace, from the environment. Raises SettingsError: a value is malformed."""
    try:
        return TracingSettings()
    except ValidationError as error:
        raise _unusable("OTEL_", error) from None


def _unusable(prefix: str, error: ValidationError) -> SettingsError:
    first = error.errors()[0]
    name = prefix + "_".join(str(part) for part in first["loc"]).upper()
    return SettingsError(f"{name} is not usable: {first['msg']}. Correct it or unset it.")
