"""A trained model as a Hugging Face GPT-2 folder, for transformers, lm_eval and llama.cpp; and onto the hub.

python export.py                                                   # the newest run: out/<run>/hugging_face
python export.py --model_path out/shakespeare --out exported --dtype bfloat16
python export.py --model_path out/shakespeare --push user/name --private --dry_run   # what would go there
python export.py --model_path out/shakespeare --push user/name --private             # after `hf auth login`
python export.py --model_path nanoGPT/out/ckpt.pt --out exported   # of nanoGPT, or any other that is read here
"""

from cli import from_command_line, recipe_text, run_verb
from config import TrainConfig, UserError
from reader_config import ExportConfig, model_path

if __name__ == "__main__":
    CONFIG = from_command_line(ExportConfig, __doc__)

import dataclasses
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import model_hub
import trained
from card import card
from formats import generation_config, hugging_face_config, to_hugging_face, unexportable
from trained import Trained
from vocabulary import tokenizer_files

WEIGHTS = "model.safetensors"
# Of a run's settings these are about the machine, not about the model.
LOCAL = ("config", "data_dir", "out_dir", "init_from", "device", "wandb", "wandb_project", "rank_timeout")


def say(line: str) -> None:
    """What goes on; standard output is for what was written."""
    print(line, file=sys.stderr, flush=True)


def folder_to_write(config: ExportConfig, found: Trained) -> Path | None:
    """The new folder; None where the files are only to be uploaded.

    Raises:
        UserError: there is something already, or nobody says where.
    """
    if config.out is None and config.push:
        return None
    if config.out is None and not (found.state and found.path.parent.name == "ckpt"):
        raise UserError(f"{found.path} is in no run's folder, where an export goes by default: give --out FOLDER")
    out = Path(config.out) if config.out else found.path.parent.parent / "hugging_face"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"out = {out} is there already: an export makes a new folder; move it away, or give another --out"
        )
    return out


def make(config: ExportConfig, found: Trained) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The tensors of model.safetensors, and the other files by name.

    Raises:
        UserError: a model or a tokenizer that Hugging Face's GPT-2 does not know.
    """
    if reasons := unexportable(found.config):
        raise UserError(f"{found.path} cannot be exported: {'; '.join(reasons)}")
    model, encoding = trained.load(found, torch.device("cpu"), config.context_length)
    tensors = to_hugging_face(model.state_dict(), model.config)
    tensors = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(
            f"{found.path}: {broken[0]} has nan or inf in {config.dtype}: the run diverged, or float16 is too narrow "
            "for it; take an earlier checkpoint, or --dtype bfloat16"
        )
    text = card(
        found.path,
        found.state,
        model.config,
        name=title(config, found),
        repo=config.push,
        tokenizer=found.tokenizer,
        parameters=model.num_params(),
        dtype=config.dtype,
        recipe=recipe(found.state) if found.state else "",
    )
    settings = {
        "config.json": hugging_face_config(model.config, encoding.eot_token, config.dtype),
        "generation_config.json": generation_config(model.config, encoding.eot_token, encoding.n_vocab),
    }
    files = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in settings.items()}
    return tensors, files | tokenizer_files(encoding, model.config.context_length) | {"README.md": text.encode()}


def title(config: ExportConfig, found: Trained) -> str:
    """The model's name: its repository's, else its run's, else that of what was given."""
    given = config.push or found.state.get("config", {}).get("out_dir") or config.model_path or found.path
    path = Path(os.path.abspath(given))
    return path.parent.name if path.is_file() else path.name  # of nanoGPT's ckpt.pt


def recipe(state: dict) -> str:
    """The settings of a run as TOML, without what is about its machine."""
    known = {f.name for f in dataclasses.fields(TrainConfig)} - set(LOCAL)
    trained_with = TrainConfig(**{key: value for key, value in state["config"].items() if key in known})
    return recipe_text(dataclasses.replace(trained_with, **dict.fromkeys(LOCAL)))


