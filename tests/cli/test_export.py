"""export.py: folders against transformers itself, refused models and options, errors while writing, and uploads."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from exported import HUGGING_FACE_FILES, export_here, files_in, refused, save_run, small_files, table_rows
from hub_host import WRITER
from random_models import generate
from safetensors import safe_open

import eval as evaluation
import export
from config import EvalConfig, ExportConfig, ModelConfig, SamplingConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import Decoder
from flatgpt.interop import huggingface, loading, pretrained
from flatgpt.runs import checkpoint
from model import GPT

T = 32


def transformers_model(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def difference(model: GPT, other, length: int = T) -> float:
    """Return the largest difference between the logits of our model and of transformers'."""
    ids = torch.randint(model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    return (model(ids) - other(ids).logits).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


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
    model = save_run(**changes)
    export_here("--model_path", "out/r")
    other = transformers_model("out/r/hugging_face")
    assert difference(model, other) < 1e-4
    assert other.dtype == torch.float32
    assert other.config.resid_pdrop == other.config.embd_pdrop == other.config.attn_pdrop == model.config.dropout
    assert (other.lm_head.weight is other.transformer.wte.weight) == model.config.tie_weights
    assert files_in("out/r/hugging_face") == HUGGING_FACE_FILES


@pytest.mark.parametrize("encoding", ["gpt2", "byte"])
def test_tokenizer(in_tmp, encoding):
    ours, text = tokenizer.load(encoding), "Naïve café, 東京!"
    model = save_run(encoding=encoding, vocab_size=ours.n_vocab)
    export_here()  # the newest run
    assert difference(model, transformers_model("out/r/hugging_face")) < 1e-4
    tokens = transformers.AutoTokenizer.from_pretrained("out/r/hugging_face")
    assert tokens(text).input_ids == ours.encode_ordinary(text)
    assert (tokens.model_max_length, tokens.eos_token_id) == (T, ours.eot_token)


@pytest.mark.parametrize(
    ("settings", "supported"),
    [({}, True), ({"activation": "gelu"}, False), ({"mlp_ratio": 2.0}, False), ({"encoding": "byte"}, False)],
)
def test_llama_cpp_is_suggested_for_models_that_it_supports(in_tmp, capsys, settings, supported):
    save_run(**{"encoding": "gpt2", "vocab_size": 50257, **settings})
    export_here()
    printed = capsys.readouterr().out
    assert "lm_eval" in printed
    assert ("convert_hf_to_gguf.py out/r/hugging_face" in printed) == supported


def test_the_loss_that_eval_reports(tiny_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_home)
    export_here("--model_path", "out/quickstart", "--out", tmp_path / "hf")
    report = tmp_path / "report.json"
    words = ["--model_path", "out/quickstart", "--device", "cpu", "--json", str(report)]
    evaluation.main(cli.parse(EvalConfig, words))
    model, ids = (
        transformers_model(tmp_path / "hf"),
        np.fromfile("data/tiny/val_000000.bin", dtype="<u2").astype(np.int64),
    )
    loss, tokens = 0.0, torch.from_numpy(ids)
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            x, y = tokens[start : start + 33][:-1], tokens[start : start + 33][1:]
            loss -= model(x[None]).logits[0].double().log_softmax(-1)[torch.arange(len(y)), y].sum().item()
    assert json.loads(report.read_text())["loss"] == pytest.approx(loss / (len(ids) - 1), rel=1e-6)


@pytest.mark.parametrize("vocab_size", [257, 320])
def test_the_same_greedy_tokens(in_tmp, vocab_size):
    """Also where ids beyond the tokenizer's, which have no meaning, would have the largest logits."""

    def varied(model: GPT) -> None:
        model.transformer.wpe.weight *= 10
        model.lm_head.weight[257:] *= 3

    model = save_run(vocab_size=vocab_size, tie_weights=False, context_length=64, alter=varied)
    export_here()
    prompt = list(b"First Cit")
    options = SamplingConfig(greedy=True)
    expected = generate(Decoder(model), prompt, 50, options, n_vocab=257)
    other, ids = transformers_model("out/r/hugging_face"), torch.tensor([prompt])
    got = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, temperature=None, top_k=None)
    assert got[0, len(prompt) :].tolist() == expected
    assert len(set(expected)) > 5
    free = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, suppress_tokens=None)
    assert (free.max() > 256) == (vocab_size > 257)


