"""Run with the Python of an environment the wheel was installed in, from an empty folder."""

import importlib.util
import pathlib

import llama_pro_fast.config
import llama_pro_fast.export
import llama_pro_fast.train
import llama_pro_kernels
import llama_pro_kernels.triton_kernels

here = pathlib.Path.cwd()
for package in (llama_pro_fast, llama_pro_kernels):
    folder = pathlib.Path(package.__file__).parent
    assert "site-packages" in folder.parts, f"{package.__name__} was imported from {folder}, not from the wheel"
    assert not list(folder.glob("tests")), f"{folder}: the wheel carries tests"
assert importlib.util.find_spec("base_text") is None, "the wheel carries tools/"
assert importlib.util.find_spec("transformers") is not None
from transformers import LlamaForCausalLM  # noqa: E402, F401 - fails where a package named `kernels` shadows the hub's

package = pathlib.Path(llama_pro_fast.__file__).parent
recipes = list((package / "recipes").glob("*.yaml"))
assert recipes, "the wheel carries no recipes"
base = {path.name for path in (package / "assets" / "prose-3m").iterdir()}
needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "sources.yaml"}
assert needed <= base, f"the wheel's base lacks {needed - base}"
print("wheel: imported", llama_pro_fast.__version__, "with", len(recipes), "recipes and the base")
