"""What the verbs that read a trained model can be told, in config.py's manner. Standard library only."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from config import opt, run_dir

# In --help of every verb that takes a model.
MODEL = "a run's folder (its best checkpoint), a checkpoint, a Hugging Face folder or hub name, or nanoGPT's ckpt.pt"


@dataclass(frozen=True)
class ModelPathConfig:
    """What the verbs that read a trained model share."""

    config: str | None = opt(None, "a recipe: the bare name of a file in configs/, or a path", section="Shared")
    model_path: str | None = opt(None, MODEL, none="the newest run")
    out_dir: str | None = opt(None, "a run's folder, when model_path is not given", none="out/<recipe>")
    context_length: int | None = opt(
        None, "tokens that the model sees at once, fewer than it could", low=1, none="the model's", recipe=False
    )

    def problems(self) -> list[str]:
        """None: the fields do not touch each other."""
        return []


@dataclass(frozen=True)
class ReaderConfig(ModelPathConfig):
    """Of these, those that run it."""

    device: str = opt("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = opt(
        "float32", "precision of the matrix products", choices=("float32", "bfloat16", "float16"), recipe=False
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; all that sampling.py needs."""

    temperature: float | None = opt(
        None, "below 1 safer, above 1 wilder; 0: greedy", low=0, none="0.8", section="Sampling"
    )
    greedy: bool = opt(False, "always take the likeliest token")
    top_k: int = opt(0, "draw from the k likeliest tokens only; 0: from all", low=0)
    top_p: float = opt(1.0, "draw from the likeliest tokens that together reach this probability", above=0, high=1)
    min_p: float = opt(0.0, "draw from tokens at least this likely, the likeliest being 1", low=0, high=1)
    repetition_penalty: float = opt(1.0, "above 1: tokens that were there before are less likely", above=0)
    seed: int = opt(1337, "of the random numbers; the n-th text has its own", low=0, below=2**63, recipe=False)

    @property
    def heat(self) -> float:
        """The temperature that counts; 0: greedy."""
        return 0.0 if self.greedy else 0.8 if self.temperature is None else self.temperature

    def problems(self) -> list[str]:
        """Options that could not all be meant."""
        if self.heat:
            return []
        why = "greedy" if self.greedy else "temperature = 0"
        asked = {"top_k": self.top_k, "top_p": self.top_p < 1, "min_p": self.min_p, "temperature": self.temperature}
        return [f"{why} takes the likeliest token: leave out {key}" for key in asked if asked[key]]


@dataclass(frozen=True)
class EvalConfig(SamplingConfig, ReaderConfig):
    """eval.py: models + text -> report."""

    model_path: tuple[str, ...] = opt((), f"{MODEL}; several: side by side. Without: the newest run")
    data_dir: str = opt("data", "folder that holds one folder of shards per dataset", section="What is scored")
    dataset: str | None = opt(None, "name of the folder of shards in data_dir", none="the model's")
    split: str = opt("val", "which split of it", choices=("train", "val", "test"))
    test_data_path: str | None = opt(None, "or one .bin file of uint16 ids")
    text: str | None = opt(None, "or a file of text, tokenised on the spot")
    choices: str | None = opt(None, "or a .jsonl file of multiple-choice questions: ctx, endings, label")
    protocol: str = opt(
        "window",
        "stride: windows overlap, so that all tokens have context; rolling: as lm_eval's",
        choices=("window", "stride", "rolling"),
        section="How",
    )
    stride: int | None = opt(
        None, "protocol stride: tokens that each window scores", low=1, none="half the context", recipe=False
    )
    eval_batches: int = opt(
        0, "batches, from the start; 0: the whole split", low=0, alias=("eval_epochs",), recipe=False
    )
    batch_size: int | None = opt(None, "windows per pass", low=1, none="by size", recipe=False)
    rank_timeout: float = opt(300, "seconds that torchrun's ranks wait for each other", low=1)
    sampled: bool = opt(False, "precision, recall and F1 of a sampled next token too (temperature 1)")
    generate: int = opt(0, "continue so many prompts cut from the split, and compare with it (BLEU, ROUGE-L)", low=0)
    prompt_tokens: int = opt(64, "of each of these prompts", low=1)
    max_new_tokens: int = opt(64, "of each continuation", low=1)
    format: str = opt("table", "smol: six lines, as smol-GPT's", choices=("table", "smol"), section="Report")
    json: str | None = opt(None, "write the report to this file, - for standard output")
    plot: str | None = opt(None, "draw the loss by position in the context to this file, .png")

    def problems(self) -> list[str]:
        """SamplingConfig's; and what belongs to another protocol or to scores of text."""
        found = super().problems()
        if self.stride and self.protocol != "stride":
            found.append(f"stride = {self.stride} belongs to --protocol stride, not to {self.protocol}: leave it out")
        of_text = {"protocol": self.protocol != "window", "eval_batches": self.eval_batches, "sampled": self.sampled}
        of_text |= {"generate": self.generate, "plot": self.plot, "format": self.format != "table"}
        if self.choices:
            found += [f"{key} is for text, not for --choices: leave it out" for key in of_text if of_text[key]]
        if self.plot and not self.plot.endswith(".png"):
            found.append(f"plot = {self.plot}: a name that ends in .png is expected")
        return found


