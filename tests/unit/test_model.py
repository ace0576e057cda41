"""model.py against transformers, torch's own functions and arithmetic by hand."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from processes import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from config import ModelConfig
from flatgpt.kernels import cross_entropy
from model import GPT, KVCache, RotaryEmbedding, causal_attention, fused_attention, manual_attention, rotate

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257)
B, T, V = 3, 16, 50  # V is no multiple of 64: the vocabulary is padded inside
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
KINDS = [
    {"position": position, "attention": attention}
    for position in ("learned", "rope")
    for attention in ("flash", "manual")
]


def config(**changes) -> ModelConfig:
    return dataclasses.replace(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=T, vocab_size=V), **changes)


def fresh(seed: int = 0, **changes) -> GPT:
    """A small model as training starts it."""
    torch.manual_seed(seed)
    return GPT(config(**changes))


def lively(seed: int = 0, **changes) -> GPT:
    """A small model with large random numbers in every parameter, biases and gains too: a mistake in any shows.
    In eval mode."""
    model = fresh(seed, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# parity


def hugging_face(model: GPT):
    """transformers' GPT-2 with the same weights; its Conv1D matrices lie transposed, its vocabulary is not padded."""
    import transformers

    c = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_positions=c.context_length,
            vocab_size=c.vocab_size,
            tie_word_embeddings=c.tie_weights,
            attn_implementation="eager",
        )
    ).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(ours[name].T if "c_" in name and p.dim() == 2 else ours[name][: p.size(0)])
    return theirs


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_logits_and_loss_equal_hugging_faces(attention, tie_weights):
    model = lively(attention=attention, tie_weights=tie_weights)
    theirs = hugging_face(model)
    with torch.no_grad():
        answer = theirs(IDS, labels=IDS)  # labels are shifted inside
        assert (model(IDS) - answer.logits).abs().max() < 1e-4
        assert model(IDS[:, :-1], IDS[:, 1:]).item() == pytest.approx(answer.loss.item(), abs=1e-5)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_state_dict_has_hugging_faces_names(tie_weights):
    model = fresh(tie_weights=tie_weights)
    theirs = {n for n in hugging_face(model).state_dict() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    assert set(model.state_dict()) == theirs - ({"lm_head.weight"} if tie_weights else set())


def test_rope_stores_no_positions():
    assert set(fresh(position="rope").state_dict()) == set(fresh().state_dict()) - {"transformer.wpe.weight"}


# ---------------------------------------------------------------------------------------------------------------------
# sizes


def on_meta(**changes) -> GPT:
    return GPT.on_meta_device(dataclasses.replace(GPT2, **changes))


def test_a_model_without_values_takes_no_memory_and_no_compiler():
    """Random numbers on the meta device import torch._dynamo, which takes a second."""
    assert {p.device.type for p in on_meta(tie_weights=False, head_bias=True).parameters()} == {"meta"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from model import GPT; from config import ModelConfig; "
    code += "GPT.on_meta_device(ModelConfig(vocab_size=99, tie_weights=False)); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


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
    ],
)
def test_number_of_parameters(changes, parameters):
    assert on_meta(**changes).num_params() == parameters


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"position": "rope"}])
def test_flops_per_token_by_hand(changes):
    """6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024; an untied head costs what a tied one costs."""
    assert on_meta(**changes).flops_per_token() == 741_920_256 + 113_246_208


@pytest.mark.parametrize("tie_weights", [True, False])
def test_flops_per_token_equal_what_torch_counts(tie_weights):
    """torch counts matrix products only, the formula every parameter but the tables: vectors are the difference."""
    model = fresh(vocab_size=64, tie_weights=tie_weights, attention="manual", mlp_ratio=3.0)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    with FlopCounterMode(display=False) as counter:
        model(IDS, TARGETS).backward()
    assert counter.get_total_flops() == B * T * (model.flops_per_token() - 6 * vectors)


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary and loss


@pytest.mark.parametrize("tie_weights", [True, False])
def test_first_loss_is_that_of_a_guess_among_the_real_ids(tie_weights):
    """257 ids are padded to 320; ln 257 = 5.549, ln 320 = 5.768."""
    model = fresh(vocab_size=257, tie_weights=tie_weights)
    assert model(IDS, TARGETS).item() == pytest.approx(math.log(257), abs=0.05)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False}, {"tie_weights": False, "head_bias": True}], ids=["tied", "untied", "biased"]
)
def test_padding_of_the_vocabulary_has_no_say(changes):
    model = lively(**changes)
    logits, loss = model(IDS), model(IDS, TARGETS)
    assert logits.shape == (B, T, V)
    loss.backward()
    tables = [p for p in model.parameters() if p.size(0) == 64]
    assert len(tables) == 1 + len(changes)
    for table in tables:
        assert table.grad[:V].any()
        assert not table.grad[V:].any()
        with torch.no_grad():
            table[V:] = 100.0
    assert torch.equal(model(IDS), logits)
    assert torch.equal(model(IDS, TARGETS), loss)
    assert model(IDS, cache=new_cache(model)).shape == (B, 1, V)


