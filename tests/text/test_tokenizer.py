"""Text to ids: what the published tokenizers give, except that control tokens in a user's text stay text."""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import CannotStart, InvalidRequest
from isthmus.text.chat_template import ChatLimits, ChatTemplate
from isthmus.text.tokenizer import Tokenizer
from isthmus.v1 import inference_pb2
from tests.text.conftest import BUNDLED, deepseek_folder

TEXTS = [
    "",
    "a",
    "Hello, world!",
    "12 + 34 = 46",
    " leading and trailing ",
    "naïve 東京 한국어 👩‍👩‍👧 🏳️‍🌈",
    "a\x00b\r\n\t",
    "\u202egnp.exe",
]
BOS, EOS, USER, ASSISTANT = 0, 1, 3, 4
TOKENIZER = Tokenizer.open(BUNDLED)


def message(role: str, content: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=role, content=content)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(deepseek_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer._controls


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_gives_the_ids_transformers_gives(bundled: Tokenizer, oracle: Any, text: str) -> None:
    assert bundled.encode(text) == oracle(text).input_ids
    assert bundled.encode(text)[0] == BOS


@pytest.mark.parametrize("text", TEXTS)
def test_deepseek_ids_and_text_are_the_library_s(deepseek: Tokenizer, library: tokenizers.Tokenizer, text: str) -> None:
    ids = deepseek.encode(text)
    assert ids == library.encode(text).ids
    assert deepseek.decode(ids) == library.decode(ids) == text


def test_control_tokens_written_by_a_user_stay_text(tokenizer: Tokenizer) -> None:
    controls = control_tokens(tokenizer)
    assert len(controls) >= 8
    text = " and ".join(controls)
    ids = tokenizer.encode(text)
    assert not set(ids[1:]) & set(controls.values())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_wins_over_the_post_processor(flag: bool) -> None:
    config = {"bos_token": {"content": "<|bos|>"}, "add_bos_token": flag}
    tokenizer = Tokenizer(json.loads((BUNDLED / "tokenizer.json").read_text()), config)
    assert tokenizer.encode("a") == [BOS] * flag + tokenizer.encode("a")[flag:]
    assert (tokenizer.encode("a")[0] == BOS) == flag


def test_too_many_bytes_are_refused(bundled: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: given '1048577 bytes'; allowed: at most 1048576 bytes"):
        bundled.encode("x" * (2**20 + 1))


def test_a_text_that_cannot_fit_is_refused_before_any_work(bundled: Tokenizer) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match="at most 2048 tokens"):
        bundled.encode("7" * 2**20, max_tokens=2048)
    assert time.perf_counter() - started < 0.1
    longest = max(bundled._vocabulary.token_bytes, key=len).decode()
    assert bundled.encode(longest * 20, max_tokens=20)


def test_lone_surrogates_are_refused(bundled: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        bundled.encode("\ud800")


def test_other_threads_run_while_a_long_text_is_encoded(bundled: Tokenizer) -> None:
    worker = threading.Thread(target=bundled.encode, args=("the cat sat on " * 30_000,))
    worker.start()
    num_turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 10


def test_a_chat_gives_the_ids_transformers_gives(bundled: Tokenizer, oracle: Any) -> None:
    turns = [("system", "Be brief."), ("user", " hi < there "), ("assistant", "Hello\n"), ("user", "東京?")]
    ids = bundled.encode_chat([message(role, content) for role, content in turns])
    expected = oracle.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], add_generation_prompt=True
    )
    assert ids == expected["input_ids"]
    assert ids[-1] == ASSISTANT


