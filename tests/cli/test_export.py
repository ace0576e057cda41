"""export.py: folders against transformers itself, refused models and options, errors while writing, and uploads."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from exported import HUGGING_FACE_FILES, T, export_here, files_in, refused, save_run, table_rows
from hub_host import WRITER
from random_models import generate

import export
import model
from config import SamplingConfig, TrainConfig, UserError
from flatgpt.cli.settings import parse
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import Decoder
from flatgpt.interop import loading
from flatgpt.kernels.attention import attention
from model import GPT

EXPORTED = Path("out/r/hugging_face")


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
    {"bias": False, "tie_weights": False},
    {"bias": False, "attn_bias": True},
    {"attn_bias": False, "activation": "relu", "mlp_ratio": 2.0},
    {"activation": "gelu", "mlp_ratio": 1.0},  # MLP matrices are square
    {"vocab_size": 320, "tie_weights": False, "dropout": 0.5, "n_head": 4},
    {"mlp_ratio": 1.3},  # 20.8 hidden units
]


@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_logits_equal_ours(in_tmp, changes):
    """An export of an export is the same."""
    model = save_run(**changes)
    export_here()  # the newest run
    other = transformers_model(EXPORTED)
    assert difference(model, other) < 1e-4
    assert other.dtype == torch.float32
    assert other.config.resid_pdrop == other.config.embd_pdrop == other.config.attn_pdrop == model.config.dropout
    assert (other.lm_head.weight is other.transformer.wte.weight) == model.config.tie_weights
    assert files_in(EXPORTED) == HUGGING_FACE_FILES
    back, ids = loading.load(loading.find(str(EXPORTED)), "cpu")[0], torch.arange(T)[None]
    torch.testing.assert_close(back(ids), model(ids), rtol=0, atol=1e-5)
    export_here("--model_path", EXPORTED, "--out", "twice")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (EXPORTED / name).read_bytes() == Path("twice", name).read_bytes()
    ours = set(json.loads((EXPORTED / "config.json").read_text()))  # transformers keeps a misspelt key without an error
    assert ours - set(transformers.GPT2Config().to_dict()) == {"torch_dtype", "n_ctx"}


@pytest.mark.parametrize(
    ("encoding", "changes", "for_llama_cpp"),
    [
        ("gpt2", {}, True),
        ("gpt2", {"activation": "gelu"}, False),
        ("gpt2", {"mlp_ratio": 2.0}, False),
        ("byte", {}, False),
    ],
)
def test_tokenizer_and_the_programs_that_are_suggested(in_tmp, capsys, encoding, changes, for_llama_cpp):
    ours, text = tokenizer.load(encoding), "Naïve café, 東京!"
    save_run(encoding=encoding, vocab_size=ours.n_vocab, **changes)
    export_here()
    tokens = transformers.AutoTokenizer.from_pretrained(EXPORTED)
    assert tokens(text).input_ids == ours.encode_ordinary(text)
    assert (tokens.model_max_length, tokens.eos_token_id) == (T, ours.eot_token)
    printed = capsys.readouterr().out
    assert "lm_eval" in printed
    assert (f"convert_hf_to_gguf.py {EXPORTED}" in printed) == for_llama_cpp


@pytest.mark.parametrize("vocab_size", [257, 320])
def test_the_same_greedy_tokens(in_tmp, vocab_size):
    """Also where ids beyond the tokenizer's, which have no meaning, would have the largest logits."""

    def varied(model: GPT) -> None:
        model.transformer.wpe.weight *= 10
        model.lm_head.weight[257:] *= 3

    model = save_run(vocab_size=vocab_size, tie_weights=False, context_length=64, alter=varied)
    export_here()
    prompt = list(b"First Cit")
    expected = generate(Decoder(model), prompt, 50, SamplingConfig(greedy=True), n_vocab=257)
    other, ids = transformers_model(EXPORTED), torch.tensor([prompt])
    settings = other.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.eos_token_id) == (True, 0.8, 0, 256)
    got = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, temperature=None, top_k=None)
    assert got[0, len(prompt) :].tolist() == expected
    assert len(set(expected)) > 5
    free = other.generate(ids, do_sample=False, max_new_tokens=50, eos_token_id=None, suppress_tokens=None)
    assert (free.max() > 256) == (vocab_size > 257)


