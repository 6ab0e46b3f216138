"""``python -m qgnn_plugin``: the command ``qgnn`` (see :mod:`.cli`)."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
