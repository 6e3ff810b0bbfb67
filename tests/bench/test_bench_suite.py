"""bench/suite.sh: what it refuses. Its parts are for a machine with a GPU."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("arguments", [[], ["everything"]])
def test_an_unknown_part_is_told_the_usage(run_bench, arguments):
    finished = run_bench("suite.sh", *arguments)
    assert finished.returncode == 2
    assert (
        finished.stdout
        == "usage: bench/suite.sh tests|kernels|train|throughput|close|sizes|memory|profile|quickstart\n"
    )
