"""Find the tokenizer that `prepare_data.py --tokenizer` names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import tiktoken

from config import UserError
from flatgpt.data import hub, tokenizer, tokenizer_reader
from flatgpt.data.shards import DAMAGED
from flatgpt.data.tokenizer import FileTokenizer

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
FILE_SUFFIXES = (".json", ".txt", ".tiktoken", ".pkl", ".model")
EXPECTED = "tokenizer.json, vocab.json, .tiktoken or meta.pkl"


def find(name: str, data_dir: str = "data") -> tiktoken.Encoding | None:
    """Return the tokenizer of a path or of a model on the hub; None if it is the name of an encoding.

    Args:
        name: a path as in tokenizer_reader.read, also the folder of a dataset, run or checkpoint; or user/name.
        data_dir: folder of datasets, in which an unknown name is looked for, to suggest its path.

    Raises:
        UserError: as tokenizer_reader.read; or there is no such tokenizer.
    """
    path = Path(name)
    if not name or name in (*tiktoken.list_encoding_names(), "byte"):
        return tokenizer.check_name(name)
    if path.exists():
        if found := _of_dataset_or_run(path) or tokenizer_reader.read(path):
            return found
        files = (path, *(path / file for file in ("tokenizer.json", "vocab.json", "meta.pkl")))
        if wrong := [file for file in files if file.suffix in FILE_SUFFIXES and file.is_dir()]:
            raise UserError(f"tokenizer {name}: {wrong[0]} is a folder; a file is expected")
        raise UserError(f"tokenizer {name}: the folder has no {EXPECTED}; choose one that has")
    if not HUB_NAME.fullmatch(name) or path.parent.exists() or path.suffix in FILE_SUFFIXES:
        try:
            return tokenizer.check_name(name)
        except UserError as error:
            likely = (Path(data_dir, name, "meta.json"), Path("out", name, "ckpt"))
            found = [path.parent for path in likely if path.exists()]
            hint = f"; did you mean --tokenizer {shlex.quote(str(found[0]))}?" if found else ""
            raise UserError(f"{error}, bpe:N, or the path of a {EXPECTED}{hint}") from None
    found = tokenizer_reader.read(hub.fetch_tokenizer(name))
    if found is None:
        raise UserError(f"tokenizer {name}: the repository on the hub has no tokenizer.json and no vocab.json")
    if isinstance(found, FileTokenizer):
        found.name = name.partition("@")[0].rpartition("/")[2]  # not that of the folder in the cache
    return found


def _of_dataset_or_run(path: Path) -> tiktoken.Encoding | None:
    """Return the tokenizer of a dataset, run or checkpoint of flatGPT; None if the path is none of these."""
    for file in (path / "meta.json", path / "state.json", *sorted(path.glob("ckpt/*/state.json"), reverse=True)):
        if file.is_file():
            try:
                facts = json.loads(file.read_text(encoding="utf-8-sig"))
                facts = {**facts, "name": facts["tokenizer"]} if file.name == "meta.json" else facts["tokenizer"]
                name, end_of_text_id = facts["name"], facts["eot_id"]
            except DAMAGED as error:
                raise UserError(f"{file} names no tokenizer ({type(error).__name__} {error})") from None
            return tokenizer.load(name, file.parent, end_of_text_id)
    return None
