"""Runs before any test module is imported."""

import os

import pytest

# Networks here are small, and the interpreter lane runs beside them: threads that wait for each other on two cores take
# several times as long as one. Read when torch is loaded, which is now, and by every process that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import openmmlab_shim, torchvision_shim
from tests.interpreter_lane import Lane

torchvision_shim.install()
openmmlab_shim.install()


def _is_lane(item) -> bool:
    return item.nodeid.endswith("test_interpreter_lane.py::test_interpreter")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    items.sort(key=_is_lane)  # last, and nothing else moves


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session) -> None:
    """Starts the interpreter lane, which runs beside the other tests, where its test is among the selected ones."""
    config, lanes = session.config, [item for item in session.items if _is_lane(item)]
    if lanes and not config.option.collectonly and not hasattr(config, "workerinput"):
        module = lanes[0].module
        if module.why_not() is None:
            config.stash[module.LANE] = lane = Lane(module.FOLDER)
            config.add_cleanup(lane.stop)  # also where the session is interrupted, or ends with its first failure
