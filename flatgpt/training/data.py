"""Data of a run: open or prepare its dataset, and load its tokenizer."""

from __future__ import annotations

import copy
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken

from config import SOURCE_SETTINGS, PrepareConfig, TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.data import tokenizer
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.data.sources import dataset_folder
from flatgpt.data.tokenizer import FileTokenizer
from flatgpt.interop.pretrained import find, read_tokenizer
from flatgpt.runtime.device import note
from flatgpt.runtime.distributed import DistributedContext


def load_dataset(config: TrainConfig, ranks: DistributedContext) -> Dataset:
    """Open and check the dataset on every rank. If it is missing and small, it is prepared first."""
    folder = Path(config.data_dir) / config.dataset
    if ranks.first:
        prepare_small(config.data_dir, folder)
    ranks.barrier()
    exists = any(folder.glob("*"))
    try:
        dataset = open_dataset(folder)
    except UserError:
        if exists or not (command := recipe_command(config.dataset)):
            raise
        raise UserError(f"dataset {folder} does not exist: run {command}{data_dir_words(config.data_dir)}") from None
    with ThreadPoolExecutor(1) as thread:  # hashing a large dataset may take longer than a collective's timeout
        checked = thread.submit(lambda: ranks.local_rank == 0 and dataset.check(config.verify_data))
        ranks.poll_all(checked.done)
    checked.result()
    ranks.require_equal({f"dataset {folder}": dataset.manifest_hash})
    return dataset


def prepare_small(data_dir: str, folder: Path) -> None:
    """Prepare a small source with default settings or another named tokenizer, if the dataset is missing."""
    source, _, name = folder.name.partition("_")
    settings = PrepareConfig(source=source, tokenizer=name or None, data_dir=data_dir)
    at_start = source in SOURCE_SETTINGS and SOURCE_SETTINGS[source].at_start
    if not at_start or not (name == "" or tokenizer.is_named(name, folder)):
        return
    finished = (folder / "meta.json").exists() or (any(folder.glob("*.bin")) and not (folder / PROGRESS).exists())
    if finished or dataset_folder(settings) != folder:
        return
    command = f"python prepare_data.py {source}{f' --tokenizer {name}' * bool(name)}{data_dir_words(data_dir)}"
    print(f"{folder} does not exist yet: preparing it {at_start}")
    try:
        prepare(settings)
    except UserError as error:
        raise UserError(f"{error}; then run this command again, or {command}") from None


def recipe_command(dataset: str) -> str | None:
    """Return the command that makes a dataset, from the comments of the recipe that uses it; None if there is none."""
    for path in sorted((REPO_ROOT / "configs").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        command = re.search(r"^# Data: (python prepare_data\.py .+)$", text, re.M)
        if command and f'dataset = "{dataset}"' in text.splitlines():
            return command[1]
    return None


def data_dir_words(data_dir: str) -> str:
    """Return the words that give prepare_data.py this data_dir, with a blank before them; "" for its default."""
    return "" if Path(data_dir) == Path("data") else f" --data_dir {shlex.quote(data_dir)}"


def count_eval_tokens(config: dict) -> int:
    """Return the number of validation tokens (0: all) of a run's settings, whose older form is eval_batches."""
    batches = config.get("eval_batches") or 0
    return config.get("eval_tokens") or batches * config["batch_size"] * config["context_length"]


def load_encoding(
    config: TrainConfig, ranks: DistributedContext, dataset: Dataset, model_path: str | None
) -> tiktoken.Encoding | None:
    """Return the tokenizer of a run: the model's if it only adds tokens to that of the data, otherwise the data's.

    Args:
        model_path: the model that training starts from, if there is one.

    Returns:
        None if the tokenizer has a known name, and there are no samples or a rank cannot load it.

    Raises:
        UserError: the model was trained with another tokenizer, or that of the data is damaged.
    """
    folder, meta, encoding = dataset.folder, dataset.meta, None
    initial = read_tokenizer(model_path) if model_path else None
    differs = initial is not None and tokenizer.ranks_hash(initial) != meta["ranks_sha256"]
    required = differs or not tokenizer.is_named(meta["tokenizer"], folder)
    if required or config.sample_tokens:
        try:
            encoding = dataset.load_tokenizer()
        except UserError as error:
            if required:
                raise
            note(f"warning: no samples will be written: {error}")
    if differs:
        if not tokenizer.extends(initial, encoding):
            mine = initial.name
            if isinstance(initial, FileTokenizer):
                mine = path if (path := find(model_path)).is_dir() else "DATA/meta.pkl"  # of nanoGPT
            other = "another tokenizer, also named" if initial.name == encoding.name else "tokenizer"
            raise UserError(
                f"{model_path} was trained with {other} {initial.name}, but {folder} is tokenised with "
                f"{encoding.name}: prepare the text with --tokenizer {mine}"
            )
        if isinstance(initial, FileTokenizer) and encoding.eot_token is not None:
            initial = copy.copy(initial)
            initial.end_of_text = encoding.decode([encoding.eot_token])  # as in the run's data
        encoding = initial
    return encoding if ranks.all(encoding is not None) else None
