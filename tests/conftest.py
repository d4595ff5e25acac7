"""Settings for every test; read before NumPy is imported."""

import os

# the tests' matrices are small: on shared cores a second BLAS thread waits longer than it works (125 s against 13 s)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