@dataclass(frozen=True)
class ExportConfig(ModelPathConfig):
    """export.py: a trained model -> a Hugging Face folder or hub repository."""

    out: str | None = opt(
        None,
        "the folder to write, a new one; with --push alone none is kept",
        none="out/<recipe>/hugging_face",
        section="Export",
    )
    dtype: str = opt("float32", "of the weights in it", choices=("float32", "bfloat16", "float16"), recipe=False)
    push: str | None = opt(None, "upload it to this repository of the Hugging Face hub, user/name")
    private: bool = opt(False, "where that repository is new: nobody else sees it")
    space: str | None = opt(
        None, "or write a folder that runs as a Hugging Face Space: app.py, what it imports, the model", none="no"
    )
    dry_run: bool = opt(False, "list what would be written and uploaded; do neither")

    def problems(self) -> list[str]:
        """What only makes sense together."""
        found = []
        if self.private and not self.push:
            found.append("private is about --push user/name: give that too, or leave private out")
        if self.push and self.push.count("/") != 1:
            found.append(f"push = {self.push}: a repository of the hub is user/name")
        asked = {"out": self.out, "push": self.push, "context_length": self.context_length}
        asked |= {"dtype": self.dtype != "float32"}
        if self.space and (extra := [key for key in asked if asked[key]]):
            found.append(
                f"space = {self.space} is a folder of its own, with the model as it is: leave out "
                f"{' and '.join(extra)}; it goes onto the hub with {upload_space(self.space)}"
            )
        return found


@dataclass(frozen=True)
class WriterConfig(SamplingConfig, ReaderConfig):
    """What the verbs that write texts share."""

    dtype: str = opt(
        "auto", "precision of the matrix products", choices=("auto", "float32", "bfloat16", "float16"), recipe=False
    )
    quantize: str | None = opt(
        None, "weights of 8 bits: half of bfloat16's memory, and faster", choices=("int8",), section="Speed"
    )

    def problems(self) -> list[str]:
        """SamplingConfig's; and a precision that int8 does not have."""
        found = super().problems()
        if self.quantize and self.dtype == "float32":
            found.append("quantize = int8 takes bfloat16 or float16 products: leave out dtype")
        return found


