"""bench/child.py: a process for each, the next one ready meanwhile, and how a failure is told."""

from __future__ import annotations

import multiprocessing
import os
import time

import child
import pytest
import torch


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_has_a_process_of_its_own_and_none_is_left(device):
    """As on a GPU, where the next one is started before its turn."""
    with child.Children(device) as children:
        found = [children.result(os.getpid) for _ in range(2)]
        assert len({os.getpid(), *found}) == 3
        assert len(multiprocessing.active_children()) == (device == "cuda")
    assert not multiprocessing.active_children()


def test_a_process_that_takes_too_long_is_ended():
    result = child.Child("cpu").result(time.sleep, 100, limit=1)
    assert result == {"status": "failed", "error": "TimeoutError: no result after 1 s"}


def test_what_is_raised_or_ends_the_process_is_the_result():
    assert child.Child("cpu").result(int, "x\ny") == {
        "status": "failed",
        "error": "ValueError: invalid literal for int() with base 10: 'x\\ny'",
    }
    assert child.Child("cpu").result(os.abort) == {"status": "failed", "error": "ended by SIGABRT"}


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
