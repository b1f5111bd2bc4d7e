"""Text to token ids and back, from a model directory's tokenizer.json and tokenizer_config.json. No torch."""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from isthmus.errors import CannotStart, InvalidRequest
from isthmus.text.chat_template import ChatTemplate
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.vocabulary import AddedToken, Vocabulary, read_added_tokens, read_vocabulary
from isthmus.v1.inference_pb2 import ChatMessage

MAX_TEXT_BYTES = 1 << 20
_MAX_FILE_BYTES = 256 << 20
_IDS_ONLY = "token_ids: the model has no tokenizer.json"


class Tokenizer:
    """Encodes and decodes text. It does not change; any thread may use it.

    Encoding may take seconds and releases the GIL: it belongs in a thread, not on an event loop.
    """

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any], template: str | None = None):
        """`settings`: tokenizer.json; `config`: tokenizer_config.json; `template`: chat_template.jinja, or None.

        The template of `config` is used when `template` is None. Raises CannotStart, and LookupError, TypeError or
        ValueError for a file that is not as published.
        """
        added = read_added_tokens(settings)
        self._controls = {token.content: token.id for token in added if token.is_control and len(token.content) > 1}
        unknown = (settings.get("model") or {}).get("unk_token")  # what a character outside the vocabulary becomes
        self._control_ids = frozenset(self._controls[content] for content in self._controls if content != unknown)
        self._backend = _backend(settings, added)
        self._vocabulary = read_vocabulary(settings, self._backend.get_vocab(with_added_tokens=True))
        self._seam = secrets.token_hex(16)  # nobody can write it
        self._backend.add_tokens([tokenizers.AddedToken(self._seam, normalized=False)])
        self._min_tokens_per_byte = _min_tokens_per_byte(settings, self._vocabulary)
        named = _named_tokens(config)
        self._before, self._after = _frame(self._backend, config, named)
        source = template if template is not None else _template_source(config)
        self._chat_template = None if source is None else ChatTemplate(source, named, list(self._controls))
        self._control_pattern = _any_of(self._controls)
        self._strip_before = {token.content for token in added if token.lstrip}
        self._strip_behind = {token.content for token in added if token.rstrip}

    @classmethod
    def open(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer of a model directory; NoTokenizer for one without a tokenizer.json.

        Raises CannotStart naming the file that is wrong.
        """
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            return NoTokenizer()
        try:
            return cls(
                _read_json(folder, "tokenizer.json"),
                _read_json(folder, "tokenizer_config.json"),
                _read(folder, "chat_template.jinja"),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"tokenizer.json or what belongs to it is not as published: {error!r}"
            raise CannotStart(f"model: {folder}", problem, "take the published files") from error

    @property
    def vocab_size(self) -> int:
        """The number of ids that the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return len(self._vocabulary.token_bytes)

    def encode(self, text: str, *, max_bytes: int = MAX_TEXT_BYTES, max_tokens: int | None = None) -> list[int]:
        """The ids of a text, with bos and eos as the model's files say. Control tokens written in `text` stay text.

        Raises InvalidRequest for more than `max_bytes` of UTF-8, and, before the text is encoded, when its length alone
        says that it has more than `max_tokens`.
        """
        least = int(_check_size(text, max_bytes, "prompt") * self._min_tokens_per_byte)
        if max_tokens is not None and least > max_tokens:
            raise InvalidRequest.of("prompt", f"{least} tokens or more", f"at most {max_tokens} tokens")
        return [*self._before, *self._encode_text(text, "prompt"), *self._after]

    def encode_chat(self, messages: Sequence[ChatMessage], *, max_bytes: int = MAX_TEXT_BYTES) -> list[int]:
        """The ids of a chat that the model's template rendered; the template writes bos itself.

        Contents become plain text, whatever they say. Raises InvalidRequest for a chat that the template refuses, for
        one that is too large, and when the model has no template.
        """
        if self._chat_template is None:
            allowed = "prompt or token_ids: the model has no chat template"
            raise InvalidRequest.of("chat", f"{len(messages)} messages", allowed)
        for i, message in enumerate(messages):
            _check_size(message.content, max_bytes, f"chat.messages[{i}].content")
        chat = self._chat_template.render(messages)
        _check_size(chat.plain(chat.text), max_bytes, "chat")
        parts = [chat.plain(part) for part in self._control_pattern.split(chat.text)]  # text, control, text, ..., text
        token_ids = self._encode_part(parts, 0)
        for i in range(1, len(parts), 2):
            token_ids += [self._controls[parts[i]], *self._encode_part(parts, i + 1)]
        return token_ids

    def _encode_part(self, parts: Sequence[str], i: int) -> list[int]:
        part = parts[i]
        before = "".join(parts[i - 1 : i])
        behind = "".join(parts[i + 1 : i + 2])
        part = part.lstrip() if before in self._strip_behind else part
        part = part.rstrip() if behind in self._strip_before else part
        # A tokenizer may treat the first text apart from what follows a token (Metaspace's "first").
        return self._encode_text(self._seam + part, "chat")[1:] if before and part else self._encode_text(part, "chat")

    def decode(self, token_ids: Iterable[int]) -> str:
        """The whole text of these tokens: what a Detokenizer without stop strings releases for them."""
        text = b"".join(map(self._vocabulary.bytes_of, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._vocabulary.strips_leading_space else text

    def detokenizer(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> Detokenizer:
        """The text of a new stream, released token by token; `stop` and `include_stop` as Detokenizer has them."""
        return Detokenizer(self._vocabulary, stop, include_stop=include_stop)

    def _encode_text(self, text: str, field: str) -> list[int]:
        # A batch of one: unlike `encode` it releases the GIL (a megabyte takes seconds) and computes no offsets.
        token_ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if not self._control_ids.isdisjoint(token_ids):  # vocabularies exist that hold control tokens as words
            raise InvalidRequest.of(field, "a control token", "text without the model's control tokens")
        return token_ids


class NoTokenizer(Tokenizer):
    """For a model that was published without tokenizer.json (Kimi, Moonlight): prompts and answers are token ids."""

    def __init__(self) -> None:
        self._vocabulary = Vocabulary((), strips_leading_space=False)

    def encode(self, text: str, *, max_bytes: int = MAX_TEXT_BYTES, max_tokens: int | None = None) -> list[int]:
        raise InvalidRequest.of("prompt", text, _IDS_ONLY)

    def encode_chat(self, messages: Sequence[ChatMessage], *, max_bytes: int = MAX_TEXT_BYTES) -> list[int]:
        raise InvalidRequest.of("chat", f"{len(messages)} messages", _IDS_ONLY)

    def decode(self, token_ids: Iterable[int]) -> str:
        raise InvalidRequest.of("token_ids", "ids to turn into text", "nothing: the model has no tokenizer.json")

    def detokenizer(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> Detokenizer:
        if stop:
            raise InvalidRequest.of("sampling.stop", list(stop), "stop_token_ids: the model has no tokenizer.json")
        return super().detokenizer()


def _any_of(controls: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the control tokens, the longest first; in a group, so that `split` keeps what matched."""
    longest_first = sorted(controls, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _backend(settings: Mapping[str, Any], added: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    """The library's tokenizer, set up to read control tokens as text.

    It reads special tokens so when asked; control tokens that the file does not mark as special are marked here.
    """
    controls = {token.id for token in added if token.is_control}
    entries = [{**entry, "special": entry["id"] in controls} for entry in settings.get("added_tokens") or []]
    changed = {**settings, "added_tokens": entries, "truncation": None, "padding": None}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the library raises nothing more precise for a bad file
        raise CannotStart("tokenizer.json", str(error), "take the file the model was published with") from error
    if unlike := [token.content for token in added if backend.token_to_id(token.content) != token.id]:
        problem = f"{unlike[0]!r} would get another id: the library closes gaps between ids"
        raise CannotStart("tokenizer.json: added_tokens", problem, "add tokens for the ids left out")
    backend.encode_special_tokens = True
    return backend


def _frame(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[list[int], list[int]]:
    """The ids before and after every prompt: (before, after).

    They are those of the post-processor, unless add_bos_token or add_eos_token says otherwise.
    """
    probe = backend.encode("a", add_special_tokens=True)
    is_text = [not mask for mask in probe.special_tokens_mask]
    first = is_text.index(True)
    last = len(is_text) - is_text[::-1].index(True)
    frames: list[list[int]] = []
    for name, default in (("bos", probe.ids[:first]), ("eos", probe.ids[last:])):
        wanted = config.get(f"add_{name}_token")
        token_id = backend.token_to_id(named.get(f"{name}_token", ""))
        frames.append(default if wanted is None or token_id is None else [token_id] * bool(wanted))
    return frames[0], frames[1]


def _min_tokens_per_byte(settings: Mapping[str, Any], vocabulary: Vocabulary) -> float:
    """A lower bound, by which a text that cannot fit is refused before it is encoded.

    It is 0 where a normalizer may shorten the text.
    """
    normalizer = settings.get("normalizer")
    if normalizer and normalizer.get("normalizers", True):
        return 0.0
    return 1 / max(1, *map(len, vocabulary.token_bytes))


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, by the names that templates use. A token that is null stays undefined there."""
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in named.items() if name.endswith("_token") and isinstance(value, str)}


def _template_source(config: Mapping[str, Any]) -> str | None:
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        return next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def _check_size(text: str, max_bytes: int, field: str) -> int:
    """The text's size in bytes of UTF-8. Raises InvalidRequest for more than `max_bytes`."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest.of(field, "a lone surrogate", "text that UTF-8 can hold") from None
    if num_bytes > max_bytes:
        raise InvalidRequest.of(field, f"{num_bytes} bytes", f"at most {max_bytes} bytes")
    return num_bytes


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        return json.loads(_read(folder, name) or "{}")
    except (ValueError, RecursionError) as error:
        raise CannotStart(f"model: {folder / name}", f"not JSON: {error}", "take the published file") from error


def _read(folder: Path, name: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CannotStart(f"model: {path}", "too large", f"take a file of at most {_MAX_FILE_BYTES} bytes")
    return path.read_text(encoding="utf-8")
