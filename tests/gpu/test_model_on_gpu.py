"""model.py on a GPU: logits as on the CPU, attention kernels for each head size and precision."""

import itertools

import pytest
import torch
from random_models import V, random_ids, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatgpt.kernels import cross_entropy
from flatgpt.kernels.attention import attention
from flatgpt.runtime.device import compile_forward

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head_size", [32, 57, 64])
def test_every_head_size_has_a_fused_kernel_in_float16(head_size):
    """Of the only fused kind that GPUs before Ampere have; without one torch raises."""
    q, k, v = torch.randn(3, 2, 4, 128, head_size, device="cuda", dtype=torch.float16).requires_grad_()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        y = attention(q, k, v)
        y.sum().backward()
    torch.testing.assert_close(y, attention(q, k, v, path="manual"), rtol=0, atol=5e-3)


@pytest.mark.parametrize(("position", "kind"), list(itertools.product(("learned", "rope"), ("flash", "manual"))))
def test_logits_equal_those_of_the_cpu(position, kind):
    model, ids = small_model(position=position, attention=kind), random_ids()
    with torch.no_grad():
        expected = model(ids)
        assert torch.get_float32_matmul_precision() == "highest"  # no TF32
        logits = model.cuda()(ids.cuda()).cpu()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_manual_attention_equals_flash_in_bfloat16():
    ids = torch.randint(V, (4, 256), generator=torch.Generator().manual_seed(3)).cuda()
    logits = {}
    for kind in ("flash", "manual"):
        model = small_model(n_embd=128, context_length=256, attention=kind).cuda()
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            logits[kind] = model(ids).float()
    difference = (logits["manual"] - logits["flash"]).abs()
    assert difference.max() < 0.05 * logits["flash"].abs().max()
    assert difference.mean() < 0.005 * logits["flash"].abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=str)
def test_loss_and_gradients_equal_those_of_the_cpu(dtype, tolerance, compiled, monkeypatch):
    """Of the fused loss, whose chunks and pieces are small here; compiled, it has another kernel."""
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 0)
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cuda", 20)
    monkeypatch.setitem(cross_entropy.SOFTMAX_BYTES, "cuda", 7 * 64 * 4)
    torch._dynamo.reset()
    model, found = small_model(), {}
    for device in ("cpu", "cuda"):
        forward = compile_forward(model.to(device)) if compiled and device == "cuda" else model.to(device)
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=device == "cuda" and dtype != torch.float32):
            loss = forward(random_ids(seed=1).to(device), random_ids(seed=2).to(device))
        loss.backward()
        found[device] = [loss.detach().cpu(), *(p.grad.clone().cpu() for p in model.parameters())]
    for value, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert (value - expected).abs().max() < tolerance * expected.abs().max()
