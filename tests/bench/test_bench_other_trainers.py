"""bench/other_trainers.py: the checkpoint it hands over, and LLaMA-Factory's model of it where that is installed."""

from __future__ import annotations

import pytest
import torch
import transformers
from contestants import CONTESTANTS
from other_trainers import checkpoint
from torch.torch_version import TorchVersion
from transformers import AutoTokenizer, LlamaForCausalLM
from workload import Workload, weights_digest


@pytest.fixture
def tiny():
    return Workload(size="tiny", seq=8, micro_batch=1, steps=1, warmup=0, device="cpu")


def test_the_checkpoint_holds_the_drawn_bits_and_a_tokenizer(tiny):
    with checkpoint(tiny) as folder:
        model = LlamaForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, tiny.draw(name, tuple(tensor.shape)))


def test_llama_factory_trains_the_new_blocks_of_the_same_bits(tiny):
    pytest.importorskip("llamafactory")
    if TorchVersion(transformers.__version__) >= "5.14":
        pytest.skip("LLaMA-Factory's checkpointing fails with transformers above 5.13")
    theirs, plain = (CONTESTANTS[name].build(tiny) for name in ("llama-factory", "hf"))
    assert theirs.trained.keys() == plain.trained.keys()
    assert weights_digest(theirs, tiny.dtype) == weights_digest(plain, tiny.dtype)
    tokens = next(tiny.token_batches())
    losses = [runner.loss(runner.prepare(tokens)) for runner in (theirs, plain)]
    assert torch.allclose(*losses, rtol=1e-6)
