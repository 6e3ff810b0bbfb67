"""bench/suite.sh: what it refuses. Its parts are for a machine with a GPU."""


def test_an_unknown_part_is_told_the_usage(run_bench):
    finished = run_bench("suite.sh", "everything")
    assert finished.returncode == 2
    parts = "tests|kernels|train|throughput|close|sizes|memory|profile|quickstart|forgetting|ranks"
    parts += "|fp8-products|fp8-close|fp8-rivals"
    assert finished.stdout == f"usage: bench/suite.sh {parts}\n"
