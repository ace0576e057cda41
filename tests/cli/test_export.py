"""export.py: folders against transformers itself, what is refused, what a fault leaves, and what is uploaded."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hub_host import WRITER
from safetensors import safe_open

import eval as evaluation
import export
from config import EvalConfig, ExportConfig, ModelConfig, SamplingConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.inference import sampling
from flatgpt.inference.decoder import Decoder
from flatgpt.interop import huggingface, loading, pretrained
from flatgpt.runs import checkpoint
from model import GPT

T = 64
FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "vocab.json"),
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
}


def run(*words) -> None:
    """export.py in this process."""
    export.main(cli.parse(ExportConfig, list(map(str, words))))


def save(run_dir: str = "out/r", encoding: str = "byte", alter=lambda model: None, **changes) -> GPT:
    """A checkpoint of a tiny model with large random numbers in every parameter: a mistake in any of them shows.

    Args:
        alter: changes them.
    """
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": T, "vocab_size": 257, **changes}
    model = GPT(ModelConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        alter(model)
    tokens = tokenizer.load(encoding)
    state = {
        "iter": 7,
        "config": dataclasses.asdict(TrainConfig(**shape, out_dir=run_dir)),
        "tokenizer": {"name": encoding, "ranks_sha256": tokenizer.ranks_hash(tokens)},
        "data": {"end_of_text": False},
    }
    checkpoint.save(Path(run_dir), state, model.state_dict(), {}, keep=1)
    return model


def theirs(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def difference(model: GPT, other, ids=None) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (3, model.config.context_length), generator=generator)
    return (model(ids) - other(ids).logits).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# what transformers makes of it


SHAPES = [
    {},
    {"tie_weights": False},
    {"bias": False},
    {"bias": False, "attn_bias": True, "tie_weights": False},
    {"attn_bias": False},
    {"activation": "relu", "mlp_ratio": 2.0},
    {"activation": "gelu", "mlp_ratio": 1.0},  # MLP matrices are square
    {"vocab_size": 300, "n_head": 4},
    {"vocab_size": 320, "tie_weights": False, "dropout": 0.5},
    {"mlp_ratio": 1.3},  # 20.8 hidden units
]


@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_logits_equal_ours(in_tmp, changes):
    model = save(**changes)
    run("--model_path", "out/r")
    other = theirs("out/r/hugging_face")
    assert difference(model, other) < 1e-4
    assert other.dtype == torch.float32
    assert other.config.resid_pdrop == other.config.embd_pdrop == other.config.attn_pdrop == model.config.dropout
    assert (other.lm_head.weight is other.transformer.wte.weight) == model.config.tie_weights
    assert {p.name for p in Path("out/r/hugging_face").iterdir()} == FILES


def test_gpt2_vocabulary(in_tmp, capsys):
    model = save(encoding="gpt2", vocab_size=50257)
    run()  # the newest run
    assert difference(model, theirs("out/r/hugging_face")) < 1e-4
    ids = transformers.AutoTokenizer.from_pretrained("out/r/hugging_face")("Naïve café, 東京!").input_ids
    assert ids == tokenizer.load("gpt2").encode_ordinary("Naïve café, 東京!")
    assert "convert_hf_to_gguf.py out/r/hugging_face" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"mlp_ratio": 2.0}, {"encoding": "byte"}])
def test_llama_cpp_is_named_for_models_that_it_computes_only(in_tmp, capsys, changes):
    save(**{"encoding": "gpt2", "vocab_size": 50257, **changes})
    run()
    printed = capsys.readouterr().out
    assert "lm_eval" in printed
    assert "llama.cpp" not in printed


def test_byte_tokenizer(in_tmp):
    save()
    run()
    tokens = transformers.AutoTokenizer.from_pretrained("out/r/hugging_face")
    assert tokens("Naïve café, 東京!").input_ids == list("Naïve café, 東京!".encode())
    assert (tokens.model_max_length, tokens.eos_token_id) == (T, 256)


def test_the_loss_that_eval_reports(tiny_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_home)
    run("--model_path", "out/quickstart", "--out", tmp_path / "hf")
    report = tmp_path / "report.json"
    words = ["--model_path", "out/quickstart", "--device", "cpu", "--json", str(report)]
    evaluation.main(cli.parse(EvalConfig, words))
    model, ids = theirs(tmp_path / "hf"), np.fromfile("data/tiny/val_000000.bin", dtype="<u2").astype(np.int64)
    loss, tokens = 0.0, torch.from_numpy(ids)
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            x, y = tokens[start : start + 33][:-1], tokens[start : start + 33][1:]
            loss -= model(x[None]).logits[0].double().log_softmax(-1)[torch.arange(len(y)), y].sum().item()
    assert json.loads(report.read_text())["loss"] == pytest.approx(loss / (len(ids) - 1), rel=1e-6)


@pytest.mark.parametrize("vocab_size", [257, 320])
def test_the_same_greedy_tokens(in_tmp, vocab_size):
    """Also where ids beyond the tokenizer's would be the likeliest: they mean nothing."""

    def varied(model: GPT) -> None:
        model.transformer.wpe.weight *= 10
        model.lm_head.weight[257:] *= 3

    model = save(vocab_size=vocab_size, tie_weights=False, alter=varied)
    run()
    prompt = list(b"First Cit")
    options = SamplingConfig(greedy=True)
    expected = list(sampling.generate(Decoder(model), prompt, 50, options, n_vocab=257))
    other, ids = theirs("out/r/hugging_face"), torch.tensor([prompt])
    got = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, temperature=None, top_k=None)
    assert got[0, len(prompt) :].tolist() == expected
    assert len(set(expected)) > 5
    free = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, suppress_tokens=None)
    assert (free.max() > 256) == (vocab_size > 257)


