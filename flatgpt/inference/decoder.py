"""Token ids -> logits of the next token, step by step, with cached keys and values.

decoder = Decoder(model)
decoder.reset(rows=2, capacity=300)
logits = decoder.prefill([0, 1], prompt)             # (V): the same prompt into both rows
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
    """Computes the next logits of a batch of texts, which may differ in length.

    Args:
        model: as trained, or prepacked. Where autocast is on, its precision is used.
        compile: compile the decoding step; on CUDA also record its kernel launches and replay them as one. Every step
            then attends to `capacity` keys, which is rounded up, so that texts of similar length share what was
            compiled.

    Attributes:
        lengths: tokens that each row holds.
        compile_seconds: time spent on compiling so far.
    """

    LENGTH_MULTIPLE = 128  # the capacity of a compiled cache is a multiple of it

    def __init__(self, model: GPT, compile: bool = False):
        self.model = model
        self.device = model.transformer.wte.weight.device
        self.lengths: list[int] = []
        self.compile_seconds = 0.0
        self._compiled = torch.compile(self._forward, dynamic=False) if compile else None
        self._compiler_failed = False
        self._shape: tuple[int, int, torch.dtype] | None = None  # of the cache: rows, capacity, precision
        self._cache: KVCache | None = None
        self._step: Callable[[Tensor], Tensor] | None = None  # the compiled step for that shape

    @torch.inference_mode()
    def reset(self, rows: int, capacity: int) -> None:
        """Forget all tokens; afterwards there are `rows` rows of at most `capacity` tokens, up to context_length."""
        if self._compiled:
            capacity = -(-capacity // self.LENGTH_MULTIPLE) * self.LENGTH_MULTIPLE
        shape = (rows, min(capacity, self.model.config.context_length), self._cache_dtype())
        if shape != self._shape:
            self._shape = self._cache = self._step = None  # free the old cache before the new one is allocated
            self._cache = KVCache(self.model.config, *shape[:2], self.device, shape[2])
            self._positions = torch.zeros(rows, dtype=torch.int64, device=self.device)  # of the next tokens
            self._shape = shape
        self._positions.zero_()
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
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
        """Replace the tokens of some rows by the same ids, at most `capacity`; return the next logits, (V)."""
        prompt = KVCache(self.model.config, 1, len(ids), self.device, self._shape[2])
        logits = self.model(torch.tensor([ids], device=self.device), cache=prompt)[0, -1]
        for stored, new in zip([*self._cache.k, *self._cache.v], [*prompt.k, *prompt.v], strict=True):
            for row in rows:
                stored[row, :, : len(ids)] = new[0]
        for row in rows:
            self.lengths[row] = len(ids)
            self._positions[row] = min(len(ids), self.capacity - 1)
        return logits

    @torch.inference_mode()
    def decode_step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row: (B) int64 -> (B, V) logits. In a row that is full it replaces the last one."""
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
        if self._step is None:
            started = time.perf_counter()
            self._compiler_failed = self._compiler_failed or not self._compiles(tokens)
            forward = self._forward if self._compiler_failed else self._compiled
            self._step = self._record(forward) if self.device.type == "cuda" else forward
            self.compile_seconds += time.perf_counter() - started
        return self._step(tokens)

    def _compiles(self, tokens: Tensor) -> bool:
        """Compile for the cache's shape, by one step, which changes nothing when it is repeated; warn on failure."""
        from torch._dynamo.exc import TorchDynamoException  # slow to import, and only needed here

        # On a CPU weights become constants, which the compiler lays out.
        settings = {"freezing": True} if self.device.type == "cpu" else {}
        try:
            with torch._inductor.config.patch(settings):
                self._compiled(tokens)
        except TorchDynamoException as error:
            note(f"warning: torch.compile failed, going on without it: {str(error).strip().splitlines()[0]}")
            return False
        return True

    def _record(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Record the kernels that a step launches on CUDA; replayed as one, they cost the host no time."""
        static_tokens = torch.zeros_like(self._positions)  # a graph reads and writes the same memory each time
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first call cannot be recorded
            forward(static_tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(static_tokens)

        def replay(tokens: Tensor) -> Tensor:
            static_tokens.copy_(tokens)
            graph.replay()
            return logits.clone()  # the next step overwrites it

        return replay
