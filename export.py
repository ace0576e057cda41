"""Export a trained model as a Hugging Face GPT-2 folder (transformers, lm_eval, llama.cpp) or a Space, or upload it.

python export.py                                                   # the newest run: out/<run>/hugging_face
python export.py --model_path out/shakespeare --out exported --dtype bfloat16
python export.py --model_path out/shakespeare --push user/name --private --dry_run   # list what would be uploaded
python export.py --model_path out/shakespeare --push user/name --private             # after `hf auth login`
python export.py --model_path nanoGPT/out/ckpt.pt --out exported   # nanoGPT, or another model that flatGPT loads
python export.py --model_path out/shakespeare --space playground   # app.py and this model, to run here or on the hub
"""

from flatgpt.cli.cli import from_command_line, run_script
from config import ExportConfig, TrainConfig, UserError, model_path, upload_space
from flatgpt.cli.settings import recipe_text

if __name__ == "__main__":
    CONFIG = from_command_line(ExportConfig, __doc__)

import dataclasses
import json
import os
import shlex
import tempfile
from functools import partial
from pathlib import Path

import torch

from flatgpt.data.tokenizer import FileTokenizer, start_ids
from flatgpt.interop import hub, loading
from flatgpt.interop.export_folder import export_problems, file_sizes, hugging_face_files, space_files, write_folder
from flatgpt.interop.hub import LOCAL_SETTINGS
from flatgpt.interop.loading import ModelSource
from flatgpt.interop.verification import model_outputs, verify
from flatgpt.runtime.device import note


def main(config: ExportConfig) -> None:
    """Write the folder, upload it, or both. With --dry_run, only list the files."""
    source = loading.find(model_path(config))
    out, name = output_folder(config, source), model_name(config, source)
    recipe = run_recipe(source.state) if source.state else ""
    note(f"{source.describe()}, tokenizer {source.encoding.name}; exported as {config.dtype}")
    model, encoding = loading.load(source, "cpu", config.context_length)
    files, convert = {}, not (config.space and source.state)  # a Space loads a flatGPT checkpoint without conversion
    if convert and (problems := export_problems(model.config)):
        raise UserError(f"{source.path} cannot be exported: {'; '.join(problems)}")
    check = None
    if config.verify and not config.dry_run:
        # float32: rounded weights, but no rounded arithmetic, so that one tolerance is right for each dtype
        expected = model_outputs(model.to(getattr(torch, config.dtype)).float())
        check = partial(verify, source.path, expected, bool(config.space))
    if convert:
        files |= hugging_face_files(source, model, encoding, config, name, recipe)
    if config.space:
        files |= space_files(source, name, recipe)
    table = size_table(file_sizes(files))
    if config.dry_run:
        upload = f"{config.push} on the hub" + ", private if it is new" * config.private
        targets = [str(out)] * bool(out) + [upload] * bool(config.push)
        print(f"would be written to {' and '.join(targets)}:\n{table}")
        return
    with tempfile.TemporaryDirectory(prefix="flatgpt_") as temporary:
        folder = write_folder(out or Path(temporary, "model"), files, check)
        if out:
            print(f"{out}:\n{table}")
        if config.push:
            print(f"uploaded: {hub.upload(folder, list(files), config.push, config.private, note)}")
        else:
            print(next_steps(config, source, out))


def output_folder(config: ExportConfig, source: ModelSource) -> Path | None:
    """Return the folder to write; None if the files are only uploaded.

    Raises:
        UserError: the folder exists and is not empty, or no folder is given and the model is not a run's checkpoint.
    """
    given = config.space or config.out
    if given is None and config.push:
        return None
    if given is None and not (source.state and source.path.parent.name == "ckpt"):
        raise UserError(
            f"{source.path} is not in a run's folder, so the export has no default folder: give --out FOLDER"
        )
    out = Path(given) if given else source.path.parent.parent / "hugging_face"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists, and an export needs a new folder: move it, or choose another one")
    return out


def model_name(config: ExportConfig, source: ModelSource) -> str:
    """Return the last component of the repository, the run's folder or the model's path."""
    given = config.push or source.state.get("config", {}).get("out_dir") or config.model_path or source.path
    path = Path(os.path.abspath(given))
    return path.parent.name if path.is_file() else path.name  # ckpt.pt of nanoGPT gets the name of its folder


def run_recipe(state: dict) -> str:
    """Return a run's settings as TOML, without machine-specific ones."""
    known = TrainConfig.__dataclass_fields__.keys() - set(LOCAL_SETTINGS)
    settings = TrainConfig(**{key: value for key, value in state["config"].items() if key in known})
    return recipe_text(dataclasses.replace(settings, **dict.fromkeys(LOCAL_SETTINGS)))


def size_table(sizes: dict[str, int]) -> str:
    """Return one line per file with its size, and a line with the total."""
    rows = sizes | {"total": sum(sizes.values())}
    texts = {name: f"{size:,} bytes" if size < 10_000 else f"{size / 1e6:,.2f} MB" for name, size in rows.items()}
    width = max(24, *map(len, rows))
    return "\n".join(f"  {name:<{width}} {text:>14}" for name, text in texts.items())


def next_steps(config: ExportConfig, source: ModelSource, out: Path) -> str:
    """Return commands that use the folder."""
    folder, model = shlex.quote(str(out)), shlex.quote(config.model_path or str(source.path))
    if config.space:
        commands = [f"(cd {folder} && python app.py)", upload_space(str(out)) + "   # after `hf auth login`"]
        return "\n  ".join(["Next, in a shell:", *commands])
    commands = [f"lm_eval --model hf --model_args pretrained={folder} --tasks wikitext"]
    # llama.cpp ignores activation and MLP size in config.json, and identifies tokenizers by a hash of their output.
    shape = source.config
    standard_mlp = shape.activation == "gelu_tanh" and round(shape.mlp_ratio * shape.n_embd) == 4 * shape.n_embd
    named = not isinstance(source.encoding, FileTokenizer)
    prompt = "The " if named else source.encoding.decode(start_ids(source.encoding, end_of_text=False))
    if standard_mlp and named and source.encoding.name in ("gpt2", "r50k_base"):
        commands += [f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf"]
    commands += [f"python export.py --model_path {model} --push user/name --private"]
    text = json.dumps(prompt, ensure_ascii=False)
    python = f'print(pipeline("text-generation", {str(out)!r})({text}, max_new_tokens=100)[0]["generated_text"])'
    lines = ["Next, in Python:", "  from transformers import pipeline", f"  {python}", "or in a shell:"]
    return "\n  ".join(["\n".join(lines), *commands])


if __name__ == "__main__":
    run_script(main, CONFIG)
