"""Ids to text, token by token: pure, never a broken character, stop strings cut exactly."""

import time
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.text.detokenizer import Detokenizer
from isthmus.text.tokenizer import Tokenizer
from isthmus.text.vocabulary import Vocabulary, read_vocabulary
from tests.text.conftest import BUNDLED

SCRIPTS = "naïve 東京都 한국어 ไทย हिन्दी 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301\u0323 \u202eabc"
LIBRARY = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
TOKENIZER = Tokenizer.open(BUNDLED)
# Tokens that are a part of a character, at every place in it, and a few whole ones.
FRAGMENT_IDS = [i for i, piece in enumerate(TOKENIZER._vocabulary.token_bytes) if piece and not piece.isascii()]
ANY_IDS = st.lists(st.one_of(st.sampled_from(FRAGMENT_IDS), st.integers(0, TOKENIZER.vocab_size + 3)), max_size=40)

LETTERS = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"abab", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"\xff"]
SMALL = Vocabulary(tuple(LETTERS), strips_leading_space=False)
SMALL_IDS = st.lists(st.integers(0, len(LETTERS) - 1), max_size=30)
STOPS = st.lists(
    st.one_of(st.text("ab", min_size=2, max_size=4), st.text("abé\ufffd", min_size=1, max_size=5)),
    min_size=1,
    max_size=3,
)


def text_of(token_ids: Sequence[int]) -> str:
    return b"".join(LETTERS[i] for i in token_ids).decode("utf-8", "replace")


