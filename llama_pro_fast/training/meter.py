"""The forgetting meter of a run: every held-out text is measured now and then, said and stored."""

from __future__ import annotations

import math
from dataclasses import asdict

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import say
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.held_out import described, evaluate
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.training.metrics import MetricsWriter


class Meter:
    """Evaluation of every held-out source, and on the general ones how much of the base is left."""

    def __init__(
        self, model: Decoder, corpus: Corpus, config: RunConfig, metrics: MetricsWriter, new_blocks: tuple[int, ...]
    ) -> None:
        self.model, self.corpus, self.config, self.metrics = model, corpus, config, metrics
        self.new_blocks = new_blocks

    def measure(self, step: int) -> None:
        """Evaluate, say it and store it.

        Raises:
            UserError: a loss is not finite.
        """
        for text in self.corpus.held_out:
            source = text.source
            metered = source.role == "general" and len(self.new_blocks) > 0
            sample = text.sample(self.config.eval.tokens)
            result = evaluate(
                self.model,
                sample.batches(self.config.train.micro_batch_size),
                skip_for_base=self.new_blocks if metered else (),
                num_bytes=sample.num_bytes,
            )
            figures = [result.loss, *(value for value in (result.base_loss, result.kl) if value is not None)]
            if not all(map(math.isfinite, figures)):
                raise UserError(
                    f"step {step}: the loss on {source.name} is not finite ({described(result)}); nothing was "
                    "saved since the last checkpoint. Lower --optim.lr and start again, or resume from that checkpoint"
                )
            self.metrics.write(
                "eval", step, source=source.name, role=source.role, measured=self.corpus.measured, **asdict(result)
            )
            say(f"  eval {step:>7}  {source.role:<7} {source.name:<16} {described(result)}")
