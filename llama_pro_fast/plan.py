"""`llama-pro-fast plan --config RECIPE --gpu h100`: what a run will need and cost, from the model's config alone.

It takes the options of `train`: swap the verb, keep the line.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.console import say
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.config import find_config
from llama_pro_fast.hf.known_shapes import SHAPES
from llama_pro_fast.planning import devices
from llama_pro_fast.planning.devices import DEVICES
from llama_pro_fast.planning.job import Question, ask, assume
from llama_pro_fast.planning.search import best_fit
from llama_pro_fast.planning.show import as_dict, show
from llama_pro_fast.recipe import Request, parse
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.schedule import settle_schedule
from llama_pro_fast.training.settle import check_model, count_steps, settle_sharding, start_device

OWN = {
    "gpu": {
        "default": "auto",
        "choices": ["auto", *DEVICES, "cpu"],
        "help": "The card to plan for; by default this machine's.",
    },
    "price": {"type": float, "help": "Of an hour of the card."},
    "json": {"metavar": "FILE", "help": "Write the figures there too."},
}
"""The options that `train` does not have."""
DESCRIPTION = (
    "What a run needs in memory and costs in time, from the model's config alone. These models are known without the "
    f"network: {', '.join(SHAPES)}."
)


def main(argv: list[str] | None = None) -> int:
    """The verb `plan`; 1 where nothing fits."""
    request = parse(sys.argv[1:] if argv is None else argv, verb="plan", description=DESCRIPTION, own=OWN)
    question = question_of(request)
    found = best_fit(question)
    show(question, found)
    if path := request.own["json"]:
        try:
            Path(path).write_text(json.dumps(as_dict(question, found), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {path}: cannot be written ({error.strerror}); give another file") from error
        say(f"written to {path}")
    return 0 if found else 1


def question_of(request: Request) -> Question:
    """The question that a command line puts.

    Raises:
        UserError: naming the option and the remedy.
    """
    config, price = request.config, request.own["price"]
    check_model(config)
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price: {price:g} is not a number from 0 up")
    raw, base = find_config(model_folder.config_of(config.model.path))
    expansion = ExpansionPlan.from_config(base.num_hidden_layers, config.expand) if config.expand.wanted else None
    trained = what_trains(
        raw,
        base.num_hidden_layers,
        parameters=config.train.parameters,
        blocks=config.train.blocks,
        plan=expansion,
        name=f"--model.path {config.model.path}",
    )
    name = request.own["gpu"]
    if name == "auto":
        name = start_device(config).type
    device = (
        devices.present() if name == "cuda" else devices.cpu(config.train.ranks) if name == "cpu" else DEVICES[name]
    )
    config, assumed = assume(config, base, device, here=name in ("cuda", "cpu"))
    if config.train.steps is not None or config.train.tokens is not None:
        settle_schedule(config.optim, count_steps(config, sequences_in_epoch=0))
    how = {"triton": not device.is_cpu, "price": price, "assumed": assumed}
    question = ask(config, base, trained, expansion, device, **how)
    return ask(settle_sharding(config, question), base, trained, expansion, device, **how)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