def test_samples_as_infer_does_by_default(in_tmp):
    save()
    run()
    settings = transformers.GenerationConfig.from_pretrained("out/r/hugging_face")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.eos_token_id) == (True, 0.8, 0, 256)
    assert settings.suppress_tokens is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions(in_tmp, dtype):
    model = save(bias=False)
    run("--dtype", dtype)
    other = theirs("out/r/hugging_face", dtype="auto")
    assert other.dtype == getattr(torch, dtype)
    with safe_open("out/r/hugging_face/model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    expected = model.transformer.h[0].attn.c_attn.weight.to(other.dtype)
    assert torch.equal(other.transformer.h[0].attn.c_attn.weight, expected.T)
    rounded = GPT(model.config).eval()
    rounded.load_state_dict({name: t.to(other.dtype).float() for name, t in model.state_dict().items()})
    assert difference(rounded, other.float()) < 1e-4


def test_a_shorter_context(in_tmp):
    model = save()
    run("--context_length", 16)
    other = theirs("out/r/hugging_face")
    ids = torch.arange(16)[None]
    assert (other.config.n_positions, other.config.n_ctx, len(other.transformer.wpe.weight)) == (16, 16, 16)
    assert (model(ids) - other(ids).logits).abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained("out/r/hugging_face").model_max_length == 16


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False, "vocab_size": 300, "mlp_ratio": 1.3}, {"bias": False}, {"attn_bias": False}]
)
def test_and_back(in_tmp, changes):
    model = save(**changes)
    run()
    shape = pretrained.pretrained_shape("out/r/hugging_face")
    back = huggingface.hugging_face_weights(Path("out/r/hugging_face"), ModelConfig(**shape))
    for name, tensor in back.items():
        there = model.state_dict().get(name)
        if there is None:
            assert name.endswith("bias")
            assert not tensor.any()
        else:
            real = (
                slice(model.config.vocab_size) if name in ("transformer.wte.weight", "lm_head.weight") else slice(None)
            )
            assert torch.equal(tensor[real], there[real])
    assert set(model.state_dict()) <= set(back)
    model.config = dataclasses.replace(model.config, bias=True, attn_bias=None)  # zeros are biases now
    same = {key: getattr(model.config, key) for key in pretrained.SHAPE}
    assert shape.pop("mlp_ratio") * 16 == round(same.pop("mlp_ratio") * 16)
    assert shape == same
    assert loading.find("out/r/hugging_face", print).tokenizer == "byte"


def test_of_a_hugging_face_folder(in_tmp):
    """Exported again, it is the same."""
    save(tie_weights=False)
    run("--out", "once")
    run("--model_path", "once", "--out", "twice")
    for name in FILES - {"README.md"}:
        assert Path("once", name).read_bytes() == Path("twice", name).read_bytes(), name
    assert "How it was trained, and on what, is not known here" in Path("twice/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# the card, of a real run


def test_card_of_a_run(tiny_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_home)
    run("--out", tmp_path / "hf")
    text = (tmp_path / "hf/README.md").read_text()
    data = huggingface_hub.metadata_load(tmp_path / "hf/README.md")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "# `quickstart`" in text
    _, state = checkpoint.find("out/quickstart", print)
    rows = Path("out/quickstart/metrics.csv").read_text().splitlines()
    row = next(line.split(",") for line in rows if line.startswith(f"{state['iter']},"))
    assert f"validation loss {float(row[4]):.4f} nats per token" in text
    assert "windows of 32 tokens that do not overlap, computed in float32" in text
    assert str(tiny_home) not in text
    assert "data_dir" not in text
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.partition("```toml\n")[2].partition("```")[0])
    again = json.loads(json.dumps(dataclasses.asdict(cli.parse(TrainConfig, ["--config", str(recipe)]))))
    local = {*export.LOCAL, "resume", "overwrite", "plan", "gpus", "mfu"}
    assert {k: v for k, v in again.items() if k not in local} == {
        k: v for k, v in state["config"].items() if k not in local
    }


