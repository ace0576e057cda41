"""Read tokenizers from files: byte-level BPEs of Hugging Face and tiktoken, and nanoGPT's tables of characters.

read(Path("a/hugging/face/folder"))    # or tokenizer.json, vocab.json, merges.txt, NAME.tiktoken, meta.pkl
"""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
import re
from pathlib import Path

import tiktoken

from config import UserError, first_line
from flatgpt.data.tokenizer import (
    GPT2_RANKS,
    MARKS_PATTERN,
    PATTERN,
    TOKENIZER_FILE,
    CharacterTokenizer,
    FileTokenizer,
    load,
    note_once,
    ranks_hash,
)
from flatgpt.data.tokenizer_files import CHAR_TO_BYTE, EACH_CHARACTER, END_OF_TEXT, FLAGS, VERSION, merge_list

# Texts of the token between documents, if no file names it.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<s>", "<|bos|>", "<bos>")
# GPT-2's pattern between single digits
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
ANYTHING = r"[\s\S]){1,100000}"  # end of a pattern that matches any text, see _covering
# n_vocab, so that only an encoding of the right size is loaded; r50k_base has the same vocabulary as gpt2
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
MAX_IDS = 65_536
UNSUPPORTED_FILES = {"vocab.txt": "WordPiece", "spiece.model": "SentencePiece", "tokenizer.model": "SentencePiece"}
CHARACTERS = "meta.pkl"  # nanoGPT's
REMEDY = "choose another tokenizer: gpt2, byte, or a byte-level BPE in Hugging Face's or tiktoken's format"
# Of pickles that consist of dicts, strings and integers. The others can run code, or reserve any amount of memory.
PLAIN_OPCODES = "PROTO FRAME MARK STOP EMPTY_DICT DICT SETITEM SETITEMS UNICODE BINUNICODE SHORT_BINUNICODE INT BININT "
PLAIN_OPCODES += "BININT1 BININT2 LONG LONG1 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)


