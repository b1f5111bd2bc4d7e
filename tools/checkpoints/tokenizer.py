"""A tokenizer for random weights: a token for each byte and a short word for every other id, so any id is text."""

import json
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from .published import Raw

_FIRST_BYTE = 16  # published special ids are below this or far above
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(folder: Path, raw: Raw) -> None:
    """tokenizer.json and tokenizer_config.json with the special ids of config.json."""
    special = _special(raw)
    tokens = {raw_id: byte for raw_id, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), _FIRST_BYTE)}
    words = {id_: _word(id_) for id_ in range(raw["vocab_size"]) if id_ not in tokens}
    vocabulary = {token: id_ for id_, token in sorted({**tokens, **words, **special}.items())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special.values()])
    bos = special[raw["bos_token_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, raw["bos_token_id"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": special[_first(raw["eos_token_id"])],
        "model_max_length": raw["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _special(raw: Raw) -> dict[int, str]:
    """Two roles may share an id; the last one named here gives the name."""
    eos = raw["eos_token_id"] if isinstance(raw["eos_token_id"], list) else [raw["eos_token_id"]]
    pad = {raw["pad_token_id"]: "<|pad|>"} if raw.get("pad_token_id") is not None else {}
    ends = {id_: f"<|eos_{number}|>" if number else "<|eos|>" for number, id_ in enumerate(eos)}
    return {**pad, raw["bos_token_id"]: "<|bos|>", **ends}


def _first(token_id: int | list[int]) -> int:
    return token_id[0] if isinstance(token_id, list) else token_id


def _word(number: int) -> str:
    """A space and letters, no two alike."""
    letters = ""
    number += len(ascii_lowercase)  # two letters at least
    while number:
        number, letter = divmod(number, len(ascii_lowercase))
        letters = ascii_lowercase[letter] + letters
    return "\u0120" + letters  # the stand-in of a space in byte-level vocabularies
