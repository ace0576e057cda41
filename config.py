"""All settings: a frozen dataclass per script, whose fields have help, limits and a default. Also UserError.

flatgpt/cli fills these from TOML recipes and the command line. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Keys that exclude each other. In one layer both are an error; otherwise the key of the later layer is used.
TEXTS = ("dataset", "test_data_path", "text", "choices")  # eval.py scores one of these
EXCLUSIVE = (("epochs", "max_iters"), ("warmup_fraction", "warmup_iters"), ("eval_batches", "eval_tokens"))
EXCLUSIVE += (*itertools.combinations(TEXTS, 2),)
# Keys that say one thing together: a layer that gives one of them replaces those of earlier layers.
TOGETHER = (("tracker", "wandb"),)
# Settings of one start of train.py. They do not describe the run: config.toml and a resume leave them out.
START_ONLY = ("config", "resume", "overwrite", "list", "plan", "gpus", "mfu", "show_batch", "json")
CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
CONTROLS |= {n: f"\\u{n:04x}" for n in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
DEVICES = ("auto", "cuda", "cuda:N", "mps", "cpu")  # N stands for a number
# Help of settings that train.py and eval.py share.
EVAL_TOKENS = "tokens to score, from the start of the split, rounded up to whole windows; 0: all"
EVAL_BATCHES = "older form of eval_tokens: that many batches of batch_size windows; 0: all"
# Settings that `--help` shows; `--help all` shows all. Without an entry, both show all.
COMMON = {
    "TrainConfig": "config device n_layer n_head n_embd context_length dropout data_dir dataset batch_size "
    "grad_accum_steps max_iters lr eval_interval out_dir resume overwrite tracker list plan",
    "PrepareConfig": "source input val_input repo column sample_size val_fraction name overwrite tokenizer "
    "data_dir workers info verify",
    "EvalConfig": "config model_path device dtype data_dir dataset split text choices protocol eval_tokens batch_size "
    "generate json",
    "InferConfig": "config model_path device prompt prompt_file interactive num_samples max_new_tokens temperature "
    "top_k top_p seed stop json",
    "AppConfig": "config model_path device temperature top_k top_p max_new_tokens server_name server_port",
    "BenchConfig": "what config data_dir dataset warmup_updates timed_updates rounds json peer profile target input "
    "variants model_path",
}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count_of(n: int, noun: str) -> str:
    """Return a number with a noun: 1 layer, 12 layers."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def format_decimal(value: float, digits: int) -> str:
    """Format a number with so many decimals, or with one significant digit if it is smaller than the last of them."""
    return f"{value:,.{digits}f}" if value == 0 or not abs(value) < 10**-digits else f"{value:.1g}"


def escape_controls(text: str) -> str:
    """Return a text in which control characters other than line breaks and tabs are escapes, such as \\x1b.

    A terminal would obey C0 and C1 controls, DEL, and the controls that reorder bidirectional text.
    """
    return text.translate(CONTROLS)


class UserError(Exception):
    """An error that the user can correct. The message says what was wrong, with which value, and what to do."""


class ReportedByOtherRank(UserError):  # noqa: N818 - not an error of this rank
    """A UserError that another rank reports; this rank exits silently."""


def record_failure(text: str) -> None:
    """Write an error to the file that torchrun reads when this rank exits. Does nothing without torchrun.

    torchrun repeats the earliest error as the root cause at the end of its output, after a traceback of its own.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def is_text_encoding(name: str) -> bool:
    """Return whether Python has a codec of that name that decodes bytes to valid text."""
    try:
        "\ud800".encode(name)  # half a surrogate pair: codecs that do not refuse it, as utf-7, can return one
    except UnicodeEncodeError:
        return True
    except (LookupError, ValueError):
        pass
    return False


def opt(default, help: str, **meta):
    """Return a dataclass field with its help and limits.

    Args:
        default: the value when neither a recipe nor the command line sets it.
        help: one sentence for `--help`.
        meta: `choices` (allowed values), `low`/`high` (inclusive limits), `above`/`below` (exclusive limits),
            `none` (the word for None), `bare` (value of the flag alone), `section` (heading in
            `--help` above this field), `verbatim` (the value is a text, in which `~` is not the home folder),
            `separator` (several words after the flag are joined with it, once all positional arguments are given),
            `positional` (given without a flag; a tuple takes all positional arguments),
            `recipe` (False: the key in a recipe is for train.py; ignore it).
    """
    return dataclasses.field(default=default, metadata={"help": help, **meta})


def limit_problem(meta, value) -> str | None:
    """Return what is expected instead of `value` if it is outside a field's limits. None: it is within them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number is expected"
    for limit, is_violated, word in (
        ("low", lambda v, b: v < b, "at least"),
        ("high", lambda v, b: v > b, "at most"),
        ("above", lambda v, b: v <= b, "more than"),
        ("below", lambda v, b: v >= b, "less than"),
    ):
        if value is not None and limit in meta and is_violated(value, meta[limit]):
            return f"{word} {meta[limit]} is expected"
    return None


def tokenizer_names(text: str) -> list[str]:
    """Return the tokenizers of a --tokenizer setting. Digits of bpe:N may be grouped: bpe:4,096 or bpe:4_096."""
    if Path(text).exists():
        return [text]
    return re.sub(r"\bbpe:\d{1,3}([,_]\d{3})+\b", lambda found: re.sub("[,_]", "", found[0]), text).split(",")


def checked(value, kind: type, limits: Mapping):
    """Return the value of a field after checks; an int for a float is converted.

    Args:
        kind: int, float, bool, str or dict.
        limits: metadata of the field.

    Raises:
        ValueError: the value has another type, is not among the choices, or is outside the limits.
    """
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
        raise ValueError(f"{names[kind]} is expected")
    choices = limits.get("choices", ())
    if choices and not any(re.fullmatch(re.escape(c).replace(":N", ":[0-9]{1,3}"), value) for c in choices):
        raise ValueError(f"one of {', '.join(limits['choices'])} is expected")
    if problem := limit_problem(limits, value):
        raise ValueError(problem)
    return value