def test_targets_of_minus_one_are_not_scored():
    model = lively()
    targets = TARGETS.clone()
    targets[0, 5:] = -1
    targets[2, ::2] = -1
    chances = model(IDS).double().log_softmax(-1)
    losses = [-chances[b, t, targets[b, t]].item() for b in range(B) for t in range(T) if targets[b, t] >= 0]
    assert model(IDS, targets).item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_loss_is_float32_where_products_are_bfloat16(autocast):
    model = lively() if autocast else lively().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(IDS).dtype == torch.bfloat16
        assert model(IDS, TARGETS).dtype == torch.float32


def test_one_batch_can_be_learned_by_heart():
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(IDS, TARGETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# attention and positions


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("t", [1, 7, 15])
def test_no_token_sees_the_future(kind, t):
    model = lively(**kind)
    changed = IDS.clone()
    changed[:, t] = (changed[:, t] + 1) % V
    before, after = model(IDS), model(changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
    assert ((after - before)[:, t:].abs().amax(dim=(0, 2)) > 1e-3).all()  # the past is seen


@pytest.mark.parametrize("bf16", [False, True])
def test_manual_attention_equals_flash(bf16, monkeypatch):
    """530 tokens: up to 512, bf16 on a CPU takes the manual way in any case."""
    fused = []
    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or torchs(*a, **k))
    ids = torch.randint(V, (1, 530), generator=torch.Generator().manual_seed(3))
    logits = {}
    for attention in ("flash", "manual"):
        model = lively(context_length=530, attention=attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
            logits[attention] = model(ids).float()
        assert len(fused) == model.config.n_layer  # by the first; the second adds none
    torch.testing.assert_close(logits["manual"], logits["flash"], rtol=0, atol=0.15 if bf16 else 1e-5)


@pytest.mark.parametrize(("n_embd", "heads"), [(12, 2), (8, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_manual_attention_equals_a_loop(causal, n_embd, heads):
    q, k, v = torch.randn(3, 2, heads, 5, n_embd // heads, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = range(t + 1) if causal else range(5)
        likeness = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(n_embd // heads)) for s in seen]
        expected[b, h, t] = sum(w / sum(likeness) * v[b, h, s] for w, s in zip(likeness, seen, strict=True))
    got = causal_attention(q, k, v, 0.0) if causal else manual_attention(q, k, v, None)
    torch.testing.assert_close(got, expected)


def test_manual_attention_does_not_see_what_is_hidden():
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 2:] = False
    got = manual_attention(q, k, v, mask)
    torch.testing.assert_close(got[0], manual_attention(q[:1], k[:1, :, :2], v[:1, :, :2], None)[0])
    torch.testing.assert_close(got[1], manual_attention(q, k, v, None)[1])


def test_odd_head_sizes_are_filled_up_for_the_kernel(monkeypatch):
    """57, GPT2's: the kernel sees 64, the result and the gradients are those of 57."""
    seen = []
    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a[0].shape[-1]) or torchs(*a, **k)
    )
    qkv = torch.randn(3, 2, 3, 6, 57, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = {}
    for attention in (fused_attention, causal_attention):
        y = attention(*qkv, 0.0)
        results[attention] = y, *torch.autograd.grad(y.square().sum(), qkv)
    assert seen == [64]
    assert results[fused_attention][0].shape == (2, 3, 6, 57)
    for fused, manual in zip(*results.values(), strict=True):
        torch.testing.assert_close(fused, manual, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [32, 57, 64])
def test_gpu_has_a_fused_kernel_for_every_head_size(head_size):
    """The only kernels that a T4 has, in float16; where none fits, torch raises."""
    q, k, v = torch.randn(3, 2, 4, 128, head_size, device="cuda", dtype=torch.float16).requires_grad_()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        y = fused_attention(q, k, v, 0.0)
        y.sum().backward()
    torch.testing.assert_close(y, causal_attention(q, k, v, 0.0), rtol=0, atol=5e-3)


def test_rotary_is_a_turn_of_complex_numbers():
    """RoFormer's definition: the pair (x_j, x_j+D/2) as a complex number, times exp(i position / 10,000^(2j/D))."""
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :8], x[..., 8:]).to(torch.complex128)
    speed = 10_000 ** (-2 * torch.arange(8).double() / 16)
    angle = torch.outer(torch.arange(7, 12).double(), speed)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    rotary = RotaryEmbedding(config(position="rope"))
    places = torch.arange(7, 12)
    expected = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(rotate(x, rotary(places)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rotate(x, rotary(torch.stack((places, places)))), expected, rtol=0, atol=1e-5
    )  # a row each
    assert rotate(x.bfloat16(), rotary(places)).dtype == torch.bfloat16


def test_rotary_sees_distances_only_and_keeps_lengths():
    rotary = RotaryEmbedding(config(position="rope"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    at = torch.arange(T)[:, None]
    products = {
        (m, n): (rotate(q, rotary(at[m])) * rotate(k, rotary(at[n]))).sum().item() for m in range(T) for n in range(T)
    }
    for (m, n), product in products.items():
        first = products[(m - n, 0)] if m >= n else products[(0, n - m)]
        assert product == pytest.approx(first, abs=1e-5)
    assert max(products.values()) - min(products.values()) > 1
    lengths = torch.stack([rotate(q, rotary(m)).norm() for m in at])
    torch.testing.assert_close(lengths, q.norm().expand(T))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_order_of_the_past_matters(position):
    """One block without positions would give the same answer for a past in another order."""
    model = lively(n_layer=1, position=position)
    swapped = IDS.clone()
    swapped[:, [0, 1]] = IDS[:, [1, 0]]
    assert (model(swapped) - model(IDS))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("prompt", [1, 5, T])
def test_logits_through_the_cache_equal_those_without(kind, prompt):
    """With one place for all rows, and with a place for each."""
    model = lively(**kind)
    expected = model(IDS).detach()
    for place in (int, lambda t: torch.full((B,), t)):
        cache, got = new_cache(model), []
        with torch.no_grad():
            for t in range(prompt - 1, T):
                cache.position = place(t) if t >= prompt else 0
                got.append(model(IDS[:, : t + 1] if t < prompt else IDS[:, t : t + 1], cache=cache))
        torch.testing.assert_close(torch.cat(got, dim=1), expected[:, prompt - 1 :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_rows_of_a_cache_may_differ_in_length(position):
    """Each row's logits are those of its own text; what lies in places that it has not come to does not matter."""
    model, cache = lively(position=position), None
    lengths = [3, T - 2, 5, 1][:B]
    assert len(set(lengths)) == B
    with torch.no_grad():
        cache = new_cache(model)
        model(IDS, cache=cache)  # all places hold something
        cache.position, cache.key_length = torch.tensor(lengths), T - 1
        got = model(torch.stack([IDS[row, n] for row, n in enumerate(lengths)])[:, None], cache=cache)
        for row, n in enumerate(lengths):
            torch.testing.assert_close(got[row, 0], model(IDS[row : row + 1, : n + 1])[0, -1], rtol=0, atol=1e-5)


def new_cache(model: GPT) -> KVCache:
    return KVCache(model.config, B, T, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# switches


def biases(**changes) -> set[str]:
    """Modules of the first block and of the end that have a bias."""
    names = {n.removesuffix(".bias") for n, _ in fresh(**changes).named_parameters() if n.endswith(".bias")}
    return {n.removeprefix("transformer.").removeprefix("h.0.") for n in names if "h.1." not in n}


ATTENTION, REST = {"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2", "ln_f"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ATTENTION | REST),
        ({"bias": False}, set()),
        ({"attn_bias": False}, REST),
        ({"bias": False, "attn_bias": True}, ATTENTION),
        ({"tie_weights": False}, ATTENTION | REST),
        ({"tie_weights": False, "bias": False, "head_bias": True}, {"lm_head"}),
    ],
)
def test_bias_switches(changes, expected):
    assert biases(**changes) == expected


def test_head_bias_is_added_to_the_logits():
    model = lively(tie_weights=False, head_bias=True)
    before = model(IDS)
    shift = torch.linspace(-3, 3, V)
    with torch.no_grad():
        model.lm_head.bias[:V] += shift
    torch.testing.assert_close(model(IDS) - before, shift.expand(B, T, V), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ratio", "hidden"), [(4.0, 128), (2.5, 80), (2.74, 88)])
def test_mlp_ratio(ratio, hidden):
    mlp = fresh(mlp_ratio=ratio).transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (hidden, 32)
    assert mlp.c_proj.weight.shape == (32, hidden)


@pytest.mark.parametrize(
    ("name", "torchs"),
    [("gelu_tanh", torch.nn.GELU("tanh")), ("gelu", torch.nn.GELU()), ("relu", torch.nn.ReLU())],
)
def test_activation(name, torchs):
    mlp = lively(activation=name).transformer.h[1].mlp
    x = 3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected = torchs(x @ mlp.c_fc.weight.T + mlp.c_fc.bias) @ mlp.c_proj.weight.T + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-5)
    assert set(model_module.ACTIVATIONS) == set(ModelConfig.__dataclass_fields__["activation"].metadata["choices"])


def test_dropout_zeroes_its_share_in_training_and_nothing_in_evaluation():
    """On the embedding and on what each block adds; the three places that GPT-2 has besides the attention weights."""
    model = lively(dropout=0.25, n_embd=64, context_length=64)
    ids = torch.randint(V, (8, 64), generator=torch.Generator().manual_seed(0))
    seen = {}
    for name in ("drop", "h.0.attn", "h.1.mlp"):
        module = model.transformer.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (out == 0).float().mean()}))
    expected = lively(n_embd=64, context_length=64)(ids)
    torch.testing.assert_close(model(ids), expected)
    assert max(seen.values()) == 0
    model.train()
    model(ids)
    assert [share.item() for share in seen.values()] == pytest.approx([0.25] * 3, abs=0.02)


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_dropout_of_attention_weights(attention):
    """With every other dropout off, what is left to chance is the attention weights; their mean is kept."""
    attn = lively(dropout=0.5, attention=attention).transformer.h[0].attn
    x = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attn(x)
        attn.train()
        attn.resid_dropout.eval()
        torch.manual_seed(0)
        dropped = attn(x.expand(4000, T, 32))
    assert (dropped[0] - dropped[1]).abs().max() > 0.1
    torch.testing.assert_close(dropped.mean(0), expected[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_activation_checkpointing_changes_nothing_but_memory(position):
    """Dropout is on: the second run of a block has to draw the masks of the first."""
    answers = {}
    for on in (False, True):
        model = lively(activation_checkpointing=on, dropout=0.2, position=position).train()
        entered = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda m, args, entered=entered: entered.append(1))
        torch.manual_seed(5)
        loss = model(IDS, TARGETS)
        loss.backward()
        assert len(entered) == 1 + on  # once more in the backward pass
        answers[on] = [loss.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(answers[True], answers[False])


@pytest.mark.parametrize("tie_weights", [True, False])
def test_initialisation(tie_weights):
    """GPT-2's: 0.02, and 0.02 / sqrt(2 n_layer) = 0.005 for what is added to the residual stream."""
    model = fresh(n_layer=8, n_embd=64, context_length=64, tie_weights=tie_weights)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = 0.005 if "c_proj" in name else 0.02
            assert p[:V].std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(p[:V].mean()) < 0.1 * expected, name


# ---------------------------------------------------------------------------------------------------------------------
# what only a GPU shows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_logits_on_the_gpu_equal_those_of_the_cpu(kind):
    model = lively(**kind)
    with torch.no_grad():
        expected = model(IDS)
        assert torch.get_float32_matmul_precision() == "highest"  # no TF32
        got = model.cuda()(IDS.cuda()).cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_manual_attention_equals_flash_on_the_gpu():
    ids = torch.randint(V, (4, 256), generator=torch.Generator().manual_seed(3)).cuda()
    logits = {}
    for attention in ("flash", "manual"):
        model = lively(n_embd=128, context_length=256, attention=attention).cuda()
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            logits[attention] = model(ids).float()
    difference = (logits["manual"] - logits["flash"]).abs()
    assert difference.max() < 0.05 * logits["flash"].abs().max()
    assert difference.mean() < 0.005 * logits["flash"].abs().max()


@pytest.mark.parametrize("tie_weights", [True, False])
def test_head_of_hidden_is_forward_and_its_padding_has_no_say(tie_weights):
    model = fresh(vocab_size=70, tie_weights=tie_weights).eval()
    idx = torch.randint(70, (2, 5))
    hidden = model.hidden_states(idx)
    assert hidden.shape == (2, 5, 32)
    with torch.no_grad():
        padded = model.compute_logits(hidden, padded=True)
    assert torch.equal(model.compute_logits(hidden), model(idx))
    assert padded.shape == (2, 5, 128)
    assert torch.equal(padded[..., :70], model(idx))
    assert (padded[..., 70:] == -torch.inf).all()


def test_each_loss_by_itself(monkeypatch):
    """Some rows at a time, the last of them fewer; 0 where there is nothing to score."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 4)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=5, vocab_size=70))
    idx, targets = torch.randint(70, (2, 2, 5))
    targets[1, 2:4] = -1
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    found = model(idx, targets, reduction="none")
    torch.testing.assert_close(found, expected)
    assert found[7:9].tolist() == [0, 0]
