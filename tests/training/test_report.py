"""The page about runs: it holds the right figures whatever state they are in, and reading a run leaves it alone."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import forked
import numpy as np
import pytest

from llama_pro_fast.report import main as report_main
from llama_pro_fast.reporting import curves
from llama_pro_fast.reporting.page import labels, page
from llama_pro_fast.reporting.record import Record, results
from llama_pro_fast.reporting.summary import summarise
from llama_pro_fast.runs.run_folder import claimed

VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a reader sees of a page: the words, the facts by name, and tables as rows of cells by their first."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.open = html, [], []
        self.words: list[str] = []
        self.facts: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.best: list[str] = []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            if dict(attrs).get("class") == "best":
                self.best.append((self.tables[-1][-1][0], len(self.tables[-1][-1]) - 1))
        elif tag == "dt":
            self.name = ""
        elif tag == "dd":
            self.facts[self.name] = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] == "dt":
            self.name += data
        if "dd" in self.open:
            self.facts[self.name] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def rows(self, *columns: str) -> list[list[str]]:
        """Of the table with these columns."""
        (found,) = [table for table in self.tables if table[0] == list(columns)]
        return found[1:]

    @property
    def titles(self) -> list[str]:
        """Of the pictures."""
        return [attrs["aria-label"] for tag, attrs in self.tags if tag == "svg" and "aria-label" in attrs]


NATS = ("text", "role", "at step", "before", "now", "change", "base", "now − base", "KL(base ‖ now)")
BITS = ("text", "role", "before", "now", "change")


@pytest.fixture
def report(cli):
    """``report(*arguments)``: the page that the verb writes, parsed."""

    def call(*arguments) -> Page:
        code, out, err = cli(report_main, *arguments)
        assert code == 0, err
        path = Path(out.strip().splitlines()[-1].removeprefix("report: "))
        return Page(path.read_text(encoding="utf-8"))

    return call


def train_row(step: int, loss: float | None = 2.0, **more) -> dict:
    known = {"lr": 1e-3, "grad_norm": 0.5, "seconds": 2.0, "tokens_per_second": 1234.5, "peak_memory_gib": 1.5}
    return {"kind": "train", "step": step, "loss": loss} | known | more


def eval_row(step: int, loss: float = 3.0, *, source: str = "law", role: str = "domain", **more) -> dict:
    row = {"kind": "eval", "step": step, "source": source, "role": role, "measured": "one text", "loss": loss}
    return row | {"tokens": 100, "base_loss": None, "kl": None, "bits_per_byte": loss / 3} | more


def metered(step: int, loss: float, base: float = 3.0, **more) -> dict:
    return eval_row(step, loss, source="web", role="general", base_loss=base, kl=loss - base, **more)


def marked(run: Path) -> list[dict]:
    """The run's rows, the evaluation before its first step marked as such."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row | {"first": True} if row["kind"] == "eval" and row["step"] == 0 else row for row in rows]


def written(run: Path, rows) -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "report.html" not in path.name
    }


def test_a_finished_run_leaves_its_page(finished):
    html = (finished / "report" / "report.html").read_text(encoding="utf-8")
    found = Page(html)
    assert "finished" in found.text
    assert "All 6 steps are done." in found.text
    assert found.facts["blocks"].startswith("..XooX")
    assert found.facts["export"].startswith("read back")


def test_the_page_of_a_finished_run_holds_its_figures(a_run, report):
    rows = marked(a_run)
    written(a_run, rows)
    summary = json.loads((a_run / "report" / "summary.json").read_text())
    found = report(a_run)
    wanted_nats, wanted_bits = [], []
    for role, source in (("domain", "domain"), ("general", "general")):
        mine = [row for row in rows if row["kind"] == "eval" and row["role"] == role]
        first, last = mine[0], mine[-1]
        base = ["–"] * 3
        if role == "general":
            base = [f"{last['base_loss']:.4f}", f"{last['loss'] - last['base_loss']:+.4f}", f"{last['kl']:.4f}"]
        change = f"{last['loss'] - first['loss']:+.4f}"
        wanted_nats.append([source, role, "6", f"{first['loss']:.4f}", f"{last['loss']:.4f}", change, *base])
        (of_summary,) = [row for row in summary["results"] if row["role"] == role]
        bits = [row["bits_per_byte"] for row in (first, last)]
        beside = [f"{of_summary[f'{name}_bits_per_byte']:.4f}" for name in ("unigram", "gzip")]
        wanted_bits.append([source, role, *(f"{b:.4f}" for b in bits), f"{bits[1] - bits[0]:+.4f}", *beside])
    assert found.rows(*NATS) == wanted_nats
    assert found.rows(*BITS, "unigram model", "gzip -9") == wanted_bits
    assert found.facts["trains"].endswith(f"({summary['trained_parameters'] / summary['parameters']:.1%})")
    assert found.facts["length"] == "6 steps of 4 × 32 tokens: 768 tokens"
    assert found.titles == [
        "Fall of the loss on domain, nats per token", "Training loss", "Held out: domain (domain)",
        "Held out: general (general)", "KL(base ‖ now): general (general)", "Learning rate", "Gradient norm", "Speed",
    ]  # fmt: skip