def run(detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
    return "".join(detokenizer.push(token_id).text for token_id in token_ids) + detokenizer.finish()


def first_end(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that completes first; the longest of several."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@given(ANY_IDS)
@settings(max_examples=60, deadline=None)
def test_released_text_is_the_library_s_decoding(token_ids: list[int]) -> None:
    expected = LIBRARY.decode(token_ids, skip_special_tokens=True)
    assert run(TOKENIZER.detokenizer(), token_ids) == TOKENIZER.decode(token_ids) == expected


@given(ANY_IDS)
@settings(max_examples=60, deadline=None)
def test_released_text_depends_on_earlier_tokens_only(token_ids: list[int]) -> None:
    detokenizer, released = TOKENIZER.detokenizer(), ""
    for count, token_id in enumerate(token_ids, 1):
        released += detokenizer.push(token_id).text
        whole = TOKENIZER.decode(token_ids[:count])
        assert whole.startswith(released)
        assert set(whole[len(released) :]) <= {"\ufffd"}  # held back: an unfinished character


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_valid_text_is_never_broken(text: str) -> None:
    detokenizer = TOKENIZER.detokenizer()
    parts = [detokenizer.push(token_id).text for token_id in TOKENIZER.encode(text)]
    assert "".join(parts) == text
    assert detokenizer.finish() == ""


def test_every_script_comes_through(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode(SCRIPTS)
    parts = [detokenizer.push(token_id).text for token_id in ids]
    assert "".join(parts) == SCRIPTS
    assert len(ids) > len(list(filter(None, parts)))  # some tokens were parts of characters


def test_invalid_bytes_become_replacements_once_certain() -> None:
    byte_ids = {piece: i for i, piece in enumerate(TOKENIZER._vocabulary.token_bytes) if len(piece) == 1}
    first, second, third = (byte_ids[bytes([b])] for b in "東".encode())
    detokenizer = TOKENIZER.detokenizer()
    assert [detokenizer.push(i).text for i in (first, second, third)] == ["", "", "東"]
    assert [detokenizer.push(i).text for i in (first, second, byte_ids[b"a"])] == ["", "", "\ufffda"]
    assert [detokenizer.push(i).text for i in (third, first)] == ["\ufffd", ""]
    assert detokenizer.finish() == "\ufffd"


def test_special_and_unknown_tokens_release_nothing(bundled: Tokenizer) -> None:
    detokenizer = bundled.detokenizer()
    for token_id in (0, 1, 2, 5, bundled.vocab_size, 10**9, -1):
        assert detokenizer.push(token_id).text == ""


@given(SMALL_IDS, STOPS, st.booleans())
@settings(max_examples=200, deadline=None)
@example(token_ids=[1, 5], stops=["aab"], include_stop=False)  # a a a b: the match begins inside a failed one
@example(token_ids=[6, 6], stops=["abaa", "ba"], include_stop=False)  # a stop string inside the beginning of another
@example(token_ids=[6], stops=["abab", "b"], include_stop=True)
@example(token_ids=[3], stops=["ab", "b"], include_stop=False)  # both end here: the longer counts
def test_text_ends_at_the_first_stop_string(token_ids: list[int], stops: list[str], include_stop: bool) -> None:
    detokenizer = Detokenizer(SMALL, stops, include_stop=include_stop)
    assert run(detokenizer, token_ids) == cut(text_of(token_ids), stops, include_stop)


def cut(text: str, stops: Sequence[str], include_stop: bool) -> str:
    found = first_end(text, stops)
    return text if found is None else text[: found[1] if include_stop else found[0]]


@given(SMALL_IDS, STOPS)
@settings(max_examples=200, deadline=None)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(token_ids: list[int], stops: list[str]) -> None:
    detokenizer, released = Detokenizer(SMALL, stops), ""
    for count, token_id in enumerate(token_ids, 1):
        result = detokenizer.push(token_id)
        released += result.text
        certain = text_without_unfinished(token_ids[:count])
        assert result.stopped == (first_end(certain, stops) is not None)
        if result.stopped:
            break
        beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
        assert certain[len(released) :] == max((b for b in beginnings if certain.endswith(b)), key=len)


def text_without_unfinished(token_ids: Sequence[int]) -> str:
    raw = b"".join(LETTERS[i] for i in token_ids)
    return (raw[:-1] if raw.endswith(b"\xc3") else raw).decode("utf-8", "replace")


def test_a_stop_string_across_tokens() -> None:
    detokenizer = Detokenizer(SMALL, ("bab",))
    assert [detokenizer.push(i) for i in (1, 2, 1)] == [
        detokenizer_result("a"), detokenizer_result(""), detokenizer_result(""),
    ]  # fmt: skip
    last = detokenizer.push(3)  # "ba" + "ab": no match yet, "ab" begins none, "b" does
    assert (last.text, last.stopped) == ("baa", False)
    assert detokenizer.push(3).stopped
    assert (detokenizer.push(1).text, detokenizer.finish()) == ("", "")


def detokenizer_result(text: str) -> object:
    from isthmus.text.detokenizer import Released

    return Released(text, stopped=False)


def test_pushing_stays_cheap() -> None:
    stops = [*("a" * size + "b" for size in range(1, 9)), "\n\nUser:", "###"]
    detokenizer = TOKENIZER.detokenizer(stops)
    token_ids = TOKENIZER.encode("the quick brown fox " * 2000)
    started = time.perf_counter()
    for token_id in token_ids:
        detokenizer.push(token_id)
    assert (time.perf_counter() - started) / len(token_ids) < 100e-6


# A sentencepiece vocabulary as Llama-like models publish it.
PIECES = {
    "<s>": 0,
    "</s>": 1,
    **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)},
    "▁": 258,
    "▁Hello": 259,
    "▁wor": 260,
    "ld": 261,
}
SENTENCEPIECE = {
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


def test_byte_fallback_and_word_starts() -> None:
    vocabulary = read_vocabulary(SENTENCEPIECE, PIECES)
    emoji = [2 + byte for byte in "😀".encode()]
    detokenizer = Detokenizer(vocabulary)
    released = [detokenizer.push(i).text for i in (0, 259, 260, 261, *emoji, 258, 2 + 0xE6, 261, 1)]
    assert released == ["", "Hello", " wor", "ld", "", "", "", "😀", " ", "", "\ufffdld", ""]


@given(st.lists(st.integers(0, 261).filter(lambda i: not 2 + 0x80 <= i < 258), max_size=20))
@settings(deadline=None)
def test_sentencepiece_text_is_the_library_s_decoding(token_ids: list[int]) -> None:
    model = tokenizers.models.BPE(vocab=PIECES, merges=[], byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    library.add_special_tokens(["<s>", "</s>"])
    vocabulary = read_vocabulary(SENTENCEPIECE, PIECES)
    assert run(Detokenizer(vocabulary), token_ids) == library.decode(token_ids)


@pytest.mark.parametrize(
    "scheme", [{"prepend_scheme": "always"}, {"prepend_scheme": "never"}, {"add_prefix_space": True}]
)
def test_metaspace_decoders_are_read(scheme: dict[str, object]) -> None:
    decoder = {"type": "Metaspace", "replacement": "▁", **scheme}
    vocabulary = read_vocabulary({"decoder": decoder}, {"▁Hello": 0})
    expected = " Hello Hello" if "never" in scheme.values() else "Hello Hello"
    assert run(Detokenizer(vocabulary), [0, 0]) == expected
