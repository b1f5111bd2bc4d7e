"""Tokenizers built as the served families build theirs: the library's ids, and loud refusal of what would be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from isthmus.errors import CannotStart
from isthmus.text.tokenizer import Tokenizer
from isthmus.v1 import inference_pb2
from tests.text.conftest import BUNDLED

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TURNS = [("system", ""), ("user", "  hi\n"), ("assistant", " a b "), ("user", "c")]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
SENTENCEPIECE_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def sentencepiece(flags: dict[str, bool] | None = None, **parts: Any) -> dict[str, Any]:
    """A byte-fallback vocabulary of single characters, with the tokens of ChatML."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abchistemunrd", "▁a", "▁u", "▁s"]
    merges = [["▁", "a"], ["▁", "u"], ["▁", "s"]]
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{**entry, "id": i, "content": pieces[i]} for i in (0, 1)]
    added += [{**entry, **(flags or {}), "id": len(pieces) + i, "content": (START, END)[i]} for i in range(2)]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return {"version": "1.0", "added_tokens": added, "decoder": SENTENCEPIECE_DECODER, "model": model, **parts}


def byte_level() -> dict[str, Any]:
    return json.loads((BUNDLED / "tokenizer.json").read_text())


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("parts", [{"pre_tokenizer": METASPACE}, {"normalizer": PREPEND}], ids=["metaspace", "prepend"])
def test_a_chat_is_encoded_as_the_library_does(parts: dict[str, Any], flags: dict[str, bool]) -> None:
    settings = sentencepiece(flags, **parts)
    rendered = "".join(f"{START}{role}\n{content}{END}\n" for role, content in TURNS) + f"{START}assistant\n"
    expected = tokenizers.Tokenizer.from_str(json.dumps(settings)).encode(rendered, add_special_tokens=False).ids
    tokenizer = Tokenizer(settings, {"chat_template": CHATML})
    messages = [inference_pb2.ChatMessage(role=role, content=content) for role, content in TURNS]
    assert tokenizer.encode_chat(messages) == expected


def test_a_chat_that_begins_with_text_begins_a_word() -> None:
    settings = sentencepiece(pre_tokenizer=METASPACE)
    tokenizer = Tokenizer(settings, {"chat_template": "{{ messages[0].content }}<|im_end|>a"})
    expected = tokenizers.Tokenizer.from_str(json.dumps(settings)).encode(f"a{END}a", add_special_tokens=False).ids
    assert tokenizer.encode_chat([inference_pb2.ChatMessage(role="user", content="a")]) == expected


def test_a_character_outside_the_vocabulary_is_unknown_not_refused() -> None:
    settings = sentencepiece(normalizer=PREPEND)
    settings["model"]["byte_fallback"] = False
    assert 0 in Tokenizer(settings, {}).encode("a東b")


@pytest.mark.parametrize("content", ["öü", "é¡", "<ö>", "two words"])
def test_added_tokens_are_the_text_they_stand_for(content: str) -> None:
    settings = byte_level()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    token_id = len(settings["model"]["vocab"])
    settings["added_tokens"].append({"id": token_id, "content": content, **flags})
    tokenizer = Tokenizer(settings, {})
    text = f"sch{content}n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([token_id]) == content


def test_gaps_between_added_ids_are_refused() -> None:
    settings = sentencepiece()
    settings["added_tokens"][-1]["id"] += 1
    with pytest.raises(CannotStart, match=r"added_tokens: '<\|im_end\|>' would get another id"):
        Tokenizer(settings, {})


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Strip", "content": " ", "start": 2, "stop": 0},
        {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    ],
)
def test_decoders_with_other_settings_are_refused(decoder: dict[str, Any]) -> None:
    with pytest.raises(CannotStart, match="is not known"):
        Tokenizer(sentencepiece(decoder=decoder), {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"added_tokens": [{"content": "x"}]}'),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"chat_template": 7}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_files_of_another_shape_stop_the_start(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece()))
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(CannotStart):
        Tokenizer.open(tmp_path)
