"""Packaging. Imports neither torch nor triton: a build environment has neither."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dwconv_kernels" / "_version.py").read_text()).group(1)

# matplotlib draws the loss curve, kornia augments batches of tensors (it imports beside a CPU build of torch, which
# torchvision does not), scikit-learn ships the digits of the demo, safetensors reads the checkpoints of today.
TRAIN = ["kornia>=0.7", "matplotlib>=3.6", "numpy", "pillow>=9.5", "safetensors", "scikit-learn", "tqdm>=4.60"]
# A CPU build of torch brings no Triton, which compiles and interprets kernels where there is no GPU, too.
TRITON = ['triton>=3.6; platform_system == "Linux"']
# Every torchvision is built for one torch; a free choice would take the newest of both, with its CUDA packages, even
# where a torch is there. The packages themselves need neither of these.
PEERS = ["timm>=1.0.20", "torchvision==0.28.*", "transformers>=4.56"]

setup(
    name="convnext-fast",
    version=VERSION,
    description="Depthwise-convolution kernels for PyTorch, forward and backward, and the ConvNeXt built on them",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["dwconv_kernels", "dwconv_kernels.*", "convnext_fast", "convnext_fast.*"]),
    package_data={"dwconv_kernels": ["py.typed", "*/README.md"], "convnext_fast": ["py.typed", "README.md"]},
    # Triton comes with torch's own CUDA builds, in the version they were built for; without it the PyTorch path runs.
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "test": [
            *TRAIN,
            *PEERS,
            *TRITON,
            "mlxtend",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "peft>=0.15",
            "pytest>=8",
            "pytest-benchmark>=5",
            "segmentation-models-pytorch>=0.5",
            "torchao",
        ],
        "bench": [*PEERS, *TRITON, "matplotlib>=3.6", "pytest>=8", "pytest-benchmark>=5"],
    },
    entry_points={"console_scripts": ["convnext-fast = convnext_fast.cli:main"]},
)
