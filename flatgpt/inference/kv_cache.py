"""Keys and values of earlier tokens, which decoding does not compute again."""

from __future__ import annotations

import torch
from torch import Tensor

from config import ModelConfig


class KVCache:
    """Keys and values of earlier tokens, (B, H, capacity, D) for each layer, allocated once.

    model(prompt, cache=cache), then model(token, cache=cache) for one token after the other.

    Attributes:
        position: where the next token goes. An int is the same for all rows, and the model advances it. A (B,) int64
            tensor on the device has a position for each row, and the caller advances it. Rows can then differ in
            length, and all steps have the same shapes, as compilers need.
        key_length: with a tensor, attention reads so many keys of each row and masks those after its position.

    Args:
        capacity: tokens of a row, at most the model's context_length.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        if capacity > config.context_length:
            raise ValueError(f"capacity = {capacity}: the model has context_length = {config.context_length}")
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.position: int | Tensor = 0
        self.capacity = self.key_length = capacity

    def next_positions(self, count: int) -> Tensor:
        """Positions of the next tokens: (count,), or (B, 1) where rows have their own.

        Raises:
            ValueError: more than one token after the first ones, or more than fit.
        """
        if isinstance(self.position, Tensor):
            if count > 1:
                raise ValueError(f"{count} tokens: a cache with a position for each row takes one at a time")
            return self.position[:, None]
        if count > 1 and self.position > 0:
            raise ValueError(
                f"{count} tokens after {self.position} cached ones: pass one at a time, or set cache.position = 0 to "
                "start another text"
            )
        if self.position + count > self.capacity:
            raise ValueError(f"{count} tokens after {self.position} cached ones exceed capacity = {self.capacity}")
        return torch.arange(self.position, self.position + count, device=self.k[0].device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the next tokens, (B, H, T, D).

        Returns:
            keys and values to attend to. A prompt (T > 1) sees itself only, in the precision it was computed in: k and
            v. A single token sees what is stored: (B, H, position + 1, D), or (B, H, key_length, D).
        """
        keys, values = self.k[layer], self.v[layer]
        if isinstance(self.position, Tensor):
            rows = torch.arange(k.size(0), device=k.device)
            keys[rows, :, self.position] = k[:, :, 0].type_as(keys)
            values[rows, :, self.position] = v[:, :, 0].type_as(values)
            return keys[:, :, : self.key_length], values[:, :, : self.key_length]
        end = self.position + k.size(2)
        keys[:, :, self.position : end] = k
        values[:, :, self.position : end] = v
        return (k, v) if k.size(2) > 1 else (keys[:, :, :end], values[:, :, :end])

    def attention_mask(self) -> Tensor | None:
        """(B, 1, 1, key_length) bool, true where a key is visible to the new token; None: all that `update` gives."""
        if isinstance(self.position, int):
            return None
        return (torch.arange(self.key_length, device=self.k[0].device) <= self.position[:, None])[:, None, None]

    def advance(self, count: int) -> None:
        """Move an int position behind the tokens that were stored last."""
        if isinstance(self.position, int):
            self.position += count
