"""Runs with tokenizers of their own: characters, without end-of-text, and byte-pair encodings with added tokens."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from exported import T
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from in_process import TEXT as ENGLISH
from in_process import TINY, train_here
from scoring import strided_loop
from vocabularies import (
    HINDI,
    TEXT,
    bpe,
    characters,
    save_run_of,
    write_bpe,
    write_dataset,
    write_model,
    write_nanogpt_characters,
)

import flatgpt
from config import UserError
from flatgpt.data import tokenizer
from flatgpt.runs import checkpoint

CPU = ("--device", "cpu", "--dtype", "float32")
SHORT = (*CPU, "--max_new_tokens", 12)


def state_of(folder: Path | str) -> dict:
    return json.loads(Path(folder, "state.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# text


def test_infer_with_characters(cli, in_tmp):
    """An empty prompt is a newline; a character that the model lacks is one error line with its place."""
    save_run_of(characters())
    done = cli("infer", *SHORT, "--json", "report.json")
    (text,) = json.loads(Path("report.json").read_text())["texts"]
    assert (done.code, text["prompt_tokens"], text["tokens"], text["ended"]) == (0, 1, 12, "length")
    assert set(text["text"]) <= set(TEXT)
    assert cli("infer", *SHORT, "--prompt", HINDI).out.startswith(HINDI)
    error = cli("infer", *SHORT, "--prompt", "सभी\nसभी Z मनुष्यों").error
    assert "'Z' (U+005A), which is in line 2, column 5 of the text" in error
    done = cli("infer", *SHORT, "--interactive", stdin="सभी Z\nसभी\n")
    assert (done.code, done.out.startswith("सभी"), done.err.count("error: tokenizer letters")) == (0, True, 1)


@pytest.mark.parametrize("parse_special", [False, True])
def test_infer_with_added_tokens(cli, in_tmp, parse_special):
    encoding, tokens = bpe(), "<|user|>x<|assistant|>"
    save_run_of(encoding)
    tokenizer.note_once.cache_clear()
    words = ["--parse_special"] * parse_special
    done = cli("infer", *SHORT, "--prompt", tokens, "--num_samples", 2, "--json", "report.json", *words)
    count = 3 if parse_special else len(encoding.encode_ordinary(tokens))
    assert [text["prompt_tokens"] for text in json.loads(Path("report.json").read_text())["texts"]] == [count] * 2
    assert done.err.count("'<|user|>', which is encoded as ordinary characters") == (not parse_special)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("make", [characters, bpe])
def test_eval_of_a_text(cli, in_tmp, make):
    """Bits per byte, against a slow plain loop."""
    encoding, text = make(), TEXT.replace(" ", "") if make is characters else TEXT
    encoding = characters(text) if make is characters else encoding
    save_run_of(encoding)
    Path("t.txt").write_text(text)
    found = json.loads(cli("eval", *CPU, "--text", "t.txt", "--json", "-").out)
    model, ids = flatgpt.load()[0], encoding.encode_ordinary(text)
    nats = 0.0
    for inputs, targets in strided_loop(ids, T + 1, T):
        log_p = model(torch.tensor([inputs])).log_softmax(-1)[0, -len(targets) :]
        nats -= log_p.gather(1, torch.tensor(targets)[:, None]).sum().item()
    scored = len(text.encode()) - len(encoding.decode_single_token_bytes(ids[0]))
    assert (found["tokens"], found["bytes"], found["words"]) == (len(ids) - 1, scored, len(text.split()))
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / scored, rel_tol=1e-5)


def test_eval_with_added_tokens_in_a_text(cli, in_tmp):
    encoding, text = bpe(), f"<|user|>{HINDI}<|assistant|>"
    save_run_of(encoding)
    Path("t.txt").write_text(text)
    tokenizer.note_once.cache_clear()
    plain = cli("eval", *CPU, "--text", "t.txt", "--json", "-")
    parsed = cli("eval", *CPU, "--text", "t.txt", "--json", "-", "--parse_special")
    assert json.loads(plain.out)["tokens"] == len(encoding.encode_ordinary(text)) - 1
    assert json.loads(parsed.out)["tokens"] == len(tokenizer.encode_special(encoding, text)) - 1
    assert ["--parse_special" in done.err for done in (plain, parsed)] == [True, False]
    assert "parse_special is for --text" in cli("eval", *CPU, "--parse_special").error


def test_eval_of_characters(cli, in_tmp):
    """rolling needs end-of-text; an empty context of a question is a newline; continuations do not end."""
    save_run_of(characters())
    Path("t.txt").write_text(TEXT)
    error = cli("eval", *CPU, "--text", "t.txt", "--protocol", "rolling").error
    assert "end-of-text, which tokenizer letters of out/r/ckpt/iter_000007 does not have: choose" in error
    Path("c.jsonl").write_text(json.dumps({"ctx": "", "endings": ["सभी", "มนุษย์"], "label": 0}))
    assert json.loads(cli("eval", *CPU, "--choices", "c.jsonl", "--json", "-").out)["questions"] == 1
    Path("t.txt").write_text(TEXT + "Z")
    lines = TEXT.count("\n") + 1
    assert f"'Z' (U+005A), which is in line {lines}, column 1" in cli("eval", *CPU, "--text", "t.txt").error


@pytest.mark.extra("sacrebleu", "rouge_score")
def test_continuations_of_characters(cli, in_tmp):
    save_run_of(characters())
    Path("t.txt").write_text(TEXT)
    words = ("--generate", 3, "--prompt_tokens", 8, "--max_new_tokens", 8)
    assert json.loads(cli("eval", *CPU, "--text", "t.txt", *words, "--json", "-").out)["prompts"] == 3


def test_eval_compares_vocabularies_not_names(cli, in_tmp):
    """A model whose tokenizer adds tokens to that of the data reads the data; another one of the same name does not."""
    save_run_of(bpe())
    same = cli("eval", *CPU, "--dataset", write_dataset("data/same", bpe("plain", added=())).name, "--json", "-")
    assert json.loads(same.out)["tokens"] > 99
    write_dataset("data/other", bpe("bpe", size=350))
    error = cli("eval", *CPU, "--dataset", "other").error
    assert "is tokenized with another tokenizer, also named bpe, but the model" in error


def test_eval_of_a_dataset_that_was_changed_or_removed(cli, in_tmp):
    """The command for one that is missing gives it the model's tokenizer."""
    save_run_of(bpe())
    folder = write_dataset("data/mine", bpe())
    shutil.copy(write_dataset("data/other", bpe("bpe", size=350)) / "tokenizer.json", folder)
    assert "data/mine/tokenizer.json was changed" in cli("eval", *CPU, "--dataset", "mine").error
    error = cli("eval", *CPU, "--dataset", "gone").error
    assert "python prepare_data.py text --input FILES --tokenizer out/r/ckpt/iter_000007 --name gone" in error