def test_generation_defaults_are_those_of_infer(in_tmp):
    save_run()
    export_here()
    settings = transformers.GenerationConfig.from_pretrained("out/r/hugging_face")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.eos_token_id) == (True, 0.8, 0, 256)
    assert settings.suppress_tokens is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions(in_tmp, dtype):
    model = save_run(bias=False)
    export_here("--dtype", dtype)
    other = transformers_model("out/r/hugging_face", dtype="auto")
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
    model = save_run()
    export_here("--context_length", 16)
    other = transformers_model("out/r/hugging_face")
    assert (other.config.n_positions, other.config.n_ctx, len(other.transformer.wpe.weight)) == (16, 16, 16)
    assert difference(model, other, 16) < 1e-4
    assert transformers.AutoTokenizer.from_pretrained("out/r/hugging_face").model_max_length == 16


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False, "vocab_size": 300, "mlp_ratio": 1.3}, {"bias": False}, {"attn_bias": False}]
)
def test_round_trip(in_tmp, changes):
    model = save_run(**changes)
    export_here()
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


def test_an_export_of_an_export_is_the_same(in_tmp):
    save_run(tie_weights=False)
    export_here("--out", "once")
    export_here("--model_path", "once", "--out", "twice")
    for name in HUGGING_FACE_FILES - {"README.md"}:
        assert Path("once", name).read_bytes() == Path("twice", name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------------------------
# the model card


def test_card_of_a_run(tiny_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_home)
    export_here("--out", tmp_path / "hf")
    text, data = (tmp_path / "hf/README.md").read_text(), huggingface_hub.ModelCard.load(tmp_path / "hf/README.md").data
    assert (data.library_name, data.model_name) == ("transformers", "quickstart")
    assert "# `quickstart`" in text
    _, state = checkpoint.find("out/quickstart", print)
    rows = Path("out/quickstart/metrics.csv").read_text().splitlines()
    loss = next(float(line.split(",")[4]) for line in rows if line.startswith(f"{state['iter']},"))
    assert f"- val_loss: `{loss:.4f}`" in text
    found = {result.metric_type: (result.dataset_name, result.dataset_split) for result in data.eval_results}
    assert found == dict.fromkeys(("loss", "perplexity"), ("tiny", "val"))
    assert data.eval_results[0].metric_value == pytest.approx(loss, abs=1e-4)
    assert str(tiny_home) not in text
    assert "data_dir" not in text
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.partition("```toml\n")[2].partition("```")[0])
    again = json.loads(json.dumps(dataclasses.asdict(cli.parse(TrainConfig, ["--config", str(recipe)]))))
    local = {*export.LOCAL, "resume", "overwrite", "plan", "gpus", "mfu"}
    trained = state["config"]
    assert {k: v for k, v in again.items() if k not in local} == {k: v for k, v in trained.items() if k not in local}


def test_recipe_does_not_identify_the_machine():
    paths = {"config": "/home/me/a.toml", "data_dir": "/home/me/data", "out_dir": "/home/me/out"}
    settings = TrainConfig(**paths, init_from="/home/me/old", wandb_project="hidden", wandb="online", lr=0.5)
    text = export.run_recipe({"config": {**dataclasses.asdict(settings), "of_another_version": 1}})
    assert "lr = 0.5\n" in text
    assert not any(word in text for word in ("/home", "hidden", "online", "of_another_version"))


