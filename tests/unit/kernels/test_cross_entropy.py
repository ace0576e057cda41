"""cross_entropy.py against torch's plain operators, in float32 and in float64."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import ModelConfig
from flatgpt.kernels import cross_entropy
from flatgpt.runtime.device import compile_forward
from model import GPT

N, C, V, PADDED = 53, 16, 100, 128
ROWS, AT_ONCE = 20, 7  # 53 rows in chunks of 18, 18 and 17, their softmax in pieces of 7, 7 and 4 or 3
KERNELS = [None, cross_entropy.gradient_in_one_kernel]
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=V)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every batch is large, and goes through many chunks and pieces."""
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 0)
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", ROWS)
    monkeypatch.setitem(cross_entropy.SOFTMAX_BYTES, "cpu", AT_ONCE * PADDED * 4 + 5)


def tensors(rows: int = N, bias: bool = False, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Hidden states, a matrix whose padding is large, and its bias, with logits of about 1; targets."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, C), torch.randn(PADDED, C) / 4
    weight[V:] *= 1000
    made = [x, weight]
    if bias:
        made.append(torch.randn(PADDED))
        made[-1][V:] += 1000
    return [t.requires_grad_() for t in made], torch.randint(V, (rows,))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias)[:, :V].float(), targets, ignore_index=-1)


def reference(made: list[Tensor], targets: Tensor) -> list[Tensor]:
    """The loss, and the gradients of `made`, all in float64."""
    made = [t.detach().double().requires_grad_() for t in made]
    x, weight, bias = (*made, None)[:3]
    loss = F.cross_entropy(F.linear(x, weight, bias)[:, :V], targets, ignore_index=-1)
    return [loss.detach(), *torch.autograd.grad(loss, made)]


def answers(made: list[Tensor], targets: Tensor, loss_of=plain, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same in float32, or by autocast."""
    low = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with low:
        loss = loss_of(*(*made, None)[:3], targets)
    return [loss.detach(), *torch.autograd.grad(loss, made)]


def fused(kernel=None):
    return lambda x, weight, bias, targets: cross_entropy.fused_loss(
        x, weight, bias, targets, V, softmax_gradient=kernel
    )


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, the largest difference against the largest number expected."""
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# the same numbers


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 20, 21, 53, 60])
def test_loss_and_gradients_equal_the_plain_ones(rows, bias, kernel):
    made, targets = tensors(rows, bias)
    found, expected = answers(made, targets, fused(kernel)), reference(made, targets)
    assert [t.dtype for t in found] == [torch.float32] * len(found)
    assert found[0].shape == ()
    assert max(errors(found, expected)) < 2e-6
    loss, *gradients = errors(found, answers(made, targets))
    assert loss < 1e-5
    assert max(gradients) < 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_under_autocast_it_is_as_exact_as_plain_operators(dtype, tolerance, bias, kernel):
    made, targets = tensors(bias=bias)
    with torch.no_grad():
        for t in made[1:]:
            t[V:] /= 1000  # plain operators lose the padding before anything is rounded; here it has to fit
    expected = reference(made, targets)
    found, theirs = (answers(made, targets, loss_of, dtype) for loss_of in (fused(kernel), plain))
    assert [t.dtype for t in found] == [torch.float32] * len(found)
    for ours, other in zip(errors(found, expected), errors(theirs, expected), strict=True):
        assert ours < tolerance
        assert ours < 2 * other + 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_affects_no_loss_and_has_no_gradient(kernel):
    made, targets = tensors(bias=True)
    large = answers(made, targets, fused(kernel))
    with torch.no_grad():
        for t in made[1:]:
            t[V:] = 0
    zero = answers(made, targets, fused(kernel))
    for ours, other in zip(large, zero, strict=True):
        assert torch.equal(ours, other)
    for gradient in zero[2:]:
        assert gradient[:V].all()
        assert not gradient[V:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "without", [slice(0, None, 3), slice(18, 36), slice(7, 14), slice(1, None)], ids=["some", "chunk", "piece", "most"]
)
def test_rows_without_a_target_do_not_count(without, bias, kernel):
    made, targets = tensors(bias=bias)
    targets[without] = -1
    found = answers(made, targets, fused(kernel))
    assert max(errors(found, reference(made, targets))) < 2e-6
    assert not found[1][targets < 0].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_any_target_the_loss_is_nan_as_torch_has_it(kernel):
    made, targets = tensors()
    targets[:] = -1
    assert answers(made, targets)[0].isnan()
    assert answers(made, targets, fused(kernel))[0].isnan()


def test_gradients_scale_with_the_gradient_of_the_loss():
    made, targets = tensors(bias=True)
    found = answers(made, targets, lambda *args: fused()(*args) * 3 / 4)
    expected = reference(made, targets)
    assert max(errors(found, [t * 3 / 4 for t in expected])) < 2e-6