def test_the_page_of_a_finished_run_holds_its_dial(a_run, report):
    path = a_run / "report" / "summary.json"
    summary = json.loads(path.read_text())
    found = report(a_run)
    wanted = []
    for role in ("domain", "general"):
        base, *scaled = [row for row in summary["dial"] if row["role"] == role]
        changes = [f"{row['loss'] - base['loss']:+.4f}" for row in scaled]
        wanted.append([base["source"], role, f"{base['loss']:.4f}", *changes])
    wanted.append(["", "its KL", "0.0000", *(f"{row['kl']:.4f}" for row in scaled)])
    assert found.rows("text", "role", "× 0", "× 0.25", "× 0.5", "× 0.75", "× 1") == wanted
    assert summary["dial_said"] in found.text
    assert (a_run / "report" / "dial.png").stat().st_size
    path.write_text(json.dumps({key: value for key, value in summary.items() if "dial" not in key}))  # an older run's
    assert "scaled" not in report(a_run).text


def test_a_page_needs_nothing_beside_itself(finished):
    html = (finished / "report" / "report.html").read_text(encoding="utf-8")
    for tag, attrs in Page(html).tags:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith("#"), attrs
    assert not re.search(r"url\((?!#)|@import", html)


def test_what_is_unknown_is_a_dash(made, report):
    rows = [train_row(1, None, tokens_per_second=None, grad_norm=float("nan")), eval_row(1, bits_per_byte=None)]
    found = report(made("run", rows))
    assert found.rows(*NATS) == [["law", "domain", "1", "–", "3.0000", "–", "–", "–", "–"]]
    assert not re.search(r"\b(None|nan|null|inf)\b", found.text)


def test_a_run_that_goes_on_is_read_and_not_disturbed(a_run, report, tmp_path):
    (a_run / "report" / "summary.json").unlink()
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = forked.start(forked.hold, str(a_run), there, screen=tmp_path / "screen.txt")
    assert here.recv() == "held"
    before = contents(a_run)
    found = report(a_run)
    assert "running" in found.text
    assert "At step 6 of 6" in found.text
    assert "last checkpoint at step 6" in found.text
    assert contents(a_run) == before
    here.send("go")
    process.join()
    assert "running" not in report(a_run).text
    with claimed(a_run, resume=True, overwrite=False):  # nor does a page that was written hold it
        pass


def test_a_stopped_and_a_crashed_run_are_told_apart(a_run, report, copy_of):
    (a_run / "report" / "summary.json").unlink()
    last = a_run / "checkpoints" / "step-000006"
    stopped = copy_of(a_run, "stopped")
    found = report(stopped)
    assert "stopped" in found.text
    assert "--resume" in found.text
    shutil.rmtree(last)
    found = report(a_run)
    assert "crashed" in found.text
    assert "after step 6 of 6 (100.0%); last checkpoint at step 4; 2 steps will be repeated" in found.text

    rows = marked(a_run)
    stop = {"kind": "stop", "step": 6, "signal": "SIGTERM"}
    assert "by SIGTERM" in report(written(a_run, [*rows, stop])).text
    gone_on = [*rows[:-1], stop, rows[-1]]
    assert "crashed" in report(written(a_run, gone_on)).text, "it went on after that stop"


@pytest.mark.parametrize("rows", [[], [train_row(1)], [eval_row(0, first=True)], None])
def test_a_run_that_has_hardly_begun(made, report, rows):
    run = made("run", rows or ())
    if rows is None:
        (run / "metrics.jsonl").unlink()
    found = report(run)
    assert found.facts["blocks"].startswith("..XooX")
    assert ("Nothing was measured yet." in found.text) == (not rows or rows[0]["kind"] != "eval")
    assert ("No row was written yet." in found.text) == (not rows)


