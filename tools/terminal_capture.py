"""A picture of what a command shows on a terminal: the README's is made by

    python tools/terminal_capture.py --columns 100 --tail 43 docs/pictures/quickstart.svg -- \\
        llama-pro-fast train

The command runs on a pseudo-terminal, its output goes through a terminal emulator (`pip install pyte`), and what stands
on the screen at the end is drawn by rich. Nothing is edited; ``--tail`` leaves out all but the last lines.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import shlex
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

ROWS = 400
PALETTE = {name: name for name in ("red", "green", "blue", "magenta", "cyan")} | {"brown": "yellow"}


def record(command: list[str], columns: int) -> bytes:
    """Everything the command writes to a terminal of ``columns`` by `ROWS`, shown here as it comes."""
    os.environ |= {"COLUMNS": str(columns), "LINES": str(ROWS), "TERM": "xterm-256color"}
    written = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        written.extend(data)
        return data

    if os.waitstatus_to_exitcode(pty.spawn(command, read)):
        raise SystemExit(f"{shlex.join(command)} failed")
    return bytes(written)


def screen(written: bytes, columns: int) -> list[Text]:
    """The lines that stand on the screen, with their colours."""
    terminal = pyte.Screen(columns, ROWS)
    pyte.ByteStream(terminal).feed(written)
    lines = []
    for number in range(ROWS):
        row = terminal.buffer[number]
        line = Text()
        for column in range(columns):
            cell = row[column]
            # No bold: fonts that stand in for the picture's own draw it wider, and frames would no longer meet.
            line.append(cell.data, style="" if cell.fg == "default" else PALETTE.get(cell.fg, ""))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of what a command shows on a terminal.")
    parser.add_argument("picture", type=Path, help="an .svg file")
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--tail", type=int, help="only the last lines")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    lines = screen(record(arguments.command, arguments.columns), arguments.columns)
    shown = lines[-arguments.tail :] if arguments.tail else lines
    console = Console(record=True, width=arguments.columns, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ {shlex.join(arguments.command)}"))
    if len(shown) < len(lines):
        console.print(Text("...", style="dim"))
    for line in shown:
        console.print(line, no_wrap=True, crop=False)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.picture), title="llama-pro-fast")


if __name__ == "__main__":
    main()
