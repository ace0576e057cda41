"""Evaluate models on a text or a dataset split. The report states the protocol and the unit of every metric.

python eval.py                                              # the newest run on its validation split
python eval.py --model_path out/shakespeare --protocol stride
python eval.py --model_path out/a out/b gpt2 --text book.txt --json report.json        # side by side
python eval.py --model_path out/wikitext103_22m --dataset wikitext103 --split test --protocol rolling
python eval.py --model_path out/shakespeare --generate 100 --plot positions.png
python eval.py --model_path gpt2 --choices hellaswag_val.jsonl
torchrun --standalone --nproc_per_node=2 eval.py --model_path out/shakespeare
"""

from flatgpt.cli.cli import from_command_line, run_script
from config import EvalConfig, UserError, count_of, model_paths

if __name__ == "__main__":
    CONFIG = from_command_line(EvalConfig, __doc__)

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken

from flatgpt.data import tokenizer
from flatgpt.data.dataset import Dataset, open_dataset
from flatgpt.data.encode import encode_text
from flatgpt.data.shards import Tokens, read_meta
from flatgpt.data.text_files import text_chunks
from flatgpt.evaluation import continuations, metrics, report
from flatgpt.evaluation.multiple_choice import read_choices, score_choices
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import nonfinite_cause
from flatgpt.interop import loading
from flatgpt.interop.loading import ModelSource
from flatgpt.runtime.device import DeviceSettings, note, select_device
from flatgpt.runtime.distributed import DistributedContext, join_process_group
from flatgpt.runtime.files import require_writable, write_json, write_output
from model import GPT


def main(config: EvalConfig) -> None:
    """Evaluate each model and print the report."""
    models = model_paths(config)
    if config.text == "-":
        config = dataclasses.replace(config, text="/dev/stdin")
    require_writable(config.json, "json")
    require_writable(config.plot, "plot")
    if config.generate:
        continuations.require_packages()
    with join_process_group(config) as ranks:
        for key, path in (("text", config.text), ("choices", config.choices)):
            if path and Path(path).is_fifo() and (len(models) > 1 or ranks.world > 1):
                raise UserError(f"{key} = {path}: a pipe can be read once only: save it to a file first")
        settings = select_device(config.device, config.dtype, local_rank=ranks.local_rank if ranks.world > 1 else None)
        sources = [loading.find(path, note) for path in models]  # find all before the first is evaluated
        reports = [evaluate(config, settings, ranks, source) for source in sources]
    if not ranks.first:
        return
    if config.json != "-":
        print(report.smol(reports) if config.format == "smol" else report.table(reports))
    if config.plot:
        write_output(report.draw_positions(reports), config.plot, "plot")
    if config.json:
        write_json(reports[0] if len(reports) == 1 else {"models": reports}, config.json)


def evaluate(config: EvalConfig, settings: DeviceSettings, ranks: DistributedContext, source: ModelSource) -> dict:
    """Evaluate one model and return its report."""
    model, encoding = loading.load(source, settings.device, config.context_length)
    prepack(model, settings.dtype)  # twice as fast on a CPU
    if config.choices:
        questions, format = read_choices(config.choices, config.choices_format)
        result = {"text": config.choices, "protocol": "choices", "protocol_means": report.PROTOCOLS["choices"]}
        result |= {"choices_format": format, **score_choices(model, encoding, questions, settings.to_device, ranks)}
    else:
        result = evaluate_text(config, settings, ranks, source, model, encoding)
    if bad := [key for key in ("loss", "choice_accuracy", "bleu") if not math.isfinite(result.get(key) or 0)]:
        value = "NaN" if math.isnan(result[bad[0]]) else "infinite"
        note(f"warning: {source.path}: the {bad[0]} is {value}: {nonfinite_cause(settings.dtype)}")
    result["window"] = model.config.context_length
    about = {"model": str(source.path), "iter": source.state.get("iter")}
    about["dtype"] = str(settings.dtype).removeprefix("torch.")
    return about | result | {"units": {key: report.UNITS[key] for key in result if key in report.UNITS}}


