"""Score models over a whole split, with the protocol and every normaliser named.

python eval.py                                              # the newest run, on its own validation split
python eval.py --model_path out/shakespeare --protocol stride
python eval.py --model_path out/a out/b gpt2 --text book.txt --json report.json        # side by side
python eval.py --model_path out/wikitext103_22m --dataset wikitext103 --split test --protocol rolling
python eval.py --model_path out/shakespeare --generate 100 --sampled --plot positions.png
python eval.py --model_path gpt2 --choices hellaswag_val.jsonl
torchrun --standalone --nproc_per_node=2 eval.py --model_path out/shakespeare
"""

from config import EvalConfig, SamplingConfig, model_paths
from flatgpt.cli.cli import from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(EvalConfig, __doc__)

import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.data.readers import text_chunks
from flatgpt.data.shards import Tokens, read_meta
from flatgpt.evaluation import continuations, report
from flatgpt.evaluation.metrics import default_batch_size, measure
from flatgpt.evaluation.multiple_choice import read_choices, score_choices
from flatgpt.evaluation.text_stats import TextCounts, count_text
from flatgpt.evaluation.windows import Prefixed, Protocol, eval_batches
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.interop import loading
from flatgpt.interop.loading import ModelSource
from flatgpt.runtime.device import DeviceSettings, find_device, seed_of, select_device
from flatgpt.runtime.distributed import DistributedContext, join_process_group
from flatgpt.runtime.files import require_writable, write_json, write_output
from model import GPT


@dataclass
class EvalContext:
    """Who scores: a machine among ranks, of which the first speaks."""

    config: EvalConfig
    place: DeviceSettings
    ranks: DistributedContext

    def say(self, line: str) -> None:
        """Facts that are no figures; standard output is for the report."""
        if self.ranks.first:
            print(line, file=sys.stderr)

    def watch(self, work: list | None = None, **more) -> tqdm:
        """Progress on a terminal, of the first rank's share."""
        return tqdm(work, leave=False, disable=None if self.ranks.first else True, **more)


