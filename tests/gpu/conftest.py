"""A GPU, or the sentence that says why there is none: the test skips, and fails where REQUIRE_GPU=1."""

import os

import pytest

from noria.errors import SettingsError
from noria.providers import require


def needed(wanted):
    """The providers for what is wanted."""
    try:
        return require(wanted)
    except SettingsError as error:
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def gpu():
    """A GPU that ONNX Runtime can compute on."""
    return needed("cuda")


@pytest.fixture
def tensorrt(gpu):
    """The same with TensorRT's libraries; without them the test skips even where a GPU is required."""
    try:
        return require("tensorrt")
    except SettingsError as error:
        pytest.skip(str(error))
