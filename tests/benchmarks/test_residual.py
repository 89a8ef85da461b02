"""What a residual stream in half precision costs, measured on a small network."""

import torch

import convnext_fast
from benchmarks import residual


def test_rounding_the_residual_shows_and_is_reported(monkeypatch, capsys):
    small = lambda **settings: convnext_fast.ConvNeXt(depths=(2, 2, 2, 2), dims=(8, 8, 16, 16), **settings)  # noqa: E731
    monkeypatch.setattr(convnext_fast, "convnext_tiny", small)
    assert residual.main(["--images", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    errors = [[float(cell.strip("% ")) for cell in line.split("|")[1:]] for line in lines[1:]]
    assert [len(row) for row in errors] == [2, 2]
    assert all(0 < without < with_it < 5 for without, with_it in zip(*errors, strict=True))


def test_the_same_network_every_time():
    first, second = (residual.network(half).state_dict() for half in (False, True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_relative_error():
    exact = torch.tensor([3.0, -4.0])
    assert residual.relative_error(exact * 1.5, exact) == 0.5