def write(folder: Path, tensors: dict[str, Tensor], files: dict[str, bytes]) -> None:
    """Write all files into an empty folder, and to the disk.

    Raises:
        UserError: there is no room, or no right to.
    """
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # the key is what transformers asks for
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        for name in (WEIGHTS, *files):
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as why:
        reason = why.strerror if isinstance(why, OSError) and why.strerror else str(why).splitlines()[0]
        needed, free = sum(sizes(tensors, files).values()), shutil.disk_usage(folder).free
        raise UserError(
            f"{folder} could not be written: {reason}; {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are "
            "free; nothing of it is kept"
        ) from None


def sizes(tensors: dict[str, Tensor], files: dict[str, bytes]) -> dict[str, int]:
    """Bytes of each file; of the weights without their names, a few thousand bytes more."""
    return {WEIGHTS: sum(t.nbytes for t in tensors.values())} | {name: len(content) for name, content in files.items()}


def table(bytes_of: dict[str, int]) -> str:
    """File and size, a line each."""

    def text(size: int) -> str:
        return f"{size:,} bytes" if size < 10_000 else f"{size / 1e6:,.2f} MB"

    lines = [f"  {name:<24} {text(size):>14}" for name, size in bytes_of.items()]
    return "\n".join([*lines, f"  {'together':<24} {text(sum(bytes_of.values())):>14}"])


def next_steps(config: ExportConfig, found: Trained, out: Path) -> str:
    """What a user may do with the folder, ready to copy."""
    folder, model = shlex.quote(str(out)), shlex.quote(config.model_path or str(found.path))
    shell = [f"lm_eval --model hf --model_args pretrained={folder} --tasks wikitext"]
    # llama.cpp computes the tanh GELU and four times the width in the MLP, whatever config.json says, and it knows
    # tokenizers by a hash of what they do
    shape, tokenizers = found.config, ("gpt2", "r50k_base")
    four_times = round(shape.mlp_ratio * shape.n_embd) == 4 * shape.n_embd
    if shape.activation == "gelu_tanh" and four_times and found.tokenizer in tokenizers:
        shell += [f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf"]
    shell += [f"python export.py --model_path {model} --push user/name --private"]
    python = (
        "from transformers import pipeline",
        f'print(pipeline("text-generation", {str(out)!r})("The ", max_new_tokens=100)[0]["generated_text"])',
    )
    return "\n  ".join(["Next, in Python:", *python]) + "\n" + "\n  ".join(["or in a shell:", *shell])


def main(config: ExportConfig) -> None:
    """Write the folder, upload it, or both; of neither, say what it would be."""
    found = trained.find(model_path(config), say)
    out = folder_to_write(config, found)
    say(f"{found.describe()}, tokenizer {found.tokenizer}; to be written in {config.dtype}")
    tensors, files = make(config, found)
    if config.dry_run:
        places = [str(out)] * (out is not None)
        places += [f"{config.push} on the hub" + ", private where it is new" * config.private] * bool(config.push)
        print(f"would go to {' and '.join(places)}:\n{table(sizes(tensors, files))}")
        return
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flatgpt_") as folder:
            write(Path(folder), tensors, files)
            upload(config, Path(folder), [WEIGHTS, *files])
        return
    place = Path(os.path.realpath(out))  # of a link to an empty folder, on another disk say, that folder
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
        try:
            partial.mkdir(parents=True)
        except OSError as why:
            raise UserError(f"out = {out}: cannot be written: {why.strerror}") from None
        write(partial, tensors, files)
        os.rename(partial, place)  # an empty folder makes way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}:\n{table({name: (place / name).stat().st_size for name in (WEIGHTS, *files)})}")
    if config.push:
        upload(config, place, [WEIGHTS, *files])
    else:
        print(next_steps(config, found, out))


def upload(config: ExportConfig, folder: Path, names: list[str]) -> None:
    """Send these files, and no others, to the repository."""
    print(f"uploaded: {model_hub.upload(folder, names, config.push, config.private, say)}")


if __name__ == "__main__":
    run_verb(main, CONFIG)
