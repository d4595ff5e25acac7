"""Settings for every test; read before NumPy is imported."""

import os
import tempfile

# the matrices of the tests are small: on shared cores a second BLAS thread waits longer than it works
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# measured latencies are cached in the user's folder: not in the tests, nor in the processes that they start
_CACHE = tempfile.TemporaryDirectory(prefix="onnx-lrs-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # what platformdirs asks for on Linux and, since 4.3.8, on macOS
os.environ["LOCALAPPDATA"] = os.environ["WIN_PD_OVERRIDE_LOCAL_APPDATA"] = _CACHE.name  # and on Windows
