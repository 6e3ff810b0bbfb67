"""`llama-pro-fast plan`: what it says of well-known models, and how it refuses; all without the network or a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
from rich.console import Console

from llama_pro_fast import console, plan
from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.hf import known_shapes
from llama_pro_fast.planning.devices import DEVICES
from llama_pro_fast.recipe import parse

LLAMA_7B, LLAMA_8B, LLAMA_70B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """A known shape is planned without asking anybody."""

    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    for name in ("snapshot_download", "hf_hub_download", "model_info", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, asked)


@pytest.fixture
def said(capsys, monkeypatch):
    """``(exit code, what is printed on 100 columns, the same in one line without frames)``."""
    monkeypatch.setattr(console, "console", Console(width=100, highlight=False))

    def run(*argv: str) -> tuple[int, str, str]:
        code = run_entry_point(plan.main, [str(word) for word in argv])
        captured = capsys.readouterr()
        assert not captured.err, captured.err
        return code, captured.out, " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out).split())

    return run


@pytest.fixture
def refused(capsys):
    def run(*argv: str) -> str:
        assert run_entry_point(plan.main, [str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("llama-pro-fast: error: ")
        return line

    return run


def test_eight_blocks_in_llama_2_7b_on_an_h100(said):
    code, _, text = said("--model.path", LLAMA_7B, "--gpu", "h100", "--expand.groups", 8)
    assert code == 0
    for fact in (
        f"{LLAMA_7B} + 8 blocks on one H100 80 GB",
        "....XooooXooooXooooXooooXooooXooooXooooX",
        "8.36 B, of which 1.62 B train (19.4%): blocks 4, 9, 14, 19, 24, 29, 34, 39",
        "16 x 4096 = 65,536 tokens, in 8 micro-batches of 2",
        "66.0 GiB at the fullest, of 74.2 usable on 79.1",
        "38.18 GFLOP a token: forward 16.45, dX 14.73, dW 3.238, attention 3.758",
        "93,320 +0.0% 52.9 2 x 4096",
        "should products and attention reach 50% of 989 TFLOP/s",
        "8 in the upper half",
        "full fine-tuning 6.74 B 54.0 102.8 too large",
        "LoRA, rank 16 40 M",
        "neither is measured",
    ):
        assert fact in text, fact


def test_eight_blocks_in_llama_3_1_8b(said):
    code, _, text = said("--model.path", LLAMA_8B, "--gpu", "h200", "--expand.groups", 8)
    assert code == 0
    assert f"{LLAMA_8B} + 8 blocks on one H200 141 GB" in text
    assert "9.78 B, of which 1.74 B train (17.9%)" in text


def test_a_70b_model_fits_no_card_and_that_is_said(said):
    code, _, text = said("--model.path", LLAMA_70B, "--gpu", "h200", "--expand.groups", 8)
    assert code == 1
    assert "on one H200 141 GB: does not fit" in text
    assert "No card in the list holds it, and what is frozen stands on every card" in text
    assert "weights, masters, moments and gradients alone take 230.5 GiB" in text


def test_all_of_the_expanded_7b_fits_141_gb_and_not_80(said):
    """Not with bf16 copies of its weights, which take 15.5 GiB; so blocks that recompute everything keep none."""
    code, _, text = said("--model.path", LLAMA_7B, "--gpu", "h200", "--expand.groups", 8, "--train.parameters", "all")
    assert code == 0
    assert "131.6 GiB at the fullest, of 131.8 usable" in text
    code, _, text = said("--model.path", LLAMA_7B, "--gpu", "h100", "--expand.groups", 8, "--train.parameters", "all")
    assert code == 1
    assert "weights, masters, moments and gradients alone take 125.0 GiB (134.2 GB)" in text
    assert "74.2 GiB (79.7 GB) are usable on H100 80 GB" in text
    assert "8 new blocks in place of all parameters" in text


@pytest.mark.parametrize(
    "argv",
    [
        ("--model.path", LLAMA_7B, "--gpu", "h100", "--expand.groups", 8, "--price", 2.5),
        ("--model.path", LLAMA_8B, "--gpu", "4090", "--expand.groups", 8),
        ("--model.path", LLAMA_70B, "--gpu", "a100-80", "--expand.after", "79"),
        ("--model.path", LLAMA_7B, "--gpu", "cpu", "--expand.groups", 8),
    ],
)
def test_it_fits_80_columns(said, argv, monkeypatch):
    """What a terminal has until it is widened, and a pipe always."""
    monkeypatch.setattr("llama_pro_fast.console.console.width", 80)
    _, printed, _ = said(*argv)
    framed = [line for line in printed.splitlines() if line.startswith(("│", "╭", "├", "╰"))]
    assert max(map(len, framed)) <= 80
    # No column is so low that a word or a figure breaks.
    for word in ("full fine-tuning", "LoRA, rank 16", "GFLOP", "at a time"):
        assert word in printed


def test_what_was_asked_for_is_kept_and_said(said):
    code, _, text = said(
        "--model.path",
        LLAMA_7B,
        "--gpu",
        "h100",
        "--expand.groups",
        8,
        "--train.micro_batch_size",
        4,
        "--train.recompute",
        "block",
    )
    assert code == 0
    assert "in 4 micro-batches of 4" in text
    assert "32.8% more work" in text


def test_where_only_what_was_asked_for_does_not_fit_it_says_what_would(said):
    code, _, text = said(
        "--model.path",
        LLAMA_7B,
        "--gpu",
        "h100",
        "--expand.groups",
        8,
        "--train.micro_batch_size",
        16,
        "--train.recompute",
        "none",
    )
    assert code == 1
    assert "memory micro-batch 16 and the recomputation asked for needs " in text
    assert "What would fit: micro-batch 2 with recompute none" in text


def test_the_price_is_of_the_hours(said):
    _, _, text = said(
        "--model.path", LLAMA_7B, "--gpu", "h100", "--expand.groups", 8, "--price", 2, "--train.tokens", "1e9"
    )
    hours, cost = re.search(r"1 B tokens: ([\d.]+) h, cost (\d+) \(an hour costs 2\)", text).groups()
    assert abs(2 * float(hours) - int(cost)) <= 0.6


@pytest.mark.parametrize("gpu", ["h100", "4090", "cpu"])
def test_the_json_agrees_with_what_is_said(said, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr("llama_pro_fast.planning.devices.available_memory", lambda: 100 * 2**30)
    path = tmp_path / "plan.json"
    code, _, text = said("--model.path", LLAMA_7B, "--gpu", gpu, "--expand.groups", 8, "--json", path)
    figures = json.loads(path.read_text())
    assert f"written to {path}" in text
    assert figures["fits"] == (code == 0) == (gpu != "4090")
    assert (figures["layers"], figures["trained_blocks"]) == (40, [4, 9, 14, 19, 24, 29, 34, 39])
    assert (figures["parameters"], figures["trained_parameters"]) == (8_357_482_496, 8 * 202_383_360)
    assert figures["ways"][0]["name"] == "this plan"
    if not figures["fits"]:
        assert "peak_bytes" not in figures
        return
    assert figures["peak_bytes"] <= figures["usable_bytes"]
    assert f"{figures['peak_bytes'] / 2**30:.1f} GiB at the fullest" in text
    assert sum(figures["memory"].values()) <= figures["peak_bytes"]
    assert f"in {figures['phase']}" in text
    micro, batch = figures["micro_batch_size"], figures["batch_size"]
    assert f"in {batch // micro} micro-batches of {micro}" in text
    cost = figures["flops_per_token"]
    assert f"{sum(cost[part] for part in ('forward', 'dx', 'dw', 'attention')) / 1e9:.4g} GFLOP a token" in text
    if gpu == "cpu":
        assert figures["tokens_per_second"] is None
        assert "tokens/s, should" not in text
    else:
        assert f"{figures['tokens_per_second']:,.0f} tokens/s" in text
        assert figures["device"] == DEVICES[gpu].title


PLANNED = ("--model.path", LLAMA_7B, "--expand.groups", 8)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ((), ("--model.path: say which model",)),
        (("--model.path", "no/such/folder"), ("no/such/folder", "no such folder")),
        (("--model.path", LLAMA_7B), ("has no new blocks to train", "--expand.groups 8", "--train.parameters all")),
        (("--model.path", LLAMA_7B, "--expand.groups", 33), ("--expand.groups 33", "from 1 to 32")),
        (("--model.path", LLAMA_7B, "--expand.groups", "eight"), ("--expand.groups", "eight", "int")),
        ((*PLANNED, "--expand.after", "3"), ("--expand.after", "--expand.groups", "give one")),
        (("--model.path", LLAMA_7B, "--expand.after", "3,x"), ("--expand.after 3,x", "3,7,11")),
        (("--model.path", LLAMA_7B, "--expand.after", "32"), ("--expand.after 32", "0 to 31")),
        ((*PLANNED, "--expand.copies", 0), ("--expand.copies: 0 is not a number above 0",)),
        ((*PLANNED, "--expand.copies", 5), ("--expand.copies 5", "give fewer")),
        (
            ("--model.path", LLAMA_7B, "--train.parameters", "all", "--expand.copies", 2),
            ("--expand.copies", "not where", "--expand.groups"),
        ),
        ((*PLANNED, "--train.tokens", "inf"), ("--train.tokens: 'inf' is not float",)),
        ((*PLANNED, "--train.tokens", "nan"), ("--train.tokens: 'nan' is not float",)),
        ((*PLANNED, "--train.seq_len", 8192), ("--train.seq_len 8192", "4096", "at most")),
        ((*PLANNED, "--train.seq_len", 1), ("--train.seq_len 1", "at least 2")),
        ((*PLANNED, "--train.batch_size", 0), ("--train.batch_size: 0 is not a number above 0",)),
        ((*PLANNED, "--train.micro_batch_size", 3), ("--train.micro_batch_size: 3", "--train.batch_size 16")),
        ((*PLANNED, "--train.micro_batch_size", 0), ("--train.micro_batch_size: 0 is not a number above 0",)),
        ((*PLANNED, "--train.recompute", "all"), ("--train.recompute all", "none, mlp, all_but_attention, block")),
        ((*PLANNED, "--train.recompute", ".b"), ("--train.recompute .b", "each of the 40 blocks")),
        ((*PLANNED, "--price", -1), ("--price: -1 is not a number from 0 up",)),
        (("--config", "no-such-recipe"), ("no-such-recipe", "quickstart")),
        ((*PLANNED, "--groups", 3), ("there is no option or recipe key groups", "did you mean expand.groups?")),
    ],
)
def test_a_bad_option_is_one_line_with_the_remedy(refused, argv, fragments):
    line = refused("--gpu", "h100", *argv)
    for fragment in fragments:
        assert fragment in line


def test_an_unknown_card_and_a_file_that_cannot_be_written_too(refused, capsys, tmp_path):
    line = refused("--model.path", LLAMA_7B, "--expand.groups", 8, "--gpu", "h101")
    assert "h101" in line
    assert "h200" in line
    line = refused(
        "--model.path", LLAMA_7B, "--expand.groups", 8, "--gpu", "h100", "--json", tmp_path / "none" / "plan.json"
    )
    assert f"--json {tmp_path / 'none' / 'plan.json'}: cannot be written" in line


def test_a_recipe_is_planned_and_options_win(said):
    code, _, text = said("--config", "llama-2-7b", "--gpu", "h100")
    assert code == 0
    assert f"{LLAMA_7B} + 8 blocks" in text
    _, _, text = said(
        "--config",
        "llama-2-7b",
        "--gpu",
        "h100",
        "--expand.groups",
        4,
        "--train.seq_len",
        1024,
        "--train.batch_size",
        6,
    )
    assert f"{LLAMA_7B} + 4 blocks" in text
    assert "6 x 1024 = 6,144 tokens" in text


def test_of_a_folder_only_the_config_is_read(said, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(known_shapes.SHAPES[LLAMA_7B] | {"architectures": ["LlamaForCausalLM"]})
    )
    code, _, text = said("--model.path", folder, "--gpu", "h100", "--expand.groups", 8)
    assert code == 0
    assert "38.18 GFLOP a token" in text


def test_an_expanded_folder_says_itself_what_trains(said, make_base, tmp_path):
    make_base()
    assert expand_main([str(tmp_path / "base"), str(tmp_path / "expanded"), "--expand.after", "0,2"]) == 0
    for path in (tmp_path / "expanded").glob("*.safetensors*"):
        path.unlink()
    path = tmp_path / "plan.json"
    code, _, text = said("--model.path", tmp_path / "expanded", "--gpu", "h100", "--json", path)
    assert code == 0
    assert json.loads(path.read_text())["trained_blocks"] == [1, 4]
    assert "XooXo" in text  # nothing below the first has a backward
    assert "64 = " in text  # no more positions than the model has


@pytest.mark.slow
def test_in_a_fresh_process_it_ends_without_a_network_or_a_gpu():
    environment = os.environ | {
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    command = [
        sys.executable,
        "-m",
        "llama_pro_fast.plan",
        "--model.path",
        LLAMA_7B,
        "--gpu",
        "h100",
        "--expand.groups",
        "8",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "38.18 GFLOP a token" in done.stdout
    assert max(map(len, (line for line in done.stdout.splitlines() if line[:1] in "│╭├╰"))) <= 100


def test_a_recipes_limit_dtype_and_backend_are_planned_with(said, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    text = f"model: {{path: {LLAMA_7B}}}\nexpand: {{groups: 8}}\noptim: {{lr: 1.0e-5}}\ntrain: {{batch_size: 4, %s}}\n"
    recipe.write_text(text % "memory: 60")
    code, _, printed = said("--config", recipe, "--gpu", "h100")
    assert code == 0
    assert "of 60.0 usable on 79.1" in printed
    assert "1 sequence at a time (2 would fit with more recomputed only)" in printed
    asked = {}
    for settings in ("dtype: float32", "attention: flash_3"):
        recipe.write_text(text % settings)
        job = plan.question_of(parse(["--config", str(recipe), "--gpu", "h100"], verb="plan", own=plan.OWN)).job
        asked[settings] = (str(job.dtype), job.attention)
    assert asked == {
        "dtype: float32": ("torch.float32", "reference"),
        "attention: flash_3": ("torch.bfloat16", "flash_3"),
    }


def test_copies_go_with_the_places_of_a_recipe(said):
    _, _, printed = said("--config", "llama-2-7b", "--gpu", "h200", "--expand.copies", 2)
    assert f"{LLAMA_7B} + 16 blocks" in printed


def test_small_figures_are_not_rounded_to_nothing(said, monkeypatch):
    monkeypatch.setattr("llama_pro_fast.planning.devices.available_memory", lambda: 2**34)
    code, _, printed = said(
        "--model.path", "builtin:prose-3m", "--gpu", "cpu", "--expand.groups", 3, "--train.batch_size", 1
    )
    assert code == 0
    assert not re.search(r" 0(\.0+)? (GiB|GB|GFLOP)", printed)
    assert "in 1 micro-batch of 1" in printed


@pytest.mark.parametrize(("gpu", "ranks", "rate"), [("h100", 8, 450e9), ("h100", 16, 50e9), ("4090", 16, 31.5e9)])
def test_ranks_share_a_step_and_add_up_its_gradients(gpu, ranks, rate, said, tmp_path):
    """Each takes a part of the sequences with all weights, and sends a ring's share of four bytes a parameter."""
    figures = {}
    for count in (1, ranks):
        options = ["--model.path", "meta-llama/Llama-3.2-1B", "--expand.groups", "4", "--gpu", gpu, "--price", "2"]
        options += ["--train.tokens", "1e9", "--train.ranks", count, "--train.batch_size", 4 * count]
        _, _, text = said(*options, "--json", tmp_path / "plan.json")
        figures[count] = json.loads((tmp_path / "plan.json").read_text()) | {"said": text}
    one, many = figures[1], figures[ranks]
    assert many["peak_bytes"] == one["peak_bytes"]
    assert (many["batch_size"], many["ranks"], one["sent_bytes"]) == (4 * ranks, ranks, 0)
    sent = 2 * (ranks - 1) / ranks * 4 * one["trained_parameters"]
    assert many["sent_bytes"] == pytest.approx(sent, abs=1)
    step = 4 * one["seq_len"] / one["tokens_per_second"] + sent / rate
    assert many["tokens_per_second"] == pytest.approx(many["batch_size"] * one["seq_len"] / step, rel=1e-3)
    assert f"on {ranks} x {DEVICES[gpu].title}" in many["said"]
    assert f"on each of {ranks} ranks in" in many["said"]
    hours = 1e9 / many["tokens_per_second"] / 3600
    assert f"1 B tokens: {hours:,.1f} h, cost {hours * 2 * ranks:,.0f}" in many["said"]


