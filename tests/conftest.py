"""Fixtures of all tests; the helpers behind them are in tiny.py."""

import os
import shutil
import signal

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the library is imported: no test asks the network
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where nohup runs the tests

from tiny import build_photos, build_tiny_pipeline  # noqa: E402


# A process takes one file after the other. These take longest: begun first, none is left for a single process to end.
LONG = ["training", "distributed", "resume", "readme", "machines", "memory", "learning", "validation", "cli"]


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the tiny random Z-Image pipeline. Shared by all tests: read it, never write to it."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-z-image")


@pytest.fixture(scope="session")
def shared_photos(tmp_path_factory):
    """Folder of six photographs, shared by all tests: read it, never write to it."""
    return build_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def photos(shared_photos, tmp_path):
    """Folder of six photographs for this test alone, which may add captions to it or take pictures out."""
    return shutil.copytree(shared_photos, tmp_path / "photos")