def test_damaged_rows_are_left_out_and_said(made, report):
    good = [train_row(1), eval_row(0, 3.5, first=True), eval_row(1, 3.0)]
    run = made("run", good)
    bad = [5, {}, [], {"kind": "train"}, {"kind": "eval", "step": "x"}]
    rows = "".join(json.dumps(row) + "\n" for row in bad)
    # Rows of the right form whose values are not.
    odd = [train_row(2, "x", seconds=None, peak_memory_gib=[], skipped="?", source_tokens=3, lr=True),
           eval_row(2) | {"loss": "x"}, eval_row(2, source=None), {"kind": "skipped", "step": 2, "documents": 7},
           {"kind": "save", "step": 2}, {"kind": "change", "step": 2}]  # fmt: skip
    rows += "".join(json.dumps(row) + "\n" for row in odd)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(rows + '{"kind": "train", "st')
    found = report(run)
    assert f"{len(bad)} lines of metrics.jsonl are damaged" in found.text
    assert found.rows(*NATS) == [["law", "domain", "1", "3.5000", "3.0000", "-0.5000", "–", "–", "–"]]


def test_what_happened_is_told(made, report):
    rows = [
        metered(0, 3.0, first=True, first_base_loss=2.75, first_kl=0.0),
        train_row(
            1, peak_share=0.5, data_seconds=0.5, source_tokens={"law": 3000, "web": 1000}, source_epochs={"law": 1.5}
        ),
        {"kind": "save", "step": 1, "seconds": 2.0, "bytes": 3 * 2**30},
        {"kind": "skipped", "step": 2, "loss": None, "grad_norm": None, "documents": ['law, document 17: "a <b>"']},
        {"kind": "change", "step": 2, "key": "optim.lr", "before": 0.01, "after": 0.005},
        train_row(3, peak_share=0.25, skipped=1),
        metered(3, 3.5, first_base_loss=2.75, first_kl=0.875),
        {"kind": "save", "step": 3, "seconds": 4.0, "bytes": 3 * 2**30},
    ]
    found = report(made("run", rows))
    assert "1 step left out" in found.text
    not_finite = ["not finite", "not finite"]
    assert found.rows("step", "loss", "gradient norm", "documents") == [["2", *not_finite, 'law, document 17: "a <b>"']]
    assert found.rows("step", "what", "") == [["2", "changed on resume", "optim.lr: 0.01 → 0.005"]]
    columns = ("source", "tokens trained on", "share", "epochs")
    assert found.rows(*columns) == [["law", "3,000", "75.0%", "1.50"], ["web", "1,000", "25.0%", "–"]]
    columns = ("text", "role", "first base", "now − first base", "KL(first base ‖ now)")
    assert found.rows(*columns) == [["web", "general", "2.7500", "+0.7500", "0.8750"]]
    assert found.facts["saving"] == "2 times, 3.0 s each (median), 4.0 s at most; 3.00 GiB"
    assert found.facts["waiting for data"] == "0:00 (12.5% of the time of steps)"
    assert found.facts["of the peak FLOP/s"] == "37.5%, median"
    assert "Of the device's peak FLOP/s" in found.titles


def test_before_is_the_evaluation_marked_first_on_the_text_of_the_last():
    rows = [
        eval_row(0, 9.0, first=True),
        eval_row(2, 5.0, first=True, measured="new"),
        eval_row(4, 4.0, measured="new"),
    ]
    (result,) = results(rows)
    assert (result["before"]["loss"], result["after"]["loss"]) == (5.0, 4.0)
    (result,) = results([rows[0], rows[2]])
    assert result["before"] is None


def test_a_summary_without_a_row_of_training_has_no_figures_of_it(made):
    measured = summarise(made("run", [eval_row(0, first=True)]), {})
    assert measured["median_tokens_per_second"] is None
    assert measured["results"][0]["before"] == measured["results"][0]["after"]


# Several runs.


def runs_of(made, *rates: float) -> list[Path]:
    folders = []
    for index, rate in enumerate(rates):
        rows = [eval_row(0, 3.0, first=True), metered(0, 3.0, first=True), train_row(1), train_row(2 + index)]
        rows += [eval_row(2, 2.5 - index / 10), metered(2, 3.0 + rate)]
        folders.append(made(f"sweep/{rate}/run", rows, optim={"lr": rate}))
    return folders


