"""llama-pro-fast: post-pretraining by block expansion (LLaMA Pro, arXiv 2401.02415).

    from llama_pro_fast import expand, load, train, evaluate, export, freeze_to_new_blocks

Each is loaded when it is first asked for (:mod:`llama_pro_fast.api`), so that a command line answers at once. The
command lines are modules of the same names: ``python -m llama_pro_fast.train``, or ``from llama_pro_fast.train import
main``.
"""

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "expand", "export", "freeze_to_new_blocks", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama_pro_fast import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The command lines are modules of the same names; importing one must not hide the function.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
