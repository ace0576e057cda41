"""cross_entropy.py against torch's plain operators in float64; test_model.py has the loss of a whole model."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from random_models import random_ids, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatgpt.kernels import cross_entropy
from flatgpt.kernels.cross_entropy import fused_loss, gradient_in_one_kernel
from flatgpt.runtime.device import compile_forward

N, C, V, PADDED = 53, 16, 100, 128
ROWS, AT_ONCE = 20, 7  # 53 rows in chunks of 18, 18 and 17, their softmax in pieces of 7, 7 and 4 or 3
KERNELS = pytest.mark.parametrize("kernel", [None, gradient_in_one_kernel])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every batch is large, and goes through many chunks and pieces."""
    monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 0)
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", ROWS)
    monkeypatch.setitem(cross_entropy.SOFTMAX_BYTES, "cpu", AT_ONCE * PADDED * 4 + 5)


def tensors(rows: int = N, padding: float = 1000.0) -> tuple[list[Tensor], Tensor]:
    """Hidden states, a matrix whose padding is large, and its bias, with logits of about 1; targets."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, C), torch.randn(PADDED, C) / 4, torch.randn(PADDED)
    weight[V:] *= padding
    bias[V:] += padding
    return [t.requires_grad_() for t in (x, weight, bias)], torch.randint(V, (rows,))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)[:, :V]
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, ignore_index=-1)


def answers(made: list[Tensor], targets: Tensor, loss_of=plain, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The loss, and the gradients of `made`, in float32 or by autocast."""
    low = torch.autocast("cpu", dtype) if dtype in (torch.bfloat16, torch.float16) else contextlib.nullcontext()
    with low:
        loss = loss_of(*(*made, None)[:3], targets)
    return [loss.detach(), *torch.autograd.grad(loss, made)]


def reference(made: list[Tensor], targets: Tensor) -> list[Tensor]:
    """The same in float64."""
    return answers([t.detach().double().requires_grad_() for t in made], targets)


def fused(kernel=None):
    return lambda x, weight, bias, targets: fused_loss(x, weight, bias, targets, V, softmax_gradient=kernel)


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, the largest difference against the largest number expected."""
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]


@KERNELS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "unscored"),
    [
        *((rows, slice(0)) for rows in (1, 7, 20, 21, 60)),
        *((N, rows) for rows in (slice(0), slice(0, None, 3), slice(18, 36), slice(7, 14), slice(1, None))),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_plain_ones(rows, unscored, bias, kernel):
    """Rows without a target and the padding have no gradient; the gradient of the loss scales all."""
    made, targets = tensors(rows)
    made = made if bias else made[:2]
    targets[unscored] = -1
    found = answers(made, targets, lambda *args: fused(kernel)(*args) * 3 / 4)
    assert {t.dtype for t in found} == {torch.float32}
    assert max(errors(found, [t * 3 / 4 for t in reference(made, targets)])) < 2e-6
    assert not found[1][targets < 0].any()
    assert not any(gradient[V:].any() for gradient in found[2:])


@KERNELS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_under_autocast_it_is_as_exact_as_plain_operators(dtype, tolerance, kernel):
    made, targets = tensors(padding=1.0)  # plain operators lose the padding before anything is rounded
    expected = reference(made, targets)
    found, theirs = (answers(made, targets, loss_of, dtype) for loss_of in (fused(kernel), plain))
    assert {t.dtype for t in found} == {torch.float32}
    for ours, other in zip(errors(found, expected), errors(theirs, expected), strict=True):
        assert ours < min(tolerance, 2 * other + 1e-4)


@KERNELS
@pytest.mark.parametrize("best", [0.0, 100.0, -1000.0, 3e4])
@pytest.mark.parametrize("below", [0.0, 20.0, 100.0, 5000.0])
def test_loss_is_exact_where_the_target_is_unlikely_or_logits_are_large(below, best, kernel):
    made, targets = [torch.ones(3, 1), torch.full((PADDED, 1), best - below)], torch.full((3,), 4)
    made[1][9], made[1][V:] = best, 1e5
    made = [t.requires_grad_() for t in made]
    found, expected = answers(made, targets, fused(kernel)), reference(made, targets)
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "twice",
    [
        lambda loss, x: torch.autograd.grad(*torch.autograd.grad(loss(x), x, create_graph=True), torch.ones_like(x)),
        lambda loss, x: torch.autograd.functional.hessian(loss, x),
        lambda loss, x: torch.func.hessian(loss)(x),
        lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    ],
)
def test_second_derivatives_are_refused(twice):
    """The gradients that the forward pass saved would count as constants."""
    (x, *others), targets = tensors()
    with pytest.raises(RuntimeError, match=r"no second derivative|functorch transforms"):
        twice(lambda x: fused()(x, *others, targets), x)


def test_a_chunks_sums_fit_float16(monkeypatch):
    """No loss scale would help: these gradients are not scaled yet."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 1024)
    made, targets = [torch.full((1024, C), 100.0), torch.zeros(PADDED, C)], torch.full((1024,), 4)
    made = [t.requires_grad_() for t in made]
    found, expected = answers(made, targets, fused(), torch.float16), reference(made, targets)
    assert max(errors(found[::2], expected[::2])) < 0.003  # loss and matrix


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
    """What is kept for the backward pass is as large as hidden states and parameters."""
    (made, targets), kept = tensors(rows), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with LargestTensor() as largest, hooks:
        answers(made, targets, fused(), dtype)
    assert largest.of[dtype] == max(18 * PADDED if rows == 53 else ROWS * PADDED, rows * C)
    assert largest.of[torch.float32] <= max(largest.of[dtype], 2 * AT_ONCE * PADDED, PADDED * C, rows * C)
    assert {t.untyped_storage().nbytes() for t in kept} <= {t.nbytes for t in made}


@pytest.mark.slow
def test_a_compiled_model_leaves_the_loss_out_of_its_graph(monkeypatch, capsys):
    torch._dynamo.reset()
    compiling, real, model = [], cross_entropy.fused_loss, small_model()

    def recorded(*args, **kwargs):
        compiling.append(torch.compiler.is_compiling())
        return real(*args, **kwargs)

    def gradients(forward) -> list[Tensor]:
        model.zero_grad()
        forward(random_ids(seed=1), random_ids(seed=2)).backward()
        return [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(cross_entropy, "fused_loss", recorded)
    eager, compiled = gradients(model), compile_forward(model)
    for _ in range(2):
        torch.testing.assert_close(gradients(compiled), eager, rtol=1e-4, atol=1e-5)
    assert compiling[-2:] == [False, False]
    assert capsys.readouterr().err == ""
    logits, at = torch.randn(N, PADDED), torch.randint(V, (N, 1))
    kernel = torch.compile(gradient_in_one_kernel, dynamic=False)
    torch.testing.assert_close(kernel(logits, at, V), gradient_in_one_kernel(logits, at, V))
