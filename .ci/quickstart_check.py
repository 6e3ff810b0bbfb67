"""What the quickstart promises, from the report of a run of it: python quickstart_check.py runs/quickstart"""

import json
import pathlib
import sys

summary = json.loads(pathlib.Path(sys.argv[1], "report", "summary.json").read_text())
results = {result["role"]: result for result in summary["results"]}
domain, general, check = results["domain"], results["general"], summary["export_check"]
gain = domain["before"]["loss"] - domain["after"]["loss"]
forgotten = general["after"]["loss"] - general["before"]["loss"]

assert gain >= 0.3, f"the loss on held-out code fell by {gain:.3f} nats only"
assert general["before"]["loss"] == general["before"]["base_loss"], "before the first step the model is not its base"
assert general["before"]["kl"] == 0.0
for reference in ("unigram_bits_per_byte", "gzip_bits_per_byte"):
    assert general["before"]["bits_per_byte"] < general[reference], f"on prose the base loses to {reference}"
assert forgotten < gain, f"it forgot {forgotten:.3f} nats of prose for {gain:.3f} of code"
# In bfloat16 a tie that rounding decides may end each of the three continuations; in float32 they go to their end.
assert check["equal"] >= check["compared"] - 3 >= 0, check
if summary["dtype"] == "float32":
    assert check["equal"] == check["compared"] == 72, check
assert summary["peak_memory_gib"] < 2 / 1.073741824, f"peak memory {summary['peak_memory_gib']} GiB"
said = f"code {-gain:+.3f} nats, prose {forgotten:+.3f}; {check['said']}; {summary['peak_memory_gib']} GiB"
print(f"quickstart: {said}")
