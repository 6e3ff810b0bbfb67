"""Runs made by several processes: one group of ranks, forked once, makes one run after the other."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import forked
import torch
import yaml
from torch import distributed
from torch.distributed import checkpoint as dcp

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.config import RunConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation import export_check
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.ranks import joined
from llama_pro_fast.recipe import parse
from llama_pro_fast.reporting import dial, summary
from llama_pro_fast.resume import to_dict
from llama_pro_fast.runs import checkpoint
from llama_pro_fast.train import main
from llama_pro_fast.training import joining, loop
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped


@dataclass
class Asked:
    """A run.

    Attributes:
        config: of a new run; or the folder of one that is to go on.
        fault: of :data:`FAULTS`, for one rank.
        options: of the command line by which a run goes on.
        others: what another rank's configuration has in place of this one's, by rank.
    """

    config: RunConfig | Path
    fault: str | None = None
    rank: int = 1
    options: Sequence[str] = ()
    others: dict[int, RunConfig] = field(default_factory=dict)


def make(asked: Sequence[Asked], *, count: int, folder: Path) -> list[list[dict[str, Any]]]:
    """For each run what came of it on each rank: ``error`` with its kind, ``stopped`` with the signal's number, or
    neither; and ``reduced``, how many tensors were added up over the ranks."""
    screens = [folder / f"rank-{number}.txt" for number in range(count)]
    processes = start(_make, list(asked), str(folder), count=count, screens=screens)
    for process in processes:
        process.join(300)
        process.kill()
    said = "\n".join(f"--- {screen.name}\n{screen.read_text()}" for screen in screens)
    assert [process.exitcode for process in processes] == [0] * count, said
    of_ranks = [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(count)]
    return [list(each) for each in zip(*of_ranks, strict=True)]


def start(function: Callable[..., Any], *arguments: Any, count: int, screens: Sequence[Path]) -> list[Any]:
    """A process for each rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        forked.start(_as_rank, number, count, port, function, arguments, screen=screen)
        for number, screen in enumerate(screens)
    ]


def _as_rank(number: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*arguments)


def _make(asked: list[Asked], folder: str) -> None:
    found = []
    with joined() as ranks, ExitStack() as patches:
        for where, name in ((summary, "draw_loss"), (summary, "write_page"), (dial, "png")):
            patches.enter_context(patch.object(where, name, lambda *_, **__: None))
        patches.enter_context(patch.object(export_check, "available_memory", lambda: 0))
        for each in asked:
            found.append(_outcome(each, ranks.number))
        (Path(folder) / f"rank-{ranks.number}.json").write_text(json.dumps(found))


def trained(config: RunConfig, fault: str) -> None:
    """A run as its command line makes it, to the exit code, with a fault of the rank that it is for."""
    recipe = Path(config.output).with_name(f"recipe-{os.environ['RANK']}.yaml")
    recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config).items() if v is not None}))
    with ExitStack() as patches:
        if os.environ["RANK"] == OF_RANK.get(fault, "1"):
            patches.enter_context(FAULTS[fault]())
        sys.exit(run_entry_point(main, ["--config", str(recipe)], several=True))


def twice(*configs: RunConfig) -> None:
    """Two runs by the same processes, which join anew for each."""
    for config in configs:
        run_training(config)


def _outcome(asked: Asked, number: int) -> dict[str, Any]:
    reduced, reduce = [], distributed.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        reduced.append(tensor.numel())
        return reduce(tensor, *arguments, **named)

    outcome: dict[str, Any] = {"error": None, "stopped": None}
    with ExitStack() as patches:
        patches.enter_context(patch.object(distributed, "all_reduce", counted))
        if asked.fault and number == asked.rank:
            patches.enter_context(FAULTS[asked.fault]())
        try:
            if isinstance(asked.config, Path):
                words = ["--output", str(asked.config), "--resume", *asked.options]
                run_training(parse(words).config, resume=True)
            else:
                run_training(asked.others.get(number, asked.config))
        except Stopped as stopped:
            outcome["stopped"] = stopped.number
        except ValueError as error:
            outcome["error"] = [type(error).__name__, str(error)]
    return outcome | {"reduced": len(reduced)}


def _in_step(number: int, action: Callable[[Optimizer], Any]) -> Any:
    """``action`` before the run's step of that number, from 1."""
    step, calls = loop.train_step, []

    def counted(model: Decoder, optimizer: Optimizer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            action(optimizer)
        return step(model, optimizer, *arguments)

    return patch.object(loop, "train_step", counted)


def _poisoned() -> Any:
    """The loss of the third micro-batch is NaN here."""
    loss, calls = Decoder.loss, []

    def counted(self: Decoder, batch: Any, scale: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(self, batch, scale * (torch.nan if len(calls) == 3 else 1.0))

    return patch.object(Decoder, "loss", counted)


def _killed_in_backward() -> Any:
    loss, calls = Decoder.loss_beside_base, []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        found = loss(*arguments, **named)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return patch.object(Decoder, "loss_beside_base", counted)


def _miscompute(optimizer: Optimizer) -> None:
    with torch.no_grad():
        next(iter(optimizer.parameters.values())).view(-1)[0] += 1e-3


def _full() -> Any:
    return patch.object(dcp, "save", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _elsewhere() -> Any:
    """This rank's checkpoints go where no other sees them."""
    write = checkpoint._write

    def written(folder: Path, *others: Any) -> None:
        write(folder, *others)
        for file in folder.glob("shard-00002-*"):
            (folder.parent / "elsewhere").mkdir(exist_ok=True)
            file.rename(folder.parent / "elsewhere" / file.name)

    named, patches = checkpoint._written, ExitStack()
    patches.enter_context(patch.object(checkpoint, "_write", written))
    patches.enter_context(patch.object(checkpoint, "_written", lambda folder, n: named(folder.parent / "elsewhere", n)))
    return patches


def _other_text() -> Any:
    return patch.object(joining, "corpus_of", side_effect=UserError("--data.domain: is not there"))


OF_RANK = {"disk full": "0", "first killed": "0"}
FAULTS: dict[str, Callable[[], Any]] = {
    "asked to stop": lambda: _in_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "poisoned": _poisoned,
    "miscomputes": lambda: _in_step(2, _miscompute),
    "disk full": _full,
    "elsewhere": _elsewhere,
    "other text": _other_text,
    "bug": lambda: _in_step(2, lambda _: [][0]),
    "killed in backward": _killed_in_backward,
    "killed": lambda: _in_step(3, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "first killed": lambda: FAULTS["killed"](),
}
