"""The forgetting meter of a run: every held-out text is measured now and then, said and stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import say, waiting
from llama_pro_fast.data.corpus import Corpus, HeldOut
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.held_out import Evaluation, described, evaluate
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.ranks import ALONE, Ranks
from llama_pro_fast.runs.metrics import MetricsWriter
from llama_pro_fast.runs.run_folder import resume_command
from llama_pro_fast.training.schedule import lower_rate


def measured_text(config: RunConfig, corpus: Corpus) -> str:
    """Changes when the text that evaluations see does: what is held out, or how much of it is measured."""
    return f"{corpus.measured}:{config.eval.tokens}"


class Meter:
    """Evaluation of every held-out source, and on the general ones how much of the bases is left.

    Attributes:
        last: by (role, source) what was last measured; empty before that.
    """

    def __init__(
        self,
        model: Decoder,
        corpus: Corpus,
        config: RunConfig,
        metrics: MetricsWriter,
        trained: Trained,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.corpus, self.config, self.metrics, self.trained = model, corpus, config, metrics, trained
        self.ranks = ranks
        self.last: dict[tuple[str, str], Evaluation] = {}

    def measure(self, step: int, *, first: bool = False, between: Callable[[], None] = lambda: None) -> None:
        """Evaluate, say it and store it, a source at a time.

        Args:
            first: what is gained and forgotten counts from here on; the rows say so.
            between: called before every batch of every source. What it raises ends the evaluation and passes through;
                the sources measured by then are stored.

        Raises:
            UserError: a loss is not finite.
        """
        for text in self.corpus.held_out:
            source = text.source
            result = self._evaluate(text, between)
            if not all(math.isfinite(value) for value in asdict(result).values() if value is not None):
                raise UserError(self._not_finite(step, first, source.name, result))
            self.last[source.role, source.name] = result
            marked = {"first": True} if first else {}
            row = {"source": source.name, "role": source.role, "measured": measured_text(self.config, self.corpus)}
            self.metrics.write("eval", step, **row, **marked, **asdict(result))
            say(f"  eval {step:>7}  {source.role:<7} {source.name:<16} {described(result)}")

    def bound_passed(self) -> str | None:
        """Which bound of the recipe's `stop` the last evaluation passed, in words; None where none."""
        stop = self.config.stop
        for (_, source), result in self.last.items():
            if result.base_loss is None:
                continue
            for key, found in (("kl_above", result.kl), ("general_rise", result.loss - result.base_loss)):
                bound = getattr(stop, key)
                if bound is not None and found > bound:
                    return f"stop.{key} {bound:g}: it is {found:.4f} on {source}"
        return None

    def _evaluate(self, text: HeldOut, between: Callable[[], None]) -> Evaluation:
        sample, micro_batch = text.sample(self.config.eval.tokens), self.config.train.micro_batch_size
        metered, count = text.source.role == "general", sample.num_batches(micro_batch)

        def watched() -> Iterator[PackedBatch]:
            for done, batch in enumerate(_of_rank(sample.batches(micro_batch), self.ranks)):
                update(f"evaluating {text.source.name}: {done} of {count} batches")
                between()
                yield batch

        with waiting(f"evaluating {text.source.name} ...") as update:
            return evaluate(
                self.model,
                watched(),
                skip_for_base=self.trained.skip_for_base if metered else (),
                skip_for_first_base=self.trained.skip_for_first_base if metered else (),
                num_bytes=sample.num_bytes,
                ranks=self.ranks,
            )

    def _not_finite(self, step: int, first: bool, source: str, result: Evaluation) -> str:
        found = f"step {step}: the loss on {source} is not finite ({described(result)})"
        if step == 0:
            wider = "" if self.config.train.dtype == "float32" else " or give --train.dtype float32"
            return (
                f"{found} before anything was trained, so {self.config.model.path} or this text is at fault: if it is "
                f"finite on another text, leave this one out{wider}; else look for NaN or infinity in the weights"
            )
        changed = "the text, which has changed since the start, or " if first else ""
        rate = lower_rate(self.config.optim)
        return (
            f"{found}; {changed}the model has diverged since the last checkpoint. Go on from there with a lower rate: "
            f"{resume_command(Path(self.config.output))} --optim.lr {rate:g}"
        )


def _of_rank(batches: Iterable[PackedBatch], ranks: Ranks) -> Iterator[PackedBatch]:
    """This rank's of the batches. All ranks get as many: where there are not enough, one more with nothing to predict,
    since a sharded block is put together by all ranks at once."""
    own = batch = None
    for number, batch in enumerate(batches):
        if number % ranks.count == ranks.number:
            own = batch
        if number % ranks.count == ranks.count - 1:
            yield own
            own, batch = None, None
    if batch is not None:
        nothing = {"labels": torch.full_like(batch.labels, IGNORE_INDEX), "num_valid": 0}
        yield own or replace(batch, **nothing)
