"""Score models on a text or a split. The report names the protocol and the unit of every figure.

python eval.py                                              # the newest run, on its own validation split
python eval.py --model_path out/shakespeare --protocol stride
python eval.py --model_path out/a out/b gpt2 --text book.txt --json report.json        # side by side
python eval.py --model_path out/wikitext103_22m --dataset wikitext103 --split test --protocol rolling
python eval.py --model_path out/shakespeare --generate 100 --plot positions.png
python eval.py --model_path gpt2 --choices hellaswag_val.jsonl
torchrun --standalone --nproc_per_node=2 eval.py --model_path out/shakespeare
"""

from config import EvalConfig, SamplingConfig, UserError, model_paths
from flatgpt.cli.cli import from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(EvalConfig, __doc__)

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from tqdm import tqdm

from flatgpt.data.shards import Tokens
from flatgpt.evaluation import continuations, report
from flatgpt.evaluation.metrics import default_batch_size, measure
from flatgpt.evaluation.multiple_choice import read_choices, score_choices
from flatgpt.evaluation.text import count_text, open_tokens
from flatgpt.evaluation.windows import Prefixed, Protocol, eval_batches
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.interop import loading
from flatgpt.interop.loading import ModelSource
from flatgpt.runtime.device import DeviceSettings, find_device, select_device
from flatgpt.runtime.distributed import DistributedContext, join_process_group
from flatgpt.runtime.files import require_writable, write_json, write_output
from model import GPT

PROTOCOLS = {
    "window": "windows that do not overlap; every token but the first is scored once",
    "stride": "overlapping windows, each scores the tokens that no earlier one has; all but the first, once",
    "rolling": "as lm-evaluation-harness: every token once, the first after end-of-text",
}


@dataclass
class EvalContext:
    """The config, device settings and ranks of all evaluations of one call."""

    config: EvalConfig
    settings: DeviceSettings
    ranks: DistributedContext

    def log(self, line: str) -> None:
        """Print to standard error, on the first rank; standard output is for the report."""
        if self.ranks.first:
            print(line, file=sys.stderr)

    def progress(self, items: list | None = None, **options) -> tqdm:
        """Return a progress bar of the first rank's share, shown on a terminal."""
        return tqdm(items, leave=False, disable=None if self.ranks.first else True, **options)


def evaluate_model(context: EvalContext, source: ModelSource) -> dict:
    """Return the report of one model."""
    config, settings = context.config, context.settings
    model, encoding = loading.load(source, settings.device, config.context_length)
    prepack(model, settings.dtype)  # on a CPU the evaluation takes half the time
    facts = {"model": str(source.path), "iter": source.state.get("iter")}
    facts["dtype"] = str(settings.dtype).removeprefix("torch.")
    if config.choices:
        means = "log-likelihood of each ending after its context, as lm-evaluation-harness's multiple_choice"
        answer = {"text": config.choices, "protocol": "choices", "protocol_means": means}
        answer["window"] = model.config.context_length
        options = {"ranks": context.ranks, "progress": context.progress}
        answer |= score_choices(model, encoding, read_choices(config.choices), settings.to_device, **options)
    else:
        answer = evaluate_text(context, model, encoding, source)
        if math.isnan(answer["loss"]):
            context.log(f"warning: {source.path}: the loss is NaN: the weights are damaged, or the run diverged")
    return facts | answer | {"units": report.units(answer)}


