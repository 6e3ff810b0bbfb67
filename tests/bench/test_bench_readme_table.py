"""tools/readme_table.py and the picture: who is shown, in which order, and that both pages are up to date."""

from __future__ import annotations

import pictures
import pytest
import readme_table
import throughput_rows


def row(contestant: str, speed: float | None, trains: str = "new blocks", **more: object) -> dict:
    return {
        "contestant": contestant, "trains": trains, "status": "measured", "device": "NVIDIA H200", "size": "7b",
        "seq": 4096, "document": 4096, "micro_batch": 2, "compute_dtype": "bfloat16", "trained_dtype": "float32",
        "error": None, "commit": "0123456789", "date": "2026-11-01T00:00:00+00:00", "warmup": 3, "steps": 8,
        "tokens_per_s": speed, "peak_gib": 40.125, "step_s": dict.fromkeys(("p10", "median", "p90"), 0.5),
        "tflops": 500.0, "share_of_product": 0.655, "first_loss": 10.5, "loss": 10.25, "weights_digest": trains,
    } | more  # fmt: skip


FULL = dict.fromkeys(("tokens_per_s", "peak_gib", "share_of_product"))
ROWS = [
    row("hf", 5_000.0),
    row("ours", 10_000.0),
    row("hf-bf16", 7_500.0, trained_dtype="bfloat16"),
    row("full", None, "everything", status="out of memory", error="OutOfMemoryError: CUDA", **FULL),
    row("hf-liger", None, status="missing", error="not installed: liger-kernel"),
    row("lora", 8_000.0, "adapters"),
]
"""Of a GPU, in no order of speed."""


def test_the_table_has_the_fastest_first_other_methods_apart_and_the_missing_left_out():
    picture = "![LLaMA-2-7B + 8 new blocks on NVIDIA H200, 2 × 4,096 tokens a step, bfloat16](pictures/throughput.png)"
    head = ["| | tokens/s | ours / its | peak GiB | trained weights | loss of step 11 |", "|---|--:|--:|--:|---|--:|"]
    rows = {
        "ours": "| ours | 10,000 | 1.00 | 40.1 | float32 | 10.2500 |",
        "hf-bf16": "| HF, all bf16 | 7,500 | 1.33 | 40.1 | bfloat16 | 10.2500 |",
        "hf": "| HF | 5,000 | 2.00 | 40.1 | float32 | 10.2500 |",
        "lora": "| LoRA on the base (HF) | 8,000 | 1.25 | 40.1 | float32 | 10.2500 |",
        "full": "| full fine-tuning (HF) | out of memory |  |  |  |  |",
    }
    what = "LLaMA-2-7B + 8 new blocks on NVIDIA H200, 2 × 4,096 tokens a step, bfloat16, commit 0123456, 2026-11-01:"
    name = "throughput-7b-nvidia-h200.json"
    assert readme_table.table(ROWS, readme_table.PAGE).splitlines() == [
        picture, "", *head, *rows.values(), "", what, f"[{name}](../bench/results/{name}).",
    ]  # fmt: skip
    assert readme_table.table(ROWS, readme_table.README).splitlines() == [
        *head, *(line for contestant, line in rows.items() if contestant in readme_table.IN_README), "", what,
        f"[{name}](bench/results/{name}).",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "name"), [("README", "throughput"), ("PAGE", "throughput"), ("EVIDENCE", "forgetting")]
)
def test_the_pages_hold_the_tables_of_the_results(page, name, tmp_path, monkeypatch):
    assert readme_table.main(["--check"]) == 0, "run: python tools/readme_table.py"
    stale = tmp_path / "page.md"
    stale.write_text(f"<!-- {name} -->\nold\n<!-- /{name} -->\n")
    monkeypatch.setattr(readme_table, page, stale)
    assert readme_table.main(["--check"]) == 1
    assert "old" in stale.read_text()


def test_a_result_is_drawn_but_for_who_failed_or_is_missing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    failed = row("hf-compile", None, status="failed", error="RuntimeError")
    pictures.draw_throughput([*ROWS, failed], tmp_path / "throughput.png")
    assert "full: out of memory: OutOfMemoryError: CUDA" in throughput_rows.show(ROWS)
    for axes in drawn[0].axes:
        assert len(axes.patches) == 4
        assert "out of memory" in [text.get_text() for text in axes.texts]
    shown = ["ours", "HF, all bf16", "HF", "LoRA on the base (HF)", "full fine-tuning (HF)"]
    assert [text.get_text() for text in drawn[0].axes[0].get_yticklabels()] == shown
