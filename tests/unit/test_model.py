"""model.py against torch's own functions, arithmetic by hand and a copy in float64; parity/ has transformers."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from random_models import SMALL, T, V, random_ids, small_model
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig, SamplingConfig
from flatgpt.evaluation.metrics import mean_loss, token_statistics
from flatgpt.inference.decoder import Decoder, KVCache
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import generate_batch
from flatgpt.kernels import cross_entropy
from flatgpt.runs.history import gpt2_parameters
from model import GPT

B = 3
GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257)
IDS, TARGETS = random_ids(seed=1), random_ids(seed=2)
HEADS = pytest.mark.parametrize(
    "head", [{}, {"tie_weights": False}, {"tie_weights": False, "head_bias": True}], ids=["tied", "untied", "biased"]
)
POSITIONS = pytest.mark.parametrize("position", ["learned", "rope"])


def fresh(**changes) -> GPT:
    """A small model as training starts it."""
    torch.manual_seed(0)
    return GPT(dataclasses.replace(SMALL, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# sizes, initial weights, storage


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 124_439_808),  # OpenAI's "124M"
        ({"vocab_size": 50304}, 124_439_808 + 47 * 768),
        ({"tie_weights": False}, 124_439_808 + 50257 * 768),
        ({"tie_weights": False, "head_bias": True}, 124_439_808 + 50257 * 769),
        ({"position": "rope"}, 124_439_808 - 1024 * 768),
        # per block 9 C of biases in Linear and 2 C in LayerNorm, and ln_f's C
        ({"bias": False}, 124_439_808 - (12 * 11 + 1) * 768),
        ({"attn_bias": False}, 124_439_808 - 12 * 4 * 768),
        ({"bias": False, "attn_bias": True}, 124_439_808 - (12 * 7 + 1) * 768),
    ],
)
def test_number_of_parameters(changes, parameters):
    """Also counted from the tensors, of which the head's and the embedding's have rows of padding."""
    model = GPT.on_meta_device(dataclasses.replace(GPT2, **changes))
    V = model.config.vocab_size
    tensors = list(model.parameters())
    assert {p.device.type for p in tensors} == {"meta"}
    rows = [V if p.size(0) == 50304 else p.size(0) for p in tensors]
    assert sum(n * p[0].numel() for n, p in zip(rows, tensors, strict=True)) == parameters
    assert model.num_params() == gpt2_parameters(model.config) == parameters


@pytest.mark.parametrize("tie_weights", [True, False])
def test_flops_per_token_equal_what_torch_counts(tie_weights):
    """torch counts matrix products only, the formula every parameter but the tables: vectors are the difference."""
    model = fresh(vocab_size=64, tie_weights=tie_weights, attention="manual", mlp_ratio=3.0)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    with FlopCounterMode(display=False) as counter:
        model(IDS, TARGETS).backward()
    assert counter.get_total_flops() == B * T * (model.flops_per_token() - 6 * vectors)
    # 6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024: a table of positions costs nothing
    assert GPT.on_meta_device(GPT2).flops_per_token() == 741_920_256 + 113_246_208


@HEADS
def test_initial_weights(head):
    """GPT-2's: 0.02, and 0.02 / sqrt(2 n_layer) = 0.005 for what is added to the residual stream."""
    model = fresh(n_layer=8, n_embd=64, **head)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = 0.005 if "c_proj" in name else 0.02
            assert p[:V].std().item() == pytest.approx(expected, rel=0.08), name
            assert abs(p[:V].mean()) < 0.1 * expected, name
    assert not model.lm_head.weight[V:].any()
    assert model(IDS, TARGETS).item() == pytest.approx(math.log(V), abs=0.1)  # a guess among the real ids


@HEADS
@pytest.mark.parametrize("how", ["copy", "assign", "assign on meta", "deepcopy", "pickle"])
def test_a_tied_head_is_one_parameter_stored_once(head, how):
    """Also of a state dict in which both names are, as transformers has them; copies are independent."""
    model, new, tied = small_model(**head), small_model(seed=1, **head), not head
    weights, before = {name: t.clone() for name, t in new.state_dict().items()}, model(IDS)
    assert ("lm_head.weight" in weights) is not tied
    assert len(list(model.parameters())) == len(weights)
    both_names = {"lm_head.weight": weights["transformer.wte.weight"].clone()} if tied else {}
    for more in ({}, both_names):
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
        other = copies.get(how, lambda model: small_model(seed=2, **head))(model)
        other = GPT.on_meta_device(model.config).eval() if how == "assign on meta" else other
        other.load_state_dict(weights | more, assign=how != "copy")
        assert (other.lm_head.weight is other.transformer.wte.weight) is tied
        assert torch.equal(other(IDS), new(IDS))
        other(IDS, TARGETS).backward()
        assert all(p.grad is not None for p in other.parameters())
    other = other.double()
    assert (other.lm_head.weight is other.transformer.wte.weight) is tied
    assert torch.equal(model(IDS), before)
    with pytest.raises(RuntimeError, match=r"transformer\.wte\.weight"):
        other.load_state_dict({name: t for name, t in weights.items() if "wte" not in name})