@pytest.mark.parametrize(
    ("words", "title"),
    [((), "r"), (("--push", "me/thing"), "thing"), (("--model_path", "hf"), "hf"), (("--out_dir", "out/r"), "r")],
)
def test_title(in_tmp, words, title):
    save_run()
    export_here("--out", "hf")
    config = cli.parse(ExportConfig, list(words))
    assert export.title(config, loading.find(config.model_path or "out/r", print)) == title


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "full"], "out = full already exists.* move it away, or give another --out"),
        (["--out", "full", "--dry_run"], "out = full already exists"),
        (["--out", "file"], "out = file already exists"),
        (["--out", "file/hf"], "out = file/hf: cannot be written: Not a directory"),
        (["--context_length", T + 1], "context_length = 33: .* take at most that"),
        (["--push", "gpt2"], "push = gpt2: "),
        (["--private"], "private .*--push"),
        (["--model_path", "copied"], "copied is not in a run's folder, .*: give --out FOLDER"),
        (["--model_path", "hf"], "hf is not in a run's folder"),
        (["--model_path", "nothing/here/at/all"], "no such folder"),
        (["--model_path", "rope"], "rope.* cannot be exported: position = rope: Hugging Face's GPT-2 has"),
        (["--model_path", "rope", "--dry_run"], "position = rope: .*; head_bias = true: Hugging Face's GPT-2 has"),
        # 1e5 fits into bfloat16 only
        (["--out", "half", "--dtype", "float16"], "ln_f.weight has NaN or infinite .* float16: .*--dtype bfloat16"),
    ],
)
def test_refusals(in_tmp, words, message):
    save_run("rope", position="rope", head_bias=True, tie_weights=False)
    save_run(alter=lambda model: model.transformer.ln_f.weight.fill_(1e5))
    Path("full").mkdir()
    for file in ("full/mine.txt", "file"):
        Path(file).write_text("mine")
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    export_here("--out", "hf", "--dtype", "bfloat16")
    refused(message, *words)


def test_output_folders(in_tmp, monkeypatch):
    """A new one with its parents, an empty one, a link to an empty one, and the current folder."""
    save_run()
    for folder in ("empty", "disk", "here", ".a.partial"):
        Path(folder).mkdir()
    Path(".a.partial/train_state.pt").write_text("left by a killed process")
    Path("link").symlink_to("disk")
    for folder in ("empty", "a", "b/c/d/", "link"):
        export_here("--out", folder)
        assert files_in(folder) == HUGGING_FACE_FILES
    assert Path("link").is_symlink()
    assert {path.name for path in Path("b/c").iterdir()} == {"d"}
    assert not Path(".a.partial").exists()
    assert len({path.stat().st_mode & 0o777 for path in Path("empty").iterdir()}) == 1  # not for the owner alone
    monkeypatch.chdir("here")
    export_here("--model_path", in_tmp / "out/r", "--out", ".")
    assert files_in(in_tmp / "here") == HUGGING_FACE_FILES


@pytest.mark.parametrize("words", [("--out", "hf"), ("--push", "me/thing")])
def test_a_full_disk_leaves_nothing(in_tmp, monkeypatch, words):
    save_run()
    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    before = sorted(in_tmp.rglob("*"))
    message = r"could not be written: .*File too large.*; 0.1 MB are needed, [\d,.]+ MB are free; nothing is kept"
    with small_files(4096), pytest.raises(UserError, match=message):
        export_here(*words)
    assert sorted(in_tmp.rglob("*")) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_error_in_the_last_file_leaves_nothing(in_tmp, monkeypatch, fault):
    save_run()
    before, written, real = sorted(in_tmp.rglob("*")), [], Path.write_bytes

    def write_bytes(path, content):
        assert not Path("hf").exists()  # a killed process leaves no incomplete folder of this name
        written.append(path)
        if path.name == "README.md":
            raise fault
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else UserError):
        export_here("--out", "hf")
    assert len(written) == len(HUGGING_FACE_FILES) - 1
    assert sorted(in_tmp.rglob("*")) == before


