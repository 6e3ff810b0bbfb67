"""What a page says of one run: what it is, how it stands, what it reached, what happened to it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llama_pro_fast.config import options
from llama_pro_fast.console import amount, duration
from llama_pro_fast.model.trained import LEGEND
from llama_pro_fast.planning.cost import num_parameters, num_trained_parameters
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.reporting import dial
from llama_pro_fast.reporting.markup import (
    UNKNOWN,
    Html,
    change,
    count_of_steps,
    facts,
    figure,
    median,
    picture,
    pictures,
    plain,
    section,
    table,
    text_of,
    when,
)
from llama_pro_fast.reporting.record import Record, number, results
from llama_pro_fast.runs.run_folder import resume_command

MOST_EVENTS = 200
"""Rows of a table of events; of more the last are shown."""


def one_run(run: Record, name: str) -> str:
    """The body of a page about ``run``, which is called ``name``."""
    word, sentence = state(run)
    last = "" if run.written is None else f"<p>Last row written {when(run.written)}.</p>"
    parts = [
        f'<header><h1>{escape(name)} <span class="state {word}">{word}</span></h1>',
        f"<p>{sentence}</p>{last}</header>",
        *(f'<p class="warning">{escape(text)}</p>' for text in warnings(run)),
        section("The run", facts(_description(run))),
        section("Held-out text", _results(run)),
        section("The dial", _dial(run)),
        section("Curves", pictures([run])),
        section("Speed and memory", facts(_costs(run))),
        section("Text so far", _sources(run)),
        section("Skipped steps", _skipped(run)),
        section("What happened", _happened(run)),
        section("A sample", _sample(run)),
        "<details><summary>Configuration</summary>"
        f"{facts((key, plain(value)) for key, value, _ in options(run.config))}</details>",
    ]
    return "\n".join(part for part in parts if part)


def state(run: Record) -> tuple[str, str]:
    """A word, and a sentence of HTML that also says what to do."""
    steps, step = run.config.train.steps, run.step
    of = f"step {step:,} of {steps:,} ({step / steps:.1%})"
    if run.summary is not None:
        early = f", ended early: {run.stop}" if run.stop and step < steps else ""
        return "finished", escape(f"At {of}{early}." if early else f"All {steps:,} steps are done.")
    saved = "no checkpoint yet" if run.checkpoint is None else f"last checkpoint at step {run.checkpoint:,}"
    if run.running:
        recent = median([row.get("tokens_per_second") for row in run.of_kind("train")[-20:]])
        left = f", about {duration((steps - step) * run.tokens_per_step / recent)} of steps left" if recent else ""
        return "running", escape(f"At {of}{left}; {saved}.")
    again = f"<code>{escape(resume_command(run.folder))}</code>"
    if run.running is None:
        return "unknown", escape(f"At {of}; {saved}. Whether it is running cannot be seen: its lock cannot be read.")
    if run.stop:
        return "stopped", f"{escape(f'At {of}, by {run.stop}; {saved}.')} Go on with {again}"
    if run.checkpoint is not None and run.checkpoint >= run.step:
        return "stopped", f"{escape(f'At {of}, which is saved.')} Go on with {again}"
    lost = run.step - (run.checkpoint or 0)
    repeated = f"; {lost:,} step{'s' * (lost != 1)} will be repeated" if lost else ""
    return "crashed", f"{escape(f'Crashed or was killed after {of}; {saved}{repeated}.')} Go on with {again}"


def warnings(run: Record) -> list[str]:
    """What somebody who watches the run should not overlook."""
    found = []
    if run.lost_rows:
        one = run.lost_rows == 1
        found.append(f"{run.lost_rows:,} line{'' if one else 's'} of metrics.jsonl {'is' if one else 'are'} damaged "
                     "and left out here.")  # fmt: skip
    if run.skipped_steps:
        found.append(f"{count_of_steps(run.skipped_steps)} left out: loss or gradient not finite.")
    check = _check(run)
    if check.startswith("failed"):
        found.append(f"The export: {check}")
    return found


def _description(run: Record) -> list[tuple[str, str]]:
    config, train, optim = run.config, run.config.train, run.config.optim
    blocks = trained = UNKNOWN
    if run.model:
        model, what = run.model
        blocks = Html(f'<code class="strip">{escape(what.strip)}</code> {escape(LEGEND)}')
        count, whole = num_trained_parameters(model, what), num_parameters(model)
        trained = f"{amount(count)} of {amount(whole)} parameters ({count / whole:.1%})"
    decay = f", {optim.decay_steps:,} steps of decay" if optim.schedule == "wsd" else ""
    rows = [
        ("folder", str(run.folder)),
        ("model", config.model.path + (", random weights" if config.model.init == "random" else "")),
        ("blocks", blocks),
        ("trains", trained),
        ("text", text_of(config.data.domain)),
        ("general text", text_of(config.data.general) if config.data.general else "stdlib:prose, built in"),
        ("length", f"{count_of_steps(train.steps)} of {train.batch_size:,} × {train.seq_len:,} tokens: "
                   f"{amount(train.steps * run.tokens_per_step)} tokens"),
        ("rate", f"{optim.lr:g}, {optim.schedule}, {count_of_steps(optim.warmup_steps)} of warm-up{decay}"),
        ("device", f"{train.device}, {train.dtype}, attention {train.attention}, "
                   f"{train.micro_batch_size:,} sequences at a time, recomputed: {train.recompute}"
                   f"{', fp8 backward' if train.fp8 == 'backward' else ''}"),
    ]  # fmt: skip
    if run.summary is not None:
        rows.append(("export", _check(run)))
    return rows


def _check(run: Record) -> str:
    check = (run.summary or {}).get("export_check")
    return str(check.get("said", UNKNOWN)) if isinstance(check, dict) else UNKNOWN


def _results(run: Record) -> Html | None:
    found = results(run.rows)
    if not found:
        return Html("<p>Nothing was measured yet.</p>")
    references = {(row["role"], row["source"]): row for row in (run.summary or {}).get("results", [])}
    nats, bits, first = [], [], []
    for result in found:
        before, after = result["before"] or {}, result["after"]
        text = [result["source"], result["role"]]
        loss, start = number(after["loss"]), number(before.get("loss"))
        nats.append([*text, f"{after['step']:,}", figure(start), figure(loss), change(start, loss),
                     figure(after["base_loss"]), change(after["base_loss"], loss), figure(after["kl"])])  # fmt: skip
        if number(after["first_kl"]) is not None:
            first.append([*text, figure(after["first_base_loss"]), change(after["first_base_loss"], loss),
                          figure(after["first_kl"])])  # fmt: skip
        values = before.get("bits_per_byte"), after["bits_per_byte"]
        beside = references.get((result["role"], result["source"]), {})
        bits.append([*text, *(figure(value) for value in values), change(*values),
                     *(figure(beside.get(f"{name}_bits_per_byte")) for name in ("unigram", "gzip"))])  # fmt: skip
    columns = ["text", "role", "at step", "before", "now", "change", "base", "now − base", "KL(base ‖ now)"]
    parts = [table("nats per token, lower is better; base: the model without its new blocks", columns, nats)]
    if first:
        columns = ["text", "role", "first base", "now − first base", "KL(first base ‖ now)"]
        parts.append(table("the same against the model before its first expansion", columns, first))
    columns = ["text", "role", "before", "now", "change", "unigram model", "gzip -9"]
    if run.summary is None:
        columns, bits = columns[:-2], [row[:-2] for row in bits]
    parts.append(table("bits per byte of text, comparable between tokenizers", columns, bits))
    return Html("".join(parts))


def _dial(run: Record) -> Html | None:
    rows = (run.summary or {}).get("dial")
    if not rows:
        return None
    said = f"<p>{escape(run.summary['dial_said'])}</p>"
    drawn = picture(dial.caption(rows), "", dial.svg(rows))
    return Html(f'{table(dial.title(rows), *dial.lines(rows))}{said}<div class="panels">{drawn}</div>')


def _costs(run: Record) -> list[tuple[str, str]]:
    rows = run.of_kind("train")

    def of(key: str) -> list[float]:
        return [value for row in rows if (value := number(row.get(key))) is not None]

    seconds, waited, saves = sum(of("seconds")), of("data_seconds"), run.of_kind("save")
    stalls = [value for row in saves if (value := number(row.get("seconds"))) is not None]
    found = []
    if speed := median(of("tokens_per_second")):
        found.append(("speed", f"{speed:,.0f} tokens per second, median"))
    if share := median(of("peak_share")):
        found.append(("of the peak FLOP/s", f"{share:.1%}, median"))
    if of("peak_memory_gib"):
        found.append(("memory, most", f"{max(of('peak_memory_gib')):,.2f} GiB"))
    if seconds:
        found.append(("training steps", duration(seconds)))
    if waited:
        share = f" ({sum(waited) / seconds:.1%} of the time of steps)" if seconds else ""
        found.append(("waiting for data", duration(sum(waited)) + share))
    if stalls:
        size = number(saves[-1].get("bytes"))
        each = f"{median(stalls):,.1f} s each (median), {max(stalls):,.1f} s at most"
        found.append(("saving", f"{len(stalls):,} times, {each}" + (f"; {size / GIB:,.2f} GiB" if size else "")))
    return found


def _sources(run: Record) -> Html | None:
    last = next((row for row in reversed(run.of_kind("train")) if row.get("source_tokens")), {})
    tokens, epochs = last.get("source_tokens"), last.get("source_epochs")
    if not isinstance(tokens, dict):
        return None
    epochs = epochs if isinstance(epochs, dict) else {}
    counts = {str(name): value for name, count in tokens.items() if (value := number(count)) is not None}
    total = sum(counts.values())
    rows = []
    for name, count in counts.items():
        gone = number(epochs.get(name))
        share = f"{count / total:.1%}" if total else UNKNOWN
        rows.append([name, f"{count:,.0f}", share, UNKNOWN if gone is None else f"{gone:,.2f}"])
    told = ""
    filled, without = (number((run.summary or {}).get(key)) for key in ("places_filled", "tokens_without_beginning"))
    if filled is not None and without is not None:
        told = f"sequences {filled:.2%} full, {without:.1%} of the tokens in a piece without its document's beginning"
    return table(told, ["source", "tokens trained on", "share", "epochs"], rows, words=1)


def _skipped(run: Record) -> Html | None:
    rows = []
    for row in run.of_kind("skipped"):
        documents = row.get("documents")
        documents = [str(text) for text in documents] if isinstance(documents, list) else []
        # What is not finite is the reason here, and JSON has no number for it.
        values = [number(row.get(key)) for key in ("loss", "grad_norm")]
        said = ["not finite" if value is None else figure(value) for value in values]
        rows.append([f"{row['step']:,}", *said, Html("<br>".join(map(escape, documents)) or UNKNOWN)])
    return _events(["step", "loss", "gradient norm", "documents"], rows)


def _happened(run: Record) -> Html | None:
    rows = []
    for row in run.rows:
        if row["kind"] == "change":
            what = f"{row.get('key', UNKNOWN)}: {plain(row.get('before'))} → {plain(row.get('after'))}"
            rows.append([f"{row['step']:,}", "changed on resume", what])
        elif row["kind"] == "stop":
            rows.append([f"{row['step']:,}", "stopped", str(row.get("signal") or row.get("reason") or UNKNOWN)])
    return _events(["step", "what", ""], rows)


def _events(columns: Sequence[str], rows: list[list[str]]) -> Html | None:
    if not rows:
        return None
    more = len(rows) - MOST_EVENTS
    said = f"the last {MOST_EVENTS:,}; {more:,} earlier" if more > 0 else ""
    return table(said, columns, rows[-MOST_EVENTS:], words=len(columns))


def _sample(run: Record) -> Html | None:
    sample = (run.summary or {}).get("sample")
    if not isinstance(sample, dict):
        return None
    names = {"prompt": "a held-out document begins", "base": "the base goes on", "now": "the model goes on"}
    return Html(
        "".join(f"<p>{name}</p><pre>{escape(text)}</pre>" for key, name in names.items() if (text := sample.get(key)))
    )
