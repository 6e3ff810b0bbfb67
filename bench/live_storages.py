"""What is alive: the memory of the tensors that a block of code made and that somebody still holds afterwards.

Hooks on saved tensors see what goes through `save_for_backward` and miss an attribute of a context, a closure, a
cache. Here the storage of every tensor that an operation returned is remembered by a weak reference, and what has not
died is counted, each storage once and whole, however small the view of it is. A registered operation is looked at from
outside: what its body makes and does not return is not seen.
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
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A result that shares an argument's storage, a view or an operation in place, is not new.
        before = {_key(tensor) for tensor in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if (key := _key(tensor)) not in before:
                self._made[key] = StorageWeakRef(tensor.untyped_storage())
        return result

    def live_bytes(self, *, without: tuple[torch.Tensor, ...] = ()) -> int:
        """Bytes of the storages made and still alive, but for those of ``without``."""
        left_out = {_key(tensor) for tensor in without}
        alive = (
            torch.UntypedStorage._new_with_weak_ptr(made.cdata)
            for key, made in self._made.items()
            if key not in left_out
        )
        return sum(storage.nbytes() for storage in alive if storage is not None)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