def test_folder_has_its_name_when_all_files_are_on_the_disk(in_tmp, monkeypatch):
    on_disk, renamed, rename = set(), [], os.rename

    def move(old, new):
        assert {path.stat().st_ino for path in Path(old).iterdir()} <= on_disk
        renamed.append(Path(new).name)
        rename(old, new)

    save_run()
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "rename", move)
    export_here("--model_path", "out/r", "--out", "exported")
    assert renamed == ["exported"]
    assert files_in("exported") == HUGGING_FACE_FILES


# ---------------------------------------------------------------------------------------------------------------------
# what is printed and uploaded


def test_table_and_dry_run(in_tmp, monkeypatch, capsys):
    save_run()
    monkeypatch.setattr(export.hub, "upload", None)
    before = sorted(in_tmp.rglob("*"))
    export_here("--dry_run", "--push", "me/thing", "--private", "--out", "hf")
    assert sorted(in_tmp.rglob("*")) == before
    dry = capsys.readouterr().out
    assert dry.startswith("would be written to hf and me/thing on the hub, private if it is new:\n")
    monkeypatch.setattr(export.hub, "upload", lambda *args: "https://hub/me/thing")
    export_here("--push", "me/thing", "--private", "--out", "hf")
    real = capsys.readouterr().out
    assert real.endswith("uploaded: https://hub/me/thing\n")
    assert set(table_rows(dry)) == set(table_rows(real)) == HUGGING_FACE_FILES | {"together"}
    for name in HUGGING_FACE_FILES - {"model.safetensors"}:
        assert table_rows(dry)[name] == table_rows(real)[name] == f"{Path('hf', name).stat().st_size:,} bytes"
    sizes = {path.name: path.stat().st_size for path in Path("hf").iterdir()}
    assert table_rows(real)["together"] == f"{sum(sizes.values()) / 1e6:,.2f} MB"
    assert table_rows(real)["model.safetensors"] == f"{sizes['model.safetensors'] / 1e6:,.2f} MB"


def test_printed_python_lines_run(in_tmp, capsys):
    save_run()
    export_here("--out", "it's")
    lines = capsys.readouterr().out.partition("Next, in Python:\n")[2].partition("or in a shell")[0].splitlines()
    exec("\n".join(line.strip() for line in lines).replace("max_new_tokens=100", "max_new_tokens=3"))
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize("keep", [True, False])
def test_push_uploads_the_written_files(in_tmp, monkeypatch, host, keep):
    """Without --out nothing stays on the disk."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the host serves plain HTTP
    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    model, before = save_run(), sorted(in_tmp.rglob("*"))
    export_here("--push", "user/thing", "--private", *(["--out", "hf"] if keep else []))
    uploaded = {name: body for name, body in host.files("user/thing").items() if name != ".gitattributes"}
    assert set(uploaded) == HUGGING_FACE_FILES
    assert host.created == {"user/thing": "private"}
    assert len(host.commits) == 1
    if keep:
        assert {name: Path("hf", name).read_bytes() for name in HUGGING_FACE_FILES} == uploaded
    else:
        assert sorted(in_tmp.rglob("*")) == before
    Path("fetched").mkdir()
    for name, content in uploaded.items():
        Path("fetched", name).write_bytes(content)
    assert difference(model, transformers_model("fetched")) < 1e-4
    assert "user/thing" in uploaded["README.md"].decode()


def test_config_has_no_unknown_keys():
    """transformers keeps a misspelt key without an error."""
    ours = huggingface.hugging_face_config(ModelConfig(vocab_size=257), 256, "float32")
    known = {f.name for f in dataclasses.fields(transformers.GPT2Config)} | {"torch_dtype", "n_ctx", "model_type"}
    assert set(ours) <= known
    assert json.loads(json.dumps(ours)) == ours