def test_a_second_backward_pass_is_refused():
    """The first has scaled the gradients where they were."""
    made, targets = tensors()
    loss = fused()(*made, None, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("best", [0.0, 100.0, -1000.0, 3e4])
@pytest.mark.parametrize("below", [0.0, 20.0, 100.0, 5000.0])
def test_loss_is_exact_where_the_target_is_unlikely_or_logits_are_large(below, best, kernel):
    made, targets = [torch.ones(3, 1), torch.full((PADDED, 1), best - below)], torch.full((3,), 4)
    made[1][9], made[1][V:] = best, 1e5
    made = [t.requires_grad_() for t in made]
    found, expected = answers(made, targets, fused(kernel)), reference(made, targets)
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=1e-7)


def test_a_chunks_sums_fit_float16(monkeypatch):
    """No loss scale would help: these gradients are not scaled yet."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 1024)
    made, targets = [torch.full((1024, C), 100.0), torch.zeros(PADDED, C)], torch.full((1024,), 4)
    made = [t.requires_grad_() for t in made]
    found, expected = answers(made, targets, fused(), torch.float16), reference(made, targets)
    assert max(errors(found[::2], expected[::2])) < 0.003  # loss and matrix


# ---------------------------------------------------------------------------------------------------------------------
# when it is used


KINDS = [{}, {"bias": False}, {"tie_weights": False}, {"tie_weights": False, "head_bias": True}]


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(V, (2, 4, 16), generator=torch.Generator().manual_seed(1)).to(device)
    targets[1, 3:6] = -1
    return ids, targets


def of_model(model: GPT, forward=None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and each parameter's gradient."""
    device = model.transformer.wte.weight.device.type
    model.zero_grad()
    low = torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with low:
        loss = (forward or model)(*batch(device))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def lively(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        worst = (found[name] - value).abs().max() / value.abs().max()
        assert worst < tolerance, (name, worst)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_gradient_of_a_model_equals_that_of_the_plain_loss(kind, checkpointing, monkeypatch):
    model = lively(activation_checkpointing=checkpointing, **kind)
    found = of_model(model)
    model.fused_loss = lambda *args: pytest.fail("not for a batch as small as this")
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 10**9)
    expected = of_model(model)
    assert abs(found["loss"] - expected["loss"]) < 1e-5
    assert_same(found, expected, 1e-3)
    expected = of_model(model.double())  # its sums in float32 all the same
    assert_same(found, expected, 1e-5)


def test_small_batches_and_passes_without_gradients_go_through_plain_operators(monkeypatch):
    model, used = lively(), []
    model.fused_loss = lambda *args: used.append(True) or cross_entropy.fused_loss(*args)
    losses = [model(*batch()).item()]
    assert used.pop()
    with torch.no_grad():
        losses.append(model(*batch()).item())
    logits = 4 * 16 * PADDED
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", logits)
    losses.append(model(*batch()).item())
    assert not used
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", logits - 1)
    losses.append(model(*batch()).item())
    assert used
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


@pytest.mark.slow
def test_a_compiled_model_leaves_the_loss_out_of_its_graph(monkeypatch, capsys):
    torch._dynamo.reset()
    compiling, real = [], cross_entropy.fused_loss

    def recorded(*args, **kwargs):
        compiling.append(torch.compiler.is_compiling())
        return real(*args, **kwargs)

    monkeypatch.setattr(cross_entropy, "fused_loss", recorded)
    model = lively()
    eager = of_model(model)
    compiled = compile_forward(model)
    compiled(*batch())
    compiling.clear()
    for _ in range(2):
        assert_same(of_model(model, compiled), eager, 1e-4)
    assert compiling == [False, False]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_kernel_for_a_compiler_compiles():
    logits, at = torch.randn(N, PADDED), torch.randint(V, (N, 1))
    compiled = torch.compile(cross_entropy.gradient_in_one_kernel, dynamic=False)
    for found, expected in zip(
        compiled(logits, at, V), cross_entropy.gradient_in_one_kernel(logits, at, V), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=str)
def test_on_a_gpu(dtype, tolerance, compiled, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cuda", ROWS)
    monkeypatch.setitem(cross_entropy.SOFTMAX_BYTES, "cuda", AT_ONCE * PADDED * 4)
    torch._dynamo.reset()
    model = lively()
    expected = of_model(model)
    model.cuda()
    found = of_model(model, compile_forward(model) if compiled else None, dtype)
    assert_same({name: value.cpu() for name, value in found.items()}, expected, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# memory


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned, of each dtype."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor):
                elements = t.untyped_storage().nbytes() // t.itemsize
                self.of[t.dtype] = max(self.of.get(t.dtype, 0), elements)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [53, 530])
def test_logits_of_a_whole_batch_are_never_allocated(rows, dtype):
    made, targets = tensors(rows, bias=True)
    with LargestTensor() as largest:
        answers(made, targets, fused(), dtype)
    assert largest.of[dtype] == max(18 * PADDED if rows == 53 else ROWS * PADDED, rows * C)
    if dtype != torch.float32:
        pieces = 2 * AT_ONCE * PADDED  # a softmax's input and result
        assert largest.of[torch.float32] == max(pieces, PADDED * C, rows * C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [53, 530])
def test_what_is_kept_for_backward_is_as_large_as_hidden_states_and_parameters(rows, dtype):
    made, targets = tensors(rows, bias=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        fused()(*made, targets)
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(t.nbytes for t in made)
