"""Skip the initialization of parameters, and tie two parameters."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INITIALIZERS = ("normal_", "uniform_", "kaiming_uniform_")


class skip_init(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context manager in which new modules do not initialize their weights.

    On the meta device this also saves a second, because random numbers import torch's compiler there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in INITIALIZERS:  # methods of a tensor, and functions of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def tie_parameters(module: nn.Module, name: str, tied: str) -> None:
    """Make the parameter `tied` of a module the same object as its parameter `name`.

    It is counted and updated once. State dicts contain it under `name` only. Loading a state dict, also with
    assign=True, keeps the two tied.
    """
    owner, _, attribute = tied.rpartition(".")
    setattr(module.get_submodule(owner), attribute, module.get_parameter(name))
    module.register_state_dict_post_hook(partial(_remove_tied, tied))
    module.register_load_state_dict_pre_hook(partial(_add_tied, name, tied))


def _remove_tied(tied: str, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    state_dict.pop(prefix + tied, None)


def _add_tied(name: str, tied: str, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    if prefix + name in state_dict:  # assign=True keeps a Parameter as it is: one object, two names
        parameter = nn.Parameter(state_dict[prefix + name], requires_grad=False)  # torch sets it as it was
        state_dict[prefix + name] = state_dict[prefix + tied] = parameter
