"""`llama-pro-fast expand BASE OUT --expand.groups 8`: insert identity copies of blocks, and prove that nothing changed.

    the base's headers -> plan -> rewrite, byte by byte, into OUT.partial -> proof on OUT.partial -> rename to OUT

OUT comes into being only after the proof: a crash, a full disk or a proof that fails leave no OUT.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from dataclasses import fields
from typing import Any

import torch

from llama_pro_fast.cli import PROGRAM, run_entry_point
from llama_pro_fast.config import ExpandConfig, check_values
from llama_pro_fast.console import amount, box, duration, progress_bars, say
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import IdentityProof, expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.recipe import new_parser, one_line_errors
from llama_pro_fast.training import model_folder


def main(argv: list[str] | None = None) -> int:
    """The verb `expand`."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    start = time.monotonic()
    base = PretrainedFolder(model_folder.find(options.base))
    plan = ExpansionPlan.from_config(base.config.num_hidden_layers, options.expand)
    with progress_bars() as progress:
        proof = expand_and_prove(base, options.out, plan, progress=progress)
    _report(base, PretrainedFolder(options.out), plan, proof)
    say(f"took {duration(time.monotonic() - start)}, peak memory {peak_memory_gib(torch.device('cpu')):.2f} GiB")
    say(f"written to {options.out}; next:")
    say(
        f"{PROGRAM} train --model.path {shlex.quote(options.out)} --data.domain FILE --optim.lr RATE --output runs/NAME"
    )
    return 0


def _parse(argv: list[str]) -> Any:
    """``base``, ``out`` and ``expand`` of a command line.

    Raises:
        UserError: unknown option, wrong type, or one of the two is missing.
    """
    parser = new_parser(
        "expand", "Insert identity copies of decoder blocks into a Llama-family checkpoint (arXiv 2401.02415)."
    )
    parser.add_argument(
        "base",
        metavar="BASE",
        help="Folder of a Llama-family checkpoint in the Hugging Face layout, a run or a hub id.",
    )
    parser.add_argument("out", metavar="OUT", help="Folder to write; must not exist, or be empty.")
    parser.add_class_arguments(ExpandConfig, "expand")
    with one_line_errors([f"expand.{each.name}" for each in fields(ExpandConfig)]):
        options = parser.instantiate(parser.parse_args(argv))
    check_values(options.expand, "expand.")
    return options


def _report(base: PretrainedFolder, expanded: PretrainedFolder, plan: ExpansionPlan, proof: IdentityProof) -> None:
    before, after = _num_parameters(base), _num_parameters(expanded)
    new, dtype = after - before, str(proof.dtype).removeprefix("torch.")
    rows = [
        ("blocks", f"{plan.num_old} -> {plan.num_layers}"),
        ("", f"{plan.trained.strip}"),
        ("", "X is new; in training o passes the gradient on, . has no backward"),
        (
            "parameters",
            f"{amount(before)} -> {amount(after)}, of which the new blocks hold {amount(new)} ({new / after:.1%})",
        ),
        (
            "proof",
            f"{proof.old_tensors} tensors of the base byte-identical, {proof.copied_tensors} copied, "
            f"{proof.zeroed_tensors} zero",
        ),
        ("", f"{proof.new_blocks} new blocks give back their input bit for bit ({dtype}, {proof.tokens} tokens)"),
    ]
    if proof.random_ids:
        rows.append(("", f"the tokens are random: {proof.random_ids}"))
    if proof.logits_skipped:
        rows.append(("", f"so the logits are equal; not computed whole ({proof.logits_skipped})"))
    else:
        rows.append(("", f"max |Δlogit| = {proof.max_logit_difference} (stock transformers, {dtype})"))
    box(f"expanded {base.name}", rows)


def _num_parameters(folder: PretrainedFolder) -> int:
    return sum(math.prod(e.shape) for e in folder.entries.values() if not e.name.endswith("rotary_emb.inv_freq"))


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
