"""``python -m convnext_fast`` is the command ``convnext-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
