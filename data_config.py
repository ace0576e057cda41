"""What prepare_data.py can be told, in config.py's manner. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import opt


@dataclass(frozen=True)
class PrepareConfig:
    """prepare_data.py: text -> uint16 token shards."""

    source: str | None = opt(
        None,
        "where the text comes from",
        choices=("pydoc", "shakespeare", "wikitext103", "wikipedia", "fineweb", "hub", "text"),
        positional=True,
        section="Source",
    )
    input: tuple[str, ...] = opt(
        (), "for text: files, folders and quoted patterns; .txt .md .py .jsonl[.gz|.zst] .parquet"
    )
    repo: str | None = opt(None, "for hub: a dataset repository, user/name")
    files: tuple[str, ...] = opt((), "for hub: quoted patterns of its files")
    column: str = opt("text", "for hub and text: where the text is, in parquet and JSON lines")
    dump: str | None = opt(None, "for wikipedia: date and language, 20231101.simple, say", none="20231101.en")
    revision: str | None = opt(None, "for sources on the hub: commit, branch or tag", none="a fixed commit")
    sample_size: int | None = opt(None, "documents to take, from the start of each split", low=1, none="all")
    splits: tuple[str, ...] = opt((), "make these splits only, of train val test")
    val_fraction: float | None = opt(
        None,
        "share of validation documents, where the source has none",
        above=0,
        below=1,
        none="0.1 of text, 0.0005 of the hub's",
    )
    test_fraction: float | None = opt(None, "share of test documents, likewise", above=0, below=1, none="no test split")
    name: str | None = opt(None, "the dataset's name", none="source[_dump][_tokenizer]", section="Dataset")
    tokenizer: str | None = opt(None, "byte, or a tiktoken encoding whose ids fit uint16", none="the source's")
    data_dir: str = opt("data", "folder that the shards' folder goes into")
    raw_dir: str = opt("data/raw", "folder of downloads; a file already in <raw_dir>/<source>/ is used as it is")
    shard_tokens: int = opt(100_000_000, "tokens per shard file", low=1)
    workers: int | None = opt(None, "processes that encode", low=1, none="one a core", section="Work")
    cluster: str | None = opt(None, "encode on a Dask cluster instead, tcp://scheduler:8786; its workers see our files")
    verify: str | None = opt(None, "instead of a source: a dataset's folder, to hash all its files again")
    info: str | None = opt(None, "instead of a source: a dataset's folder, to show what it holds")

    def problems(self) -> list[str]:
        """The rules between source and the fields that only some sources have."""
        found = []
        if self.source is None:
            if not (self.verify or self.info):
                found.append(
                    "source: missing; one of pydoc, shakespeare, wikitext103, wikipedia, fineweb, hub, text is "
                    "expected, or --verify FOLDER, or --info FOLDER"
                )
            return found
        if self.verify or self.info:
            found.append(f"--verify and --info read a folder of shards: leave out {self.source}")
        if self.source == "text" and not self.input:
            found.append("source text needs --input FILE, FOLDER or 'PATTERN' (several are allowed)")
        if self.source == "hub" and not self.repo:
            found.append("source hub needs --repo USER/NAME, a dataset repository")
        hub = ("wikitext103", "wikipedia", "fineweb", "hub")
        for key, sources in (
            ("input", ("text",)),
            ("repo", ("hub",)),
            ("files", ("hub",)),
            ("dump", ("wikipedia",)),
            ("revision", hub),
            ("val_fraction", ("text", "wikipedia", "fineweb", "hub")),
            ("test_fraction", ("text", "wikipedia", "fineweb", "hub")),
        ):
            if getattr(self, key) and self.source not in sources:
                found.append(f"--{key} belongs to source {', '.join(sources)}, not to {self.source}")
        if self.column != "text" and self.source not in ("hub", "text"):
            found.append(f"--column belongs to source hub, text, not to {self.source}")
        if (self.val_fraction or 0) + (self.test_fraction or 0) >= 1:
            found.append("val_fraction and test_fraction together leave nothing to train on")
        if unknown := [split for split in self.splits if split not in ("train", "val", "test")]:
            found.append(f"splits = {unknown[0]}: one of train, val, test is expected")
        if self.repo and self.repo.count("/") != 1:
            found.append(f"repo = {self.repo}: the hub's form is user/name")
        if self.name and (Path(self.name).name != self.name or self.name.startswith(".")):
            found.append(f"name = {self.name!r} has to be a plain folder name")
        return found
