"""Importing the rooms with heavy libraries does nothing but import, either."""

import importlib.util
from pathlib import Path

_found = importlib.util.spec_from_file_location("house", Path(__file__).parents[1] / "unit" / "test_house.py")
house = importlib.util.module_from_spec(_found)
_found.loader.exec_module(house)


def test_importing_does_nothing():
    """All in one process: most of what they import is the same."""
    assert house.imported(*house.modules_of("registry", "training", "monitoring", "flows"))["acts"] == []
