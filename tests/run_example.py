"""``python -m tests.run_example FILE ARGUMENTS...``, also below torchrun: a script, beside whatever torch there is."""

import runpy
import sys

from tests import openmmlab_shim, torchvision_shim

torchvision_shim.install()
openmmlab_shim.install()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
