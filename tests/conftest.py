"""Runs before any test module is imported."""

from tests.torchvision_shim import install

install()
