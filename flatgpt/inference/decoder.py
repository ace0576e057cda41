"""Compute next-token logits step by step, with cached keys and values.

decoder = Decoder(model)
decoder.reset(rows=2, capacity=300)
logits = decoder.prefill({0: prompt, 1: other})      # (B, V)
logits = decoder.decode_step(torch.tensor([7, 9]))   # (B, V); appends one token to each row
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config import ModelConfig, first_line
from flatgpt.runtime.device import compile_or_run, note
from model import GPT

# Maximum number of tokens of the prompts that share a forward pass, with padding: enough for efficient matrix products.
PREFILL_TOKENS = {"cpu": 256, "cuda": 16384, "mps": 2048}


class KVCache:
    """Cached keys and values, (B, H, capacity, D) for each layer, allocated once. Decoder sets the attributes.

    Attributes:
        position: position of the next token. An int applies to all rows and is valid for one forward pass. With a (B,)
            int64 tensor, rows can differ in length, and all steps have the same shapes, as compilation needs.
        key_length: number of keys that attention reads from each row if position is a tensor; while a step is traced, a
            scalar tensor.
        masked: whether a mask hides keys after a row's position, if position is a tensor.
        rows, sources: if position is an int, row rows[i] gets the next tokens of entry sources[i] of the batch.
        last: index of the hidden states, (B, T, C), of each text's last token.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.device, self.key_length = device, capacity
        self.slots, self.masked = torch.arange(capacity, device=device), True
        self.position: int | Tensor | None = 0
        self.rows: Tensor | slice = slice(None)
        self.sources: Tensor | slice = slice(None)
        self.last: tuple = (slice(None), -1)

    def next_positions(self, count: int) -> Tensor:
        """Return the positions of the next tokens: (count,), or (B, 1) if each row has its own.

        Raises:
            ValueError: position was not set since the last forward pass, or several tokens follow cached tokens.
        """
        if self.position is None:
            raise ValueError("set cache.position before each forward pass: 0, or the number of tokens in the cache")
        if count > 1 and (isinstance(self.position, Tensor) or self.position):
            raise ValueError(f"{count} tokens after cached tokens: pass one at a time")
        if isinstance(self.position, Tensor):
            self._index = self.position[:, None, None, None]  # (B, 1, 1, 1)
            self._mask = self.slots[: self.key_length] <= self._index if self.masked else None  # (B, 1, 1, key_length)
            return self.position[:, None]
        self._start, self.position = self.position, None
        return torch.arange(self._start, self._start + count, device=self.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store a layer's keys and values of the next tokens, (B, H, T, D).

        Returns:
            keys, values and mask for attention. For a prompt: k and v themselves, in the precision they were computed
            in. For a single token: all cached, (B, H, position + 1, D), or if position is a tensor
            (B, H, key_length, D), with a mask if masked, (B, 1, 1, key_length) bool, true where a key is visible.
        """
        keys, values = self.k[layer], self.v[layer]
        if isinstance(self.position, Tensor):
            index = self._index.expand_as(k)
            keys.scatter_(2, index, k.type_as(keys))
            values.scatter_(2, index, v.type_as(values))
            # Of a slice with a traced length, the graph would have an operator for each dimension.
            return keys.narrow(2, 0, self.key_length), values.narrow(2, 0, self.key_length), self._mask
        end = self._start + k.size(2)
        keys[self.rows, :, self._start : end] = k[self.sources].type_as(keys)
        values[self.rows, :, self._start : end] = v[self.sources].type_as(values)
        return (keys[:, :, :end], values[:, :, :end], None) if self._start else (k, v, None)


# Traced steps of each model. torch never frees a traced graph, so that decoders of a model share them.
_GRAPHS: weakref.WeakKeyDictionary[GPT, dict[tuple[int, bool], Callable[..., Tensor]]] = weakref.WeakKeyDictionary()
READS = ["item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__repr__", "__format__"]


class _RefuseReads(TorchFunctionMode):
    """Context manager in which Python cannot read values of tensors, which a traced step would not read again."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in READS:
            raise RuntimeError("the model reads values of tensors in Python")
        return function(*args, **(kwargs or {}))


class Decoder:
    """Computes next-token logits for a batch of texts, which may differ in length.

    Args:
        model: as trained, or prepacked. If autocast is enabled, its precision is used.
        compile: True: compile the decoding step, and on CUDA capture it as a CUDA graph. None: on CUDA capture the
            eager step, on a CPU trace it, which needs no compiler. False: neither. A compiled or captured step attends
            to `capacity` keys. `capacity` is rounded up, so that texts of similar length share a step.

    Attributes:
        capture: whether steps are captured as CUDA graphs.
        trace: whether steps are traced.
        capacity: maximum number of tokens in a row.
        lengths: number of tokens in each row.
        compile_seconds: total time for compiling and capturing steps.
    """

    LENGTH_MULTIPLE = 128  # capacity is a multiple of this if steps are compiled or captured

    def __init__(self, model: GPT, compile: bool | None = False):
        self.model, self.compile = model, bool(compile)
        self.device = model.transformer.wte.weight.device
        self.capture = self.device.type == "cuda" and compile is not False
        self._weights = (*model.parameters(), *model.buffers())
        self.trace = self.device.type == "cpu" and compile is None
        self._graphs = _GRAPHS.setdefault(model, {})
        self.capacity, self.compile_seconds = 0, 0.0
        self.lengths: list[int] = []
        # On a CPU, freezing makes weights constants, so that the compiler can choose their layout.
        options = {"freezing": True} if self.device.type == "cpu" else {}
        # None: _eager_step. Its bound method would be a cycle, and keep the cache until the next garbage collection.
        self._compiled = compile_or_run(self._eager_step, **options) if compile else None
        self._shape: tuple[int, int, torch.dtype] | None = None  # of the cache: rows, capacity, precision
        self._cache: KVCache | None = None
        self._static_step: Callable[[Tensor], Tensor] | None = None  # compiled or captured for self._shape

    @torch.inference_mode()
    def reset(self, rows: int, capacity: int) -> None:
        """Clear the cache and resize it to `rows` rows of `capacity` tokens, at most context_length."""
        if self.compile or self.capture:
            capacity = -(-capacity // self.LENGTH_MULTIPLE) * self.LENGTH_MULTIPLE
        self.capacity, self.lengths = min(capacity, self.model.config.context_length), [0] * rows
        # On a CPU, torch's attention for a single token is slower in bfloat16 (docs/speed.md).
        dtype = getattr(self.model.lm_head, "dtype", torch.float32) if self.device.type != "cpu" else torch.float32
        shape = (rows, self.capacity, dtype)
        if shape != self._shape:
            self._shape = self._cache = self._static_step = None  # free the old cache before the new one is allocated
            self._cache = KVCache(self.model.config, *shape, self.device)
            self._positions = torch.zeros(rows, dtype=torch.int64, device=self.device)  # of the next tokens
            self._shape = shape
        self._positions.zero_()

    @torch.inference_mode()
    def prefill(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """Set the token ids of each given row, 1 to `capacity`. Return their next-token logits, (len(texts), V).

        Equal texts are computed once. Others share forward passes of at most PREFILL_TOKENS tokens. They are padded on
        the right, where no token attends to the padding, and decode_step overwrites it in the cache.
        """
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, ids in texts.items():
            rows_of.setdefault(tuple(ids), []).append(row)
        batches: list[list[tuple[int, ...]]] = [[]]
        for ids in sorted(rows_of, key=len):  # the last text of a batch is its longest
            if batches[-1] and (len(batches[-1]) + 1) * len(ids) > PREFILL_TOKENS[self.device.type]:
                batches.append([])
            batches[-1].append(ids)
        logits = {row: line for batch in batches for row, line in self._prefill_batch(batch, rows_of)}
        return torch.stack([logits[row] for row in texts])

    def _prefill_batch(
        self, batch: list[tuple[int, ...]], rows_of: dict[tuple[int, ...], list[int]]
    ) -> list[tuple[int, Tensor]]:
        """Compute a batch of texts in one forward pass. Return each of their rows with its logits, (V)."""
        cache, longest = self._cache, len(batch[-1])
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self.device)
        targets = [(row, n, len(ids)) for n, ids in enumerate(batch) for row in rows_of[ids]]
        rows, sources, lengths = torch.tensor(targets, device=self.device).T
        cache.position, cache.rows, cache.sources = 0, rows, sources
        last = torch.tensor([len(ids) - 1 for ids in batch], device=self.device)
        cache.last = torch.arange(len(batch), device=self.device), last
        logits = self.model(padded, cache=cache)[:, -1]  # (len(batch), V)
        cache.rows, cache.sources, cache.last = slice(None), slice(None), (slice(None), -1)
        self._positions[rows] = lengths.clamp(max=self.capacity - 1)
        for row, _, length in targets:
            self.lengths[row] = length
        return [(row, logits[n]) for row, n, _ in targets]

    @torch.inference_mode()
    def decode_step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row: (B) int64 -> (B, V) logits. In a full row, it replaces the last token."""
        cache, static = self._cache, self.compile or self.capture
        cache.position, cache.masked = self._positions, static or len(set(self.lengths)) > 1
        cache.key_length = self.capacity if static else min(max(self.lengths) + 1, self.capacity)
        if static:
            self._static_step = self._static_step or self._make_static_step(tokens)
            logits = self._static_step(tokens)
        else:
            trace = self.trace and not torch.is_autocast_enabled("cpu")  # whose casts a graph would repeat
            logits = self._traced_step(tokens) if trace else self._eager_step(tokens)
        self._positions.add_(1).clamp_(max=self.capacity - 1)
        self.lengths = [min(n + 1, self.capacity) for n in self.lengths]
        return logits

    def _eager_step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens[:, None], cache=self._cache)[:, -1]

    def _traced_step(self, tokens: Tensor) -> Tensor:
        """Run the step as a TorchScript graph, which needs half of the time between products that Python needs."""
        cache = self._cache
        # Tensors that are not inputs become constants, which a graph keeps.
        state = (self._positions, cache.slots, *cache.k, *cache.v, *self._weights)
        inputs = (tokens, torch.tensor(cache.key_length), *state)
        key = (len(tokens), cache.masked)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._trace(inputs)
            except Exception as error:  # torch.jit is deprecated; a later torch may not have it
                note(f"warning: the decoding step could not be traced, continuing without it: {first_line(error)}")
                self.trace = False
                return self._eager_step(tokens)
        with torch.jit.optimized_execution(False):  # optimizing takes longer than it saves
            return self._graphs[key](*inputs)

    def _trace(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """Record the operators of a step. Running it again gives the same result."""
        decoder = weakref.proxy(self)  # the graph outlives this decoder, whose cache it must not keep

        def step(tokens: Tensor, key_length: Tensor, *_: Tensor) -> Tensor:
            decoder._cache.key_length = key_length
            return decoder._eager_step(tokens)

        with _RefuseReads():
            self._eager_step(inputs[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are constants
            return torch.jit.trace(step, inputs, check_trace=False)

    def _make_static_step(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Compile or capture the step for the cache's shape by running it. Running it again gives the same result."""
        started = time.perf_counter()
        step = self._compiled or self._eager_step
        step(tokens)
        if self.capture:
            try:
                with torch.cuda.device(self.device):  # each thread has its own current device
                    step = self._capture_graph(step, tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # such as an operator that synchronises with the host
                note(f"warning: no CUDA graph could be captured, continuing without it: {first_line(error)}")
                self.capture = False
        self.compile_seconds += time.perf_counter() - started
        return step

    def _capture_graph(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Capture a step as a CUDA graph, which the host launches with one call. Return a function that replays it."""
        static_tokens = tokens.clone()  # a graph reads and writes the same memory each time
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: the initialization of libraries cannot be captured
            step(static_tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(static_tokens)

        def replay(tokens: Tensor) -> Tensor:
            static_tokens.copy_(tokens)
            graph.replay()
            return logits.clone()  # the next replay overwrites logits

        return replay