@pytest.mark.extra("ctranslate2")
@pytest.mark.parametrize(
    ("encoding", "changes"),
    [
        ("byte", {}),
        ("byte", {"activation": "gelu", "mlp_ratio": 2.0, "bias": False, "tie_weights": False}),
        ("gpt2", {}),
    ],
)
def test_ctranslate2_converts_the_folder_and_writes_the_same_greedy_tokens(in_tmp, encoding, changes):
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    def varied(model: GPT) -> None:
        model.transformer.wpe.weight *= 10

    ours = tokenizer.load(encoding)
    model = save_run(encoding=encoding, vocab_size=ours.n_vocab, context_length=64, alter=varied, **changes)
    export_here()
    TransformersConverter(str(EXPORTED)).convert("converted")
    prompt = ours.encode_ordinary("First Cit")
    expected = generate(Decoder(model), prompt, 40, SamplingConfig(greedy=True))
    tokens = transformers.AutoTokenizer.from_pretrained(EXPORTED).convert_ids_to_tokens(prompt)
    settings = {"min_length": 40, "max_length": 40, "include_prompt_in_result": False}
    (result,) = Generator("converted", compute_type="float32").generate_batch([tokens], **settings)
    assert result.sequences_ids[0] == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_precision_and_a_shorter_context(in_tmp, dtype):
    model = save_run(bias=False)
    export_here("--dtype", dtype, "--context_length", 16)
    other = transformers_model(EXPORTED, dtype="auto")
    assert (other.dtype, other.config.n_ctx, len(other.transformer.wpe.weight)) == (getattr(torch, dtype), 16, 16)
    assert difference(model.to(other.dtype).float(), other.float(), 16) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "full"], "full already exists.* move it, or"),
        (["--out", "file", "--dry_run"], "file already exists"),
        (["--out", "file/hf"], "file/hf cannot be written: Not a directory"),
        (["--context_length", T + 1], "context_length = 33: .* which is the maximum"),
        (["--push", "gpt2"], "push = gpt2: "),
        (["--private"], "private .*--push"),
        (["--model_path", "hf"], "hf is not in a run's folder, .*: give --out FOLDER"),
        (["--model_path", "nothing/here/at/all"], "no such folder"),
        (["--model_path", "rope", "--dry_run"], "position = rope: .*; head_bias = true: Hugging Face's GPT-2 has"),
        # 1e5 fits into bfloat16 only
        (["--out", "half", "--dtype", "float16"], "ln_f.weight has NaN or infinite .* float16: .*--dtype bfloat16"),
    ],
)
def test_refusals(in_tmp, words, message):
    save_run("rope", position="rope", head_bias=True, tie_weights=False)
    save_run(alter=lambda model: model.transformer.ln_f.weight.fill_(1e5))
    Path("full/file").mkdir(parents=True)
    Path("file").touch()
    export_here("--out", "hf", "--dtype", "bfloat16")
    refused(message, *words)


class ScaledResidual(model.Block):
    def forward(self, x, rope=None, cache=None):
        x = x + 0.5 * self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class WithoutMean(torch.nn.LayerNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps) + self.bias


