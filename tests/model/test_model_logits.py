"""Our decoder computes what transformers computes, packed or not, for every kind of Llama we read."""

from __future__ import annotations

import pytest
import torch

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.batch import PackedBatch

HALF_HEAD = 2  # head dim 4: two frequencies
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.3],
        "long_factor": [1.7, 3.9],
        "original_max_position_embeddings": 32,
    },
}
KINDS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12},
    "mistral": {"family": "mistral"},
    "mistral with a window": {"family": "mistral", "sliding_window": 6},
    "qwen2": {"family": "qwen2"},
    "qwen2 with windows": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 with biases": {"family": "qwen3", "head_dim": 12, "attention_bias": True},
    "qwen3 with windows": {
        "family": "qwen3",
        "head_dim": 12,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    **{f"rope {name}": {"rope_parameters": parameters} for name, parameters in ROPE.items()},
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "reference") for kind in KINDS] + [(kind, "cpu_flash") for kind in KINDS if "window" not in kind],
)
def test_packed_logits_equal_transformers_on_each_document(
    kind, attention, make_base, load, hf_logits, batch, documents
):
    folder = make_base(**KINDS[kind])
    longest = max(map(len, documents))
    ours = load(folder, attention=attention, max_length=longest).logits(batch)
    assert relative_error(ours, hf_logits(folder, documents)) < 1e-5


def test_longrope_angles_follow_the_runs_length_and_not_the_batch(make_base, load, load_hf):
    """transformers switches to the long factors when a batch holds a long text; a run has one length for all."""
    folder = make_base(rope_parameters=ROPE["longrope"])
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(80, (n,), generator=generator) for n in (8, 40))
    model = load(folder, max_length=40)  # above the 32 original positions: long factors
    alone = model.logits(PackedBatch.from_documents([short.tolist()]))
    packed = model.logits(PackedBatch.from_documents([long.tolist(), short.tolist()]))
    assert relative_error(packed[40:], alone) < 1e-5
    with torch.no_grad():
        assert relative_error(packed[:40], load_hf(folder)(long[None]).logits[0]) < 1e-5


def test_each_rope_kind_is_a_different_function(make_base, load, batch):
    logits = {
        name: load(make_base(name=name, rope_parameters=rope), max_length=64).logits(batch)
        for name, rope in ROPE.items()
    }
    names = list(logits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert relative_error(logits[first], logits[second]) > 1e-3, f"{first} and {second} give the same logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_logits_equal_per_document_logits(dtype, make_base, load, batch, documents):
    """At most twice the error plain computation has against fp64: row counts change how a product rounds."""
    folder = make_base()
    exact = load(folder, dtype=torch.float64).logits(batch)
    model = load(folder, dtype=dtype)
    packed = model.logits(batch).double()
    alone = torch.cat([model.logits(PackedBatch.from_documents([d])).double() for d in documents if d])
    assert (packed - alone).abs().max() <= 2 * (alone - exact).abs().max()


def test_a_document_does_not_see_its_neighbours(make_base, load, documents):
    model = load(make_base())
    before = model.logits(PackedBatch.from_documents(documents))
    changed = [[(token + 1) % 80 for token in documents[0]], *documents[1:]]
    after = model.logits(PackedBatch.from_documents(changed))
    first = len(documents[0])
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gqa", "tied", "biases", "mistral", "qwen2 with windows", "qwen3 with windows"])
def test_expanded_logits_equal_the_bases_bit_for_bit(
    kind, dtype, make_base, load, hf_logits, batch, documents, tmp_path
):
    base = make_base(dtype=dtype, **KINDS[kind])
    expand_and_prove(base, tmp_path / "expanded", ExpansionPlan.from_groups(4, 2))
    expanded = PretrainedFolder(tmp_path / "expanded")
    assert torch.equal(load(base, dtype=dtype).logits(batch), load(expanded, dtype=dtype).logits(batch))
    assert torch.equal(hf_logits(base, documents, dtype), hf_logits(expanded, documents, dtype))


def test_an_expanded_model_without_its_new_blocks_is_its_base(make_base, load, batch, tmp_path):
    base = make_base()
    expand_and_prove(base, tmp_path / "expanded", ExpansionPlan.from_after(4, [0, 3], 1))
    model = load(PretrainedFolder(tmp_path / "expanded"), trained_blocks=[1, 5])
    with torch.no_grad():
        for index in model.trained_blocks:
            for parameter in model.blocks[index].parameters():
                parameter.add_(0.1)
        with_them = model.hidden_states(batch)
        without = model.hidden_states(batch, skip=model.trained_blocks)
        assert torch.equal(without, load(base).hidden_states(batch))
    assert not torch.equal(with_them, without)


def test_the_model_and_its_bases_together_are_each_alone(make_base, load, batch):
    model = load(make_base(), trained_blocks=[2])
    for skips in ([[2]], [[1, 2]], [[2], [1, 2]], [[3], [0, 2, 3]]):
        with torch.no_grad():
            found = model.hidden_states_and_bases(batch, skips=skips)
            alone = [model.hidden_states(batch, skip=skip) for skip in ([], *skips)]
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        assert not any(torch.equal(found[0], base) for base in found[1:])