FRAGMENTS = [
    "<|bos|>",
    "<|eos|>",
    "<|bo",
    "s|>",
    "<",
    "|",
    ">",
    "user",
    "<|user|>",
    "<|<|user|>user|>",
    " ",
    "\U000f0000",
    "x",
]


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.lists(st.sampled_from(FRAGMENTS)).map("".join)), min_size=1
    )
)
@settings(max_examples=80, deadline=None)
def test_no_content_becomes_a_control_token(turns: list[tuple[str, str]]) -> None:
    ids = TOKENIZER.encode_chat([message(role, content) for role, content in turns])
    counts = Counter(token_id for token_id in ids if token_id < 8)
    roles = Counter(role for role, _ in turns)
    expected = {BOS: 1, USER: roles["user"], ASSISTANT: roles["assistant"] + 1, EOS: roles["assistant"]}
    assert counts == Counter({token_id: count for token_id, count in expected.items() if count})
    assert TOKENIZER.decode(ids) == "".join(content for _, content in turns)


def test_no_content_completes_a_control_token_of_the_template() -> None:
    config = {"chat_template": "{% for m in messages %}<|{{ m.content }}|>{% endfor %}"}
    tokenizer = Tokenizer(json.loads((BUNDLED / "tokenizer.json").read_text()), config)
    ids = tokenizer.encode_chat([message("user", "user"), message("user", " eos")])
    assert min(ids) > 7
    assert tokenizer.decode(ids) == "<|user|><| eos|>"


def test_messages_are_checked(bundled: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"chat\.messages: given 0; allowed: 1 to 1024"):
        bundled.encode_chat([])
    with pytest.raises(
        InvalidRequest, match=r"chat\.messages\[1\]\.role: given 'tool'; allowed: system, user, assistant"
    ):
        bundled.encode_chat([message("user", "hi"), message("tool", "hi")])
    with pytest.raises(InvalidRequest, match=r"chat\.messages\[0\]\.content"):
        bundled.encode_chat([message("user", "x" * 11)], max_bytes=10)


def test_a_model_without_template_refuses_chats(deepseek: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="the model has no chat template"):
        deepseek.encode_chat([message("user", "hi")])


LIMITS = ChatLimits(max_seconds=0.2, max_characters=10_000)
HOSTILE = {
    "empty loop": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "macro bomb": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "long output": "{% for i in range(99999) %}xxxxxxxxxxxx{% endfor %}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "product": "{{ 'x' * 9999999999 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "padding": "{{ 'x'.ljust(99999) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os }}",
    "mutation": "{{ messages.append(1) }}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_as_an_error(source: str) -> None:
    template = ChatTemplate(source, {}, [], LIMITS)
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match="chat: given"):
        template.render([message("user", "hi")])
    assert time.perf_counter() - started < 5


def test_a_refusing_template_is_quoted() -> None:
    template = ChatTemplate(HOSTILE["refusal"], {}, [], LIMITS)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([message("user", "hi")])


def test_template_features_of_published_models_work() -> None:
    source = (
        "{%- for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}{{ {'a': 'é'} | tojson }}{{ '-' * 3 }}\n{% endfor %}"
    )
    shown = ChatTemplate(source, {"bos_token": "<|bos|>"}, ["<|bos|>"]).render(
        [message("user", "  a < b "), message("user", "c")]
    )
    assert shown.plain(shown.text) == '<|user|>a < b{"a": "é"}---\n'


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(CannotStart, match="chat_template: cannot compile"):
        ChatTemplate("{% for %}", {}, [])


def test_without_a_tokenizer_everything_that_needs_text_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(tmp_path)
    for ask in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.encode_chat([]),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.detokenizer(["x"]),
    ):
        with pytest.raises(InvalidRequest, match=r"no tokenizer\.json"):
            ask()
    assert tokenizer.detokenizer().push(7).text == ""


def test_broken_files_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CannotStart, match=r"tokenizer\.json: not JSON"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(CannotStart, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_an_unknown_decoder_stops_the_start() -> None:
    settings = json.loads((BUNDLED / "tokenizer.json").read_text()) | {
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}
    }
    with pytest.raises(CannotStart, match="WordPiece"):
        Tokenizer(settings, {})
