"""Settings for every test; read before NumPy is imported."""

import os

# the matrices of the tests are small: on shared cores a second BLAS thread waits longer than it works
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
