"""The texts of bench/forgetting.py, from Debian packages that are installed, or unpacked somewhere:

    apt-get download manpages-de debian-handbook debian-reference-de fortunes dict-jargon dict-devil
    for package in *.deb; do dpkg -x $package ROOT; done

    german           learned: pages of manuals and a handbook, without the next
    german-pages     every twentieth page: man pages share paragraphs, so it is whole pages that are held out
    german-manual    another manual
    jargon           English prose, for replay
    quotations, python, devil    what else the base knows: sayings, source code, a satirical dictionary

None of them is committed: their licences (GPL, CC-BY-SA and others) are not this project's.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEARNED, REPLAYED = "german", "jargon"
DOMAIN, GENERAL = ("german-pages", "german-manual"), ("quotations", "python", "devil")
PAGES = {
    "man": "usr/share/man/de/man?/*.gz",
    "handbook": "usr/share/doc/debian-handbook/html/de-DE/*.html",
    "reference": "usr/share/debian-reference/*.de.html",
}
CODE_BYTES = 2_000_000
"""Of source code, from files chosen by a hash of their names."""

PASSAGE = 3000
"""Characters of a document of the texts that are measured."""


def write_texts(root: Path, folder: Path) -> None:
    """One jsonl file for each text in ``folder``, from the packages under ``root``.

    Raises:
        SystemExit: a package is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learned, held_out = [], []
    for what in ("man", "handbook"):
        for path in _found(root, PAGES[what]):
            (held_out if _number(path.name) % 20 == 0 else learned).append(_page(path))
    texts = {
        LEARNED: learned,
        "german-pages": held_out,
        "german-manual": [_page(path) for path in _found(root, PAGES["reference"])],
        "quotations": [text for path in _found(root, "usr/share/games/fortunes/*.dat") for text in _sayings(path)],
        "python": [*_code()],
        **{name: [*_entries(_found(root, f"usr/share/dictd/{name}.index")[0])] for name in ("jargon", "devil")},
    }
    for name in (*DOMAIN, *GENERAL):  # so that a few thousand tokens are of many documents
        texts[name] = [row[at : at + PASSAGE] for row in texts[name] for at in range(0, len(row), PASSAGE)]
    for name, rows in texts.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows if len(row) > 100)


def _found(root: Path, pattern: str) -> list[Path]:
    if paths := sorted(path for path in root.glob(pattern) if path.is_file() and not path.is_symlink()):
        return paths
    raise SystemExit(f"{root}: no {pattern}; see the beginning of tools/forgetting_texts.py, and give --root")


def _number(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def _page(path: Path) -> str:
    if path.suffix == ".gz":
        return _from_roff(gzip.decompress(path.read_bytes()).decode(errors="replace"))
    reader = _Html()
    reader.feed(path.read_text(encoding="utf-8"))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(reader.text)).strip()


def _from_roff(source: str) -> str:
    """The words of a man page, a paragraph a line."""
    paragraphs = [""]
    for line in source.splitlines():
        macro, _, rest = line.partition(" ") if line.startswith((".", "'")) else ("", "", line)
        if macro.startswith((".\\", "'\\")) or macro in (".TH", ".so", ".ie", ".el", ".if", ".de", ".ds"):
            continue
        if macro not in ("", ".B", ".I", ".BR", ".IR", ".BI", ".IB", ".RB", ".RI"):
            paragraphs.append("")
            rest = rest if macro in (".SH", ".SS") else ""
        paragraphs[-1] += rest.strip('"') + " "
        if macro in (".SH", ".SS"):
            paragraphs.append("")
    text = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&|,/^%:]", "", text).replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\\(\(..|\[[^\]]*\]|\*.)", "", text)


class _Html(html.parser.HTMLParser):
    """The words of a page, a blank line after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "head")
        if tag in ("p", "div", "li", "pre", "h1", "h2", "h3", "h4", "tr", "dt", "dd"):
            self.text.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def _sayings(index: Path) -> list[str]:
    return [text.strip() for text in index.with_suffix("").read_text("utf-8", "replace").split("\n%\n")]


def _entries(index: Path) -> Iterator[str]:
    """The entries of a dictionary in dictd's format, each once: word, place and length, the last two in base 64."""
    text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    rows = [line.split("\t") for line in index.read_text(encoding="utf-8").splitlines()]
    places = {tuple(map(_from_base64, row[1:3])) for row in rows if not row[0].startswith("00database")}
    for begin, length in sorted(places):
        yield text[begin : begin + length].decode(errors="replace").strip()


def _from_base64(digits: str) -> int:
    return int.from_bytes(base64.b64decode(digits.rjust(8, "A")))


def _code() -> Iterator[str]:
    num_bytes, paths = 0, Path(sysconfig.get_path("purelib")).glob("*/**/*.py")
    for path in sorted(paths, key=lambda path: _number(path.name)):
        if (text := path.read_text(encoding="utf-8", errors="replace")).strip():
            yield text
            num_bytes += len(text.encode())
        if num_bytes > CODE_BYTES:
            return
