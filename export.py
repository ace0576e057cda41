"""A trained model as a Hugging Face GPT-2 folder, for transformers, lm_eval and llama.cpp; onto the hub; as a Space.

python export.py                                                   # the newest run: out/<run>/hugging_face
python export.py --model_path out/shakespeare --out exported --dtype bfloat16
python export.py --model_path out/shakespeare --push user/name --private --dry_run   # what would go there
python export.py --model_path out/shakespeare --push user/name --private             # after `hf auth login`
python export.py --model_path nanoGPT/out/ckpt.pt --out exported   # of nanoGPT, or any other that is read here
python export.py --model_path out/shakespeare --space playground   # app.py with this model, to run there or on the hub
"""

from config import ExportConfig, TrainConfig, UserError, model_path, upload_space
from flatgpt.cli.cli import from_command_line, recipe_text, run_script

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

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flatgpt.interop import hub, loading
from flatgpt.interop.huggingface import export_problems, generation_config, hugging_face_config, to_hugging_face
from flatgpt.interop.loading import ModelSource
from flatgpt.interop.model_card import LOCAL, card
from flatgpt.interop.space import space_files
from flatgpt.interop.tokenizer_files import tokenizer_files
from flatgpt.runs.checkpoint import WEIGHTS
from model import GPT

Content = bytes | Path | dict[str, Tensor]  # of a file: itself, one to copy, or what safetensors is to write


def say(line: str) -> None:
    """What goes on; standard output is for what was written."""
    print(line, file=sys.stderr, flush=True)


def folder_to_write(config: ExportConfig, found: ModelSource) -> Path | None:
    """The new folder; None where the files are only to be uploaded.

    Raises:
        UserError: there is something already, or nobody says where.
    """
    key, given = ("space", config.space) if config.space else ("out", config.out)
    if given is None and config.push:
        return None
    if given is None and not (found.state and found.path.parent.name == "ckpt"):
        raise UserError(f"{found.path} is in no run's folder, where an export goes by default: give --out FOLDER")
    out = Path(given) if given else found.path.parent.parent / "hugging_face"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{key} = {out} is there already: an export makes a new folder; move it away, or give another --{key}"
        )
    return out


def load(config: ExportConfig, found: ModelSource) -> tuple[GPT, tiktoken.Encoding]:
    """The model in the precision to be written, and its tokenizer.

    Raises:
        UserError: what trained.load says, or numbers that are none.
    """
    model, encoding = loading.load(found, torch.device("cpu"), config.context_length)
    model = model.to(getattr(torch, config.dtype))
    if broken := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        why, remedy = "the run diverged", "take an earlier checkpoint"
        if config.dtype == "float16":
            why, remedy = f"{why}, or float16 is too narrow for it", f"{remedy}, or --dtype bfloat16"
        raise UserError(f"{found.path}: {broken[0]} has nan or inf in {config.dtype}: {why}; {remedy}")
    return model, encoding


def hugging_face(config: ExportConfig, found: ModelSource) -> dict[str, Content]:
    """The files of Hugging Face's folder by name.

    Raises:
        UserError: a model or a tokenizer that Hugging Face's GPT-2 does not know.
    """
    if reasons := export_problems(found.config):
        raise UserError(f"{found.path} cannot be exported: {'; '.join(reasons)}")
    model, encoding = load(config, found)
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
    files |= tokenizer_files(encoding, model.config.context_length) | {"README.md": text.encode()}
    return {WEIGHTS: to_hugging_face(model.state_dict(), model.config), **files}


def space(config: ExportConfig, found: ModelSource) -> dict[str, Content]:
    """The files of a Space by name: a checkpoint of ours stays one, others come as Hugging Face's folder.

    Raises:
        UserError: a model that is not to be loaded.
    """
    if found.state:
        load(config, found)
        return space_files(found, title(config, found), recipe(found.state), config.model_path)
    return hugging_face(config, found) | space_files(found, title(config, found), "", config.model_path)


def title(config: ExportConfig, found: ModelSource) -> str:
    """The model's name: its repository's, else its run's, else that of what was given."""
    given = config.push or found.state.get("config", {}).get("out_dir") or config.model_path or found.path
    path = Path(os.path.abspath(given))
    return path.parent.name if path.is_file() else path.name  # of nanoGPT's ckpt.pt


