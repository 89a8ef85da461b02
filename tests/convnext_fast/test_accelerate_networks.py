"""Other networks with large depthwise kernels: the same results, and the table in convnext_fast/README.md."""

import pytest
import torch

import convnext_fast
from benchmarks import accelerated

from .accelerated import assert_unchanged
from .networks import randomise

SIZES = {"csatv2": 256, "coatnext_nano_rw_224": 224}  # the pixels of the others are up to the caller
NAMES = [name for names in accelerated.NETWORKS.values() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_before(name):
    model = randomise(pytest.importorskip("timm").create_model(name))
    for module in model.modules():  # the statistics of a network that nobody trained are no good with such weights
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    report = convnext_fast.accelerate(model)
    convnext_fast.restore(model)
    assert len(report.swapped) >= 5
    size = SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    assert_unchanged(model, x, len(report.swapped))


def test_table_in_the_readme():
    timm = pytest.importorskip("timm")
    readme = accelerated.README.read_text()
    if f"timm {timm.__version__}:" not in readme:
        pytest.skip(f"the table is of another timm than {timm.__version__}")
    assert accelerated.written(readme, accelerated.table()) == readme, "run python -m benchmarks.accelerated --write"
