"""Score a model over a whole split: loss, perplexity, bits per byte, accuracy.

python eval.py                                          # the newest run, on its own validation split
python eval.py --model_path out/shakespeare
python eval.py --model_path out/shakespeare --dataset mine --split val --json report.json
python eval.py --model_path out/shakespeare --test_data_path some/ids.bin
"""

from cli import from_command_line, run_verb, write_json
from config import EvalConfig, model_path

if __name__ == "__main__":
    CONFIG = from_command_line(EvalConfig, __doc__)

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoint
from config import UserError
from dataset import eval_batches, open_dataset
from metrics import Scores, score
from runtime import machine
from shards import Tokens, read_meta
from tokenizer import token_bytes

LOGITS_BYTES = 256e6  # float32 logits of one pass stay below this


def open_tokens(config: EvalConfig, state: dict, say: Callable[[str], None]) -> tuple[Tokens, str]:
    """The ids to score and what they are called.

    Raises:
        UserError: nothing there, or the ids of another tokenizer than the model's.
    """
    if config.test_data_path:
        path = Path(config.test_data_path)
        meta = read_meta(path.parent)
        entries = [f for split in meta["splits"].values() for f in split["files"]] if meta else []
        entry = next((f for f in entries if f["name"] == path.name), None)
        if entry is None:
            say(f"{path} is in no dataset folder: taken as ids of the model's tokenizer, {state['tokenizer']['name']}")
        tokens, name, encoding = Tokens([(path, entry and entry["tokens"])]), str(path), entry and meta["tokenizer"]
    else:
        folder = Path(state["data"]["folder"])
        if config.dataset or not folder.is_dir():
            folder = Path(config.data_dir) / (config.dataset or folder.name)
        dataset = open_dataset(folder)
        if dataset.notice:
            say(dataset.notice)
        tokens, name, encoding = dataset.tokens(config.split), f"{folder} {config.split}", dataset.meta["tokenizer"]
    if encoding and encoding != state["tokenizer"]["name"]:
        raise UserError(
            f"{name} is tokenised with {encoding}, the model was trained with {state['tokenizer']['name']}: "
            "prepare the text with the model's tokenizer"
        )
    tokens.check_ids(state["config"]["vocab_size"])
    if len(tokens) < 2:
        raise UserError(f"{name} has {len(tokens)} token: it takes two to score one")
    return tokens, name


def report(config: EvalConfig, scores: Scores, **facts) -> dict:
    """The figures by name, each with its unit in docs or name; facts come first."""
    return {
        **facts,
        "protocol": "non-overlapping windows, every token but the first scored once"
        + (f", first {config.eval_batches} batches" if config.eval_batches else ""),
        "dtype": config.dtype,
        "tokens": scores.tokens,
        "bytes": scores.bytes,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
    }


def table(figures: dict) -> str:
    """The report for a person: one figure a line, with its unit."""
    units = {
        "loss": "nats per token",
        "perplexity": "per token",
        "bits_per_byte": "bits per byte of text",
        "accuracy": "share of tokens that were the likeliest (top-1)",
        "tokens": "scored",
        "bytes": "of text scored",
        "window": "tokens",
    }
    lines = []
    for key, value in figures.items():
        text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"{key.replace('_', ' '):<14} {text}  {units.get(key, '')}".rstrip())
    return "\n".join(lines)


def main(config: EvalConfig) -> None:
    """Score one model on one split and print the report."""

    say = functools.partial(print, file=sys.stderr)
    place = machine(config.device, config.dtype)
    folder, state = checkpoint.find(model_path(config), say)
    model, encoding = checkpoint.load_model(folder, state, place.device)
    tokens, name = open_tokens(config, state, say)
    T, V = model.config.context_length, model.config.vocab_size
    batch_size = config.batch_size or max(1, min(64, int(LOGITS_BYTES / (4 * T * V))))
    batches = eval_batches(tokens, T, batch_size, config.eval_batches)
    with place.autocast():
        scores = score(model, batches, place.to_device, token_bytes(encoding))
    figures = report(config, scores, model=str(folder), iter=state["iter"], data=name, window=T, batch_size=batch_size)
    if config.json != "-":
        print(table(figures))
    if config.json:
        write_json(figures, config.json)


if __name__ == "__main__":
    run_verb(main, CONFIG)