# ---------------------------------------------------------------------------------------------------------------------
# logits and loss


def test_targets_of_minus_one_are_not_scored(monkeypatch):
    """Of the losses of each token, which are computed in chunks."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 5)
    model, targets = small_model(), TARGETS.clone()
    targets[0, 5:] = -1
    targets[2, ::2] = -1
    log_probs = model(IDS).detach().double().log_softmax(-1)
    losses = -log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    found = model(IDS, targets, reduction="none")
    torch.testing.assert_close(found.double(), losses.flatten(), rtol=1e-5, atol=1e-6)
    assert not found[targets.flatten() < 0].any()


@pytest.mark.parametrize("autocast", [True, False])
def test_loss_is_float32_where_products_are_bfloat16(autocast):
    model = small_model() if autocast else small_model().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(IDS).dtype == torch.bfloat16
        assert model(IDS, TARGETS).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# adjust_logits


class Capped(GPT):
    def adjust_logits(self, logits):
        return 15 * torch.tanh(logits / 15)


class Scaled(GPT):
    """With a parameter, for which the fused loss has no gradient."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def adjust_logits(self, logits):
        return self.scale * logits


def plain_logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """Logits, (B, T, V), by plain operators, without the vocabulary's padding."""
    logits = F.linear(model.hidden_states(ids), model.lm_head.weight, model.lm_head.bias)
    return model.adjust_logits(logits[..., : model.config.vocab_size])


@HEADS
@pytest.mark.parametrize("model_class", [GPT, Capped, Scaled])
@pytest.mark.parametrize("vocab_size", [V, 50_000], ids=["plain loss", "fused loss"])
def test_loss_and_gradients_are_those_of_plain_operators(vocab_size, model_class, head):
    """In float64; some logits are near the soft cap. The fused loss is for training on large batches."""
    ids, targets = random_ids(vocab_size=vocab_size), random_ids(seed=2, vocab_size=vocab_size)
    targets[1, 3:6] = -1
    model, used = small_model(model_class=model_class, std=1.0, vocab_size=vocab_size, **head), []
    model.fused_loss = lambda *args: used.append(1) or cross_entropy.fused_loss(*args)
    loss = model(ids, targets)
    loss.backward()
    with torch.no_grad():
        assert model(ids, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    assert len(used) == (vocab_size > V)
    reference = copy.deepcopy(model).double()
    logits = plain_logits(reference, ids)
    assert model_class is Scaled or (logits.abs() > 8).double().mean() > 0.01
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    reference.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < 1e-4 * q.grad.abs().max(), name


@HEADS
@torch.no_grad()
def test_soft_cap_changes_evaluation_and_sampling(head):
    """Each token's loss, the figures of eval.py, and the probabilities of infer.py's steps, in int8 too."""
    model = small_model(model_class=Capped, std=1.0, **head)
    logits = plain_logits(model, IDS)
    losses = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none")
    torch.testing.assert_close(model(IDS, TARGETS, reduction="none"), losses)
    batches = [(IDS.numpy(), TARGETS.numpy())]
    assert mean_loss(model, batches, torch.from_numpy) == pytest.approx(losses.mean().item(), rel=1e-5)
    sums = token_statistics(model, batches, torch.from_numpy)
    assert sums["position_loss"].sum() == pytest.approx(losses.sum().item(), rel=1e-5)
    for quantize, tolerance in ((None, 1e-3), ("int8", 4.0)):
        decoder = Decoder(prepack(copy.deepcopy(model), torch.float32, quantize) if quantize else model)
        seen, prompt = [], IDS[0, :4].tolist()
        options = SamplingConfig(temperature=1.0)
        steps = generate_batch(decoder, [prompt], 6, options, on_sample=lambda found, _: seen.append(found[0]))  # noqa: B023
        text = torch.tensor([prompt + [step[0] for step in steps]])
        expected = plain_logits(model, text)[0, 3:9]
        torch.testing.assert_close(torch.stack(seen).float(), expected, rtol=0, atol=tolerance)
        assert max(found.abs().max() for found in seen) <= 15


# ---------------------------------------------------------------------------------------------------------------------
# attention, positions, dropout


def test_dropout_zeroes_its_share_in_training_and_nothing_in_evaluation():
    """Of the embedding, of what each block adds, and of attention's weights."""
    model = small_model(dropout=0.25, n_embd=64, context_length=64)
    ids, seen = random_ids(8, 64), {}
    for name in ("drop", "h.0.attn", "h.1.mlp"):
        module = model.transformer.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (out == 0).float().mean()}))
    torch.testing.assert_close(model(ids), small_model(n_embd=64, context_length=64)(ids))
    assert max(seen.values()) == 0
    model.train()(ids)
    assert [share.item() for share in seen.values()] == pytest.approx([0.25] * 3, abs=0.02)
    attn, x = model.transformer.h[0].attn, torch.randn(1, T, 64)
    attn.resid_dropout.p = 0.0
    assert (attn(x) - attn(x)).abs().max() > 0.05


