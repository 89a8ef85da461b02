"""ConvNeXt-T against timm's on the CPU: forward and training step, fp32 and bf16, channels_last.

``pytest benchmarks/ --benchmark-only -s`` prints the comparison; the bar is that ours takes at most 1.05 times as long.
"""

import statistics

import pytest
import torch

import convnext_fast
from benchmarks.timing import compare

BAR = 1.05
BATCH = {"forward": 8, "training": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def network(library: str, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("convnext_tiny")
    else:
        model = convnext_fast.convnext_tiny()
    return model.to(dtype, memory_format=torch.channels_last).train(training)


def one_run(model: torch.nn.Module, images: torch.Tensor, training: bool):
    def forward():
        with torch.inference_mode():
            model(images)

    def step():
        torch.nn.functional.cross_entropy(model(images).float(), labels).backward()
        model.zero_grad(set_to_none=True)

    labels = torch.arange(images.shape[0])
    return step if training else forward


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU, which is not what a machine with a GPU is for")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", BATCH)
def test_convnext_tiny_takes_no_longer_than_timms(benchmark, mode, dtype):
    training = mode == "training"
    images = torch.randn(BATCH[mode], 3, 224, 224, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    ours, theirs = (
        one_run(network(library, DTYPES[dtype], training), images, training) for library in ("ours", "timm")
    )
    comparison = compare(ours, theirs)
    benchmark.group = f"ConvNeXt-T {mode} {dtype}, batch {BATCH[mode]}, CPU, {torch.get_num_threads()} threads"
    benchmark.extra_info["ours/timm"] = statistics.median(comparison.ratios)
    benchmark.extra_info["pairs"] = str(comparison)
    benchmark.pedantic(ours, rounds=3)
    print(f"\n{benchmark.group}: {comparison}")
    assert statistics.median(comparison.ratios) <= BAR, str(comparison)
