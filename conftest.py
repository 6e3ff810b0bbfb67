"""For every test and every process that one starts: one thread, and no network.

Tiny products gain nothing from a second thread, which only waits for the first, and a CPU run repeats bit for bit at
the same thread count.
"""

import gc
import os

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # read when PyTorch and the hub's client are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=9, help="how often tests/training/test_faults.py kills a run")


def pytest_collection_finish():
    """What is imported by now stays: to look through it for garbage takes a fifth of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