def test_runs_side_by_side_say_what_differs_then_what_came_of_it(made, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = runs_of(made, 0.001, 0.01, 0.1)
    found = report(*folders)
    assert (tmp_path / "report.html").exists()
    assert not (folders[0] / "report").exists()
    (table,) = found.tables
    head, *rows = table
    assert [cell.strip() for cell in head[1:]] == ["0.001/run", "0.01/run", "0.1/run"], "one name in three folders"
    assert rows[:2] == [["What differs"], ["optim.lr", "0.001", "0.01", "0.1"]]
    named = {}
    for row in rows:
        named.setdefault(row[0], []).append(row[1:])
    assert named["loss now"] == [["2.5000", "2.4000", "2.3000 ★"], ["3.0010 ★", "3.0100", "3.1000"]]
    assert named["change"] == [["-0.5000", "-0.6000", "-0.7000"], ["+0.0010", "+0.0100", "+0.1000"]]
    assert named["steps done"] == [["2", "3", "4"]]
    assert ("loss now", 3) in found.best
    assert ("tokens per second, median", 1) not in found.best, "all are as fast"


def test_of_different_texts_none_is_best(made, report, tmp_path):
    folders = [made(name, [eval_row(1, loss, measured=name)]) for name, loss in (("a", 2.0), ("b", 3.0))]
    found = report(*folders, "--out", tmp_path / "both.html")
    assert "not the same text" in found.text
    assert not found.best


def test_runs_of_any_length_stand_on_one_page(made, report, tmp_path):
    long = [train_row(step, 2 + np.cos(step / 50)) for step in range(1, 3001)]
    folders = [made("long", long), made("one", [train_row(1)]), made("none"), made("same/none")]
    found = report(*folders, "--out", tmp_path / "all.html")
    assert "the horizontal axes are logarithmic" in found.text
    (table,) = found.tables
    assert [cell.strip() for cell in table[0][1:]] == ["long", "one", f"{tmp_path.name}/none", "same/none"]
    assert len(found.html) < 400_000, "a picture is no list of all rows"


def test_runs_with_other_steps_are_drawn_over_tokens(made):
    runs = [Record.read(made(f"{size}", [train_row(10)], train={"batch_size": size})) for size in (4, 8)]
    (panel,) = curves.panels(runs, only_losses=True)
    assert panel.x_name == "tokens"
    assert [series.x.tolist() for series in panel.series] == [[10 * 4 * 32], [10 * 8 * 32]]
    (panel,) = curves.panels(runs[:1], only_losses=True)
    assert panel.x_name == "step"


def test_names_are_told_apart_by_the_end_of_their_paths():
    paths = [Path(p) for p in ("/a/x/run", "/b/x/run", "/a/y/run", "/a/other", "/run")]
    assert labels(paths) == ["a/x/run", "b/x/run", "y/run", "other", "/run"]


def test_text_of_a_user_is_text(made, report):
    name = "<b>&\"'ü €$x$医"
    rows = [eval_row(0, source=name, first=True), metered(0, 3.0), train_row(1, source_tokens={"<script>": 1})]
    run = made(f"runs/{name}", rows, model={"path": "<img src=x>"})
    found = report(run)
    assert found.tags.count(("h1", {})) == 1
    assert not {"b", "script", "img"} & {tag for tag, _ in found.tags}
    assert found.rows(*NATS)[0][0] == name
    assert found.facts["folder"].endswith(name)
    assert found.facts["model"] == "<img src=x>"
    assert f"Held out: {name} (domain)" in found.titles
    assert {"b", "script", "img"}.isdisjoint(tag for tag, _ in Page(page([Record.read(run)] * 2)).tags)


# What is refused.


def test_what_is_no_run_is_refused(cli, made, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        code, _, err = cli(report_main, made(f"run-{folder}"), tmp_path / folder)
        cli.refused(code, err, tmp_path / folder, "no run there")
    assert not (tmp_path / "empty" / "report").exists()


def test_no_file_of_a_user_is_written_over(cli, made, report, tmp_path):
    run, mine = made("run"), tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    code, _, err = cli(report_main, run, "--out", mine)
    cli.refused(code, err, mine, "--out")
    assert mine.read_text() == "<p>mine</p>"
    code, _, err = cli(report_main, run, "--out", run / "config.yaml")
    cli.refused(code, err, ".html")
    ours = tmp_path / "new" / "page.html"
    report(run, "--out", ours)
    report(run, "--out", ours)  # a page of ours is


def test_a_place_that_cannot_be_written_is_named(cli, made, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "page.html"
    code, _, err = cli(report_main, made("run"), "--out", out)
    cli.refused(code, err, out, "--out")
