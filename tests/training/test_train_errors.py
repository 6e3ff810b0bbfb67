"""A mistake of the user is one line that says what, where and what to do; exit code 2; nothing looks complete."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from transformers import GPT2Config, GPT2LMHeadModel

from llama_pro_fast import expand, export, run_folder, train
from llama_pro_fast.checkpoint import complete_checkpoints
from llama_pro_fast.recipe import parse


@pytest.fixture
def refused(cli, base, texts, tmp_path, tmp_path_factory):
    """Call ``train`` with good options, changed by the ones given, and check how it refuses."""

    def run(*fragments: str, **changes) -> str:
        options = {
            "model.path": base,
            "expand.groups": 2,
            "data.domain": texts / "domain.jsonl",
            "data.general": texts / "general",
            "data.held_out": 0.1,
            "data.cache": tmp_path_factory.getbasetemp() / "token-cache",
            "optim.lr": 1e-2,
            "train.steps": 2,
            "train.seq_len": 32,
            "train.batch_size": 2,
            "train.threads": 1,
            "eval.tokens": 64,
            "output": tmp_path / "run",
        }
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        code, _, err = cli(train.main, *argv)
        assert_refused(code, err, *fragments)
        assert not complete_checkpoints(tmp_path / "run")
        assert not (tmp_path / "run" / "export").exists()
        return err

    return run


def assert_refused(code: int, err: str, *fragments: str) -> None:
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("llama-pro-fast: error: "), err
    for fragment in fragments:
        assert str(fragment) in lines[0], f"{fragment!r} is not in: {lines[0]}"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the model -----------------------------------------------------------------------------------------------------


def test_model_folder_missing(refused, tmp_path):
    refused(tmp_path / "nowhere", "no such folder", model__path=tmp_path / "nowhere")


def test_no_model_named(refused):
    refused("--model.path", model__path=None)


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
    code, _, err = cli(expand.main, base, tmp_path / "expanded", "--groups", 2)
    assert code == 0, err
    refused("expanded already", "llama-pro-fast expand", model__path=tmp_path / "expanded")


def test_random_weights_cannot_be_expanded(refused):
    refused("--expand", "train a base first", model__init="random", train__parameters="all")


# -- the text ------------------------------------------------------------------------------------------------------


def test_no_domain(refused):
    refused("--data.domain", data__domain=None)


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
    code, _, err = cli(train.main, "--config", tmp_path / "recipe.yaml")
    assert_refused(code, err, *fragments)


def test_recipe_missing(cli, tmp_path):
    code, _, err = cli(train.main, "--config", tmp_path / "none.yaml")
    assert_refused(code, err, "none.yaml")


# -- the output ----------------------------------------------------------------------------------------------------


def test_no_output(refused):
    refused("--output", output=None)


def test_output_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", output=tmp_path / "file")


def test_output_below_a_file(refused, tmp_path):
    """Root may write anywhere, so an unwritable place is one that cannot be."""
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot be written", output=tmp_path / "file" / "run")


def test_output_holds_other_files(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    refused(tmp_path / "run", "other files")
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_output_holds_another_run(cli, make_config, tmp_path, base, texts):
    train.run(make_config(train={"steps": 1}))
    argv = ["--model.path", base, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    code, _, err = cli(train.main, *argv, "--output", tmp_path / "run")
    assert_refused(code, err, tmp_path / "run", "--resume", "--overwrite")
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))


def test_overwrite_spares_a_folder_that_is_no_run(refused, cli, tmp_path, base, texts):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes("site_name: Bücher\n".encode("latin-1"))
    argv = ["--model.path", base, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    code, _, err = cli(train.main, *argv, "--output", tmp_path / "run", "--overwrite")
    assert_refused(code, err, tmp_path / "run", "not of a run")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_overwrite_spares_its_own_inputs(cli, make_config, tmp_path, texts):
    train.run(make_config(train={"steps": 1}))
    inside = tmp_path / "run" / "export"
    argv = ["--model.path", inside, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1"]
    code, _, err = cli(train.main, *argv, "--output", tmp_path / "run", "--overwrite")
    assert_refused(code, err, inside, "lies inside")
    assert (inside / "config.json").exists()


def test_overwrite_deletes_nothing_when_the_weights_are_wrong(cli, make_config, tmp_path, copy_of, base, texts):
    train.run(make_config(train={"steps": 1}))
    folder = copy_of(base)
    edit(folder / "config.json", intermediate_size=96)
    argv = [
        "--model.path",
        folder,
        "--data.domain",
        texts / "domain.jsonl",
        "--optim.lr",
        "0.1",
        "--expand.groups",
        "2",
    ]
    code, _, err = cli(train.main, *argv, "--output", tmp_path / "run", "--overwrite")
    assert_refused(code, err, "different models")
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_a_kill_while_overwriting_leaves_a_run(make_config, tmp_path, monkeypatch):
    train.run(make_config(train={"steps": 1}))
    config = make_config(train={"steps": 1})
    rmtree = shutil.rmtree

    def killed(path, *arguments, **options):
        rmtree(path, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, overwrite=True)
    train.run(config, overwrite=True)
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_output_inside_a_source(refused, texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    refused("lies inside", data__domain=tmp_path / "texts", output=tmp_path / "texts" / "run")


@pytest.mark.parametrize("key", ["model__path", "data__domain", "output"])
def test_an_empty_path_is_not_the_current_folder(refused, key):
    refused(f"--{key.replace('__', '.')}", **{key: ""})


def test_two_runs_do_not_write_one_folder(make_config, tmp_path, cli):
    config = make_config(train={"steps": 1})
    with run_folder.claimed(tmp_path / "run", resume=False, overwrite=False):
        code, _, err = cli(lambda argv: train.run(config) and 0)
    assert_refused(code, err, tmp_path / "run", "another run")


def test_output_is_a_link_to_an_empty_folder(make_config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    train.run(make_config(train={"steps": 1}))
    assert (tmp_path / "disk" / "export" / "config.json").exists()


def test_overwrite_deletes_nothing_when_the_new_run_is_refused(cli, make_config, tmp_path, base):
    train.run(make_config(train={"steps": 1}))
    argv = ["--model.path", base, "--data.domain", tmp_path / "none.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    code, _, err = cli(train.main, *argv, "--output", tmp_path / "run", "--overwrite")
    assert_refused(code, err, "none.jsonl")
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_overwrite_starts_anew(make_config, tmp_path):
    train.run(make_config(train={"steps": 1}))
    (tmp_path / "run" / "metrics.jsonl").write_text("old")
    train.run(make_config(train={"steps": 1}), overwrite=True)
    assert "old" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# -- resuming ------------------------------------------------------------------------------------------------------


def test_resume_without_a_run(cli, tmp_path):
    code, _, err = cli(train.main, "--output", tmp_path / "none", "--resume")
    assert_refused(code, err, tmp_path / "none", "no run there")


def test_resume_with_another_setting(cli, make_config, tmp_path):
    train.run(make_config(train={"steps": 1}))
    code, _, err = cli(train.main, "--output", tmp_path / "run", "--resume", "--optim.lr", "0.5")
    assert_refused(code, err, "optim.lr", "0.5", "0.01")


def test_resume_on_another_base(make_config, tmp_path, cli):
    train.run(make_config(train={"steps": 1}))
    with open(tmp_path / "run" / "expanded" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, _, err = cli(train.main, "--output", tmp_path / "run", "--resume")
    assert_refused(code, err, "expanded", "was made on other weights")


def test_resume_on_changed_text(make_config, tmp_path, cli, texts):
    shutil.copy(texts / "domain.jsonl", tmp_path / "mine.jsonl")
    train.run(make_config(data={"domain": str(tmp_path / "mine.jsonl")}, train={"steps": 1}))
    with open(tmp_path / "mine.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    code, _, err = cli(train.main, "--output", tmp_path / "run", "--resume")
    assert_refused(code, err, "text has changed")


def test_damaged_checkpoint(make_config, tmp_path, cli):
    train.run(make_config(train={"steps": 1}))
    folder = complete_checkpoints(tmp_path / "run")[-1]
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = cli(train.main, "--output", tmp_path / "run", "--resume")
    assert_refused(code, err, folder, "delete this folder")
    code, _, err = cli(export.main, tmp_path / "run", tmp_path / "out")
    assert_refused(code, err, folder)
    assert not (tmp_path / "out").exists()


# -- the disk, and NaN ---------------------------------------------------------------------------------------------


def test_no_space_for_a_checkpoint_keeps_the_one_before(make_config, tmp_path, cli, monkeypatch):
    config = make_config(train={"steps": 4, "checkpoint_every": 2})
    write, calls = dcp.FileSystemWriter.write_data, []

    def full_disk(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full_disk)
    code, _, err = cli(lambda argv: train.run(config) and 0)
    assert_refused(code, err, "step-000004", "No space left", "free space")
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-000002"]
    monkeypatch.undo()
    train.run(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_no_space_for_the_expansion(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("expanded", "GB")
    assert not (tmp_path / "run" / "expanded").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_shown(make_config, tmp_path, cli, monkeypatch):
    from llama_pro_fast.model import Decoder

    loss, calls = Decoder.loss, []

    def poisoned(self, batch, scale):
        calls.append(1)
        return loss(self, batch, scale * (torch.nan if len(calls) == 9 else 1.0))

    monkeypatch.setattr(Decoder, "loss", poisoned)
    config = make_config(train={"steps": 8, "checkpoint_every": 3})
    code, _, err = cli(lambda argv: train.run(config) and 0)
    assert_refused(code, err, "step 5", "not finite", "--resume")
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-000003"]
    monkeypatch.undo()
    train.run(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)


# -- export --------------------------------------------------------------------------------------------------------


def test_export_of_what_is_no_run(cli, tmp_path):
    code, _, err = cli(export.main, tmp_path)
    assert_refused(code, err, tmp_path, "no run there")


def test_export_on_another_base(cli, make_config, tmp_path):
    train.run(make_config(train={"steps": 1}))
    with open(tmp_path / "run" / "expanded" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, _, err = cli(export.main, tmp_path / "run", tmp_path / "out")
    assert_refused(code, err, "expanded", "put them back")
    assert not (tmp_path / "out").exists()


def test_export_before_the_first_checkpoint(cli, make_config, tmp_path, monkeypatch):
    train.run(make_config(train={"steps": 1}))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    code, _, err = cli(export.main, tmp_path / "run", tmp_path / "out")
    assert_refused(code, err, "no complete checkpoint")


def test_export_onto_something(cli, make_config, tmp_path):
    train.run(make_config(train={"steps": 1}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    code, _, err = cli(export.main, tmp_path / "run", tmp_path / "out")
    assert_refused(code, err, tmp_path / "out", "something there")
    assert (tmp_path / "out" / "precious").exists()