class WithGain(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gain = torch.nn.Parameter(torch.ones(config.n_embd))


class ScaledEmbedding(torch.nn.Embedding):
    def forward(self, ids):
        return 4 * super().forward(ids)


class GatedMLP(model.MLP):
    def __init__(self, config):
        super().__init__(config)
        self.c_fc = torch.nn.Linear(config.n_embd, 8 * config.n_embd)

    def forward(self, x):
        gate, y = self.c_fc(x).chunk(2, -1)
        return self.c_proj(self.activation(gate) * y)


def scaled_attention(q, *rest):
    return attention(q / q.size(-1) ** 0.5, *rest)


def window_attention(q, k, v, *_):
    """The last position but one sees all tokens, the last one only itself."""
    y = attention(q, k, v)
    y[:, :, -1] = v[:, :, -1]
    return y


EDITS = {  # the changed name in model.py, its new value, and the difference that is named
    "RMSNorm": ("nn.LayerNorm", lambda C, bias: torch.nn.RMSNorm(C), "differ at transformer.h.0.ln_1"),
    "no mean": ("nn.LayerNorm", WithoutMean, "differ at transformer.h.0.ln_1"),
    "residual": ("Block", ScaledResidual, "differ at transformer.h.0.ln_2"),
    "parameter": ("Block", WithGain, "GPT-2 has no transformer.h.0.gain"),
    "gate": ("MLP", GatedMLP, r"mlp.c_fc.weight is \(16, 128\), in GPT-2 it is \(16, 64\)"),
    "embedding": ("nn.Embedding", ScaledEmbedding, "differ at transformer.drop"),
    "attention": ("attention", scaled_attention, "differ at transformer.h.0.attn.c_proj"),
    "window": ("attention", window_attention, "differ at transformer.h.0.attn.c_proj"),
    "activation": ("ACTIVATIONS", {"gelu_tanh": torch.nn.SiLU}, "differ at transformer.h.0.mlp.c_proj"),
    "soft-cap": ("GPT.adjust_logits", lambda self, logits: 15 * torch.tanh(logits / 15), "differ at logits"),
    "logits": ("GPT.compute_logits", lambda self, x: self.lm_head(x)[..., :257] / 2, "differ at logits"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_refused_by_what_differs(in_tmp, monkeypatch, edit):
    """Its weights would load as GPT-2 and give other logits. --no-verify exports them."""
    name, value, message = EDITS[edit]
    monkeypatch.setattr(f"model.{name}", value)
    save_run()
    refused(f"^out/r/ckpt/iter_000007 .*{message}", "--out", "hf")
    refused(message, "--push", "me/thing", "--dtype", "bfloat16")
    export_here("--out", "hf", "--no-verify")
    assert files_in("hf") == HUGGING_FACE_FILES
    assert "were not compared with the model" in Path("hf/README.md").read_text()


def test_output_folders(in_tmp, monkeypatch):
    """A new one with its parents, one that a killed process left, an empty one by a link, and the current folder."""
    save_run()
    for folder in ("disk", "here", ".a.00000001.partial/flatgpt", ".a.00000002.partial/flatgpt"):
        Path(folder).mkdir(parents=True)
    os.utime(".a.00000001.partial", (0, 0))
    Path("link").symlink_to("disk")
    for folder in ("a", "b/c/d/", "link"):
        export_here("--out", folder)
        assert files_in(folder) == HUGGING_FACE_FILES
    assert Path("link").is_symlink()
    assert [path.name for path in Path().glob(".a.*")] == [".a.00000002.partial"]  # of a process that is writing
    assert len({path.stat().st_mode & 0o777 for path in Path("a").iterdir()}) == 1  # not for the owner alone
    monkeypatch.chdir("here")
    export_here("--model_path", in_tmp / "out/r", "--out", ".")
    assert files_in(in_tmp / "here") == HUGGING_FACE_FILES


@pytest.mark.parametrize("words", [("--out", "hf"), ("--push", "me/thing")])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_an_error_while_writing_leaves_nothing(in_tmp, monkeypatch, fault, words):
    save_run()
    before = sorted(in_tmp.rglob("*"))

    def write_bytes(path, content):
        assert not Path("hf").exists()  # a killed process leaves no incomplete folder of this name
        raise fault

    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises((UserError, KeyboardInterrupt), match=r"^$|No space left on device; 0.1 MB are needed"):
        export_here(*words)
    assert sorted(in_tmp.rglob("*")) == before


def test_two_exports_into_one_folder(in_tmp, monkeypatch):
    """The one that ends first is kept, the other is an error, and neither has the other's files."""
    save_run()

    def other_export(source, expected, space, folder):
        (folder / "mine").touch()
        export_here("--out", "hf", "--no-verify")

    monkeypatch.setattr(export, "verify", other_export)
    with pytest.raises(UserError, match="hf cannot be written: Directory not empty"):
        export_here("--model_path", "out/r", "--out", "hf")
    assert files_in("hf") == HUGGING_FACE_FILES
    assert not [*Path().glob(".hf.*")]


def test_weights_whose_logits_are_nan_are_the_same(in_tmp):
    save_run(alter=lambda model: [parameter.mul_(1e19) for parameter in model.parameters()])
    export_here("--out", "hf")
    assert files_in("hf") == HUGGING_FACE_FILES


def test_folder_has_its_name_when_all_files_are_on_the_disk(in_tmp, monkeypatch):
    save_run()
    on_disk, rename = set(), os.rename

    def move(old, new):
        assert {path.stat().st_ino for path in Path(old).iterdir()} <= on_disk
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: on_disk.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "rename", move)
    export_here("--model_path", "out/r", "--out", "exported")
    assert files_in("exported") == HUGGING_FACE_FILES


# ---------------------------------------------------------------------------------------------------------------------
# what is printed and uploaded


def test_card_has_a_recipe_that_trains_the_same_model(in_tmp):
    save_run(lr=0.5, data_dir="/home/me/data", init_from="/home/me/old", wandb="offline")
    export_here()
    text = (EXPORTED / "README.md").read_text()
    assert "# `r`" in text
    assert "- val_loss: `5.1250`" in text
    Path("recipe.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    again = parse(TrainConfig, ["--config", "recipe.toml"])
    assert (again.lr, again.n_embd, again.data_dir, again.init_from, again.wandb) == (0.5, 16, "data", None, "disabled")


def test_printed_lines(in_tmp, capsys):
    """--dry_run prints what would be written, and writes nothing. The Python lines run."""
    save_run()
    before, out = sorted(in_tmp.rglob("*")), Path("it's")
    export_here("--dry_run", "--push", "me/thing", "--private", "--out", out)
    dry = capsys.readouterr().out
    assert dry.startswith("would be written to it's and me/thing on the hub, private if it is new:\n")
    assert sorted(in_tmp.rglob("*")) == before
    export_here("--out", out)
    real = capsys.readouterr().out
    assert set(table_rows(dry)) == set(table_rows(real)) == HUGGING_FACE_FILES | {"total"}
    assert table_rows(dry)["config.json"] == f"{(out / 'config.json').stat().st_size:,} bytes"
    lines = real.partition("Next, in Python:\n")[2].partition("or in a shell")[0].splitlines()
    exec("\n".join(line.strip() for line in lines).replace("max_new_tokens=100", "max_new_tokens=3"))
    assert capsys.readouterr().out.startswith("The ")


def test_push_uploads_the_files_and_leaves_nothing(in_tmp, monkeypatch, host, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the host serves plain HTTP
    monkeypatch.setattr(export.tempfile, "tempdir", str(in_tmp))
    save_run()
    before = sorted(in_tmp.rglob("*"))
    export_here("--push", "user/thing", "--private")
    assert sorted(in_tmp.rglob("*")) == before
    assert capsys.readouterr().out.endswith("/user/thing\n")
    uploaded = host.files("user/thing")
    assert set(uploaded) - {".gitattributes"} == HUGGING_FACE_FILES
    assert (host.created, len(host.commits)) == ({"user/thing": "private"}, 1)
    assert "# `thing`" in uploaded["README.md"].decode()
    export_here("--out", "hf")
    assert Path("hf/model.safetensors").read_bytes() == uploaded["model.safetensors"]
