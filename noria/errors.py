"""Every error that noria raises on purpose: one tree, each a sentence that says what is wrong and what to do.

Arguments are plain strings and numbers only, so that an error crosses processes (pickle) unchanged.
"""

from __future__ import annotations


class NoriaError(Exception):
    """Root of the tree; what the command line prints without a traceback."""


class SettingsError(NoriaError):
    """A setting is missing, malformed, or asks for something that this machine does not have."""


class WorkloadError(NoriaError):
    """A workload breaks its contract; `noria check` finds these before anything runs."""


class SchemaError(NoriaError):
    """Data does not match a schema. Knows the field, and the row where one is to blame."""

    def __init__(self, message: str, field: str = "", row: int | None = None) -> None:
        super().__init__(message, field, row)
        self.field = field
        self.row = row

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(NoriaError):
    """Source data cannot be fetched, is not what its hash promises, or is not enough."""


class LakeError(NoriaError):
    """A lake table cannot be read or written as asked."""


class ParityError(NoriaError):
    """The exported graph does not compute what the trained model computes."""


class BundleError(NoriaError):
    """A bundle is incomplete, changed since it was written, or cannot be loaded."""


class RegistryError(NoriaError):
    """The registry refuses, has no such version, or cannot be reached."""


class AbsentError(RegistryError):
    """The registry answers, and has no such version."""


class TrainingError(NoriaError):
    """Training cannot start or did not finish."""


class ServiceError(NoriaError):
    """A part of the stack does not start, does not answer, or has died."""
