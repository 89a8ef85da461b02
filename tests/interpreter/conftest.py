"""Tests here need ``TRITON_INTERPRET=1`` before Triton is imported: a pytest process of their own. Others pass by."""

import pytest

from dwconv_kernels.runtime import INTERPRETER

collect_ignore_glob = [] if INTERPRETER else ["*"]


@pytest.fixture
def guard():
    """Every kernel that the test launches is checked, see :mod:`tests.interpreter_guard`."""
    from tests.interpreter_guard import Guard  # imports Triton

    with Guard() as guard:
        yield guard