def recipe(state: dict) -> str:
    """The settings of a run as TOML, without what is about its machine."""
    known = {f.name for f in dataclasses.fields(TrainConfig)} - set(LOCAL)
    trained_with = TrainConfig(**{key: value for key, value in state["config"].items() if key in known})
    return recipe_text(dataclasses.replace(trained_with, **dict.fromkeys(LOCAL)))


def write(folder: Path, files: dict[str, Content]) -> None:
    """Write all files into an empty folder, and to the disk.

    Raises:
        UserError: there is no room, or no right to.
    """
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, dict):
                save_file(content, folder / name, metadata={"format": "pt"})  # the key is what transformers asks for
            elif isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)
        (folder / WEIGHTS).chmod((folder / "README.md").stat().st_mode)  # safetensors lets nobody else read it
        for name in files:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as why:
        reason = why.strerror if isinstance(why, OSError) and why.strerror else str(why).splitlines()[0]
        needed, free = sum(sizes(files).values()), shutil.disk_usage(folder).free
        raise UserError(
            f"{folder} could not be written: {reason}; {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are "
            "free; nothing of it is kept"
        ) from None


def sizes(files: dict[str, Content]) -> dict[str, int]:
    """Bytes of each file; of tensors without their names, a few thousand bytes more."""

    def size(content: Content) -> int:
        if isinstance(content, dict):
            return sum(tensor.nbytes for tensor in content.values())
        return content.stat().st_size if isinstance(content, Path) else len(content)

    return {name: size(content) for name, content in files.items()}


def table(bytes_of: dict[str, int]) -> str:
    """File and size, a line each."""

    def text(size: int) -> str:
        return f"{size:,} bytes" if size < 10_000 else f"{size / 1e6:,.2f} MB"

    rows = bytes_of | {"together": sum(bytes_of.values())}
    width = max(24, *map(len, rows))
    return "\n".join(f"  {name:<{width}} {text(size):>14}" for name, size in rows.items())


def next_steps(config: ExportConfig, found: ModelSource, out: Path) -> str:
    """What a user may do with the folder, ready to copy."""
    if config.space:
        shell = (
            f"(cd {shlex.quote(str(out))} && python app.py)",
            upload_space(str(out)) + "   # after `hf auth login`",
        )
        return "\n  ".join(["Next, in a shell:", *shell])
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
    found = loading.find(model_path(config), say)
    out = folder_to_write(config, found)
    say(f"{found.describe()}, tokenizer {found.tokenizer}; to be written in {config.dtype}")
    files = space(config, found) if config.space else hugging_face(config, found)
    if config.dry_run:
        places = [str(out)] * (out is not None)
        places += [f"{config.push} on the hub" + ", private where it is new" * config.private] * bool(config.push)
        print(f"would go to {' and '.join(places)}:\n{table(sizes(files))}")
        return
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flatgpt_") as folder:
            write(Path(folder), files)
            upload(config, Path(folder), list(files))
        return
    place = write_whole(config, out, files)
    print(f"{out}:\n{table({name: (place / name).stat().st_size for name in files})}")
    if config.push:
        upload(config, place, list(files))
    else:
        print(next_steps(config, found, out))


def write_whole(config: ExportConfig, out: Path, files: dict[str, Content]) -> Path:
    """Write the new folder, or nothing; the place that it has on the disk.

    Raises:
        UserError: as in write.
    """
    place = Path(os.path.realpath(out))  # of a link to an empty folder, on another disk say, that folder
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
        try:
            partial.mkdir(parents=True)
        except OSError as why:
            key = "space" if config.space else "out"
            raise UserError(f"{key} = {out}: cannot be written: {why.strerror}") from None
        write(partial, files)
        os.rename(partial, place)  # an empty folder makes way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def upload(config: ExportConfig, folder: Path, names: list[str]) -> None:
    """Send these files, and no others, to the repository."""
    print(f"uploaded: {hub.upload(folder, names, config.push, config.private, say)}")


if __name__ == "__main__":
    run_script(main, CONFIG)