def encode_file(path: str, encoding: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """The ids of a text file, in pieces, as prepare_data.py gives them."""
    for piece, _ in tokenizer.split_text(text_chunks(Path(path)), tokenizer.MAX_ENCODE_CHARS):
        yield tokenizer.encode(encoding, [piece], end_of_text=False)[0]


@contextlib.contextmanager
def open_tokens(context: EvalContext, found: ModelSource, encoding: tiktoken.Encoding) -> Iterator[tuple[Tokens, str]]:
    """The ids to score and what they are called.

    Raises:
        UserError: nothing there, or the ids of another tokenizer than the model's.
    """
    config, name_of_ids = context.config, None
    with tempfile.TemporaryDirectory(prefix="flatgpt-") as folder:
        if config.text:
            source = "/dev/stdin" if config.text == "-" else config.text
            path = Path(folder) / "text.bin"
            with open(path, "wb") as file:
                for ids in encode_file(source, encoding):
                    file.write(ids.tobytes())
            if not path.stat().st_size:
                raise UserError(f"text = {config.text}: it is empty; a text to score is expected")
            tokens, name = Tokens([(path, None)]), config.text
        elif config.test_data_path:
            tokens, name_of_ids = _one_file(context, Path(config.test_data_path), found.tokenizer)
            name = config.test_data_path
        else:
            dataset = open_dataset(_dataset_folder(config, found))
            if dataset.notice:
                context.say(dataset.notice)
            tokens, name = dataset.tokens(config.split), f"{dataset.folder} {config.split}"
            name_of_ids = dataset.meta["tokenizer"]
        if name_of_ids not in (None, found.tokenizer):
            raise UserError(
                f"{name} is tokenised with {name_of_ids}, the model {found.path} was trained with {found.tokenizer}: "
                "prepare the text with the model's tokenizer, or give the text itself: --text FILE"
            )
        tokens.check_ids(found.config.vocab_size)
        if len(tokens) < 2 and config.protocol != "rolling":
            raise UserError(f"{name} has {len(tokens)} token: it takes two to score one, or --protocol rolling")
        yield tokens, name


def _one_file(context: EvalContext, path: Path, taken_for: str) -> tuple[Tokens, str | None]:
    meta = read_meta(path.parent)
    entries = [f for split in meta["splits"].values() for f in split["files"]] if meta else []
    entry = next((f for f in entries if f["name"] == path.name), None)
    if path.suffix in (".txt", ".md", ".json", ".jsonl"):
        raise UserError(f"test_data_path = {path}: uint16 ids are expected there; a text is scored by --text {path}")
    tokens = Tokens([(path, entry and entry["tokens"])])
    if entry is None:
        context.say(f"{path} is in no dataset folder: taken as ids of the model's tokenizer, {taken_for}")
    return tokens, entry and meta["tokenizer"]


def _dataset_folder(config: EvalConfig, found: ModelSource) -> Path:
    if not (config.dataset or found.state):
        raise UserError(f"{found.path} does not say what it was trained on: give --dataset, --test_data_path or --text")
    folder = Path(found.state["data"]["folder"]) if found.state else Path()
    if config.dataset or not folder.is_dir():
        folder = Path(config.data_dir) / (config.dataset or folder.name)
    return folder


def score_text(context: EvalContext, model: GPT, encoding: tiktoken.Encoding, found: ModelSource) -> dict:
    """The report of a model on the text that the config asks for."""
    config, place, T = context.config, context.place, model.config.context_length
    stride = config.stride or max(1, T // 2) if config.protocol == "stride" else T
    if stride > T:
        raise UserError(f"stride = {stride:,}: a window has {T:,} tokens and cannot score more of them")
    with open_tokens(context, found, encoding) as (tokens, name):
        rolling = config.protocol == "rolling"
        text = Prefixed(tokens, encoding.eot_token) if rolling else tokens
        protocol = Protocol(len(text), T, stride, full=rolling)
        batch_size = config.batch_size or default_batch_size(T, place.device)
        windows = min(len(protocol), config.eval_batches * batch_size or len(protocol))
        targets = protocol.scored(windows)
        counts = count_text(tokens, 0, targets + (not rolling), encoding)
        if not rolling:  # the first token is read; its bytes are not scored
            first = count_text(tokens, 0, 1, encoding)
            counts = TextCounts(counts.bytes - first.bytes, counts.words, counts.lines)
        share = context.ranks.rank, context.ranks.world
        batches = eval_batches(text, T, batch_size, config.eval_batches, share, stride=stride, full=rolling)
        generator = torch.Generator(place.device)
        with context.watch(total=targets // context.ranks.world, unit="token", unit_scale=True) as bar:
            scores = measure(
                model,
                _reseeding(batches, generator, config.seed, share),
                place.to_device,
                sampled=_drawing(generator) if config.sampled else None,
                total=context.ranks.sum,
                each=bar.update,
            )
        answer = {"text": name, "protocol": config.protocol, "protocol_means": _describe(config, found), "window": T}
        answer |= {"batch_size": batch_size, "eval_batches": config.eval_batches or None}
        answer |= {"stride": stride} if config.protocol == "stride" else {}
        answer |= report.figures(scores, counts)
        if config.generate:
            answer |= score_continuations(context, model, encoding, tokens)
    return answer


def _describe(config: EvalConfig, found: ModelSource) -> str:
    never = "" if found.end_of_text else ", which the model's data never had"
    words = {
        "window": "windows that do not overlap; every token but the first is scored once",
        "stride": "overlapping windows, each scores the tokens that no earlier one has; all but the first, once",
        "rolling": f"as lm-evaluation-harness: every token once, the first after end-of-text{never}",
    }
    only = f"; first {config.eval_batches} batches" if config.eval_batches else ""
    return words[config.protocol] + only


def _reseeding(batches: Iterator, generator: torch.Generator, seed: int, share: tuple[int, int]) -> Iterator:
    """The batches; each begins with random numbers of its own number, whichever rank has it."""
    for n, batch in zip(itertools.count(*share), batches, strict=False):
        generator.manual_seed(seed_of(seed, n))
        yield batch


def _drawing(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def score_continuations(context: EvalContext, model: GPT, encoding: tiktoken.Encoding, tokens: Tokens) -> dict:
    """BLEU and the others, of continuations that begin at equal distances in the text."""
    config, ranks = context.config, context.ranks
    length = config.max_new_tokens
    places = continuations.cut(tokens, config.generate, config.prompt_tokens, length, encoding.eot_token)
    shared = {"share": (ranks.rank, ranks.world), "all_gather": ranks.all_gather, "watch": context.watch}
    written = continuations.continue_all(Decoder(model), encoding, places, length, config, **shared)
    chosen = [f.name for f in dataclasses.fields(SamplingConfig) if getattr(config, f.name) != f.default]
    means = [
        f"{length} tokens after {config.prompt_tokens}",
        f"temperature {config.effective_temperature:g}",
        f"seed {config.seed}",
    ]
    means += [f"{key} {getattr(config, key)}" for key in chosen if key not in ("temperature", "greedy", "seed")]
    scores = dataclasses.asdict(continuations.compare(encoding, places, written))
    return {"prompts_mean": ", ".join(means), **scores}


def score_answers(context: EvalContext, model: GPT, encoding: tiktoken.Encoding, found: ModelSource) -> dict:
    """The report of a model on multiple-choice questions."""
    config, ranks, place = context.config, context.ranks, context.place
    questions = read_choices(config.choices)
    shared = {"share": (ranks.rank, ranks.world), "total": ranks.sum, "watch": context.watch}
    scores = score_choices(model, encoding, questions, place.to_device, **shared)
    return {
        "text": config.choices,
        "protocol": "choices",
        "protocol_means": "log-likelihood of each ending after its context, as lm-evaluation-harness's multiple_choice",
        "window": model.config.context_length,
        "questions": scores.questions,
        "choice_accuracy": scores.accuracy,
        "choice_accuracy_stderr": scores.accuracy_stderr,
        "choice_accuracy_norm": scores.accuracy_norm,
        "choice_accuracy_norm_stderr": scores.accuracy_norm_stderr,
    }


def evaluate_model(context: EvalContext, found: ModelSource) -> dict:
    """The report of one model."""
    config = context.config
    model, encoding = loading.load(found, context.place.device, config.context_length)
    prepack(model, context.place.dtype)  # on a CPU the whole report comes in half the time
    facts = {"model": str(found.path), "iter": found.state.get("iter")}
    facts["dtype"] = str(context.place.dtype).removeprefix("torch.")
    answer = (score_answers if config.choices else score_text)(context, model, encoding, found)
    if answer.get("loss", 0.0) != answer.get("loss", 0.0):
        context.say(f"warning: {found.path}: the loss is no number: the weights are damaged, or the run diverged")
    return facts | answer | {"units": report.units(answer)}


def _is_stream(path: str) -> bool:
    return path == "-" or (Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()))


def main(config: EvalConfig) -> None:
    """Score each model on the text, and print the report."""
    require_writable(config.json, "json")
    require_writable(config.plot, "plot")
    if config.generate:
        continuations.require()
    with join_process_group(config, find_device) as ranks:
        local_rank = ranks.local_rank if ranks.world > 1 else None
        models = model_paths(config)
        for key, path in (("text", config.text), ("choices", config.choices)):
            if path and (len(models) > 1 or ranks.world > 1) and _is_stream(path):
                raise UserError(f"{key} = {path}: a pipe is read once, by one model and rank: save it to a file first")
        context = EvalContext(config, select_device(config.device, config.dtype, local_rank=local_rank), ranks)
        found = [loading.find(path, context.say) for path in models]  # all, before the first is scored
        reports = [evaluate_model(context, each) for each in found]
    if not ranks.first:
        return
    if config.json != "-":
        print(report.smol(reports) if config.format == "smol" else report.table(reports))
    if config.plot:
        write_output(report.draw_positions(reports), config.plot, "plot")
    if config.json:
        write_json(reports[0] if len(reports) == 1 else {"models": reports}, config.json)


if __name__ == "__main__":
    run_script(main, CONFIG, every_rank=True)