def test_recipe_names_nothing_of_the_machine():
    paths = {"config": "/home/me/a.toml", "data_dir": "/home/me/data", "out_dir": "/home/me/out"}
    trained_with = TrainConfig(**paths, init_from="/home/me/old", wandb_project="hidden", wandb="online", lr=0.5)
    text = export.recipe({"config": {**dataclasses.asdict(trained_with), "of_another_version": 1}})
    assert "lr = 0.5\n" in text
    assert not any(word in text for word in ("/home", "hidden", "online", "of_another_version"))


@pytest.mark.parametrize(
    ("words", "title"),
    [((), "r"), (("--push", "me/thing"), "thing"), (("--model_path", "hf"), "hf"), (("--out_dir", "out/r"), "r")],
)
def test_title(in_tmp, words, title):
    save()
    run("--out", "hf")
    config = cli.parse(ExportConfig, list(words))
    assert export.title(config, loading.find(config.model_path or "out/r", print)) == title


# ---------------------------------------------------------------------------------------------------------------------
# refusals, and what a fault leaves


def refused(message: str, *words) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*words)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "rope"}, "ckpt/.* cannot be exported: position = rope: Hugging Face's GPT-2 has learned"),
        ({"head_bias": True, "tie_weights": False}, "head_bias = true: Hugging Face's GPT-2 has no bias on its output"),
        ({"position": "rope", "head_bias": True, "tie_weights": False}, "position = rope: .*; head_bias = true: "),
    ],
)
def test_models_that_are_no_gpt2(in_tmp, changes, message):
    save(**changes)
    refused(message)
    refused(message, "--dry_run")


def test_refusals(in_tmp):
    save()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    refused("out = full is there already: .* move it away, or give another --out", "--out", "full")
    refused("out = full is there already", "--out", "full", "--dry_run")
    refused("out = file is there already", "--out", "file")
    refused("context_length = 65: .* take at most that", "--context_length", T + 1)
    refused("push = gpt2: a repository of the hub is user/name", "--push", "gpt2")
    refused("private is about --push", "--private")
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    refused("copied is in no run's folder, .*: give --out FOLDER", "--model_path", "copied")
    run("--out", "hf")
    refused("hf is in no run's folder", "--model_path", "hf")
    refused("no such folder", "--model_path", "nothing/here/at/all")


def test_into_an_empty_folder_and_a_new_one_below(in_tmp):
    save()
    Path("empty").mkdir()
    run("--out", "empty")
    run("--out", "a/b/c/")
    assert {p.name for p in Path("empty").iterdir()} == {p.name for p in Path("a/b/c").iterdir()} == FILES
    assert {p.name for p in Path("a/b").iterdir()} == {"c"}
    modes = {p.stat().st_mode & 0o777 for p in Path("empty").iterdir()}
    assert len(modes) == 1  # safetensors makes its file for the owner alone


def test_a_link_to_an_empty_folder_stays_one(in_tmp):
    """The big disk is elsewhere."""
    save()
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    run("--out", "link")
    assert Path("link").is_symlink()
    assert {p.name for p in Path("disk").iterdir()} == FILES


def test_where_nothing_can_be_made(in_tmp):
    save()
    Path("file").write_text("mine")
    refused("out = file/hf: cannot be written: Not a directory", "--out", "file/hf")


def test_weights_that_are_no_numbers(in_tmp):
    """Of a run that diverged, or too large for float16."""
    save(alter=lambda model: model.transformer.ln_f.weight.fill_(1e5))
    run("--out", "hf", "--dtype", "bfloat16")
    refused(r"ln_f.weight has nan or inf in float16: .*--dtype bfloat16", "--out", "half", "--dtype", "float16")


def test_into_the_current_folder(in_tmp, monkeypatch):
    save(str(in_tmp / "out/r"))
    Path("here").mkdir()
    monkeypatch.chdir("here")
    run("--model_path", in_tmp / "out/r", "--out", ".")
    assert {p.name for p in (in_tmp / "here").iterdir()} == FILES


