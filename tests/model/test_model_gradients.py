"""Our gradients are autograd's: over a decoder written plainly in fp64, and over transformers in fp32."""

from __future__ import annotations

import pytest
import torch
from block_cases import plain_block
from torch.nn import functional as F

from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.hf.loading import hf_tensors, rotary_tables
from llama_pro_fast.model.batch import BlockContext, PackedBatch

SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
KINDS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"family": "mistral", "sliding_window": 6},
    "qwen2": {"family": "qwen2"} | SLIDING,
    "qwen3": {"family": "qwen3", "head_dim": 12, "attention_bias": True} | SLIDING,
}
TRAINED = [1, 3]


def scale_of(batch: PackedBatch, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(1.0 / batch.num_valid, dtype=dtype)


def our_gradients(model, config, batches, scale) -> tuple[float, dict[str, torch.Tensor]]:
    loss = 0.0
    for batch in batches:
        part = model.loss(batch, scale)
        part.backward()
        loss += part.item()
    gradients = {}
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients |= dict(hf_tensors(config, name, parameter.grad))
    return loss, gradients


def plain_loss(weights: dict[str, torch.Tensor], config, documents) -> torch.Tensor:
    """The whole model in plain PyTorch: an independent definition."""
    documents = [document for document in documents if document]
    lengths, ids = (
        [len(document) for document in documents],
        torch.tensor([token for document in documents for token in document]),
    )
    tables = rotary_tables(config, max(lengths))
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        x = plain_block(x, own, block_spec(config, index), lengths, *tables)
    x = F.rms_norm(x, x.shape[-1:], weights["model.norm.weight"], config.rms_norm_eps)
    logits = x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).t()
    return sum(
        F.cross_entropy(of_one[:-1], tokens[1:], reduction="sum")
        for of_one, tokens in zip(logits.split(lengths), ids.split(lengths), strict=True)
        if len(tokens) > 1
    )


@pytest.mark.parametrize("train_all", [False, True], ids=["new blocks", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_plain_autograd_in_fp64(kind, train_all, make_base, load, documents, batch):
    folder = make_base(**KINDS[kind])
    model = load(folder, dtype=torch.float64, trained_blocks=TRAINED, train_all=train_all)
    loss, ours = our_gradients(model, folder.config, [batch], scale_of(batch, torch.float64))

    weights = {name: folder.tensor(name).double().requires_grad_() for name in folder.entries}
    expected = plain_loss(weights, folder.config, documents) / batch.num_valid
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    trained = {
        name for name in weights if train_all or any(name.startswith(f"model.layers.{index}.") for index in TRAINED)
    }
    assert ours.keys() == trained
    for name in trained:
        error = (ours[name] - weights[name].grad).norm() / weights[name].grad.norm()
        assert error < 1e-10, f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers_in_fp32(kind, make_base, load, load_hf, documents, batch):
    folder = make_base(**KINDS[kind])
    _, ours = our_gradients(load(folder, train_all=True), folder.config, [batch], scale_of(batch))

    model = load_hf(folder)
    total = sum(
        F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        for ids in map(torch.tensor, documents)
        if len(ids) > 1
    )
    (total / batch.num_valid).backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # A bias on the keys shifts all scores of a query alike: but for the rotation its gradient is a sum that is 0.
        # So its error is measured against the gradient of the queries' bias, a sum of the same kind that does not
        # cancel; and as it is a difference of two such sums, both round.
        cancels = name.endswith("k_proj.bias")
        scale = theirs[name.replace("k_proj.bias", "q_proj.bias")]
        error = (ours[name] - gradient).norm() / scale.norm()
        assert error < (2e-5 if cancels else 1e-5), f"{name}: {error}"


def test_micro_batches_add_up_to_the_whole_batch(make_base, load, documents):
    """Ragged micro-batches weigh by their valid tokens, not by one each."""
    folder = make_base()
    whole = PackedBatch.from_documents(documents)
    parts = [PackedBatch.from_documents(documents[:1]), PackedBatch.from_documents(documents[1:])]
    scale = scale_of(whole, torch.float64)
    options = {"dtype": torch.float64, "trained_blocks": TRAINED}
    loss, gradients = our_gradients(load(folder, **options), folder.config, [whole], scale)
    split_loss, split = our_gradients(load(folder, **options), folder.config, parts, scale)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-10, atol=1e-14)


def test_bf16_gradients_are_fp32_and_hold_the_2x_rule(make_base, load, load_hf, documents, batch):
    """Error against fp64 at most twice that of transformers in bf16; and more digits than bf16 has."""
    folder = make_base(dtype=torch.bfloat16)
    exact_model = load(folder, dtype=torch.float64, trained_blocks=TRAINED)
    _, exact = our_gradients(exact_model, folder.config, [batch], scale_of(batch, torch.float64))
    model = load(folder, dtype=torch.bfloat16, trained_blocks=TRAINED)
    _, ours = our_gradients(model, folder.config, [batch], scale_of(batch))

    hf = load_hf(folder, torch.bfloat16)
    total = sum(
        F.cross_entropy(hf(ids[None]).logits[0, :-1].float(), ids[1:], reduction="sum")
        for ids in map(torch.tensor, documents)
        if len(ids) > 1
    )
    (total / batch.num_valid).backward()
    theirs = dict(hf.named_parameters())
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float()), f"{name} was rounded to bf16"
        plain = (theirs[name].grad.double() - exact[name]).norm()
        assert (gradient.double() - exact[name]).norm() <= 2 * plain, name


def test_nothing_is_kept_below_the_first_trained_block(make_base, load, batch):
    model = load(make_base(), trained_blocks=[2])
    context = BlockContext.for_batch(batch, rotary_tables=(model.cos, model.sin), attention="reference")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = model.embed_tokens(batch.input_ids)
        for block in model.blocks[:2]:
            x = block(x, context)
        assert not kept
        assert not x.requires_grad
        x = model.blocks[2](x, context)
        assert kept
        assert x.requires_grad
