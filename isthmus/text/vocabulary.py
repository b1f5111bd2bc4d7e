"""What a tokenizer.json says about its tokens: the bytes each id stands for, and which of them control the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from isthmus.errors import CannotStart

_WORD_START = "\u2581"  # sentencepiece writes a space as this
_SENTENCEPIECE_DECODERS: tuple[Mapping[str, Any], ...] = (  # each with at least these settings
    {"type": "Metaspace", "replacement": _WORD_START},
    {"type": "Replace", "pattern": {"String": _WORD_START}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)
_CONTROL_OPENINGS = "<[\uff5c"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that tokenizer.json lists beside the vocabulary proper."""

    id: int
    content: str
    is_special: bool  # releases no text
    lstrip: bool  # swallows the white space before it
    rstrip: bool  # swallows the white space behind it

    @property
    def is_control(self) -> bool:
        """Special, or shaped like a tag: many vocabularies leave `<think>` or their role markers unmarked."""
        return self.is_special or self.content[:1] in _CONTROL_OPENINGS


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each token id adds to the text."""

    token_bytes: tuple[bytes, ...]  # by id: UTF-8, perhaps part of a character; empty for special tokens
    strips_leading_space: bool  # of the whole text

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for ids that the tokenizer does not know: a model's vocabulary may be padded."""
        return self.token_bytes[token_id] if 0 <= token_id < len(self.token_bytes) else b""


def read_added_tokens(settings: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens of a tokenizer.json. Raises LookupError or TypeError when the file is not as published."""
    entries = cast("list[dict[str, Any]]", settings.get("added_tokens") or [])
    flags = ("special", "lstrip", "rstrip")
    return [AddedToken(entry["id"], entry["content"], *(bool(entry.get(flag)) for flag in flags)) for entry in entries]


def read_vocabulary(settings: Mapping[str, Any], ids: Mapping[str, int]) -> Vocabulary:
    """The vocabulary of a tokenizer.json; `ids`: all tokens and their ids, added ones included.

    Raises CannotStart for a decoder that is not known.
    """
    decoders = _flatten(settings.get("decoder"))
    added = read_added_tokens(settings)
    if is_byte_level := {decoder["type"] for decoder in decoders} == {"ByteLevel"}:
        by_character = _byte_level_alphabet()
        strips = False
        to_bytes = partial(_byte_level_bytes, by_character=by_character)
    elif decoders and all(any(d.items() <= decoder.items() for d in _SENTENCEPIECE_DECODERS) for decoder in decoders):
        prepends = any(d.get("prepend_scheme") != "never" for d in decoders if d["type"] == "Metaspace")
        strips = prepends or any(d["type"] == "Strip" for d in decoders)
        to_bytes = _sentencepiece_bytes
    else:
        mend = "take a byte-level or sentencepiece tokenizer"
        raise CannotStart("tokenizer.json: decoder", f"{decoders} is not known", mend)
    table = [b""] * (max(ids.values(), default=-1) + 1)
    for token, token_id in ids.items():
        table[token_id] = to_bytes(token)
    for token in added:
        if token.is_special:
            table[token.id] = b""
        elif is_byte_level:  # added tokens are text as it is: the library would take an added "\u00f6" for a byte
            table[token.id] = token.content.encode()
    return Vocabulary(tuple(table), strips)


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for part in decoder["decoders"] for inner in _flatten(part)]
    return [decoder]


def _byte_level_alphabet() -> dict[str, int]:
    """Each byte's printable stand-in, as GPT-2 defined it: printable Latin-1 is itself, the rest follows U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _byte_level_bytes(token: str, by_character: Mapping[str, int]) -> bytes:
    """A token with a character outside the alphabet is an added one, and is its own text."""
    try:
        return bytes(by_character[character] for character in token)
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_WORD_START, " ").encode()
