"""Small jobs of every kind, on a card large enough for any of them."""

from __future__ import annotations

import dataclasses

import torch
import transformers

from llama_pro_fast.model.policy import Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.devices import DEVICES
from llama_pro_fast.planning.job import Job, Question
from llama_pro_fast.planning.search import fit, policies

NONE, MLP, ALL_BUT_ATTENTION, BLOCK = Recompute
CARD = dataclasses.replace(
    DEVICES["h100"], flops=DEVICES["h100"].flops / 1e5, bandwidth=DEVICES["h100"].bandwidth / 1e5
)
"""As slow as the models here are small, so that a step is bound by the card and not by its host."""


def job_of(
    *, family="llama", layers=8, new=(1, 3, 5, 7), seq_len=512, dtype=torch.bfloat16, train_all=False, **changes
) -> Job:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2000,
        "num_hidden_layers": layers,
        "max_position_embeddings": 1 << 20,
    }
    config = transformers.AutoConfig.for_model(family, **(sizes | changes))
    trained = Trained.all_of(layers) if train_all else Trained(layers, tuple(new))
    return Job(config=config, trained=trained, seq_len=seq_len, dtype=dtype)


JOBS = {
    "usual": job_of(),
    "short sequences": job_of(seq_len=16),
    "attention dearer than products": job_of(seq_len=65_536),
    "window": job_of(family="mistral", sliding_window=64, seq_len=4096),
    "windows in some blocks": job_of(
        family="qwen3",
        head_dim=32,
        use_sliding_window=True,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 4,
        seq_len=8192,
    ),
    "one head for k and v": job_of(num_key_value_heads=1, seq_len=2048),
    "wide heads": job_of(head_dim=128, num_key_value_heads=8, intermediate_size=256),
    "top block only": job_of(new=(7,)),
    "lowest block": job_of(new=(0,)),
    "everything": job_of(new=(), train_all=True),
    "everything, tied": job_of(new=(), train_all=True, tie_word_embeddings=True),
    "fp32": job_of(dtype=torch.float32),
}


def question_of(job: Job, *, batch_size: int, device=CARD, usable: int | None = None, **more) -> Question:
    """About ``job``, with all of the card where ``usable`` says nothing else."""
    usable = device.usable if usable is None else usable
    return Question(job=job, device=device, usable=usable, batch_size=batch_size, **more)


def peak(job: Job, recompute, micro_batch_size=1, batch_size=2) -> int:
    question = question_of(job, batch_size=batch_size)
    return fit(question, micro_batch_size=micro_batch_size, recompute=recompute).peak


def least(job: Job, micro_batch_size=1, batch_size=2) -> int:
    return min(peak(job, rung, micro_batch_size, batch_size) for rung in policies(job, micro_batch_size))