# ---------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("make", [characters, bpe])
def test_train_resume_and_use(cli, in_tmp, make):
    """The tokenizer is in each checkpoint; the data may move; the run's folder is enough for all that follows."""
    encoding = make()
    write_dataset("data/own", encoding)
    train_here("--dataset", "own", "--sample_prompt", "\n", HINDI[:8], "--out_dir", "out/a")
    folder = Path("out/a/ckpt/iter_000006")
    state, stored = state_of(folder), (folder / "tokenizer.json").read_bytes()
    assert stored == Path("data/own/tokenizer.json").read_bytes()
    facts = {"vocab_size": encoding.n_vocab, "ranks_sha256": tokenizer.ranks_hash(encoding), "name": encoding.name}
    assert state["tokenizer"] == {**facts, "eot_id": encoding.eot_token}
    assert state["files"]["tokenizer.json"] == checkpoint.fingerprint(folder / "tokenizer.json")
    assert HINDI[:8] in Path("out/a/samples.txt").read_text()
    shutil.move("data", "moved")
    train_here("--resume", "out/a", "--data_dir", "moved", "--dataset", "own", "--max_iters", 9, "--sample_tokens", 0)
    assert (Path("out/a/ckpt/iter_000009/tokenizer.json")).read_bytes() == stored
    shutil.rmtree("moved")
    assert cli("infer", *SHORT, "--model_path", "out/a", "--prompt", HINDI).out.startswith(HINDI)


