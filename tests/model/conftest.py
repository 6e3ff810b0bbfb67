from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.trained import Trained

VOCAB = 80


@pytest.fixture
def documents() -> list[list[int]]:
    """Ragged: a long one, a single token, an empty one, and others."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (19, 1, 7, 0, 24, 2)]


@pytest.fixture
def batch(documents) -> PackedBatch:
    return PackedBatch.from_documents(documents, cu_seqlens_length=12)


@pytest.fixture
def load():
    def run(folder: PretrainedFolder, *, trained_blocks=(), train_all=False, **options):
        layers = folder.config.num_hidden_layers
        trained = Trained.all_of(layers) if train_all else Trained(layers, tuple(trained_blocks))
        return load_model(folder, trained=trained, **({"attention": "reference"} | options))

    return run


@pytest.fixture
def load_hf():
    def run(folder: PretrainedFolder, dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # a mapped weight off a cache line may round otherwise
        return model

    return run


@pytest.fixture
def hf_logits(load_hf):
    """transformers' logits of each document by itself, laid end to end."""

    def run(folder: PretrainedFolder, documents, dtype=torch.float32) -> torch.Tensor:
        model = load_hf(folder, dtype)
        with torch.no_grad():
            return torch.cat([model(torch.tensor([document])).logits[0] for document in documents if document])

    return run
