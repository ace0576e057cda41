"""GPT-2, whole: config -> logits, loss, KV cache.

Sizes in the comments: B batch, T time (tokens), C channels (n_embd), H heads, D = C / H, V vocabulary.
Names of modules are those of Hugging Face's GPT-2, so a state dict reads the same; matrices lie as nn.Linear has
them, (out, in). The paper: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from flatgpt.kernels.cross_entropy import CHUNK_ROWS, fused_loss, fused_loss_outside_graph, use_fused_loss

ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


class KVCache:
    """Keys and values of earlier tokens, allocated once: (B, H, capacity, D) for each layer.

    `position` is where the next tokens are stored. An int is the same for all rows: attention reads the keys up to it.
    A (B,) int64 tensor on the device holds a position for each row, so that rows may differ in length: attention reads
    `key_length` keys, and attention_mask hides those that are not stored yet, so shapes are the same in every step, as
    compilers need. The caller sets both.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.position: int | Tensor = 0
        self.key_length = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, H, T, D); T is 1 where `position` is a tensor.

        Returns the keys and values to attend to, (B, H, position + T, D) or (B, H, key_length, D).
        """
        all_k, all_v = self.k[layer], self.v[layer]
        if isinstance(self.position, int):
            stop = self.position + k.size(2)
            all_k[:, :, self.position : stop] = k
            all_v[:, :, self.position : stop] = v
            return all_k[:, :, :stop], all_v[:, :, :stop]
        rows = torch.arange(k.size(0), device=k.device)
        all_k[rows, :, self.position] = k[:, :, 0].type_as(all_k)
        all_v[rows, :, self.position] = v[:, :, 0].type_as(all_v)
        return all_k[:, :, : self.key_length], all_v[:, :, : self.key_length]

    def attention_mask(self) -> Tensor | None:
        """(B, 1, 1, key_length) bool, true where a key is visible to the new token; None: all are."""
        if isinstance(self.position, int):
            return None
        return (torch.arange(self.key_length, device=self.k[0].device) <= self.position[:, None])[:, None, None]


Rope = tuple[Tensor, Tensor]  # cosines and sines


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021), base 10,000, first half of D paired with the second."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.n_embd // config.n_head // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)  # (D/2)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context_length, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> Rope:
        """Positions (T) or (B, T) -> cosines and sines of their angles, ([B,] 1, T, D/2): the same for all heads."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Queries or keys, (B, H, T, D), turned by their positions' angles."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention: each token takes in the values of those up to itself, by likeness of query and key."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, bias = config.n_embd, config.bias if config.attn_bias is None else config.attn_bias
        self.c_attn = nn.Linear(C, 3 * C, bias=bias)  # queries, keys and values of all heads, in one product
        self.c_proj = nn.Linear(C, C, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.manual = config.attention == "manual"

    def forward(self, x: Tensor, rope: Rope | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            stored_k, stored_v = cache.append(self.layer, k, v)
        if cache is not None and T == 1:  # in the cache's precision
            y = last_token_attention(q.to(stored_k.dtype), stored_k, stored_v, cache.attention_mask())
        else:  # a text from its start: its tokens see each other only
            dropout = self.dropout if self.training else 0.0
            # torch's CPU kernel for bf16 is slower than plain products up to 512 tokens (docs/speed.md)
            plain = self.manual or (x.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512)
            y = (causal_attention if plain else fused_attention)(q, k, v, dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention, written out.

    Args:
        q: (B, H, T, D).
        k, v: (B, H, S, D).
        mask: bool, broadcast to (B, H, T, S): which keys a query sees; None: all.

    Returns:
        (B, H, T, D).
    """
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, H, T, S): likeness of each query to each key
    if mask is not None:  # added, which takes a CPU a third less time than masked_fill on the scores
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    weights = F.softmax(scores, dim=-1)  # each row sums to 1
    return F.dropout(weights, dropout) @ v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """What the fused kernels compute, plain: no token sees the ones after it. q, k, v: (B, H, T, D)."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()  # (T, T)
    return manual_attention(q, k, v, mask, dropout)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same by torch's kernels, which never hold all scores at once.

    Kernels for cards before Ampere (a T4) take head sizes that are multiples of 8 only; zeros fill others up, add
    nothing to a score, and are cut off again.
    """
    D = q.size(-1)
    if D % 8:
        q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))  # (B, H, ..., D rounded up)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=1 / math.sqrt(D))
    return y[..., :D]


def last_token_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """manual_attention for T = 1, by what is fastest; on a GPU, kernels that the compiler makes of plain products."""
    if q.device.type != "cpu":
        return manual_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / math.sqrt(q.size(-1)))


class MLP(nn.Module):
    """Two Linear layers with a non-linearity between them, applied to each token on its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))  # (B, T, C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream and added to it (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class _NoInitialWeights(TorchFunctionMode):
    """Leaves parameters as they are: random numbers on the meta device load torch's compiler, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):  # of a tensor, or torch.nn.init's
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class GPT(nn.Module):
    """The network. `config.vocab_size` has to be set.

    Inside, the vocabulary is padded to a multiple of 64, which matrix units like; the padding has no say in loss,
    probabilities or samples, because logits are cut to vocab_size on the only way out.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size, config
        self.config = config
        C, padded = config.n_embd, -(-config.vocab_size // 64) * 64
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded, C),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(C, bias=config.bias),
            }
        )
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.context_length, C)
            self.rotary = None
        else:
            self.rotary = RotaryEmbedding(config)
        # A tied head has no parameter of its own, so it is stored once, counted once and updated once.
        self.lm_head = None if config.tie_weights else nn.Linear(C, padded, bias=config.head_bias)
        self.fused_loss = fused_loss
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1 / sqrt(2 n_layer), biases zero."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("c_proj") else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.transformer.wte, self.lm_head):
            if table is not None:
                table.weight[self.config.vocab_size :] = 0  # the padding

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean", cache: KVCache | None = None
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            idx: (B, T) int64 token ids, T at most context_length (what is in the cache counts).
            targets: (B, T) int64, the next token of each place; -1 where there is none to score.
            reduction: "mean" of the losses, or "none": the loss of each target, 0 where there is none to score.
        cache: keys and values of the tokens before idx; idx's go to `cache.position`, which T > 1 needs to be 0.

        Returns:
            targets given: the mean cross-entropy in nats, a float32 scalar, or (B T) of them with reduction "none".
            cache given: (B, 1, V) logits of the last place only.
            otherwise: (B, T, V) logits.
        """
        x = self.hidden_states(idx, cache)  # (B, T, C)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C): only the last place is asked for
        if (
            reduction == "none"
        ):  # some rows at a time, for evaluation: float32 logits of all would be more than training takes
            x, rows = x.flatten(0, 1), CHUNK_ROWS[x.device.type]
            parts = zip(x.split(rows), targets.flatten().split(rows), strict=True)
            return torch.cat([self._losses(hidden, their, "none") for hidden, their in parts])
        if targets is not None and use_fused_loss(idx.numel(), self.transformer.wte.num_embeddings):
            head = self.lm_head or self.transformer.wte
            weight, bias = head.weight, getattr(head, "bias", None)
            return self.fused_loss(x.flatten(0, 1), weight, bias, targets.flatten(), self.config.vocab_size)
        if targets is None:
            return self.compute_logits(x)  # (B, T, V)
        return self._losses(x.flatten(0, 1), targets.flatten(), "mean")

    def _losses(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        # float32: the sum over V of exponentials is where bf16 would lose the loss's third digit
        return F.cross_entropy(self.compute_logits(x).float(), targets, ignore_index=-1, reduction=reduction)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head makes logits of: (B, T, C), for ids and cache as forward takes them."""
        _, T = idx.shape
        if cache is None or isinstance(cache.position, int):
            start = cache.position if cache else 0
            assert start == 0 or T == 1, (start, T)
            assert start + T <= self.config.context_length, (start, T)
            positions = torch.arange(start, start + T, device=idx.device)  # (T)
        else:
            positions = cache.position[:, None]  # (B, 1)
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.rotary is None:
            x = x + self.transformer.wpe(positions)  # ([B,] T, C)
        else:
            rope = self.rotary(positions)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        return self.transformer.ln_f(x)  # (B, T, C)

    def compute_logits(self, x: Tensor, padded: bool = False) -> Tensor:
        """Logits (..., V) of what `hidden_states` gave, (..., C).

        Args:
            padded: leave the vocabulary's padding there, as -inf, where a softmax would copy rows that lie apart.
        """
        logits = F.linear(x, self.transformer.wte.weight) if self.lm_head is None else self.lm_head(x)
        if padded:
            logits[..., self.config.vocab_size :] = -torch.inf
            return logits
        return logits[..., : self.config.vocab_size]  # the padding stays inside

    def exclude_loss_from_compile(self) -> None:
        """Before torch.compile: the fused loss goes by chunks in memory of its own, which a graph would undo."""
        self.fused_loss = fused_loss_outside_graph(self.transformer.wte.weight.device)

    @classmethod
    def on_meta_device(cls, config: ModelConfig) -> GPT:
        """The network on the meta device: names and sizes, and no time or memory for weights that a file will give."""
        with torch.device("meta"), _NoInitialWeights():
            return cls(config)

    def num_params(self) -> int:
        """Parameters, the vocabulary's padding left out: 124,439,808 for GPT-2 124M."""
        padding = self.transformer.wte.num_embeddings - self.config.vocab_size
        per_row = self.config.n_embd if self.lm_head is None else 2 * self.config.n_embd + self.config.head_bias
        return sum(p.numel() for p in self.parameters()) - padding * per_row

    def flops_per_token(self) -> int:
        """Floating point operations to train on one token: 6 N + 12 L C T (Chowdhery et al., PaLM, appendix B, 2022).

        N is the parameters in matrix products: the head, once; no position table, no untied input table.
        """
        tables = [self.transformer.wpe] if self.rotary is None else []
        tables += [self.transformer.wte] if self.lm_head is not None else []
        padding = (self.transformer.wte.num_embeddings - self.config.vocab_size) * self.config.n_embd
        unused = sum(t.weight.numel() for t in tables) - (padding if self.lm_head is not None else 0)
        c = self.config
        return 6 * (self.num_params() - unused) + 12 * c.n_layer * c.n_embd * c.context_length
