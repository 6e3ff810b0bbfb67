"""What is alive: the memory that tensors made within a block of code still hold afterwards, whoever holds it.

Hooks on saved tensors see what goes through `save_for_backward` and miss an attribute of a context, a closure, a
cache. Here every storage that an operation made is remembered by a weak reference, and what has not died is counted,
each storage once and whole, however small the view of it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """``with LiveStorages() as storages: …`` and then ``storages.live_bytes()``."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in is no news, but for what is made in here its first appearance may be as an argument.
        before = {_key(tensor) for tensor in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if (key := _key(tensor)) not in before:
                storage = tensor.untyped_storage()
                self._made[key] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self, *, without: tuple[torch.Tensor, ...] = ()) -> int:
        """Bytes of the storages made and still alive, but for those of ``without``."""
        left_out = {_key(tensor) for tensor in without}
        return sum(
            nbytes for key, (storage, nbytes) in self._made.items() if not storage.expired() and key not in left_out
        )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
