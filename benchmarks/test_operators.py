"""Operators, and what one call costs besides its work: memory, host time, compilations."""

from benchmarks.operators import OPERATORS

SUITES = tuple(suite for operator in OPERATORS.values() for suite in operator.passes)
SUITES += ("host", "memory", "variants", "cold_start")


def test_operator(measured):
    assert measured.ok, measured.status
