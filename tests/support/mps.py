"""A stand-in for Apple's GPU: tensors that report the device mps, and operators of the CPU with the GPU's limits."""

import contextlib
import unittest.mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)


class MpsTensor(Tensor):
    """A tensor on the stand-in. Results of operators on it are of the same class."""


class Generator(torch.Generator):
    """A generator of the CPU, whatever the device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class Mps(TorchFunctionMode):
    """Replaces the device mps by the CPU, and raises for what mps does not support."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # it only parses the arguments of Module.to
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return MPS if isinstance(args[0], MpsTensor) else func(*args)
        if func == Tensor.data.__set__ and isinstance(args[1], MpsTensor):  # Module.to
            func(*args)
            args[0].__class__, args[0]._is_param = MpsTensor, True
            return None
        if func is Tensor.to and isinstance(args[-1], str):
            args = (*args[:-1], torch.device(args[-1]))
        if kwargs.get("device"):
            kwargs["device"] = torch.device(kwargs["device"])
        devices = [value.type for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        args, kwargs = tree_map_only(torch.device, lambda device: CPU, (args, kwargs))
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_mps = any(isinstance(tensor, MpsTensor) for tensor in tensors)
        if (on_mps or "mps" in devices) and kwargs.pop("non_blocking", False) and tensors[0].dim():
            raise AssertionError("nothing waits for this copy: its source may be freed, its target may be read before")
        result = func(*args, **kwargs)
        if func is Tensor.copy_:
            return args[0]
        if on_mps and isinstance(result, Tensor) and any(t.dim() and not isinstance(t, MpsTensor) for t in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if "cpu" in devices or func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            return tree_map_only(MpsTensor, lambda tensor: tensor.as_subclass(Tensor), result)
        return tree_map_only(Tensor, _put_on_mps, result) if on_mps or "mps" in devices else result


def _put_on_mps(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return tensor if isinstance(tensor, MpsTensor) else tensor.as_subclass(MpsTensor)


@contextlib.contextmanager
def mps_machine():
    """Let torch find the device mps."""
    with (
        unittest.mock.patch("torch.backends.mps.is_available", return_value=True),
        unittest.mock.patch("torch.mps.synchronize"),
        unittest.mock.patch("torch.Generator", Generator),
        Mps(),
    ):
        yield
