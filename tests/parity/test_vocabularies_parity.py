"""Models with vocabularies of their own: prompts, exports and Spaces against transformers' AutoTokenizer."""

import json
from pathlib import Path

import pytest
import torch
from exported import export_here
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import ADDED, HINDI, TEXT, THAI, bpe, characters, save_run_of, write_bpe, write_model

import flatgpt
from flatgpt.data import tokenizer
from flatgpt.inference.writer import Text
from model import GPT

pytestmark = pytest.mark.slow

CHAT = "<|user|>hi there<|assistant|>hello, how are you<|user|>fine\n"
TEXTS = (
    "<|user|>hi<|assistant|>",
    CHAT * 2,
    HINDI + ADDED[0] + THAI + " <|endoftext|> ",
    "<|user|",
    " <|user|>\n\n<|user|>",
)


def agree(reference, encoding, texts=TEXTS) -> None:
    """Check that transformers' ids of the texts are ours, and that both give the texts back."""
    for text in texts:
        ids = tokenizer.encode_special(encoding, text)
        assert reference.encode(text, add_special_tokens=False) == ids
        assert reference.decode(ids) == encoding.decode(ids) == text


def test_prompt_with_added_tokens(in_tmp, capsys):
    """Three ids instead of twelve or more; without --parse_special they are characters, which is said once."""
    reference = write_bpe("bpe")
    write_model("bpe", reference)
    encoding = flatgpt.load("bpe")[1]
    agree(reference, encoding)
    prompt = "<|user|>x<|assistant|>"
    assert Text(encoding, prompt, parse_special=True).ids == reference.encode(prompt)
    assert len(reference.encode(prompt)) == 3
    tokenizer.note_once.cache_clear()
    capsys.readouterr()
    ids = [Text(encoding, prompt).ids for _ in range(2)][1]
    assert (len(ids) > 12, encoding.decode(ids)) == (True, prompt)
    assert not {*reference.convert_tokens_to_ids([*ADDED])} & {*ids}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the text contains '<|user|>', which is encoded as ordinary characters")
    assert "--parse_special" in line


def test_added_tokens_with_rules(in_tmp):
    """Some remove the white space around them, some are found between words only, and one is part of another."""
    reference = write_bpe("bpe", added=("<|a|>", "<|a|><|b|>"))
    data = json.loads(Path("bpe/tokenizer.json").read_text())
    for token, flags in zip(data["added_tokens"][1:], ({"lstrip": True, "rstrip": True}, {}), strict=True):
        token.update(flags)
    Path("bpe/tokenizer.json").write_text(json.dumps(data))
    settings = json.loads(Path("bpe/tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    Path("bpe/tokenizer_config.json").write_text(json.dumps(settings))
    reference = AutoTokenizer.from_pretrained("bpe")
    write_model("bpe", reference)
    export_here("--model_path", "bpe", "--out", "hf")
    for name in ("bpe", "hf"):
        _, encoding = flatgpt.load(name)
        for text in ("x  <|a|>  y", "<|a|><|b|> z", " <|a|>\n<|a|><|b|>", "a<|a|>"):
            ids = tokenizer.encode_special(encoding, text)
            assert AutoTokenizer.from_pretrained(name).encode(text, add_special_tokens=False) == ids, (name, text)


@pytest.mark.parametrize("source", ["folder", "run"])
def test_export_of_a_vocabulary(in_tmp, source):
    """tokenizer.json as it came, with its added tokens; ids of end-of-text; logits."""
    reference = write_bpe("bpe")
    original = Path("bpe/tokenizer.json").read_bytes()
    if source == "folder":
        write_model("bpe", reference)
        export_here("--model_path", "bpe", "--out", "hf")
    else:
        save_run_of(bpe())
        export_here("--out", "hf")
    assert Path("hf/tokenizer.json").read_bytes() == original
    exported, theirs = AutoTokenizer.from_pretrained("hf"), AutoModelForCausalLM.from_pretrained("hf").eval()
    model, encoding = flatgpt.load("hf")
    agree(exported, encoding)
    agree(exported, flatgpt.load("bpe" if source == "folder" else "out/r")[1])
    assert [exported.encode(text) for text in TEXTS] == [reference.encode(text) for text in TEXTS]
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == reference.eos_token_id
    assert exported.eos_token_id == encoding.eot_token == reference.eos_token_id
    ids = torch.tensor([encoding.encode_ordinary(HINDI)[:16]])
    assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)
    assert torch.equal(GPT.from_pretrained("hf")(ids), model(ids))


def test_export_of_characters(in_tmp):
    """They have no end-of-text, and transformers shall not assume GPT-2's."""
    save_run_of(characters())
    export_here("--out", "hf")
    reference, theirs = AutoTokenizer.from_pretrained("hf"), AutoModelForCausalLM.from_pretrained("hf").eval()
    model, encoding = flatgpt.load("hf")
    agree(reference, encoding, [TEXT])
    assert encoding.encode(TEXT) == characters().encode(TEXT)
    found = theirs.config.eos_token_id, theirs.config.bos_token_id, theirs.generation_config.eos_token_id
    assert found == (None, None, None) == (reference.eos_token_id, reference.pad_token_id, encoding.eot_token)
    ids = torch.tensor([encoding.encode(HINDI)[:16]])
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert theirs.generate(ids, **greedy).tolist() == model.generate(ids, 8, greedy=True).tolist()