def test_without_a_known_speed_none_is_spoken_of(said):
    _, _, text = said("--model.path", "meta-llama/Llama-3.2-1B", "--expand.groups", 4, "--gpu", "cpu")
    assert "Memory is computed from the shapes; it is measured" not in text
    assert "Memory is computed from the shapes; it is not measured. How long it would take is said for a card" in text


def test_what_trains_is_sharded_where_whole_weights_do_not_fit(said, tmp_path):
    """Of eight new blocks in an 8B model masters, moments and gradients; frozen weights stand on every card."""
    options = ["--model.path", LLAMA_8B, "--expand.groups", 8, "--gpu", "a100-40", "--json", tmp_path / "plan.json"]
    code, _, text = said(*options)
    assert code == 1
    assert "or 2 such cards that share what trains (torchrun, --train.sharding trained)" in text
    options += ["--train.ranks", 8, "--train.batch_size", 64]
    assert said(*options, "--train.sharding", "replicate")[0] == 1
    code, _, text = said(*options)
    assert code == 0
    assert "trained blocks sharded, frozen weights on each" in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    trained, memory = plan["trained_parameters"], plan["memory"]
    assert memory["masters"] == memory["gradients"] == pytest.approx(4 * trained / 8, rel=1e-6)
    assert memory["moments"] == pytest.approx(8 * trained / 8, rel=1e-6)
    assert memory["low_precision"] == 0
    micro = 64 // 8 // plan["micro_batch_size"]
    assert plan["sent_bytes"] == pytest.approx(3 * 4 * trained * micro * 7 / 8, rel=1e-6)