def evaluate_text(context: EvalContext, model: GPT, encoding: tiktoken.Encoding, source: ModelSource) -> dict:
    """Score the text that the config names, and continuations of it if they are asked for."""
    config, settings, ranks = context.config, context.settings, context.ranks
    T = model.config.context_length
    rolling = config.protocol == "rolling"
    stride = config.stride or max(1, T // 2) if config.protocol == "stride" else T
    if stride > T:
        raise UserError(f"stride = {stride:,}: a window has {T:,} tokens and cannot score more of them")
    with open_tokens(config, encoding, source.config, str(source.path), source.state, context.log) as (tokens, name):
        ids = Prefixed(tokens, encoding.eot_token) if rolling else tokens
        protocol = Protocol(len(ids), T, stride, full=rolling)
        batch_size = config.batch_size or default_batch_size(T, settings.device)
        targets = protocol.scored(min(len(protocol), config.eval_batches * batch_size or len(protocol)))
        share = ranks.rank, ranks.world
        batches = eval_batches(ids, T, batch_size, config.eval_batches, share, stride=stride, full=rolling)
        with context.progress(total=targets // ranks.world, unit="token", unit_scale=True) as bar:
            scores = measure(model, batches, settings.to_device, ranks, bar.update)
        counts = count_text(tokens, targets + (not rolling), encoding)
        if not rolling:  # the first token is not scored; its word counts, so that words do not depend on the protocol
            counts = dataclasses.replace(counts, bytes=counts.bytes - count_text(tokens, 1, encoding).bytes)
        means = PROTOCOLS[config.protocol]
        means += ", which the model's data never had" if rolling and not source.end_of_text else ""
        means += f"; first {config.eval_batches} batches" if config.eval_batches else ""
        answer = {"text": name, "protocol": config.protocol, "protocol_means": means, "window": T}
        answer |= {"batch_size": batch_size, "eval_batches": config.eval_batches or None}
        answer |= {"stride": stride} if config.protocol == "stride" else {}
        answer |= report.figures(scores, counts)
        return answer | (evaluate_continuations(context, model, encoding, tokens) if config.generate else {})


def evaluate_continuations(context: EvalContext, model: GPT, encoding: tiktoken.Encoding, tokens: Tokens) -> dict:
    """Score continuations of prompts at equal distances in the text."""
    config, length = context.config, context.config.max_new_tokens
    prompts = continuations.select_prompts(tokens, config.generate, config.prompt_tokens, length, encoding.eot_token)
    options = {"ranks": context.ranks, "progress": context.progress}
    written = continuations.generate_continuations(Decoder(model), encoding, prompts, length, config, **options)
    changed = [f.name for f in dataclasses.fields(SamplingConfig) if getattr(config, f.name) != f.default]
    means = [
        f"{length} tokens after {config.prompt_tokens}",
        f"temperature {config.effective_temperature:g}",
        f"seed {config.seed}",
    ]
    means += [f"{key} {getattr(config, key)}" for key in changed if key not in ("temperature", "greedy", "seed")]
    return {"prompts_mean": ", ".join(means)} | continuations.score_continuations(encoding, prompts, written)


def main(config: EvalConfig) -> None:
    """Score each model and print the report."""
    models = model_paths(config)
    require_writable(config.json, "json")
    require_writable(config.plot, "plot")
    if config.generate:
        continuations.require_packages()
    with join_process_group(config, find_device) as ranks:
        for key, path in (("text", config.text), ("choices", config.choices)):
            if path and (len(models) > 1 or ranks.world > 1) and _is_stream(path):
                raise UserError(f"{key} = {path}: a pipe is read once, by one model and rank: save it to a file first")
        settings = select_device(config.device, config.dtype, local_rank=ranks.local_rank if ranks.world > 1 else None)
        context = EvalContext(config, settings, ranks)
        sources = [loading.find(path, context.log) for path in models]  # all of them, before the first is scored
        reports = [evaluate_model(context, source) for source in sources]
    if not ranks.first:
        return
    if config.json != "-":
        print(report.smol(reports) if config.format == "smol" else report.table(reports))
    if config.plot:
        write_output(report.draw_positions(reports), config.plot, "plot")
    if config.json:
        write_json(reports[0] if len(reports) == 1 else {"models": reports}, config.json)


def _is_stream(path: str) -> bool:
    return path == "-" or (Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()))


if __name__ == "__main__":
    run_script(main, CONFIG, every_rank=True)
