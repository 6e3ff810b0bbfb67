"""`llama-pro-fast prepare --model.path BASE --data.domain TEXT`: tokenise a run's text before the run, and look at it.

It takes the options of `train`: swap the verb, keep the line. A run of that text then finds its tokens in the cache.
"""

from __future__ import annotations

import sys

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import amount, say, table, waiting
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.data.remarks import remarks
from llama_pro_fast.data.show import shown_sequences
from llama_pro_fast.data.statistics import PERCENTILES, SourceStatistics, shared_documents, statistics
from llama_pro_fast.errors import UserError
from llama_pro_fast.planning.job import sequence_length
from llama_pro_fast.recipe import parse
from llama_pro_fast.text.tokenizer_checks import warnings
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.settle import check_text

OWN = {
    "stats": {
        "action": "store_true",
        "help": "Lengths, repeated documents, and held-out documents that stand in the training text nearly whole.",
    },
    "show": {"type": int, "metavar": "N", "default": 0, "help": "The first N packed sequences, as text."},
}
DESCRIPTION = "Tokenise the text of a run, once, with all CPUs, and say what is in it."
MOST_PLACES = 5


def main(argv: list[str] | None = None) -> int:
    """The verb `prepare`."""
    request = parse(sys.argv[1:] if argv is None else argv, verb="prepare", description=DESCRIPTION, own=OWN)
    config = request.config
    if request.own["show"] < 0:
        raise UserError(f"--show: {request.own['show']} is not a number of sequences from 0 up")
    check_text(config)
    base = model_folder.text_side(config)
    with waiting("reading text ...") as update:
        tokenizer = model_folder.make_tokenizer(config, base, update)
        seq_len = sequence_length(config, base.config)
        corpus = Corpus.prepare(
            config.data,
            tokenizer,
            seq_len=seq_len,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            default_general=config.train.parameters != "all",
            progress=update,
        )
    _say_remarks(config, corpus, tokenizer, base)
    _show_sources(corpus, seq_len)
    if request.own["stats"]:
        with waiting("comparing documents ..."):
            found, shared = statistics(corpus, seq_len), shared_documents(corpus)
        _show_statistics(found, shared, seq_len, dropped=config.data.drop_duplicates)
    for text in shown_sequences(corpus, tokenizer, request.own["show"]):
        say(text)
    return 0


def _say_remarks(config: RunConfig, corpus: Corpus, tokenizer, base) -> None:
    for line in warnings(tokenizer, base.path, base.config):
        say(line)
    for line in remarks(corpus, config.data, packaged_base=model_folder.is_packaged(config.model.path)):
        say(line)


def _show_sources(corpus: Corpus, seq_len: int) -> None:
    rows = []
    for share, each, text in zip(corpus.train.shares, corpus.mixed, corpus.held_out, strict=True):
        train, held_out = text.store.train, text.store.held_out
        rows.append((
            text.source.name,
            text.source.role,
            f"{train.num_documents:,}",
            amount(train.num_tokens),
            f"{held_out.num_documents:,}",
            f"{sum(count for _, count, _ in text.store.faults):,}",
            f"{share:.1%}" if each.trains else "only measured",
        ))  # fmt: skip
    columns = ("text", "role", "documents", "tokens", "held out", "left out", "of a step")
    table("tokens on disk", columns, rows, words=2)
    sequences = corpus.train.sequences_in_epoch(0)
    say(f"an epoch: {sequences:,} sequences of {seq_len:,}, {amount(sequences * seq_len)} tokens; {corpus.packing()}")


def _show_statistics(
    found: list[SourceStatistics], shared: dict[tuple[str, str], int], seq_len: int, *, dropped: bool
) -> None:
    percentiles = [f"{percent} %" for percent in PERCENTILES]
    columns = ("text", "documents", "tokens", *percentiles, "longest", "longer")
    table(
        f"tokens of a document; longer: than a sequence of {seq_len:,}",
        columns,
        [
            (s.name, f"{s.documents:,}", amount(s.tokens), *(f"{n:,}" for n in s.lengths), f"{s.longer:,}")
            for s in found
        ],
    )
    for s in found:
        if s.repeated:
            say(
                f"{s.name}: {s.repeated:,} of {s.documents:,} documents ({amount(s.repeated_tokens)} tokens) repeat "
                f"one before them; {'they are left out' if dropped else '--data.drop_duplicates true leaves these out'}"
            )
        if s.leaked:
            more = f" and {len(s.leaked) - MOST_PLACES:,} more" if len(s.leaked) > MOST_PLACES else ""
            say(
                f"{s.name}: {len(s.leaked):,} of {s.compared:,} held-out documents stand in the training text nearly "
                f"whole: {', '.join(s.leaked[:MOST_PLACES])}{more}; the loss there is memory, not learning: name what "
                "belongs together with `split_by`, or take the repeats out"
            )
    for (a, b), count in shared.items():
        say(f"{count:,} documents stand in {a} and in {b}")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
