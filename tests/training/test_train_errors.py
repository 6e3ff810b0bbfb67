"""A mistake of the user is one line that says what, where and what to do; exit code 2; nothing looks complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.train import main as train_main


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the model -----------------------------------------------------------------------------------------------------


def test_model_folder_missing(refused, tmp_path):
    refused(tmp_path / "nowhere", "no such folder", model__path=tmp_path / "nowhere")


def test_no_model_named(refused):
    refused("--model.path", model__path=None)


def test_no_such_model_in_the_package(refused):
    refused("builtin:prose-9b", "not in the package", "builtin:prose-3m", model__path="builtin:prose-9b")


def test_model_folder_without_config(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", model__path=tmp_path / "empty")


def test_another_architecture(refused, tmp_path):
    GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    ).save_pretrained(tmp_path / "gpt2")
    refused("GPT2LMHeadModel", "supported: LlamaForCausalLM", model__path=tmp_path / "gpt2")


def test_config_is_not_json(refused, copy_of, base):
    folder = copy_of(base)
    (folder / "config.json").write_text("{")
    refused(folder / "config.json", "JSON", model__path=folder)


@pytest.mark.parametrize("damage", ["cut short", "no header", "bytes added"])
def test_damaged_safetensors(refused, copy_of, base, damage):
    folder = copy_of(base)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-7], "no header": b"\xff" * 100, "bytes added": content + b"x"}[damage])
    refused(path, "damaged", "download it again", model__path=folder)


def test_only_pickled_weights(refused, copy_of, base):
    folder = copy_of(base)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "save_pretrained", model__path=folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 5}, "model.layers.4."),
        ({"num_hidden_layers": 3}, "model.layers.3."),
        ({"intermediate_size": 96}, "has shape [32, 64], the config says [32, 96]"),
        ({"attention_bias": True}, "bias"),
    ],
)
def test_config_and_weights_disagree(refused, copy_of, base, changes, named):
    folder = copy_of(base)
    edit(folder / "config.json", **changes)
    refused(named, "different models", model__path=folder)


def test_quantised_weights(refused, copy_of, base):
    folder = copy_of(base)
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "quantised", model__path=folder)


def test_tokenizer_missing(refused, copy_of, base):
    folder = copy_of(base)
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer", "tokenizer.json", model__path=folder)


def test_tokenizer_larger_than_the_vocabulary(refused, copy_of, base, tokenizer):
    folder = copy_of(base)
    larger = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    larger.add_tokens([f"<extra {n}>" for n in range(40)])
    larger.save_pretrained(folder)
    refused(folder, "tokens", "320 embeddings", model__path=folder)


def test_dynamic_rope(refused, copy_of, base):
    folder = copy_of(base)
    edit(folder / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0})
    refused("dynamic", "longest text of a batch", model__path=folder)


def test_sequence_longer_than_the_models_positions(refused):
    refused("--train.seq_len 65", "64 positions", train__seq_len=65)


# -- expansion -----------------------------------------------------------------------------------------------------


def test_more_groups_than_blocks(refused):
    refused("groups 5", "4", expand__groups=5)


def test_no_new_blocks_and_none_asked_for(refused, base):
    refused(base, "--expand.groups", "--train.parameters all", expand__groups=None)


def test_an_expanded_model_is_not_expanded_again(refused, base, tmp_path, cli):
    code, _, err = cli(expand_main, base, tmp_path / "expanded", "--expand.groups", 2)
    assert code == 0, err
    refused("expanded already", "llama-pro-fast expand", model__path=tmp_path / "expanded")


def test_random_weights_cannot_be_expanded(refused):
    refused("--expand", "train a base first", model__init="random", train__parameters="all")


def test_pretrained_weights_keep_their_tokenizer(refused):
    refused("--model.tokenizer train", "--model.init random", model__tokenizer="train")


def test_blocks_to_train_are_named_and_are_there(refused):
    refused("--train.blocks", "--train.parameters blocks", train__blocks="1,2")
    refused("--train.blocks", "--train.parameters blocks", train__parameters="blocks", expand__groups=None)
    named = {"train__parameters": "blocks", "train__blocks": "1,9"}
    refused("--train.blocks", "--expand", **named)
    refused("--train.blocks 9", "blocks 0 to", **named, expand__groups=None)


def test_vocabulary_too_small_for_a_tokenizer(refused, copy_of, base):
    folder = copy_of(base)
    edit(folder / "config.json", vocab_size=257)
    scratch = {"model__init": "random", "model__tokenizer": "train", "expand__groups": None}
    refused("vocab_size", "258", "257", model__path=folder, train__parameters="all", **scratch)


# -- the text ------------------------------------------------------------------------------------------------------


def test_no_domain(refused):
    refused("--data.domain", data__domain=None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[{path: a.jsonl, wieght: 2}]", "a source has path, weight"),
        ("[{path: a.jsonl, weight: two}]", "a value is not of its kind"),
        ("{path: a.jsonl}", "put it into [ ]"),
        ("[{path: a.jsonl", "is no list of sources"),
    ],
)
def test_a_slip_in_a_list_of_sources_is_not_taken_for_a_path(refused, given, words):
    refused("--data.general", words, data__general=given)


def test_a_key_of_a_source_is_no_option_of_its_own(cli):
    code, out, err = cli(train_main, "--data.domain", "a.jsonl", "--data.domain.text", "content")
    assert (code, out) == (2, "")
    assert err.endswith('--data.domain.text: belongs to a source: --data.domain "[{path: FILE, text: ...}]"\n')


def test_a_refused_run_leaves_no_folder(refused, tmp_path):
    refused("none.jsonl", data__domain=tmp_path / "none.jsonl")
    assert not (tmp_path / "run").exists()


def test_source_missing(refused, tmp_path):
    refused(tmp_path / "none.jsonl", data__domain=tmp_path / "none.jsonl")


def test_source_empty(refused, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    refused("empty.jsonl", data__domain=tmp_path / "empty.jsonl")


def test_source_not_json(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    refused("bad.jsonl", "line 2", data__domain=tmp_path / "bad.jsonl")


def test_parquet_not_parquet(refused, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    refused("bad.parquet", data__domain=tmp_path / "bad.parquet")


def test_text_column_not_there(refused, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "some words", "id": 3}\n' * 20)
    refused("other.jsonl", "text", "body", "id", data__domain=tmp_path / "other.jsonl")


def test_chat_messages_instead_of_text(refused, tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 20)
    refused("chat.jsonl", "chat", data__domain=tmp_path / "chat.jsonl")


def test_less_text_than_one_sequence(refused, tmp_path):
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(12)))
    refused("--train.seq_len", data__domain=tmp_path / "short.jsonl", data__held_out=0.3, train__seq_len=64)


# -- the settings --------------------------------------------------------------------------------------------------


def test_no_learning_rate(refused):
    refused("--optim.lr", "2e-4", "2e-5", optim__lr=None)


def test_warmup_longer_than_the_run(refused):
    refused("--optim.warmup_steps 3", "2 steps", optim__warmup_steps=3)


def test_two_lengths(refused):
    refused("--train.steps", "--train.tokens", train__tokens=1e5)


def test_fewer_tokens_than_one_step(refused):
    refused("--train.tokens 50", "64", train__steps=None, train__tokens=50)


def test_micro_batch_does_not_divide_the_batch(refused):
    refused("--train.micro_batch_size", train__micro_batch_size=3, train__batch_size=4)


@pytest.mark.parametrize("key", ["train__steps", "train__batch_size", "optim__lr", "eval__every", "train__log_every"])
def test_zero_where_something_is_needed(refused, key):
    refused(f"--{key.replace('__', '.')}: 0", **{key: 0})


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim__beta1", 1), ("optim__beta2", -0.1), ("optim__eps", 0), ("optim__decay_steps", -1)],
)
def test_values_adamw_or_the_schedule_cannot_take(refused, key, value):
    refused(f"--{key.replace('__', '.')}: {value}", **{key: value})


def test_copies_without_a_place(refused):
    refused("--expand.copies", "--expand.groups", expand__groups=None, expand__copies=2)


def test_a_rate_that_destroys_the_model_exports_nothing(refused):
    refused("not finite", "--optim.lr", optim__lr=1e30, train__steps=1)


def test_a_head_that_is_said_to_be_tied_and_is_another(refused, copy_of, base):
    folder = copy_of(base)
    edit(folder / "config.json", tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings", model__path=folder)


def test_no_gpu(refused):
    if torch.cuda.is_available():
        return
    refused("--train.device cuda", "cpu", train__device="cuda")


def test_unknown_attention_backend(refused):
    refused("--train.attention", "magic", "cpu_flash", train__attention="magic")


def test_kernels_that_cannot_be_had(refused, monkeypatch):
    def missing(device, dtype):
        raise ImportError("llama_pro_kernels needs Triton for tensors on cuda: pip install triton")

    monkeypatch.setattr("llama_pro_fast.training.settle.implementation_name", missing)
    refused("--train.device", "needs Triton", "pip install triton")


def test_unknown_option(refused):
    refused("train.stepz", "did you mean train.steps?", train__stepz=3)


def test_wrong_type(refused):
    refused("--train.steps", "'many'", "int", train__steps="many")


@pytest.mark.parametrize(
    ("recipe", "fragments"),
    [
        ("optim:\n  lrr: 1\n", ["optim.lrr", "did you mean optim.lr?"]),
        ("train: {steps: [1\n", ["not YAML"]),
        ("- a\n", ["not a recipe"]),
        ("train:\n  steps: soon\n", ["train.steps", "soon"]),
        ("data:\n  domain:\n    - {path: a, colum: b}\n", ["data.domain", "colum"]),
    ],
)
def test_bad_recipe(cli, tmp_path, recipe, fragments):
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, _, err = cli(train_main, "--config", tmp_path / "recipe.yaml")
    cli.refused(code, err, *fragments)


def test_recipe_missing(cli, tmp_path):
    code, _, err = cli(train_main, "--config", tmp_path / "none.yaml")
    cli.refused(code, err, "none.yaml")
