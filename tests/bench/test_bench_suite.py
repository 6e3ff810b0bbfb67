"""bench/suite.sh: what it refuses. Its parts are for a machine with a GPU."""

from __future__ import annotations

import sys

import pytest
import torch


def test_an_unknown_part_is_told_the_usage(run_bench):
    finished = run_bench("suite.sh", "everything")
    assert finished.returncode == 2
    parts = "tests|kernels|train|throughput|close|sizes|memory|profile|quickstart"
    assert finished.stdout == f"usage: bench/suite.sh {parts}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure there")
def test_large_models_are_refused_without_a_gpu(run_bench, tmp_path):
    finished = run_bench("suite.sh", "close", OUT=str(tmp_path), PYTHON=sys.executable)
    assert finished.returncode == 2
    assert finished.stdout == "bench/suite.sh close: its models are for a GPU, and PyTorch finds none\n"