def read(path: Path) -> tiktoken.Encoding | None:
    """Return the tokenizer of a file or folder; None if a folder contains no tokenizer.

    A vocabulary without added tokens that equals that of a named encoding is that encoding.

    Args:
        path: a folder with Hugging Face's files, or one of them: tokenizer.json, or vocab.json or merges.txt, which
            belong together; a .tiktoken file, which is read with GPT-2's pattern; or nanoGPT's meta.pkl.

    Raises:
        UserError: the file is damaged, it is another kind of tokenizer, or it has more than 65,536 ids.
    """
    if path.is_dir():
        names = (TOKENIZER_FILE, "vocab.json", "merges.txt", *UNSUPPORTED_FILES, CHARACTERS)
        found = next((path / name for name in names if (path / name).is_file()), None)
        return found and read(found)
    if kind := UNSUPPORTED_FILES.get(path.name):
        raise UserError(f"{path}: {kind} tokenizers are not supported; {REMEDY}")
    name = path.parent.resolve().name if path.stem in ("tokenizer", "vocab", "merges", "meta") else path.stem
    if path.suffix == ".pkl":
        return read_characters(path, name)
    if path.suffix not in (".tiktoken", ".json") and path.name != "merges.txt":
        raise UserError(f"{path} is not a tokenizer's file; {REMEDY}")
    try:
        if path.suffix == ".tiktoken":
            rows = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
            special = {END_OF_TEXT: max(ranks.values()) + 1}
            return _known(_file_tokenizer(path, name, PATTERN, ranks, special, END_OF_TEXT))
        if path.name not in ("vocab.json", "merges.txt"):
            return _known(read_json(path, name))
        folder = path.parent
        vocab, added = _read_object(folder / "vocab.json"), _read_object(folder / "added_tokens.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
        merges = [line for line in lines if line and not line.startswith(VERSION)]
        return _known(_from_vocabulary(path, name, vocab, merges, PATTERN, added))
    except DAMAGED as error:
        raise _damaged(path, error) from None


def read_json(path: Path, name: str, end_of_text_id: int | None = None) -> FileTokenizer:
    """Return the tokenizer of a tokenizer.json, without its normalizer and prefix space, which a note says.

    Args:
        name: name of the tokenizer.
        end_of_text_id: the id that separates documents; NO_ID: none. None: that which the folder names.

    Raises:
        UserError: as read.
    """
    try:
        content = path.read_bytes()
        data = json.loads(content)
        model, added = data["model"], {token["content"]: token for token in data.get("added_tokens") or ()}
        kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
        if kind == "WordLevel" and data["pre_tokenizer"] == EACH_CHARACTER and not added:
            return CharacterTokenizer(name, _checked_ids(path, model["vocab"]), content)
        if kind == "BPE" and model.get("byte_fallback"):
            kind = "SentencePiece BPE"
        if kind == "BPE" and (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")):
            kind = "BPE with prefixes or suffixes"
        if kind != "BPE":
            raise UserError(f"{path}: {kind} tokenizers are not supported; {REMEDY}")
        pattern, prefix_space = _pattern(path, data.get("pre_tokenizer"))
        ignored = ["its prefix space"] * prefix_space
        ignored += [f"its normalizer ({data['normalizer']['type']})"] if data.get("normalizer") else []
        if ignored:
            note_once(f"note: {path}: {' and '.join(ignored)} is not applied: texts are encoded as they are")
            steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
            for step in (step for step in steps if step["type"] == "ByteLevel"):
                step["add_prefix_space"] = False
            content = json.dumps({**data, "normalizer": None}, ensure_ascii=False, indent=1).encode()
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        ids = {text: token["id"] for text, token in added.items()}
        rules = {text: " ".join(flag for flag in FLAGS if token.get(flag)) for text, token in added.items()}
        rules = {text: rule for text, rule in rules.items() if rule}
        return _from_vocabulary(path, name, model["vocab"], merges, pattern, ids, rules, content, end_of_text_id)
    except DAMAGED as error:
        raise _damaged(path, error) from None


def read_characters(path: Path, name: str) -> CharacterTokenizer:
    """Return the characters of nanoGPT's meta.pkl. Only dicts, strings and integers are unpickled.

    Raises:
        UserError: the pickle contains other objects, which could run arbitrary code, or has no characters.
    """
    try:
        content = path.read_bytes()
        for opcode, arg, _ in pickletools.genops(content):
            if opcode.name not in PLAIN_OPCODES.split() or (opcode.name.endswith("PUT") and arg > len(content)):
                raise ValueError(f"it contains {opcode.name} {arg or ''}")
        ids = pickle.loads(content)["stoi"]
        return CharacterTokenizer(name, _checked_ids(path, ids))
    except (*DAMAGED, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is not read: it is not nanoGPT's table of characters ({first_line(error)})") from None


def _checked_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    """Return ids of characters if they are all the numbers from 0 on. Raise ValueError otherwise."""
    if len(ids) > MAX_IDS:
        raise UserError(f"{path}: its {len(ids):,} ids do not fit uint16 shards; {REMEDY}")
    if any(len(char) != 1 for char in ids):
        raise ValueError("it has keys that are not characters")
    if not ids or sorted(ids.values()) != [*range(len(ids))] or any(type(n) is not int for n in ids.values()):
        raise ValueError("ids are not the numbers from 0 on")
    return ids


def _from_vocabulary(
    path: Path,
    name: str,
    vocab: dict[str, int],
    merges: list[str],
    pattern: str,
    added: dict[str, int],
    rules: dict[str, str] | None = None,
    content: bytes = b"",
    end_of_text_id: int | None = None,
) -> FileTokenizer:
    """Return the tokenizer of Hugging Face's vocabulary and merges.

    Tokens that no merge forms are added tokens. A tokenizer.json lists those that are found in a text; a vocab.json
    does not, such as its end-of-text. Ids that no token has, which a model may generate, become tokens that are never
    found.
    """
    ids = {*vocab.values(), *added.values()}
    gaps = {f"<unused {n}>": n for n in range(min(max(ids), MAX_IDS)) if n not in ids}
    formed = {merge.replace(" ", "") for merge in merges}
    alone = {token: n for token, n in vocab.items() if len(token) > 1 and token not in formed}
    never = gaps if rules is None else gaps.keys() | (alone.keys() - added.keys())
    rules = dict.fromkeys(never, "unused") | (rules or {})
    special = gaps | alone | added
    tokens = {token: n for token, n in vocab.items() if token in formed or token in CHAR_TO_BYTE}
    if odd := next((token for token in vocab if token not in special and not {*token} <= CHAR_TO_BYTE.keys()), None):
        raise UserError(f"{path}: the token {odd!r:.60} is not of a byte-level BPE; {REMEDY}")
    ranks = {bytes(map(CHAR_TO_BYTE.get, token)): n for token, n in tokens.items()}
    end = _end_of_text(path.parent, special, end_of_text_id)
    encoding = _file_tokenizer(path, name, pattern, ranks, special, end, rules, content)
    if merges != merge_list(encoding):
        raise UserError(f"{path}: its merges do not have the order of its ids, which tiktoken needs; {REMEDY}")
    return encoding


def _file_tokenizer(path: Path, name: str, pattern: str, ranks: dict, special: dict, *rest) -> FileTokenizer:
    """Return a FileTokenizer. Raise UserError if it has too many ids or lacks a byte."""
    if missing := {bytes([byte]) for byte in range(256)} - ranks.keys():
        raise UserError(f"{path}: it has no token for {len(missing)} of the 256 bytes; {REMEDY}")
    # An added token may be one that merges form, with its id.
    numbers = [*ranks.values(), *(n for text, n in special.items() if ranks.get(text.encode()) != n)]
    if len({*numbers}) < len(numbers) or min(numbers) < 0:
        raise ValueError("two tokens have the same id, or one is negative")
    if max(numbers) >= MAX_IDS:
        raise UserError(f"{path}: its {max(numbers) + 1:,} ids do not fit uint16 shards; {REMEDY}")
    try:
        return FileTokenizer(name, pattern, ranks, special, *rest)
    except ValueError as error:  # of tiktoken
        raise UserError(
            f"{path}: its pattern {pattern!r:.200} is not supported ({first_line(error)}); {REMEDY}"
        ) from None


def _known(encoding: FileTokenizer) -> tiktoken.Encoding:
    """Return the named encoding that has the same ids, if there is one, otherwise the argument."""
    for name, size in SIZES.items():
        if encoding.n_vocab != size:
            continue
        try:
            named = load(name)  # may download
        except UserError:
            plain = tiktoken.Encoding(
                name,
                pat_str=PATTERN,
                mergeable_ranks=encoding._mergeable_ranks,
                special_tokens=encoding._special_tokens,
            )
            if ranks_hash(plain) == GPT2_RANKS:
                raise
            continue
        same = encoding._mergeable_ranks == named._mergeable_ranks
        same &= encoding._special_tokens == named._special_tokens
        if same and encoding._pat_str in (PATTERN, named._pat_str):
            return named
    return encoding


def _pattern(path: Path, pre_tokenizer: dict | None) -> tuple[str, bool]:
    """Return the regular expression of a pre-tokenizer, and whether it adds a space before the text."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "use_regex": True} as level]:
            return PATTERN, level["add_prefix_space"]
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True} as level]:
            return DIGITS_PATTERN, level["add_prefix_space"]
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}},
            {"type": "ByteLevel", "use_regex": False} as level,
        ]:
            return _covering(path, pattern), level["add_prefix_space"]
    kinds = " and ".join(str((step or {}).get("type")) for step in steps)
    raise UserError(f"{path}: it splits words by {kinds}, which is not supported; {REMEDY}")


def _covering(path: Path, pattern: str) -> str:
    """Return a pattern that also matches what is between the matches of this one, which tiktoken would drop.

    Raises:
        UserError: the pattern has a part that Oniguruma, which the tokenizers library uses, reads differently, or it
            can match nothing.
    """
    plain = re.sub(r"\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^]\\])*\]", "C", pattern)  # classes and escapes
    try:
        odd = re.search(r"[$^]|\}\+|\(\?[^:=!<>i]", plain) or re.match(plain, "")
    except re.error:
        odd = True
    if odd:
        raise UserError(f"{path}: its pattern {pattern!r:.200} is not supported; {REMEDY}")
    covers = pattern in (PATTERN, MARKS_PATTERN, DIGITS_PATTERN) or pattern.endswith(ANYTHING)
    return pattern if covers else f"{pattern}|(?:(?!{pattern}){ANYTHING}"


def _end_of_text(folder: Path, special: dict[str, int], number: int | None) -> str | None:
    """Return the token between documents: of this id, or that which the folder's files name, or a usual one."""
    texts = {n: text for text, n in special.items()}
    if number is not None:
        return texts.get(number)
    named = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_object(folder / file).get("eos_token")
        named.append(token["content"] if isinstance(token, dict) else token)
    numbers = _read_object(folder / "config.json").get("eos_token_id")
    named += [texts.get(n) for n in (numbers if isinstance(numbers, list) else [numbers])]
    return next((text for text in (*named, *ENDS_OF_TEXT) if text in special), None)


def _read_object(file: Path) -> dict:
    """Return the object in a JSON file; {} if there is no file."""
    return json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}


def _damaged(path: Path, error: Exception) -> UserError:
    problem = f"{path} is damaged or not a byte-pair vocabulary ({type(error).__name__} {error})"
    return UserError(f"{problem}: copy it again, or {REMEDY}")