@contextlib.contextmanager
def small_files(size: int):
    """A limit of file sizes stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("words", [("--out", "hf"), ("--push", "me/thing")])
def test_a_full_disk_leaves_nothing(in_tmp, monkeypatch, words):
    save()
    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    before = sorted(in_tmp.rglob("*"))
    said = r"could not be written: .*File too large.*; 0.1 MB are needed, [\d,.]+ MB are free; nothing of it is kept"
    with small_files(4096), pytest.raises(UserError, match=said):
        run(*words)
    assert sorted(in_tmp.rglob("*")) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_fault_among_the_last_files_leaves_nothing(in_tmp, monkeypatch, fault):
    save()
    before, written = sorted(in_tmp.rglob("*")), []
    real = Path.write_bytes

    def write_bytes(path, content):
        assert not Path("hf").exists()  # whoever is killed here leaves no half folder of that name
        written.append(path)
        if path.name == "README.md":
            raise fault
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else UserError):
        run("--out", "hf")
    assert len(written) == len(FILES) - 1
    assert sorted(in_tmp.rglob("*")) == before


def test_what_a_killed_call_left_makes_way(in_tmp):
    save()
    Path(".hf.partial").mkdir()
    Path(".hf.partial/train_state.pt").write_text("half")
    run("--out", "hf")
    assert {p.name for p in Path("hf").iterdir()} == FILES
    assert not Path(".hf.partial").exists()


def test_folder_has_its_name_when_all_files_are_on_the_disk(in_tmp, monkeypatch):
    on_disk, renamed, rename = set(), [], os.rename

    def move(old, new):
        assert {path.stat().st_ino for path in Path(old).iterdir()} <= on_disk
        renamed.append(Path(new).name)
        rename(old, new)

    save()
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "rename", move)
    run("--model_path", "out/r", "--out", "exported")
    assert renamed == ["exported"]
    assert {path.name for path in Path("exported").iterdir()} == FILES


# ---------------------------------------------------------------------------------------------------------------------
# the table, and the hub


def listed(printed: str) -> dict[str, str]:
    """{file: size} of a printed table."""
    lines = [line.split() for line in printed.splitlines() if line.startswith("  ") and line.endswith(("bytes", "MB"))]
    return {name: " ".join(size) for name, *size in lines}


def test_table_and_dry_run(in_tmp, monkeypatch, capsys):
    save()
    monkeypatch.setattr(export.hub, "upload", None)
    before = sorted(in_tmp.rglob("*"))
    run("--dry_run", "--push", "me/thing", "--private", "--out", "hf")
    assert sorted(in_tmp.rglob("*")) == before
    dry = capsys.readouterr().out
    assert dry.startswith("would go to hf and me/thing on the hub, private where it is new:\n")
    monkeypatch.setattr(export.hub, "upload", lambda *args: "https://hub/me/thing")
    run("--push", "me/thing", "--private", "--out", "hf")
    real = capsys.readouterr().out
    assert real.endswith("uploaded: https://hub/me/thing\n")
    assert set(listed(dry)) == set(listed(real)) == FILES | {"together"}
    for name in FILES - {"model.safetensors"}:
        assert listed(dry)[name] == listed(real)[name] == f"{Path('hf', name).stat().st_size:,} bytes"
    total = sum(p.stat().st_size for p in Path("hf").iterdir())
    assert listed(real)["together"] == f"{total / 1e6:,.2f} MB"
    assert listed(real)["model.safetensors"] == f"{Path('hf/model.safetensors').stat().st_size / 1e6:,.2f} MB"


def test_printed_python_lines_run(in_tmp, capsys):
    save()
    run("--out", "it's")
    lines = capsys.readouterr().out.partition("Next, in Python:\n")[2].partition("or in a shell")[0].splitlines()
    exec("\n".join(line.strip() for line in lines).replace("max_new_tokens=100", "max_new_tokens=3"))
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize("keep", [True, False])
def test_push_sends_what_was_written_and_nothing_else(in_tmp, monkeypatch, host, keep):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # this host has plain HTTP
    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    model, before = save(), sorted(in_tmp.rglob("*"))
    run("--push", "user/thing", "--private", *(["--out", "hf"] if keep else []))
    sent = host.files("user/thing")
    assert set(sent) - {".gitattributes"} == FILES
    assert host.created == {"user/thing": "private"}
    assert len(host.commits) == 1
    if keep:
        assert {name: Path("hf", name).read_bytes() for name in FILES} == {name: sent[name] for name in FILES}
    else:
        assert sorted(in_tmp.rglob("*")) == before
    for name in FILES:
        Path("fetched").mkdir(exist_ok=True)
        Path("fetched", name).write_bytes(sent[name])
    assert difference(model, theirs("fetched")) < 1e-4
    assert "user/thing" in sent["README.md"].decode()


def test_every_setting_of_their_config_is_one_they_know():
    """A misspelt key would be kept by transformers as it is, and do nothing."""
    ours = huggingface.hugging_face_config(ModelConfig(vocab_size=257), 256, "float32")
    known = {f.name for f in dataclasses.fields(transformers.GPT2Config)} | {"torch_dtype", "n_ctx", "model_type"}
    assert set(ours) <= known
    assert json.loads(json.dumps(ours)) == ours