@dataclass(frozen=True)
class InferConfig(WriterConfig):
    """infer.py: checkpoint + prompt -> text."""

    compile: bool | None = opt(None, "torch.compile the step from token to token", none="auto", recipe=False)
    standard_input: str | None = opt(
        None, "the prompt comes from standard input", choices=("-",), positional=True, section="Text"
    )
    prompt: str = opt("", "the text to continue; empty: a new text")
    prompt_file: str | None = opt(None, "a file with one prompt; a newline at its end is left out")
    prompts_file: str | None = opt(None, "a file with a prompt a line")
    interactive: bool = opt(False, "ask for prompts, one after the other")
    num_samples: int = opt(1, "texts to write from each prompt", low=1)
    batch_size: int = opt(32, "texts that are written at once", low=1, recipe=False)
    max_new_tokens: int = opt(200, "tokens to write", low=1)
    stop: tuple[str, ...] = opt((), "strings that end a text, and are not printed")
    ignore_eot: bool = opt(False, "write on after end-of-text")
    stream_text: bool = opt(True, "print text while it is made")
    json: str | None = opt(None, "write texts, settings and figures to this file, - for standard output")

    def problems(self) -> list[str]:
        """WriterConfig's; and one prompt at a time."""
        found = super().problems()
        given = {"-": self.standard_input, "--prompt": self.prompt, "--prompt_file": self.prompt_file}
        given |= {"--prompts_file": self.prompts_file, "--interactive": self.interactive}
        if len(names := [name for name in given if given[name]]) > 1:
            found.append(f"{' and '.join(names)} exclude each other: give one of them")
        if self.interactive and (self.json or self.num_samples > 1):
            found.append("--interactive writes one text at a time, to no file: leave out json and num_samples")
        if "" in self.stop:
            found.append("stop = '': an empty string is everywhere; give one to look for, or leave it out")
        return found


@dataclass(frozen=True)
class AppConfig(WriterConfig):
    """app.py: a playground in the browser; its sampling options are what the page begins with."""

    max_new_tokens: int = opt(200, "tokens to write", low=1, section="Text")
    ignore_eot: bool = opt(False, "write on after end-of-text")
    server_name: str | None = opt(
        None,
        "address to listen at; 0.0.0.0: other machines reach it too",
        none="GRADIO_SERVER_NAME, else 127.0.0.1",
        section="Server",
    )
    server_port: int | None = opt(
        None, "its port", low=1, high=65535, none="GRADIO_SERVER_PORT, else the first free one from 7860"
    )
    prompt_limit: int = opt(4000, "characters of a visitor's prompt, at most", low=1)
    token_limit: int = opt(500, "tokens of a text, at most", low=1)
    sample_limit: int = opt(4, "texts at once, at most", low=1, high=16)
    queue_limit: int = opt(20, "visitors who may wait; one is served at a time", low=1)


@dataclass(frozen=True)
class PlotConfig:
    """plot.py: logs of runs -> picture."""

    runs: tuple[str, ...] = opt(
        (), "folders of runs; several: side by side. Without: the newest run", positional=True, section="What is drawn"
    )
    x: str = opt(
        "iter",
        "along which axis: updates done, tokens trained on, or time of the updates",
        choices=("iter", "tokens", "time"),
    )
    watch: bool = opt(False, "draw it anew whenever a log has grown, until Ctrl-C")
    out: str | None = opt(
        None,
        "the file to write, .png or .svg",
        none="metrics.png in the run's folder, of several runs in the current one",
        section="Where to",
    )
    svg: bool = opt(False, "metrics.svg instead")

    def problems(self) -> list[str]:
        """Names that say another format."""
        if not self.out or self.out.endswith(".svg") or (self.out.endswith(".png") and not self.svg):
            return []
        return [f"out = {self.out}: a name that ends in {'.svg' if self.svg else '.png or .svg'} is expected"]

    @property
    def format(self) -> str:
        """png or svg."""
        return "svg" if self.svg or (self.out or "").endswith(".svg") else "png"


def upload_space(folder: str) -> str:
    """The command that makes a Space of a folder, or a new version of it."""
    return f"hf upload user/name {shlex.quote(folder)} . --repo-type space --private"


def model_path(config: ModelPathConfig) -> str | None:
    """The model that is asked for: model_path, else the recipe's run; None: the newest run."""
    return config.model_path or (str(run_dir(config)) if config.config or config.out_dir else None)


def model_paths(config: EvalConfig) -> tuple[str | None, ...]:
    """The same, of several."""
    return config.model_path or (model_path(config),)
