"""One thread for every test and for every process that one starts: tiny products gain nothing from a second thread,
which only waits for the first, and a CPU run repeats bit for bit at the same thread count."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is imported
