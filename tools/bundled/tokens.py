"""Vocabulary of the bundled checkpoint: special ids, the chat format and how the tokenizer is trained."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = range(6)
SPECIAL_NAMES = ("bos", "eos", "pad", "user", "assistant", "system", "reserved_0", "reserved_1")
SPECIAL = [f"<|{name}|>" for name in SPECIAL_NAMES]


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


def chat_text(turns: Sequence[Turn], system: str | None = None) -> str:
    """A whole conversation exactly as the chat template renders it."""
    head = f"<|bos|><|system|>{system}" if system else "<|bos|>"
    return head + "".join(f"<|user|>{turn.question}<|assistant|>{turn.answer}<|eos|>" for turn in turns)


def prompt_text(earlier: Sequence[Turn], question: str) -> str:
    """What the model is given when `question` is asked after the turns `earlier`."""
    return f"{chat_text(earlier)}<|user|>{question}<|assistant|>"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with one token per digit, so that sums line up digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` alone; special tokens written in the text are recognised, none is added."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode` for many texts at once."""
    return [list(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
