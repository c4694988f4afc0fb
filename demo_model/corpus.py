"""Texts that Debian ships under free licences, as tokens: ``python -m demo_model.corpus --out FOLDER``.

Three styles, each a list of documents (README.md names packages and licences): ``manual``, prose of software manuals;
``scripture``, chapters of the King James Bible, a verse a line; ``novel``, chapters of Jane Austen. Every twentieth
document is held out. FOLDER gets the tokenizer, ``corpus.safetensors`` with uint16 tokens ``STYLE.train`` and
``STYLE.heldout``, and in ``STYLE.txt`` the passages of held-out text that ``passages/`` has. Nothing is installed:
packages are only unpacked.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import tempfile
import unicodedata
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

STYLES = ("manual", "scripture", "novel")
VOCABULARY = 2048
END, PAD = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1; END closes each document
HELD_OUT = 20  # one document of so many
PASSAGES, CHARACTERS = 12, 700  # of held-out text that judges the model, and in each of them

# Folder of English HTML pages in each package.
_MANUALS = {
    "python3.11-doc": "usr/share/doc/python3.11/html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html",
    "sqlite3-doc": "usr/share/doc/sqlite3",
    "apache2-doc": "usr/share/doc/apache2-doc/manual/en",
    "python-django-doc": "usr/share/doc/python-django-doc/html",
}
_PACKAGES = (*_MANUALS, "bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
_NO_PROSE = ("_modules", "genindex", "py-modindex", "release-", "whatsnew", "changelog", "releases")

_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u00b6": ""}
)  # quotes, dashes, and the sign that Sphinx links paragraphs with


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packages = unpack(Path(folder))
        documents = {"manual": manuals(packages), "scripture": scripture(packages), "novel": novels(packages)}
    tokenizer = train_tokenizer([text for style in STYLES for text in documents[style]])
    tokenizer.save_pretrained(out)
    tokens: dict[str, np.ndarray] = {}
    for style in STYLES:
        heldout = documents[style][HELD_OUT // 2 :: HELD_OUT]
        train = [text for number, text in enumerate(documents[style]) if number % HELD_OUT != HELD_OUT // 2]
        tokens |= {f"{style}.train": encode(tokenizer, train), f"{style}.heldout": encode(tokenizer, heldout)}
        (out / f"{style}.txt").write_text("\n\n".join(passages(heldout)) + "\n")
    save_file(tokens, out / "corpus.safetensors")
    for name, ids in tokens.items():
        print(f"{name}: {len(ids):,} tokens")


def unpack(folder: Path) -> Path:
    """Download and unpack the packages under ``folder``, each in a folder of its name."""
    subprocess.run(["apt-get", "--quiet", "download", *_PACKAGES], cwd=folder, check=True)
    for archive in sorted(folder.glob("*.deb")):
        name, version = archive.name.split("_")[:2]
        print(f"{name} {version.replace('%3a', ':')}")
        subprocess.run(["dpkg", "--extract", archive, folder / name], check=True)
    return folder


def manuals(packages: Path) -> list[str]:
    """Pages of the manuals, a paragraph a line, without headings, tables, code and what another page says too."""
    seen: set[str] = set()
    pages: list[str] = []
    for package, folder in _MANUALS.items():
        for path in sorted((packages / package / folder).rglob("*.html")):
            if any(part in str(path) for part in _NO_PROSE):
                continue
            reader = _Paragraphs()
            reader.feed(path.read_text(errors="replace"))
            fresh = [text for text in map(plain, reader.paragraphs) if text not in seen and is_prose(text)]
            seen.update(fresh)
            if fresh:
                pages.append("\n".join(fresh))
    return pages


class _Paragraphs(HTMLParser):
    """Texts of all ``<p>`` of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph begins where one is said to."""
        if tag == "p":
            self.paragraphs.append("")
        self._open = tag == "p" or (self._open and tag not in ("pre", "table", "ul", "ol", "dl", "div"))

    def handle_endtag(self, tag: str) -> None:
        """A paragraph ends with its tag."""
        self._open = self._open and tag != "p"

    def handle_data(self, data: str) -> None:
        """Text belongs to the open paragraph."""
        if self._open:
            self.paragraphs[-1] += data


def plain(text: str) -> str:
    """``text`` on one line, with the typewriter's quotes and dashes."""
    return " ".join(unicodedata.normalize("NFKC", text.translate(_ASCII)).split())


def is_prose(text: str) -> bool:
    """Whether a paragraph is sentences: long enough, ASCII, closed by a full stop, nearly all of its words plain."""
    words = [word.strip(".,;:!?()\"'") for word in text.split()]
    plain_words = sum(bool(re.fullmatch(r"[A-Za-z]+(['-][A-Za-z]+)*", word)) for word in words)
    closed = text[:1].isupper() and text.endswith((".", "?", "!"))
    return len(text) >= 80 and text.isascii() and closed and plain_words >= 0.9 * len(words)


def scripture(packages: Path) -> list[str]:
    """Chapters of the King James Bible, a verse a line, without their numbers."""
    program = packages / "bible-kjv/usr/bin/bible"
    where = packages / "bible-kjv-text/usr/lib"
    command = [program, "-p", where, "-f", "gen1:1-rev22:21"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, encoding="latin-1").stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        place, _, verse = line.partition(" ")
        if ":" in place and verse:
            chapters.setdefault(place.partition(":")[0], []).append(plain(verse))
    return ["\n".join(verses) for verses in chapters.values()]


def novels(packages: Path) -> list[str]:
    """Chapters of Jane Austen's novels, a paragraph a line."""
    data = packages / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    chapters: list[str] = []
    for lines in read_rdb(data.read_bytes()):
        for chapter in re.split(r"(?m)^(?:CHAPTER|Chapter|VOLUME|Volume) .*$", "\n".join(lines))[1:]:
            paragraphs = (plain(text).replace("_", "") for text in re.split(r"\n\s*\n", chapter))
            prose = [text for text in paragraphs if len(text) > 20 and text.isascii()]
            if prose:
                chapters.append("\n".join(prose))
    return chapters


def read_rdb(data: bytes) -> list[list[str]]:
    """Lines of each object of R's lazy-load file, all vectors of strings.

    An object is its size (uint32, big-endian) and zlib's stream of R's serialisation, in which a string is 0x00040009,
    its length and its bytes (https://cran.r-project.org/doc/manuals/r-release/R-ints.html).
    """
    objects: list[list[str]] = []
    while data:
        stream = zlib.decompressobj()
        found = stream.decompress(data[4:])
        data = stream.unused_data
        lines: list[str] = []
        place = found.index(b"\x00\x04\x00\x09")
        while found[place : place + 4] == b"\x00\x04\x00\x09":
            (length,) = struct.unpack(">i", found[place + 4 : place + 8])
            lines.append(found[place + 8 : place + 8 + length].decode())
            place += 8 + length
        objects.append(lines)
    return objects


def passages(documents: list[str]) -> list[str]:
    """The beginnings of some long documents, spread evenly over them, each cut after a word."""
    long = [text for text in documents if len(text) > CHARACTERS]
    chosen = [long[number * len(long) // PASSAGES] for number in range(PASSAGES)]
    return [text[: CHARACTERS + 1].rsplit(None, 1)[0] for text in chosen]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Tokens of all documents, uint16 [tokens], each closed by ``END``."""
    return np.array([token for ids in tokenizer(documents).input_ids for token in (*ids, 0)], dtype=np.uint16)


if __name__ == "__main__":
    main()