@dataclass(frozen=True)
class ModelConfig:
    """The model's architecture; the only settings that model.py reads."""

    n_layer: int = opt(4, "transformer blocks", low=1, high=10_000, section="Model")
    n_head: int = opt(4, "attention heads per block; divides n_embd", low=1)
    n_embd: int = opt(192, "width of the residual stream (C)", low=1, high=1_000_000)
    context_length: int = opt(128, "maximum sequence length in tokens (T)", low=1, high=10_000_000)
    vocab_size: int | None = opt(None, "number of token ids (V)", low=1, high=65536, none="the tokenizer's")
    dropout: float = opt(0.0, "dropout probability in training", low=0, below=1)
    bias: bool = opt(True, "biases in Linear and LayerNorm, as in GPT-2")
    attn_bias: bool | None = opt(None, "biases in the two Linear layers of attention", none="as bias")
    head_bias: bool = opt(False, "bias of the output head; needs an untied head")
    tie_weights: bool = opt(True, "use the token embedding matrix as output head")
    mlp_ratio: float = opt(4.0, "width of the MLP's hidden layer, as a multiple of n_embd", above=0, high=1000)
    activation: str = opt(
        "gelu_tanh",
        "activation function of the MLP",
        choices=("gelu_tanh", "gelu", "relu"),
    )
    position: str = opt("learned", "position embedding: learned, or rotary", choices=("learned", "rope"))
    attention: str = opt(
        "flash", "flash: torch's fused kernels; manual: separate matrix products", choices=("flash", "manual")
    )
    activation_checkpointing: bool = opt(False, "recompute each block in the backward pass: less memory, more time")

    def problems(self) -> list[str]:
        """Return a message for each conflict between fields."""
        found = []
        if self.n_embd % self.n_head:
            found.append(
                f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: all heads have the same size"
            )
        elif self.position == "rope" and (self.n_embd // self.n_head) % 2:
            found.append(
                f"position = rope needs an even head size, n_embd / n_head = {self.n_embd // self.n_head} is odd"
            )
        if self.head_bias and self.tie_weights:
            found.append(
                "head_bias needs an untied head: add --no-tie_weights (tie_weights = false), or leave head_bias out"
            )
        if round(self.mlp_ratio * self.n_embd) < 1:
            found.append(f"mlp_ratio = {self.mlp_ratio} leaves no hidden unit at n_embd = {self.n_embd}")
        return found

    def model(self) -> ModelConfig:
        """Return the ModelConfig with the same values."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


@dataclass(frozen=True)
class MachineConfig:
    """Settings of every script that runs a model."""

    config: str | None = opt(None, "a recipe: the bare name of a file in configs/, or a path", section="Shared")
    device: str = opt("auto", "where to compute", choices=DEVICES)


class SourceSettings(NamedTuple):
    """What is known of a source of text without importing flatgpt/data.

    Attributes:
        tokenizer: the default tokenizer.
        settings: the settings of PrepareConfig that the source uses, of those that some sources do not use.
        at_start: what preparation takes, if train.py prepares the source when a run needs it; otherwise empty.
    """

    tokenizer: str
    settings: str = ""
    at_start: str = ""


FRACTIONS, HUB = "val_fraction test_fraction", "revision refresh"
# The values of prepare_data.py's `source`. flatgpt/data/sources.py opens them.
SOURCE_SETTINGS = {
    "pydoc": SourceSettings("byte", at_start="from Python's built-in reference (pydoc)"),
    "shakespeare": SourceSettings(
        "gpt2", at_start="(a download of 1.1 MB, and of 1.5 MB for GPT-2's tokenizer if it needs that)"
    ),
    "wikitext103": SourceSettings("gpt2", HUB),
    "wikipedia": SourceSettings("gpt2", f"dump {HUB} {FRACTIONS}"),
    "fineweb": SourceSettings("gpt2", f"{HUB} {FRACTIONS}"),
    "hub": SourceSettings("gpt2", f"repo subset files column encoding {HUB} {FRACTIONS}"),
    "text": SourceSettings("gpt2", f"input val_input test_input column encoding {FRACTIONS}"),
    "compare": SourceSettings("gpt2,byte,bpe:8192", "input val_input column encoding val_fraction"),
}


@dataclass(frozen=True)
class PrepareConfig:
    """prepare_data.py: text -> shards of uint16 token ids."""

    source: str | None = opt(
        None,
        "source of the text",
        choices=tuple(SOURCE_SETTINGS),
        positional=True,
        section="Source",
    )
    input: tuple[str, ...] = opt(
        (),
        "for text and compare: files, folders and quoted glob patterns; .txt .md .py .rst .tex .jsonl .ndjson .json "
        ".csv .tsv, also with .gz .zst .bz2 .xz, and .parquet",
    )
    val_input: tuple[str, ...] = opt(
        (), "for text and compare: files of the validation split, which --input then lacks"
    )
    test_input: tuple[str, ...] = opt((), "for text: files of the test split")
    repo: str | None = opt(None, "for hub: a dataset repository, user/name")
    subset: str | None = opt(None, "for hub: a subset that the dataset's page names, or a folder", none="the only one")
    files: tuple[str, ...] = opt((), "for hub: quoted glob patterns of the files to use")
    column: str = opt("text", "for hub and text: parquet or csv column, or JSON key, of the text; a.b is nested")
    encoding: str = opt("utf-8", "for hub and text: encoding of text files, for example utf-16-le, cp1252 or gb18030")
    dump: str | None = opt(None, "for wikipedia: date and language, for example 20231101.simple", none="20231101.en")
    revision: str | None = opt(None, "for sources on the hub: commit, branch or tag", none="a fixed commit")
    refresh: bool = opt(False, "for sources on the hub: list the files of a branch anew, instead of the cached list")
    sample_size: int | None = opt(None, "number of documents, from the start of each split", low=1, none="all")
    splits: tuple[str, ...] = opt((), "splits to make, of train, val and test; default: all")
    val_fraction: float | None = opt(
        None,
        "share of documents for validation if the source has no validation split; 0: no validation split",
        low=0,
        below=1,
        none="0.1 of text, 0.0005 of the hub's",
    )
    test_fraction: float | None = opt(
        None, "share of documents for test if the source has no test split", low=0, below=1, none="no test split"
    )
    name: str | None = opt(None, "the dataset's name", none="source[_dump][_tokenizer]", section="Dataset")
    overwrite: bool = opt(False, "move another dataset of this name aside, to <name>.old-<time>")
    tokenizer: str | None = opt(
        None,
        "byte, gpt2 or another tiktoken encoding of at most 65,536 ids; bpe:N, which is trained on the training split "
        "and has N ids; a tokenizer.json, vocab.json, .tiktoken or meta.pkl, or a folder with one; user/name on the "
        "hub; several for compare",
        none="the source's",
        separator=",",
    )
    special_tokens: tuple[str, ...] = opt(
        (), "tokens to add to the tokenizer, for example '<|user|>' '<|assistant|>'", verbatim=True
    )
    parse_special: bool = opt(
        False, "make the tokenizer's added tokens in the text one id each; otherwise they are ordinary characters"
    )
    tokenizer_sample_mb: int = opt(100, "for bpe:N: megabytes of text to read, spread evenly over the files", low=1)
    encoder: str = opt("tiktoken", "gigatoken: the same ids, several times as fast", choices=("tiktoken", "gigatoken"))
    data_dir: str = opt("data", "folder that holds one folder of shards per dataset")
    raw_dir: str = opt("data/raw", "folder for downloads; existing files in <raw_dir>/<source>/ are used")
    shard_tokens: int = opt(100_000_000, "tokens per shard file", low=1)
    workers: int | None = opt(None, "number of encoding processes", low=1, none="one a core", section="Work")
    cluster: str | None = opt(
        None, "Dask cluster to encode on, tcp://scheduler:8786; its workers need access to the same files"
    )
    verify: str | None = opt(None, "instead of a source: dataset folder whose shards to verify")
    info: str | None = opt(None, "instead of a source: dataset folder whose counts and first tokens to print")

    def problems(self) -> list[str]:
        """Return a message for each conflict between fields and each field that the source does not use."""
        found = []
        if self.source is None:
            if not (self.verify or self.info):
                found.append(
                    f"source: missing; give one of {', '.join(SOURCE_SETTINGS)}, or --verify FOLDER, or --info FOLDER"
                )
            return found
        if self.verify or self.info:
            found.append(f"--verify and --info read a folder of shards: leave out {self.source}")
        if self.source in ("text", "compare") and not self.input:
            found.append(f"source {self.source} needs --input FILE, FOLDER or 'PATTERN' (several are allowed)")
        names = tokenizer_names(self.tokenizer or "")
        if len(names) > 1 and self.source != "compare":
            found.append(f"tokenizer = {self.tokenizer}: several tokenizers apply to source compare, not {self.source}")
        if self.source == "compare" and (self.special_tokens or self.parse_special):
            found.append("--special_tokens and --parse_special do not apply to source compare")
        if self.tokenizer_sample_mb != 100 and self.source != "compare" and not names[0].startswith("bpe:"):
            found.append("--tokenizer_sample_mb applies to --tokenizer bpe:N, which is trained; leave it out")
        if self.encoder == "gigatoken":
            if self.parse_special:
                found.append("--parse_special needs --encoder tiktoken")
            if (self.tokenizer or "").startswith("bpe:"):
                found.append(f"--encoder gigatoken supports tokenizer gpt2, r50k_base, not {self.tokenizer}")
        if self.source == "hub" and not self.repo:
            found.append("source hub needs --repo USER/NAME, a dataset repository")
        for field in dataclasses.fields(self):
            sources = [name for name, source in SOURCE_SETTINGS.items() if field.name in source.settings.split()]
            if sources and self.source not in sources and getattr(self, field.name) != field.default:
                hint = "; its subsets are --dump" if (field.name, self.source) == ("subset", "wikipedia") else ""
                found.append(f"--{field.name} applies to source {', '.join(sources)}, not to {self.source}{hint}")
        if self.subset and self.files:
            found.append("--subset and --files exclude each other: give one of them")
        if not is_text_encoding(self.encoding):
            found.append(f"encoding = {self.encoding}: unknown; one of Python's is expected, such as utf-16 or cp1252")
        for split, inputs in (("val", self.val_input), ("test", self.test_input)):
            if inputs and getattr(self, f"{split}_fraction") is not None:
                found.append(f"--{split}_input and --{split}_fraction exclude each other: give one of them")
        if self.source == "compare" and self.val_fraction == 0:
            found.append("val_fraction = 0: compare counts the tokens of the validation split; leave it out")
        if (self.val_fraction or 0) + (self.test_fraction or 0) >= 1:
            found.append("val_fraction and test_fraction add up to 1 or more: no text is left for train")
        if unknown := [split for split in self.splits if split not in ("train", "val", "test")]:
            hint = f"; separate them by blanks: --splits {unknown[0].replace(',', ' ')}" if "," in unknown[0] else ""
            found.append(f"splits = {unknown[0]}: one of train, val, test is expected{hint}")
        if self.repo and self.repo.count("/") != 1:
            found.append(f"repo = {self.repo}: user/name is expected")
        if self.name and (Path(self.name).name != self.name or self.name.startswith(".")):
            found.append(f"name = {self.name!r} is not a folder name: leave out / and a leading dot")
        elif self.name and Path(self.raw_dir).resolve().is_relative_to(Path(self.data_dir, self.name).resolve()):
            found.append(f"name = {self.name}: this folder of {self.data_dir} has the downloads; choose another")
        return found


@dataclass(frozen=True)
class TrainConfig(ModelConfig, MachineConfig):
    """train.py: shards -> checkpoints and log."""

    seed: int = opt(1337, "seed for initial weights, batch order and dropout", low=0, below=2**63, section="Data")
    data_dir: str = opt("data", "folder that holds one folder of shards per dataset")
    dataset: str = opt("pydoc", "name of the folder of shards in data_dir")
    verify_data: bool = opt(False, "hash all shards before the first update")
    batch_size: int = opt(8, "sequences per micro-batch on one device", low=1, high=1_000_000)
    grad_accum_steps: int = opt(1, "micro-batches per update, over all devices", low=1)
    stride: int | None = opt(None, "tokens between the starts of two windows", low=1, none="context_length")
    max_iters: int | None = opt(2000, "number of updates", low=1, high=10**12, none="from epochs", section="Length")
    epochs: float | None = opt(None, "passes over the training split, instead of max_iters", above=0, high=1e6)
    patience: int | None = opt(None, "stop after this many evaluations without a new best loss", low=1, none="never")
    max_minutes: float | None = opt(None, "save and stop after this time; --resume continues", above=0)
    on_nonfinite: str = opt(
        "stop", "if a loss or gradient is NaN or infinite: end the run, or skip the update", choices=("stop", "skip")
    )
    init_from: str | None = opt(
        None, "initial weights: a run, a Hugging Face folder or hub name, or nanoGPT's ckpt.pt", none="random"
    )
    optimizer: str = opt(
        "adamw",
        "muon: Muon for the blocks' matrices, AdamW for the rest, both with lr, beta1 and weight_decay",
        choices=("adamw", "muon"),
        section="Optimizer",
    )
    lr: float = opt(2e-3, "peak learning rate", above=0)
    min_lr: float | None = opt(
        None, "learning rate at lr_decay_iters and after", low=0, none="2e-4, or lr / 10 if lr is below 2e-4"
    )
    schedule: str = opt(
        "cosine", "decay from lr to min_lr after warm-up", choices=("cosine", "linear", "constant", "onecycle", "wsd")
    )
    warmup_iters: int | None = opt(100, "updates of warm-up", low=0, none="from warmup_fraction")
    warmup_fraction: float | None = opt(None, "warm-up as a share of lr_decay_iters", low=0, below=1)
    decay_fraction: float = opt(0.2, "wsd: share of lr_decay_iters that is the final decay", above=0, high=1)
    lr_decay_iters: int | None = opt(None, "update at which min_lr is reached", low=1, none="max_iters")
    weight_decay: float = opt(0.1, "decoupled weight decay, of matrices only", low=0)
    beta1: float = opt(0.9, "decay rate of the gradients' running mean", low=0, below=1)
    beta2: float = opt(0.99, "decay rate of the running mean of their squares", low=0, below=1)
    eps: float = opt(1e-8, "AdamW's epsilon", above=0)
    grad_clip: float = opt(1.0, "maximum gradient norm; 0: no clipping", low=0)
    dtype: str = opt(
        "auto",
        "precision of matrix products in training",
        choices=("auto", "bfloat16", "float16", "float32"),
        section="Speed",
    )
    compile: bool | None = opt(None, "use torch.compile for the forward pass in training", none="auto")
    deterministic: bool = opt(False, "use deterministic, slower CUDA kernels; results on CPUs are always reproducible")
    fsdp: bool = opt(False, "under torchrun: shard weights, gradients and optimizer state over the devices")
    rank_timeout: float = opt(300, "seconds that ranks wait for each other; doubled in the first update", low=1)
    eval_interval: int = opt(200, "updates between two evaluations", low=1, section="Evaluation, log, files")
    eval_tokens: int | None = opt(None, EVAL_TOKENS, low=0, none="all")
    eval_batches: int | None = opt(0, EVAL_BATCHES, low=0)
    eval_train: bool = opt(False, "also evaluate the loss on as many tokens of the training split")
    sample_tokens: int = opt(160, "tokens of sample text at each evaluation; 0: none", low=0)
    sample_prompt: tuple[str, ...] = opt(("\n",), "prompts of the samples", verbatim=True)
    log_interval: int = opt(10, "updates between two rows of the log", low=1)
    save_interval: int | None = opt(
        None,
        "updates between checkpoints, in addition to those at evaluations",
        low=1,
        none="eval_interval",
    )
    save_minutes: float | None = opt(None, "minutes between checkpoints, in addition to the others", above=0)
    keep_checkpoints: int = opt(2, "number of latest checkpoints to keep, in addition to the best", low=1)
    keep_every: int | None = opt(None, "keep the checkpoint of every N-th update", low=1, none="newest and best only")
    on_save_error: str = opt(
        "stop", "if a save fails: end the run, or warn and retry at the next save", choices=("stop", "warn")
    )
    out_dir: str | None = opt(None, "the run's folder", none="out/<recipe>")
    resume: str | None = opt(
        None,
        "continue a run with its settings: latest, auto (latest, or a new run without one) or a path",
        bare="latest",
    )
    overwrite: bool = opt(False, "start a new run; the old run is moved to <out_dir>.old-<time>")
    tracker: str | None = opt(
        None, "log to a tracker as well; wandb is --wandb online", choices=("wandb", "tensorboard", "trackio")
    )
    wandb: str = opt(
        "disabled", "log to Weights & Biases as well", choices=("online", "offline", "disabled"), bare="online"
    )
    wandb_project: str = opt("flatgpt", "project on Weights & Biases or trackio")
    json: str | None = opt(
        None, "write the result of the run, or --show_batch, to this file, - for standard output", recipe=False
    )
    list: bool = opt(False, "print recipes and the runs in out/ without training", section="Plan")
    plan: bool = opt(False, "print model size, memory and time without training")
    show_batch: int | None = opt(
        None,
        "print the texts in the batch of update N without training: the batch whose loss is in row iter N of "
        "metrics.csv; also with --resume, of that run",
        low=1,
        none="no",
    )
    gpus: int = opt(1, "number of devices for --plan", low=1)
    mfu: float = opt(0.4, "model FLOPs utilization assumed by --plan", above=0, high=1)

    def __post_init__(self):
        """Set the other one of `tracker` and `wandb`, if one of them says to log to Weights & Biases."""
        if self.tracker == "wandb" and self.wandb == "disabled":
            object.__setattr__(self, "wandb", "online")
        elif self.tracker is None and self.wandb in ("online", "offline"):
            object.__setattr__(self, "tracker", "wandb")

    def problems(self) -> list[str]:
        """Return the messages of ModelConfig, and one for each conflict between training fields."""
        found = super().problems()
        if self.tracker in ("tensorboard", "trackio") and self.wandb != "disabled":
            found.append(f"tracker = {self.tracker} excludes wandb = {self.wandb}: leave out one of them")
        if self.max_iters is None and self.epochs is None:
            found.append("max_iters and epochs are both none: set one of them")
        if self.warmup_iters is None and self.warmup_fraction is None:
            found.append("warmup_iters and warmup_fraction are both none: set one of them (0: no warm-up)")
        if not self.sample_prompt:
            found.append("sample_prompt is empty: give a prompt, or turn samples off with sample_tokens = 0")
        if self.optimizer == "muon" and self.fsdp:
            found.append("optimizer = muon needs whole matrices, but fsdp = true shards them: leave out one of them")
        if self.schedule != "constant" and self.min_lr is not None and self.min_lr > self.lr:
            found.append(
                f"min_lr = {self.min_lr} is larger than lr = {self.lr}: lower it too, with --min_lr {self.lr / 10:g}"
            )
        if self.show_batch and (self.list or self.plan):
            found.append("show_batch and list or plan exclude each other: give one of them")
        if self.json and (self.list or self.plan):
            found.append("json is for training and --show_batch: leave it out")
        if self.resume and self.overwrite:
            found.append("resume and overwrite exclude each other: continue the run, or start a new one")
        return found

    def require_equal_shares(self, world: int) -> None:
        """Raise UserError if `world` devices cannot share the passes of an update equally.

        The message suggests settings with as many sequences per update, rounded up to a multiple of `world`.
        """
        if self.grad_accum_steps % world == 0:
            return
        sequences = self.batch_size * self.grad_accum_steps
        total = -(-sequences // world) * world
        steps = next(n for n in range(world, total + 1, world) if total % n == 0 and total // n <= self.batch_size)
        difference = "the same updates" if total == sequences else f"{total} sequences, not {sequences}"
        raise UserError(
            f"grad_accum_steps = {self.grad_accum_steps} is the number of passes of all devices together and cannot be "
            f"divided by {world}: use --batch_size {total // steps} --grad_accum_steps {steps} ({difference})"
        )


# Help of --model_path.
MODEL = "a run's folder (its best checkpoint), a checkpoint, a Hugging Face folder or hub name, or nanoGPT's ckpt.pt"


@dataclass(frozen=True)
class ModelPathConfig:
    """Settings of the scripts that read a trained model."""

    config: str | None = opt(None, "a recipe: the bare name of a file in configs/, or a path", section="Shared")
    model_path: str | None = opt(None, MODEL, none="the newest run")
    out_dir: str | None = opt(None, "a run's folder, if model_path is not given", none="out/<recipe>")
    context_length: int | None = opt(
        None,
        "maximum sequence length in tokens, at most the model's",
        low=1,
        none="the model's",
        recipe=False,
    )

    def problems(self) -> list[str]:
        """Return no messages: the fields do not depend on each other."""
        return []


@dataclass(frozen=True)
class ReaderConfig(ModelPathConfig):
    """Settings of the scripts that run a trained model."""

    device: str = opt("auto", "where to compute", choices=DEVICES)
    dtype: str = opt(
        "float32", "precision of matrix products", choices=("float32", "bfloat16", "float16"), recipe=False
    )


@dataclass(frozen=True)
class SamplingConfig:
    """Settings for sampling the next token."""

    temperature: float | None = opt(
        None, "below 1: more predictable, above 1: more varied, 0: greedy", low=0, none="0.8", section="Sampling"
    )
    greedy: bool = opt(False, "always choose the most likely token")
    top_k: int = opt(0, "sample from the k most likely tokens only; 0: from all", low=0)
    top_p: float = opt(1.0, "sample from the most likely tokens that together reach this probability", above=0, high=1)
    min_p: float = opt(0.0, "minimum probability, relative to the most likely token's; 0: none", low=0, high=1)
    repetition_penalty: float = opt(1.0, "above 1: makes tokens that already occurred less likely", above=0)
    seed: int = opt(1337, "random seed; each text derives its own from it", low=0, below=2**63, recipe=False)

    @property
    def effective_temperature(self) -> float:
        """The temperature in use; 0: greedy."""
        return 0.0 if self.greedy else 0.8 if self.temperature is None else self.temperature

    def problems(self) -> list[str]:
        """Return a message for each setting that is outside its limits, or that greedy decoding does not use."""
        settings = [(field, getattr(self, field.name)) for field in dataclasses.fields(SamplingConfig)]
        found = [f"{f.name} = {value}: {text}" for f, value in settings if (text := limit_problem(f.metadata, value))]
        if found or self.effective_temperature:
            return found
        reason = "greedy" if self.greedy else "temperature = 0"
        unused = {"top_k": self.top_k, "top_p": self.top_p < 1, "min_p": self.min_p, "temperature": self.temperature}
        return [f"{reason} chooses the most likely token: leave out {key}" for key in unused if unused[key]]


@dataclass(frozen=True)
class EvalConfig(SamplingConfig, ReaderConfig):
    """eval.py: models and text -> report."""

    model_path: tuple[str, ...] = opt((), f"{MODEL}; several are compared. Default: the newest run")
    data_dir: str = opt("data", "folder that holds one folder of shards per dataset", section="Data")
    dataset: str | None = opt(None, "name of the folder of shards in data_dir", none="the model's")
    split: str = opt("val", "split of the dataset", choices=("train", "val", "test"))
    test_data_path: str | None = opt(None, "score a .bin file of uint16 ids instead of the dataset")
    text: str | None = opt(None, "score a text file instead of the dataset")
    parse_special: bool = opt(False, "encode added tokens, such as <|endoftext|>, in --text as their ids")
    choices: str | None = opt(None, "score multiple-choice questions: a .jsonl file with ctx, endings, label")
    choices_format: str = opt(
        "auto",
        "plain: use ctx and endings as they are; auto: if the lines are HellaSwag's, with activity_label, ctx_a and "
        "ctx_b, prepare them as lm_eval's task hellaswag",
        choices=("auto", "plain"),
    )
    protocol: str = opt(
        "window",
        "stride: overlapping windows, so that all tokens have context; rolling: each document after end-of-text, as in "
        "lm_eval",
        choices=("window", "stride", "rolling"),
        section="Protocol",
    )
    stride: int | None = opt(
        None, "protocol stride: tokens scored per window", low=1, none="half the context", recipe=False
    )
    eval_tokens: int | None = opt(None, EVAL_TOKENS, low=0, none="all", recipe=False)
    eval_batches: int | None = opt(0, EVAL_BATCHES, low=0, recipe=False)
    batch_size: int | None = opt(None, "windows per pass", low=1, none="by size", recipe=False)
    rank_timeout: float = opt(300, "seconds that torchrun's ranks wait for each other", low=1)
    generate: int = opt(
        0, "number of prompts from the split; compares their continuations with the text (BLEU, ROUGE-L)", low=0
    )
    prompt_tokens: int = opt(64, "tokens per prompt", low=1)
    max_new_tokens: int = opt(64, "tokens per continuation", low=1)
    format: str = opt("table", "smol: six lines in the format of smol-GPT", choices=("table", "smol"), section="Report")
    json: str | None = opt(None, "write the report to this file, - for standard output")
    plot: str | None = opt(None, "plot the loss by position in the context to this file, .png")

    def problems(self) -> list[str]:
        """Return the messages of SamplingConfig, and one for each setting that protocol or --choices does not use."""
        found = super().problems()
        if self.stride and self.protocol != "stride":
            found.append(f"stride = {self.stride} applies to --protocol stride, not to {self.protocol}: leave it out")
        text_only = {"protocol": self.protocol != "window", "format": self.format != "table"}
        text_only |= {key: getattr(self, key) for key in ("eval_tokens", "eval_batches", "generate", "plot")}
        if self.choices:
            found += [f"{key} is for text, not for --choices: leave it out" for key in text_only if text_only[key]]
        if self.parse_special and not self.text:
            found.append("parse_special is for --text: add --text, or leave it out")
        if self.choices_format != "auto" and not self.choices:
            found.append(f"choices_format = {self.choices_format} is for --choices: add --choices, or leave it out")
        if self.plot and not self.plot.endswith(".png"):
            found.append(f"plot = {self.plot}: a name that ends in .png is expected")
        return found


@dataclass(frozen=True)
class ExportConfig(ModelPathConfig):
    """export.py: a trained model -> a Hugging Face folder or hub repository."""

    out: str | None = opt(
        None,
        "new folder to write; --push without --out keeps no folder",
        none="out/<recipe>/hugging_face",
        section="Export",
    )
    dtype: str = opt(
        "float32", "precision of the exported weights", choices=("float32", "bfloat16", "float16"), recipe=False
    )
    push: str | None = opt(None, "upload the folder to this repository of the Hugging Face hub, user/name")
    private: bool = opt(False, "make a new repository private")
    space: str | None = opt(
        None,
        "write a folder for a Hugging Face Space instead: the model, app.py and the files that it needs",
        none="no",
    )
    dry_run: bool = opt(False, "list the files, without writing or uploading them")
    verify: bool = opt(True, "load the written files, and compare their logits with the model's")

    def problems(self) -> list[str]:
        """Return a message for each conflict between fields."""
        found = []
        if self.private and not self.push:
            found.append("private applies to --push user/name: add --push, or leave out private")
        if self.push and self.push.count("/") != 1:
            found.append(f"push = {self.push}: user/name is expected")
        unused = {"out": self.out, "push": self.push, "context_length": self.context_length}
        unused |= {"dtype": self.dtype != "float32"}
        if self.space and (extra := [key for key in unused if unused[key]]):
            found.append(
                f"space = {self.space} stores the model unchanged: leave out "
                f"{' and '.join(extra)}; upload it with {upload_space(self.space)}"
            )
        return found


@dataclass(frozen=True)
class WriterConfig(SamplingConfig, ReaderConfig):
    """Settings that infer.py and app.py share."""

    dtype: str = opt(
        "auto", "precision of matrix products", choices=("auto", "float32", "bfloat16", "float16"), recipe=False
    )
    quantize: str | None = opt(
        None, "8-bit weights, on a CPU: half the memory of bfloat16, and faster", choices=("int8",), section="Speed"
    )

    def problems(self) -> list[str]:
        """Return the messages of SamplingConfig, and one for a dtype that int8 weights do not support."""
        found = super().problems()
        if self.quantize and self.dtype == "float32":
            found.append("quantize = int8 computes in bfloat16 or float16: leave out dtype")
        return found


@dataclass(frozen=True)
class InferConfig(WriterConfig):
    """infer.py: model and prompt -> text."""

    compile: bool | None = opt(
        None,
        "compile the decoding step, for long work: it takes half a minute. auto: only record it, as a CUDA graph or on "
        "a CPU as TorchScript",
        none="auto",
        recipe=False,
    )
    standard_input: str | None = opt(
        None, "read the prompt from standard input", choices=("-",), positional=True, section="Text"
    )
    prompt: str = opt("", "text to continue; empty: start a new text", verbatim=True)
    parse_special: bool = opt(False, "encode added tokens, such as <|endoftext|>, in prompts as their ids")
    prompt_file: str | None = opt(None, "a file with one prompt; a final newline is dropped")
    prompts_file: str | None = opt(None, "a file with one prompt per line")
    interactive: bool = opt(False, "read prompts from the terminal, one at a time")
    num_samples: int = opt(1, "texts per prompt", low=1)
    batch_size: int = opt(32, "number of texts generated at once", low=1, recipe=False)
    max_new_tokens: int = opt(200, "maximum number of tokens per text", low=1)
    stop: tuple[str, ...] = opt((), "strings that end a text; they are not printed", verbatim=True)
    ignore_eot: bool = opt(False, "continue after the end-of-text token")
    stream_text: bool = opt(True, "print text while it is generated")
    json: str | None = opt(None, "write texts, settings and statistics to this file, - for standard output")
    logprobs: int | None = opt(
        None,
        "write to --json the log-probability of each token, and of this many most likely tokens in its place; they are "
        "the model's, before temperature, top_k, top_p, min_p and repetition_penalty",
        low=0,
        none="no",
    )

    def problems(self) -> list[str]:
        """Return the messages of WriterConfig, and one for each conflict between fields."""
        found = super().problems()
        prompts = {"-": self.standard_input, "--prompt": self.prompt, "--prompt_file": self.prompt_file}
        prompts |= {"--prompts_file": self.prompts_file, "--interactive": self.interactive}
        if len(names := [name for name in prompts if prompts[name]]) > 1:
            found.append(f"{' and '.join(names)} exclude each other: give one of them")
        if self.interactive and (self.json or self.num_samples > 1):
            found.append("--interactive generates one text per prompt and no report: leave out json and num_samples")
        if self.logprobs is not None and not self.json:
            found.append(f"logprobs = {self.logprobs} is for the report: add --json FILE, or leave it out")
        if "" in self.stop:
            found.append("stop = '': an empty string matches everywhere; give a non-empty string, or leave it out")
        return found


@dataclass(frozen=True)
class AppConfig(WriterConfig):
    """app.py: a demo in the browser, and an OpenAI-compatible endpoint.

    The sampling settings are the page's initial values. The endpoint's are OpenAI's.
    """

    max_new_tokens: int = opt(200, "maximum number of tokens per text", low=1, section="Text")
    parse_special: bool = opt(False, "encode added tokens, such as <|endoftext|>, in prompts as their ids")
    ignore_eot: bool = opt(False, "continue after the end-of-text token")
    server_name: str | None = opt(
        None,
        "address to listen on; 0.0.0.0: accept connections from other machines",
        none="GRADIO_SERVER_NAME, else 127.0.0.1",
        section="Server",
    )
    server_port: int | None = opt(
        None, "port to listen on", low=1, high=65535, none="GRADIO_SERVER_PORT, else the first free one from 7860"
    )
    allowed_hosts: tuple[str, ...] = opt(
        (),
        "further names of this server, with which browsers and clients address it, for example behind a proxy; "
        "IP addresses, localhost, server_name, and with a server_name for other machines this machine's name are "
        "always allowed; '*': any name",
    )
    api_key: str | None = opt(
        None,
        "key that clients of /v1 must send; the page needs none. The variable is not in the list of processes",
        none="FLATGPT_API_KEY, else no key",
        verbatim=True,
    )
    prompt_limit: int = opt(4000, "maximum number of characters, or token ids, per prompt", low=1)
    token_limit: int = opt(500, "maximum number of tokens per text", low=1)
    sample_limit: int = opt(4, "maximum number of texts per request", low=1, high=16)
    queue_limit: int = opt(20, "maximum number of waiting requests; one is served at a time", low=1)


@dataclass(frozen=True)
class PlotConfig:
    """plot.py: logs of runs -> image."""

    runs: tuple[str, ...] = opt(
        (),
        "folders of runs, plotted in one image. Default: the newest run",
        positional=True,
        section="Input",
    )
    x: str = opt(
        "iter",
        "x axis: updates, trained tokens, or time of the updates",
        choices=("iter", "tokens", "time"),
    )
    watch: bool = opt(False, "plot again whenever a log grows, until Ctrl-C")
    out: str | None = opt(
        None,
        "file to write, .png or .svg",
        none="metrics.png in the run's folder, of several runs in the current one",
        section="Output",
    )
    svg: bool = opt(False, "write metrics.svg instead of metrics.png")

    def problems(self) -> list[str]:
        """Return a message if the file name is not of a supported format."""
        if not self.out or self.out.endswith(".svg") or (self.out.endswith(".png") and not self.svg):
            return []
        return [f"out = {self.out}: a name that ends in {'.svg' if self.svg else '.png or .svg'} is expected"]

    @property
    def format(self) -> str:
        """Format of the image, png or svg."""
        return "svg" if self.svg or (self.out or "").endswith(".svg") else "png"


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """bench.py: speed and memory of the other scripts."""

    what: str = opt(
        "train",
        "benchmark or check to run",
        choices=("train", "loss", "save", "data", "infer", "eval", "resume", "tests", "all", "gpu", "merge"),
        positional=True,
        section="Benchmark",
    )
    warmup_updates: int = opt(5, "updates before the timed ones, compilation included", low=1)
    timed_updates: int = opt(20, "timed updates; with save or --peer, per round", low=2)
    rounds: int = opt(3, "number of rounds; each measures all variants in turn", low=1)
    json: str | None = opt(None, "write the measurements to this file, - for standard output")
    peer: tuple[str, ...] = opt((), "compare with another project: nanoGPT and the folder of its checkout")
    profile: str | None = opt(
        None, "train: write torch.profiler's trace of a few updates to this file", bare="trace.json"
    )
    dry_run: bool = opt(False, "gpu: run each row at toy size on the CPU, to check that it works")
    target: float | None = opt(None, "validation loss to reach", above=0, section="Benchmark of loss")
    seeds: int = opt(3, "number of runs, with seeds from 1", low=1)
    plot: str | None = opt(None, "draw the validation loss of each run by its seconds to this file, .png")
    input: tuple[str, ...] = opt(
        (),
        "data: files of documents, repeated up to size_mb (default: the Python reference); merge: results of all",
        section="Benchmark of data",
    )
    size_mb: int = opt(300, "MB of text to encode", low=1)
    workers: int | None = opt(None, "number of encoding processes", low=1, none="one a core")
    prompt_tokens: int = opt(128, "length of the prompt in tokens", low=1, section="Benchmark of infer")
    new_tokens: int = opt(64, "tokens to generate", low=2)
    samples: int = opt(8, "batch size of the variants that generate several texts", low=2)
    variants: tuple[str, ...] = opt((), "variants to time, named as in the results: bfloat16, int8 ...; default: all")
    model_path: str | None = opt(
        None, "trained model with which to score data_dir/dataset", none="out/<recipe>", section="Benchmark of eval"
    )
    split: str = opt("val", "split to score", choices=("train", "val", "test"))
    text_tokens: int = opt(0, "tokens to score, from the start of the split; 0: all", low=0)

    def problems(self) -> list[str]:
        """Return the messages of TrainConfig, and one for each setting that this benchmark does not use."""
        train_only = {"resume": self.resume, "overwrite": self.overwrite, "tracker": self.tracker}
        train_only |= {"list": self.list, "plan": self.plan, "show_batch": self.show_batch}
        train_only |= {"patience": self.patience, "max_minutes": self.max_minutes}
        found = [f"{key} applies to train.py: a benchmark keeps no run" for key in train_only if train_only[key]]
        if self.peer and (len(self.peer) != 2 or self.peer[0] != "nanoGPT"):
            found.append(f"peer = {' '.join(self.peer)}: --peer nanoGPT PATH is expected")
        for key, values, benchmarks in (
            ("peer", self.peer, ("train", "loss", "all", "gpu")),
            ("profile", self.profile, ("train",)),
            ("target", self.target, ("loss",)),
            ("plot", self.plot, ("loss",)),
            ("dry_run", self.dry_run, ("gpu",)),
            ("variants", self.variants, ("infer",)),
            ("input", self.input, ("data", "merge")),
        ):
            if values and self.what not in benchmarks:
                found.append(f"{key} applies to bench.py {', '.join(benchmarks)}, not to {self.what}")
        if self.plot and not self.plot.endswith(".png"):
            found.append(f"plot = {self.plot}: a name that ends in .png is expected")
        if self.what == "loss" and self.target is None:
            found.append("bench.py loss needs a validation loss to reach: --target X")
        if self.what == "merge" and not self.input:
            found.append("bench.py merge needs the files of several machines: --input A.json B.json")
        if self.what == "resume" and (self.max_iters is None or self.max_iters < 2):
            found.append("bench.py resume needs --max_iters N, 2 or more: it resumes after half of the updates")
        if self.what in ("all", "gpu"):
            if self.json in (None, "-"):
                found.append(f"bench.py {self.what} needs a file to write after each row: --json FILE")
            used = ("what", "json", "peer", "data_dir", "dry_run")
            found += [
                f"{field.name}: bench.py {self.what} has fixed settings; run one benchmark to change them"
                for field in dataclasses.fields(self)
                if field.name not in used and getattr(self, field.name) != field.default
            ]
        return super().problems() + found


SCRIPT_CONFIGS = (TrainConfig, BenchConfig, PrepareConfig, EvalConfig, InferConfig, ExportConfig, PlotConfig, AppConfig)


def run_dir(config: TrainConfig) -> Path:
    """Return the folder of a training run: out_dir, else out/<recipe>, else out/quickstart."""
    return Path(config.out_dir or Path("out") / (Path(config.config).stem if config.config else "quickstart"))


def upload_space(folder: str) -> str:
    """Return the command that uploads a folder as a Space."""
    return f"hf upload user/name {shlex.quote(folder)} . --repo-type space --private"


def model_path(config: ModelPathConfig) -> str | None:
    """Return model_path, else the folder of the recipe's run, else None for the newest run."""
    return config.model_path or (str(run_dir(config)) if config.config or config.out_dir else None)


def model_paths(config: EvalConfig) -> tuple[str | None, ...]:
    """Return model_path, else the folder of the recipe's run, else (None,) for the newest run."""
    return config.model_path or (model_path(config),)