def test_resume_refuses_a_changed_tokenizer(in_tmp):
    write_dataset("data/own", bpe())
    train_here("--dataset", "own")
    shutil.rmtree("data/own")
    write_dataset("data/own", bpe(size=350))
    with pytest.raises(UserError, match=r"trained with another tokenizer, also named bpe, .*data/own is"):
        train_here("--dataset", "own", "--resume", "--max_iters", 9)


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_tokenizer_of_a_dataset(in_tmp, damage):
    write_dataset("data/own", bpe())
    file = Path("data/own/tokenizer.json")
    bpe("other", size=350)
    content = {"cut": file.read_bytes()[:-9], "other": Path("other/tokenizer.json").read_bytes()}
    file.unlink() if damage == "missing" else file.write_bytes(content[damage])
    with pytest.raises(UserError, match="tokenizer") as caught:
        train_here("--dataset", "own", "--sample_tokens", 0)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_init_from_a_vocabulary_of_its_own(in_tmp):
    """The weights and tokens of a Hugging Face model. Its added tokens are kept, although the data has none."""
    reference = write_bpe("bpe")
    write_model("bpe", reference)
    write_dataset("data/own", bpe("plain", added=()))
    train_here("--context_length", 16, "--dataset", "own", "--init_from", "bpe")
    folder = Path("out/quickstart/ckpt/last")
    assert (folder / "tokenizer.json").read_bytes() == Path("bpe/tokenizer.json").read_bytes()
    assert state_of(folder)["tokenizer"]["vocab_size"] == state_of(folder)["config"]["vocab_size"] == len(reference)
    train_here("--context_length", 16, "--dataset", "own", "--resume", "out/quickstart", "--max_iters", 8)
    encoding = flatgpt.load("out/quickstart")[1]
    assert tokenizer.encode_special(encoding, "<|user|>hi<|assistant|>") == reference.encode("<|user|>hi<|assistant|>")
    write_dataset("data/other", bpe("other", size=350))
    with pytest.raises(UserError, match=r"bpe was trained with tokenizer bpe, but data/other .* other: .*r bpe$"):
        train_here("--context_length", 16, "--dataset", "other", "--init_from", "bpe", "--out_dir", "out/other")


def test_init_from_characters_of_nanogpt(in_tmp):
    letters = characters(ENGLISH)
    Path("nano").mkdir()
    torch.save(nanogpt_checkpoint(random_gpt2(vocab_size=letters.n_vocab)), "nano/ckpt.pt")
    write_nanogpt_characters("nano/meta.pkl", letters.ids)
    write_dataset("data/own", letters, ENGLISH)
    train_here("--context_length", 16, "--dataset", "own", "--init_from", "nano/ckpt.pt")
    assert flatgpt.load()[1].encode("99 green") == letters.encode("99 green")
    write_dataset("data/more", characters(ENGLISH + "Z"), ENGLISH)
    with pytest.raises(UserError, match=r"ckpt.pt was trained with tokenizer shake.* --tokenizer DATA/meta.pkl"):
        train_here("--context_length", 16, "--dataset", "more", "--init_from", "nano/ckpt.pt", "--out_dir", "out/more")


def test_two_ranks(ranks, in_tmp):
    write_dataset("data/own", characters())
    words = ("--dataset", "own", "--grad_accum_steps", 2, "--sample_prompt", "\n", HINDI[:8])
    ranks(2, *TINY, *words, cwd=in_tmp)
    assert flatgpt.load()[1].encode(TEXT) == characters().encode(TEXT)
    assert HINDI[:8] in Path("out/quickstart/samples.txt").read_text()
