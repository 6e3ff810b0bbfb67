"""`llama-pro-fast evaluate MODEL --data.general FILE [--base B]`: what a model makes of your text, beside its base.

No training and no further package: loss, bits per byte, and how far predictions have moved. MODEL may be a run, even
one that is going on; without a text its own held-out texts are measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.console import amount, box, say, table
from llama_pro_fast.data.remarks import FEW
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.texts import Against
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.recipe import parse
from llama_pro_fast.training.evaluating import Report, TextReport, evaluate_texts

OWN = {
    "MODEL": {"help": "A folder in the Hugging Face layout, the folder of a run, or a hub id."},
    "base": {
        "metavar": "MODEL",
        "help": "Hold it against this model; by default against the base that an expanded model has in it.",
    },
    "from_step": {"type": int, "metavar": "N", "help": "Of a run, the checkpoint of this step; by default the last."},
    "json": {"metavar": "FILE", "help": "Write the figures there too; `-` is stdout, and all else goes to stderr."},
    "fresh": {"action": "store_true", "help": "Measure again what is known from an earlier call."},
}
TAKES = {
    "data.domain": "Text to measure: a path, or a list of sources; a run's own held-out texts without one.",
    "data.general": "The same, under another heading.",
    "data.special_tokens": None,
    "data.max_bad_share": None,
    "data.workers": None,
    "data.cache": "Where tokens and results are kept; by default `llama-pro-fast` in the user's cache folder.",
    "train.seq_len": "Tokens per sequence; by default the run's, or the model's positions, at most 4096.",
    "train.micro_batch_size": "Sequences at a time; by default what fits `memory`.",
    "train.memory": "GiB that may be taken on the device; `auto` is what is free there, with something to spare.",
    "train.device": None,
    "train.dtype": None,
    "train.attention": None,
    "train.threads": None,
    "eval.tokens": "At most this many tokens of a text; by default 65,536, of a run's own texts as many as it does.",
}
DESCRIPTION = "Loss and bits per byte of a model on text, beside its base, and how far the two are apart."
CLEAR = 2
"""Standard errors from which on a change is not put down to the choice of documents."""


def main(argv: list[str] | None = None) -> int:
    """The verb `evaluate`."""
    argv = sys.argv[1:] if argv is None else argv
    request = parse(argv, verb="evaluate", description=DESCRIPTION, own=OWN, takes=TAKES)
    own, out = request.own, sys.stdout
    to_stdout = own["json"] == "-"
    with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        report = evaluate_texts(
            own["MODEL"], request.config, base=own["base"], from_step=own["from_step"], fresh=own["fresh"]
        )
        show(report)
    if own["json"]:
        written = json.dumps(asdict(report), indent=1) + "\n"
        if to_stdout:
            out.write(written)
        else:
            try:
                Path(own["json"]).write_text(written, encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"--json {own['json']}: cannot be written ({error.strerror}); give another file"
                ) from error
            say(f"written to {own['json']}")
    return 0


def show(report: Report) -> None:
    """The figures, and what they mean in words."""
    box(f"llama-pro-fast · {report.model}", list(_facts(report)))
    names = _names(report)
    if any(bases := [_bases(report, text) for text in report.texts]):
        nats, bits = [], []
        for name, text, against in zip(names, report.texts, bases, strict=True):
            for base_name, base in against or [("", None)]:
                label = f"{name}, {base_name}" if base_name and len(against) > 1 else name
                nats.append((label, f"{text.tokens:,}", *_nats(text, base)))
                values = map(_figure, (base and base.bits_per_byte, text.bits_per_byte))
                bits.append((label, _documents(text), *values))
        columns = ("text", "tokens", "base", "now", "now - base", "KL(base‖now)")
        table("loss, nats per token; ± one standard error over documents", columns, nats)
        table("the same in bits per byte", ("text", "documents", "base", "now"), bits)
    else:
        rows = [
            (name, _documents(text), f"{text.tokens:,}", _figure(text.loss), _figure(text.bits_per_byte))
            for name, text in zip(names, report.texts, strict=True)
        ]
        table("loss, nats per token", ("text", "documents", "tokens", "loss", "bits/byte"), rows)
    for line in (*report.notes, *_in_words(report, names)):
        say(line)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    if report.step is not None:
        yield "step", f"{report.step:,}"
    if bases := [name for name in (report.base, report.first_base) if name is not None]:
        yield "base", "; the first one ".join(bases)
    yield "computed", f"on {report.device}, {report.dtype}, attention {report.attention}"
    size = report.micro_batch_size
    if size is not None:
        yield "", f"{size} x {report.seq_len:,} tokens at a time, {report.planned_bytes / GIB:.2f} GiB planned"
    if cached := sum(text.cached for text in report.texts):
        which = "everything" if cached == len(report.texts) else f"{cached} of {len(report.texts)} texts"
        yield "known", f"{which} from an earlier call; --fresh measures again"


def _names(report: Report) -> list[str]:
    """Of the texts, with the role where a name is not of one alone."""
    names = [text.source for text in report.texts]
    return [f"{text.source} ({text.role})" if names.count(text.source) > 1 else text.source for text in report.texts]


def _bases(report: Report, text: TextReport) -> list[tuple[str, Against]]:
    found = [(report.base or "", text.base), (report.first_base or "", text.first_base)]
    return [(name, base) for name, base in found if base is not None]


def _documents(text: TextReport) -> str:
    """How many were measured; of how many, where that is another number."""
    return f"{text.documents:,}" + (f" of {text.of_documents:,}" if text.documents < text.of_documents else "")


def _nats(text: TextReport, base: Against | None) -> tuple[str, ...]:
    if base is None:
        return "–", _figure(text.loss), "–", "–"
    change = "–" if base.change is None else f"{base.change:+.4f}"
    change += "" if base.change_se is None else f" ± {base.change_se:.4f}"
    return _figure(base.loss), _figure(text.loss), change, _figure(base.kl)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _in_words(report: Report, names: list[str]) -> Iterator[str]:
    for name, text in zip(names, report.texts, strict=True):
        bases = _bases(report, text)
        if not bases:
            yield f"{name}: perplexity {_perplexity(text.loss)}"
        for base_name, base in bases:
            yield f"{name}: {_against(base_name, text, base)}"
    if report.base is None and report.first_base is None:
        yield "bits per byte compare between tokenizers, loss and perplexity do not; --base holds it against a model"


def _against(name: str, text: TextReport, base: Against) -> str:
    if base.change is None:
        if not (text.bits_per_byte and base.bits_per_byte):
            return f"cannot be compared with {name}"
        less = 1 - text.bits_per_byte / base.bits_per_byte
        return f"{abs(less):.1%} {'fewer' if less > 0 else 'more'} bits per byte than {name}"
    if base.kl == 0 and base.change == 0:
        return f"predicts exactly as {name} does"
    size = f"perplexity {_perplexity(text.loss)}, {name} has {_perplexity(base.loss)}"
    if base.change_se is None:
        return f"{size}; it is one document, which says little of others"
    if text.documents < FEW:
        return f"{size}; {text.documents:,.0f} documents say little of others"
    if abs(base.change) < CLEAR * base.change_se:
        return f"{size}; no difference that {text.documents:,} documents can show"
    errors = f"{abs(base.change) / base.change_se:.1f} standard errors" if base.change_se else "in every document alike"
    return f"{size}; {'better' if base.change < 0 else 'worse'} by {abs(math.expm1(base.change)):.1%} ({errors})"


def _perplexity(loss: float) -> str:
    return amount(math.exp(min(loss, 700)))


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
