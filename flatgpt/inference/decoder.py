"""Token ids -> logits of the next one, step by step: a model with the keys and values of what it has read.

decoder = Decoder(model)
decoder.reset(rows=2, capacity=300)
logits = decoder.prefill([0, 1], prompt)         # (V): the same prompt into both rows
logits = decoder.decode_step(torch.tensor([7, 9]))   # (B, V): one more token in each row
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatgpt.inference.kv_cache import KVCache
from flatgpt.runtime.device import note
from model import GPT


class Decoder:
    """Texts that are being read and written, a row each; `lengths` counts the tokens that each row holds.

    Args:
        model: as trained, or packed. Where autocast is on, its precision is taken.
        compile: the step as compiled kernels; on CUDA all launches of a step are recorded and sent as one. Every step
            then computes with all places, so their number is rounded up (texts of about a length share what was
            compiled) and worth keeping small.
    """

    LENGTH_MULTIPLE = 128  # places of a compiled cache come in such numbers

    def __init__(self, model: GPT, compile: bool = False):
        self.model = model
        self.device = model.transformer.wte.weight.device
        self.lengths: list[int] = []
        self.compile_seconds = 0.0  # seconds that went into it so far
        self._compiled = torch.compile(self._forward, dynamic=False) if compile else None
        self._fails = False  # the compiler did, once
        self._shape: tuple[int, int, torch.dtype] | None = None  # of the cache: rows, places, precision
        self._cache: KVCache | None = None
        self._replay: Callable[[Tensor], Tensor] | None = None  # the compiled step for that shape

    @torch.inference_mode()
    def reset(self, rows: int, capacity: int) -> None:
        """Forget all tokens; afterwards there are `rows` rows of at most `capacity` tokens, up to context_length."""
        if self._compiled:
            capacity = -(-capacity // self.LENGTH_MULTIPLE) * self.LENGTH_MULTIPLE
        shape = (rows, min(capacity, self.model.config.context_length), self._cache_dtype())
        if shape != self._shape:
            self._shape = self._cache = self._replay = None  # the old one's memory goes before the new one's comes
            self._cache = KVCache(self.model.config, *shape[:2], self.device, shape[2])
            self._positions = torch.zeros(rows, dtype=torch.int64, device=self.device)  # of the next tokens
            self._shape = shape
        self._positions.zero_()
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self._shape[1]

    def _cache_dtype(self) -> torch.dtype:
        if self.device.type == "cpu":
            return torch.float32  # torch's attention of a single token is slower in bfloat16 (docs/speed.md)
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        layer = self.model.transformer.h[0].attn.c_attn
        return getattr(layer, "dtype", layer.weight.dtype)

    @torch.inference_mode()
    def prefill(self, rows: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Put the same ids, at most `capacity`, into some rows, in place of what these held; (V) logits of the next."""
        one = KVCache(self.model.config, 1, len(ids), self.device, self._shape[2])
        logits = self.model(torch.tensor([ids], device=self.device), cache=one)[0, -1]
        for mine, read in zip([*self._cache.k, *self._cache.v], [*one.k, *one.v], strict=True):
            for row in rows:
                mine[row, :, : len(ids)] = read[0]
        for row in rows:
            self.lengths[row] = len(ids)
            self._positions[row] = min(len(ids), self.capacity - 1)
        return logits

    @torch.inference_mode()
    def decode_step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row: (B) int64 -> (B, V) logits. A row that is full loses its last token for it."""
        if self._compiled:
            self._cache.position = self._positions
            logits = self._compiled_step(tokens)
        else:
            same = len(set(self.lengths)) == 1
            self._cache.position = min(self.lengths[0], self.capacity - 1) if same else self._positions
            self._cache.key_length = min(max(self.lengths) + 1, self.capacity)
            logits = self._forward(tokens)
        self._positions.add_(1).clamp_(max=self.capacity - 1)
        self.lengths = [min(n + 1, self.capacity) for n in self.lengths]
        return logits

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens[:, None], cache=self._cache)[:, -1]

    def _compiled_step(self, tokens: Tensor) -> Tensor:
        if self._replay is None:
            began = time.perf_counter()
            self._fails = self._fails or not self._compiles(tokens)
            forward = self._forward if self._fails else self._compiled
            self._replay = self._record(forward) if self.device.type == "cuda" else forward
            self.compile_seconds += time.perf_counter() - began
        return self._replay(tokens)

    def _compiles(self, tokens: Tensor) -> bool:
        """Compile for these shapes; where the compiler fails, one warning. A step repeated changes nothing."""
        from torch._dynamo.exc import TorchDynamoException  # slow to load, and needed only here

        # On a CPU weights are constants that the compiler lays out.
        settings = {"freezing": True} if self.device.type == "cpu" else {}
        try:
            with torch._inductor.config.patch(settings):
                self._compiled(tokens)
        except TorchDynamoException as error:
            note(f"warning: torch.compile failed, going on without it: {str(error).strip().splitlines()[0]}")
            return False
        return True

    def _record(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """CUDA: every kernel that a step launches, recorded once; sent again as one, it takes the host no time."""
        mine = torch.zeros_like(self._positions)  # a recording reads and writes the same memory each time
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first call cannot be recorded
            forward(mine)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(mine)

        def replay(tokens: Tensor) -> Tensor:
            mine.copy_(tokens)
            graph.replay()
            return logits.clone()  # the next step overwrites it

        return replay
