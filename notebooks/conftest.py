"""nbval runs the notebooks as notebooks/build.py does: the kernels inherit one thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
