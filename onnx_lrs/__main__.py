"""``python -m onnx_lrs`` is ``onnx-lrs``."""

import sys

from onnx_lrs.cli import main

if __name__ == "__main__":
    sys.exit(main())
