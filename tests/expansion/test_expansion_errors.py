"""Whatever a user can get wrong: one line, exit code 2, and nothing left that looks like a model."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.expansion import manifest, rewrite
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import INDEX_FILE, SINGLE_FILE, PretrainedFolder

from .conftest import edit_config, left_behind


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the verb on `tmp_path/base`; it must refuse in one line that holds ``words``, and leave nothing."""

    def run(words: str, *options: str, out: str = "out", base: str = "base", code: int = 2) -> None:
        before = sorted(left_behind(tmp_path))
        capsys.readouterr()  # saving the base shows a progress bar
        argv = [str(tmp_path / base), str(tmp_path / out), *(options or ("--expand.groups", "2"))]
        assert run_entry_point(expand_main, argv) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("llama-pro-fast: ")
        assert words in line
        assert sorted(left_behind(tmp_path)) == before

    return run


def test_a_missing_folder(refused):
    refused("no such folder", base="nowhere")


def test_another_architecture(make_base, refused):
    edit_config(make_base().path, architectures=["GPT2LMHeadModel"])
    refused("GPT2LMHeadModel of model_type llama is not supported; supported: LlamaForCausalLM (llama), Mistral")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--expand.groups", "9"), "groups 9"),
        (("--expand.groups", "x"), "--expand.groups: 'x' is not int"),
        (("--expand.after", "1,x"), "after 1,x"),
        (("--expand.after", "4"), "after 4"),
        (("--expand.groups", "2", "--expand.copies", "3"), "copies 3"),
        (("--expand.groups", "2", "--expand.after", "1"), "--expand.groups and --expand.after: each of them is given"),
        (("--expand.copies", "1"), "--expand.groups and --expand.after: none of them is given"),
        (("--expand.groups", "2", "--grops", "2"), "no option or recipe key grops; did you mean expand.groups?"),
    ],
)
def test_options_that_make_no_plan(make_base, refused, options, words):
    make_base()
    refused(words, *options)


@pytest.mark.parametrize("cut", [1, 4000])
def test_a_truncated_shard(make_base, refused, cut):
    path = make_base().path / SINGLE_FILE
    os.truncate(path, path.stat().st_size - cut)
    refused("damaged")


def test_a_shard_that_is_no_safetensors_file(make_base, refused):
    (make_base().path / SINGLE_FILE).write_bytes(b"<html>" * 100)
    refused("damaged")


def test_a_header_whose_tensors_overlap(make_base, refused):
    path = make_base().path / SINGLE_FILE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    name = "model.layers.0.mlp.up_proj.weight"
    table[name]["data_offsets"] = table["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    path.write_bytes(
        content[:8] + json.dumps(table, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )
    refused("overlap")


def test_a_missing_shard(make_base, refused):
    base = make_base(shard_size="6KB")
    (base.path / base.files[1]).unlink()
    refused(base.files[1])


def test_weights_of_another_depth_than_the_config_says(make_base, refused):
    base = make_base()
    edit_config(base.path, num_hidden_layers=5)
    refused("model.layers.4.")
    edit_config(base.path, num_hidden_layers=3)
    refused("model.layers.3.")


def test_weights_of_another_width_than_the_config_says(make_base, refused):
    edit_config(make_base().path, intermediate_size=25)
    refused("has shape [16, 24]")


def test_no_weights_at_all(make_base, refused):
    (make_base().path / SINGLE_FILE).unlink()
    refused("no safetensors weights")


def test_a_damaged_manifest(make_base, refused):
    edit_config(make_base().path, block_expansion={"format_version": 7})
    refused("block_expansion")


def test_an_output_that_is_taken(make_base, refused, tmp_path):
    make_base()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    refused("something there already")
    assert (tmp_path / "out" / "precious").read_text() == "data"
    refused("something there already", out="base")


def test_an_output_below_a_file(make_base, refused, tmp_path):
    make_base()
    (tmp_path / "file").write_text("")
    refused("cannot be written", out="file/out")


def test_too_small_a_disk(make_base, refused, small_disk):
    make_base()
    refused("GB are free")


def test_a_disk_that_fills_up_on_the_way(make_base, refused, monkeypatch):
    make_base()
    write, calls = rewrite._write_all, []

    def fills_up(file, piece):
        calls.append(len(piece))
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, piece)

    monkeypatch.setattr(rewrite, "_write_all", fills_up)
    refused("No space left on device")
    assert len(calls) == 20


def test_a_disk_that_takes_only_part_of_what_it_is_given():
    class Slow:
        def __init__(self):
            self.got = b""

        def write(self, piece):
            self.got += bytes(piece[:3])
            return min(3, len(piece))

    file = Slow()
    rewrite._write_all(file, memoryview(b"0123456789"))
    assert file.got == b"0123456789"


def test_ctrl_c(make_base, refused, monkeypatch):
    make_base()

    def interrupted(file, piece):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "_write_all", interrupted)
    refused("interrupted", code=130)


def test_a_failed_proof_leaves_nothing(make_base, refused, monkeypatch):
    make_base()
    for module in (rewrite, manifest):
        monkeypatch.setattr(module, "ZEROED", ("self_attn.o_proj",))
    refused("block 2: its output is not its input")


def test_a_killed_expansion_leaves_no_model_and_the_next_one_succeeds(make_base, tmp_path):
    base = make_base(shard_size="6KB")
    plan, out = ExpansionPlan.from_groups(4, 2), tmp_path / "out"
    base.entries  # noqa: B018 - headers are read before the fork, so the child does nothing but copy

    def kill_halfway(what, done, total):
        if 2 * done > total:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            expand_and_prove(base, out, plan, progress=kill_halfway)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert not out.exists()
    assert not (tmp_path / "out.partial" / INDEX_FILE).exists()
    expand_and_prove(base, out, plan)
    assert PretrainedFolder(out).config.num_hidden_layers == 6
    assert sorted(left_behind(tmp_path)) == ["out"]


def test_an_empty_output_folder_is_used_and_progress_reaches_its_ends(make_base, tmp_path):
    base = make_base()
    (tmp_path / "out").mkdir()
    last = {}
    plan = ExpansionPlan.from_groups(4, 2)
    expand_and_prove(
        base, tmp_path / "out", plan, progress=lambda what, done, total: last.update({what: (done, total)})
    )
    assert set(last) == {"writing", "comparing files", "running blocks"}
    assert all(done == total for done, total in last.values())
