"""model.py against transformers: logits, loss, greedy text, names of weights."""

import pytest
import torch
from random_models import random_ids, small_model

from model import GPT

transformers = pytest.importorskip("transformers")

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
SHAPES = [
    {},
    {"tie_weights": False},
    {"attention": "manual"},
    {"activation": "gelu", "mlp_ratio": 2.5},
    {"activation": "relu", "mlp_ratio": 2.74},  # 87.68 -> 88
    {"n_layer": 1, "n_head": 1, "vocab_size": 64},  # without padding
    {"n_layer": 3, "n_head": 3, "n_embd": 57, "vocab_size": 257},  # heads of 19 channels, as in GPT2's 57
    {"context_length": 40, "vocab_size": 130, "tie_weights": False},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_same_as_transformers(changes):
    model = small_model(**changes)
    c = model.config
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_inner=round(c.mlp_ratio * c.n_embd),
            activation_function=ACTIVATIONS[c.activation],
            n_positions=c.context_length,
            vocab_size=c.vocab_size,
            tie_word_embeddings=c.tie_weights,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = model.state_dict()
    names = {n for n in reference.state_dict() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    assert set(weights) == names - ({"lm_head.weight"} if c.tie_weights else set())
    for name, p in reference.named_parameters():  # Conv1D's matrices lie (in, out), the vocabulary has no padding
        p.copy_(weights[name].T if "c_" in name and p.dim() == 2 else weights[name][: p.size(0)])
    ids = random_ids(length=c.context_length, vocab_size=c.vocab_size)
    answer = reference(ids, labels=ids)  # labels are shifted inside
    assert (model(ids) - answer.logits).abs().max() < 1e-4
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(answer.loss.item(), abs=1e-5)
    settings = {"max_new_tokens": c.context_length - 3, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(ids[:, :3], attention_mask=torch.ones_like(ids[:, :3]), **settings)
    assert torch.equal(model.generate(ids[:, :3], c.context_length - 3, greedy=True), expected)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_from_pretrained_reads_a_folder_of_transformers(tie_weights, tmp_path):
    """Into GPT and into a subclass of it."""

    class Scaled(GPT):
        def adjust_logits(self, logits):
            return 2 * logits

    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 12, "initializer_range": 0.5}
    config = transformers.GPT2Config(**shape, tie_word_embeddings=tie_weights, attn_implementation="eager")
    reference = transformers.GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path)
    model, scaled = (cls.from_pretrained(str(tmp_path)) for cls in (GPT, Scaled))
    assert not model.training
    ids = random_ids(2, 12, vocab_size=50257)
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(scaled(ids), 2 * expected, rtol=0, atol=2e-3)
