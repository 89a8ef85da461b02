"""Runs before any benchmark is imported."""

from tests.torchvision_shim import install

install()
