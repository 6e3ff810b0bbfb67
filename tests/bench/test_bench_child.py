"""bench/child.py: one turn after another, whoever is next imports meanwhile, and how a failure is told."""

from __future__ import annotations

import itertools
import multiprocessing
import time

import child
import pytest
import torch

# As on a GPU, where the next process is started early. The first job waits for the second one's imports.
AHEAD = """
import sys, time
from pathlib import Path
from child import Job, in_turn

ready, done = Path(sys.argv[1], "ready"), Path(sys.argv[1], "done")

def first():
    while not ready.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    done.touch()
    return {"turn": 1}

def second():
    return {"turn": 2 if done.exists() else "too early"}

if __name__ == "__main__":
    jobs = iter([Job("a", first, ()), Job("b", second, (), imports=["touches_ready"])])
    print(list(in_turn(jobs, "cuda")))
"""


def test_on_a_gpu_the_next_process_imports_while_one_runs_and_waits_for_its_turn(run_bench, tmp_path):
    (tmp_path / "ahead.py").write_text(AHEAD)
    (tmp_path / "touches_ready.py").write_text(f"open({str(tmp_path / 'ready')!r}, 'w').close()")
    finished = run_bench(tmp_path / "ahead.py", str(tmp_path))
    assert "[('a', {'turn': 1}), ('b', {'turn': 2})]" in finished.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_job_is_left_out_though_it_was_started_before_the_result_that_speaks_against_it(device):
    failed = []
    jobs = (child.Job(round_, int, ("none",), unless=lambda: bool(failed)) for round_ in range(3))
    last = child.Job("last", dict, ())
    done = []
    for key, result in child.in_turn(itertools.chain(jobs, [last]), device):
        done.append(key)
        failed += ["error"] if "error" in result else []
    assert done == [0, "last"]
    assert not multiprocessing.active_children()


def test_after_the_deadline_nobody_but_the_first_has_a_turn():
    jobs = (child.Job(name, dict, ([("name", name)],)) for name in "abc")
    assert list(child.in_turn(jobs, "cpu", deadline=time.monotonic())) == [("a", {"name": "a"})]


def test_a_process_that_takes_too_long_is_ended():
    result = child.Child("cpu", time.sleep, 100).result(limit=1)
    assert result == {"status": "failed", "error": "TimeoutError: no result after 1 s"}


def test_an_import_that_fails_is_the_result():
    result = child.Child("cpu", dict, imports=["nowhere_to_be_found"]).result()
    assert result == {"status": "failed", "error": "ModuleNotFoundError: No module named 'nowhere_to_be_found'"}


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError("out of memory"), False),  # the host's
    ],
)
def test_out_of_memory_is_the_devices(error, out_of_memory):
    assert child._out_of_memory(error) is out_of_memory