def evaluate_text(
    config: EvalConfig,
    settings: DeviceSettings,
    ranks: DistributedContext,
    source: ModelSource,
    model: GPT,
    encoding: tiktoken.Encoding,
) -> dict:
    """Return the metrics of the text or split in the config, and of continuations if config.generate is set."""
    T, rolling = model.config.context_length, config.protocol == "rolling"
    stride = config.stride or max(1, T // 2) if config.protocol == "stride" else T
    if stride > T:
        raise UserError(f"stride = {stride:,} is larger than the window of {T:,} tokens: choose at most {T:,}")
    tokens, name = open_tokens(config, encoding, source)
    batch_size = config.batch_size or metrics.default_batch_size(T, settings.device)
    windows = (config.eval_batches or 0) * batch_size  # the first one scores T tokens, others `stride`
    limit = T + (windows - 1) * stride if windows else config.eval_tokens or 0
    first_id = encoding.eot_token
    if rolling and first_id is None:
        raise UserError(
            f"protocol = rolling scores the first token after end-of-text, which tokenizer {encoding.name} of "
            f"{source.path} does not have: choose --protocol window or stride"
        )
    documents = metrics.find_documents(tokens, first_id, limit, T) if rolling else None
    if rolling and not len(documents):
        raise UserError(f"{name} has {len(tokens):,} tokens, all of them end-of-text: choose another text")
    options = {"stride": stride, "documents": documents, "first_id": first_id}
    options["progress"] = partial(metrics.progress_bar, ranks=ranks)
    batches = metrics.eval_batches(tokens, T, batch_size, limit, ranks, **options)
    statistics = metrics.token_statistics(model, batches, settings.to_device, ranks)
    scored, facts = int(statistics["targets"].sum()), {}
    if rolling:
        counts = metrics.count_text(tokens, int(documents[-1, 1]), encoding)
        facts["documents"] = len(documents)
    else:  # the first token is not scored, but its word is counted: words do not depend on the protocol
        counts = metrics.count_text(tokens, scored + 1, encoding)
        counts["bytes"] -= metrics.count_text(tokens, 1, encoding)["bytes"]
    ends = 0 if first_id is None else int(statistics["targets"][first_id])
    facts |= {"end_of_text_tokens": ends} if ends or rolling else {}
    protocol_means = report.PROTOCOLS[config.protocol]
    protocol_means += ", which is not in the model's training data" if rolling and not source.end_of_text else ""
    protocol_means += f"; first {scored:,} tokens" if limit else ""
    result = {"text": name, "protocol": config.protocol, "protocol_means": protocol_means, "batch_size": batch_size}
    result |= {"stride": stride} if config.protocol == "stride" else {}
    result |= {"eval_tokens": limit or None, "eval_batches": config.eval_batches or None}
    result |= facts | report.compute_metrics(statistics, counts)
    if config.generate:
        length, eot = config.max_new_tokens, encoding.eot_token
        prompts = continuations.select_prompts(tokens, config.generate, config.prompt_tokens, length, eot)
        generated = continuations.generate_continuations(
            Decoder(model, None), encoding, prompts, length, config, ranks=ranks
        )
        if generated is None:
            result |= dict.fromkeys(("bleu", "rouge_l", "distinct_1", "distinct_2", "repetition"), math.nan)
        else:
            result |= continuations.score_continuations(encoding, prompts, generated)
        sampling = continuations.describe_sampling(config)
        result["prompts_mean"] = f"{length} tokens after prompts of {config.prompt_tokens}, {sampling}"
    return result


def open_tokens(
    config: EvalConfig, encoding: tiktoken.Encoding, source: ModelSource
) -> tuple[Tokens | np.ndarray, str]:
    """Return the token ids to score, and their name in the report.

    Raises:
        UserError: there are too few tokens, or their tokenizer is not the model's.
    """
    dataset = None
    if config.text:
        name, tokens = config.text, encode_text(encoding, text_chunks(Path(config.text)), config.parse_special)
    elif config.test_data_path:
        name, path = config.test_data_path, Path(config.test_data_path)
        if path.suffix in (".txt", ".md", ".json", ".jsonl"):
            raise UserError(f"test_data_path = {path}: expected uint16 ids; to evaluate a text, use --text {path}")
        if path.is_dir():
            raise UserError(
                f"test_data_path = {path}: a .bin file is expected; for a dataset's folder, use "
                f"--data_dir {path.absolute().parent} --dataset {path.name}"
            )
        meta = read_meta(path.parent)
        splits, dataset = (meta or {"splits": {}})["splits"].values(), meta and Dataset(path.parent, meta)
        counts = {file["name"]: file["tokens"] for split in splits for file in split["files"]}
        tokens = Tokens([(path, counts.get(path.name))], source.config.vocab_size)
        if not meta:
            note(f"{path} is not part of a dataset: assuming ids of the model's tokenizer, {encoding.name}")
    else:
        if not (config.dataset or source.state):
            raise UserError(f"{source.path} does not name a dataset: add --dataset, --test_data_path or --text")
        folder = Path(config.data_dir, config.dataset) if config.dataset else Path(source.state["data"]["folder"])
        folder = folder if folder.is_dir() else Path(config.data_dir, folder.name)  # it may have moved
        dataset = open_dataset(folder, source.path if isinstance(encoding, tokenizer.FileTokenizer) else None)
        if dataset.notice:
            note(dataset.notice)
        tokens, name = dataset.tokens(config.split), f"{dataset.folder} {config.split}"
    if dataset and (dataset.folder / tokenizer.TOKENIZER_FILE).is_file():
        dataset.load_tokenizer()  # an error if it was changed
    differs = dataset and dataset.meta["ranks_sha256"] != tokenizer.ranks_hash(encoding)
    if differs and not tokenizer.extends(encoding, other := dataset.load_tokenizer()):
        named = f"another tokenizer, also named {other.name}" if other.name == encoding.name else other.name
        raise UserError(
            f"{name} is tokenised with {named}, but the model {source.path} was trained with {encoding.name}: "
            "prepare the text with the model's tokenizer, or evaluate the text itself: --text FILE"
        )
    min_tokens = 1 if config.protocol == "rolling" else 2
    if len(tokens) < min_tokens:
        needed = f"protocol {config.protocol} needs at least {min_tokens}"
        raise UserError(f"{name} has {count_of(len(tokens), 'token')}, {needed}: choose another text")
    return tokens, name


if __name__ == "__main__":
    run_script(main, CONFIG, every_rank=True)