@POSITIONS
def test_activation_checkpointing_changes_nothing_but_memory(position):
    """With dropout: the second pass through a block has to draw the masks of the first."""
    answers = {}
    for on in (False, True):
        model = small_model(activation_checkpointing=on, dropout=0.2, position=position).train()
        entered = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda m, args, entered=entered: entered.append(1))
        torch.manual_seed(5)
        loss = model(IDS, TARGETS)
        loss.backward()
        assert len(entered) == 1 + on  # once more in the backward pass
        answers[on] = [loss.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(answers[True], answers[False])


# ---------------------------------------------------------------------------------------------------------------------
# cache, text


@POSITIONS
@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("prompt", [1, 5, T])
@torch.no_grad()
def test_logits_with_a_cache_equal_those_without(prompt, attention, position):
    """With one position for all rows, and with one for each row. The order of tokens matters."""
    model = small_model(position=position, attention=attention)
    expected, swapped = model(IDS), model(IDS[:, [1, 0, *range(2, T)]])
    assert (swapped - expected)[:, -1].abs().max() > 1e-3
    for positions in (lambda t: t, lambda t: torch.full((B,), t)):
        cache = KVCache(model.config, B, T, torch.float32, torch.device("cpu"))
        found = [model(IDS[:, :prompt], cache=cache)]
        for t in range(prompt, T):
            cache.position = positions(t)
            found.append(model(IDS[:, t : t + 1], cache=cache))
        torch.testing.assert_close(torch.cat(found, dim=1), expected[:, prompt - 1 :], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens are more than context_length = 16"):
        model(random_ids(length=T + 1))


@torch.no_grad()
def test_forgotten_position_of_a_cache_is_an_error():
    model = small_model()
    cache = KVCache(model.config, B, T, torch.float32, torch.device("cpu"))
    model(IDS[:, :5], cache=cache)
    with pytest.raises(ValueError, match="before each forward pass"):
        model(IDS[:, 5:6], cache=cache)
    for position in (5, torch.full((B,), 5)):
        cache.position = position
        with pytest.raises(ValueError, match="2 tokens after cached tokens"):
            model(IDS[:, 5:7], cache=cache)


def test_generate_is_what_the_scripts_sample():
    """Beyond the context too; settings change the text, the model's mode and the prompt stay."""
    model = small_model().train()
    prompt, texts = IDS[:, :5], []
    for settings in ({"greedy": True}, {"seed": 1, "top_k": 2}, {"seed": 2, "temperature": 2.0}):
        found = model.generate(prompt, 20, **settings)
        assert (found.shape, found.dtype) == ((B, 25), torch.int64)
        assert torch.equal(found[:, :5], prompt)
        steps = generate_batch(Decoder(model), prompt.tolist(), 20, SamplingConfig(**settings))
        assert found[:, 5:].T.tolist() == list(steps)
        texts.append(found.tolist())
    assert all(texts.count(text) == 1 for text in texts)
    assert model.training
    assert torch.equal(model.generate(prompt, 0), prompt)
    for settings in ({"temperature": math.nan}, {"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} = .* is expected"):
            model.generate(prompt, 1, **settings)
    with pytest.raises(TypeError, match="temprature"):
        model.generate(prompt, 1, temprature=1.0)
    with pytest.raises(ValueError, match="leave out top_k"):
        model.generate(prompt, 1, greedy=True, top_k=3)
