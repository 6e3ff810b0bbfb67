"""The console script: verbs, and how errors reach the user."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from llama_pro_fast import __version__, cli
from llama_pro_fast.errors import UserError
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.hf.folder import PretrainedFolder


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llama-pro-fast"])
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for verb, line in cli.VERBS.items():
        assert f"  {verb}" in printed
        assert line in printed


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llama-pro-fast {__version__}\n"


def test_unknown_verb(capsys):
    assert cli.main(["expnd"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llama-pro-fast: error: unknown verb expnd")


def test_a_verb_gets_its_arguments(make_base, tmp_path, capsys):
    make_base()
    assert cli.main(["expand", str(tmp_path / "base"), str(tmp_path / "out"), "--expand.after", "0,2"]) == 0
    printed = capsys.readouterr().out
    for words in ("4 -> 6", ".XooXo", "max |Δlogit| = 0.0", f"train --model.path {tmp_path / 'out'}"):
        assert words in printed
    assert PretrainedFolder(tmp_path / "out").config.num_hidden_layers == 6


def test_a_verbs_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_entry_point(expand_main, ["--help"])
    assert stopped.value.code == 0
    assert "--expand.groups" in capsys.readouterr().out


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


def test_a_users_error_is_one_line_even_if_its_text_is_not(capsys):
    assert cli.run_entry_point(raising(UserError("here\n  and there"))) == 2
    assert capsys.readouterr().err == "llama-pro-fast: error: here and there\n"


def test_ctrl_c_is_one_line(capsys):
    assert cli.run_entry_point(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "llama-pro-fast: interrupted\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_entry_point(raising(ZeroDivisionError()))


def test_help_imports_nothing_heavy():
    code = "import sys; from llama_pro_fast import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from llama_pro_fast.cli import run_entry_point as r; sys.exit(r(lambda argv: print('x' * 10**6)))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 141


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_python_m_is_the_same_entry_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["expand", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--expand.groups", "2"]
    )
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("llama_pro_fast.expand", run_name="__main__")
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
