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
from torch.utils.checkpoint import checkpoint

from config import ModelConfig

ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


class KVCache:
    """Keys and values of the tokens seen so far, in memory set aside once: (L, B, H, context_length, D) each.

    `length` tokens are filled. GPT.forward(idx, cache=...) appends idx's.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.context_length, head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, H, T, D), and return all of that layer, (B, H, length + T, D)."""
        start, stop = self.length, self.length + k.size(2)
        self.k[layer, :, :, start:stop] = k
        self.v[layer, :, :, start:stop] = v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop]


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021), base 10,000, first half of D paired with the second."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.n_embd // config.n_head // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)  # (D/2)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context_length, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Turn (B, H, T, D), whose first token stands at position `start`."""
        cos = self.cos[start : start + x.size(2)]  # (T, D/2), broadcast over B and H
        sin = self.sin[start : start + x.size(2)]
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

    def forward(self, x: Tensor, rotary: Rotary | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if rotary is not None:
            start = cache.length if cache else 0
            q, k = rotary(q, start), rotary(k, start)
        if cache is not None:
            assert T == 1 or cache.length == 0, (T, cache.length)  # a prompt into an empty cache, then one by one
            k, v = cache.append(self.layer, k, v)  # (B, H, length + T, D)
        causal = T > 1  # a single new token may look at everything
        dropout = self.dropout if self.training else 0.0
        # torch's CPU kernel for bf16 is slower than plain products up to 512 tokens (docs/speed.md)
        plain = self.manual or (x.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 512)
        attention = manual_attention if plain else fused_attention
        y = attention(q, k, v, causal, dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def manual_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """What the fused kernels compute, written out. q: (B, H, T, D); k, v: (B, H, S, D); returns (B, H, T, D)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S): likeness of each query to each key
    if causal:
        future = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)  # (T, S)
        scores = scores.masked_fill(future, -math.inf)  # no token sees the ones after it
    weights = F.softmax(scores, dim=-1)  # each row sums to 1
    return F.dropout(weights, dropout) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """The same by torch's kernels, which never hold all scores at once. Shapes as in manual_attention.

    Kernels for cards before Ampere (a T4) take head sizes that are multiples of 8 only; zeros fill others up, add
    nothing to a score, and are cut off again.
    """
    D = q.size(-1)
    if D % 8:
        q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))  # (B, H, ..., D rounded up)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout, scale=1 / math.sqrt(D))
    return y[..., :D]


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

    def forward(self, x: Tensor, rotary: Rotary | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


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
            self.rotary = Rotary(config)
        # A tied head has no parameter of its own, so it is stored once, counted once and updated once.
        self.lm_head = None if config.tie_weights else nn.Linear(C, padded, bias=config.head_bias)
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

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            idx: (B, T) int64 token ids, T at most context_length (what is in the cache counts).
            targets: (B, T) int64, the next token of each place; -1 where there is none to score.
            cache: keys and values of the tokens before idx; idx's are appended. T > 1 needs an empty one.

        Returns:
            targets given: the mean cross-entropy in nats, a float32 scalar.
            cache given: (B, 1, V) logits of the last place only.
            otherwise: (B, T, V) logits.
        """
        _, T = idx.shape
        start = cache.length if cache else 0
        assert start + T <= self.config.context_length, (start, T, self.config.context_length)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.rotary is None:
            x = x + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))  # (T, C), over B
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, self.rotary, use_reentrant=False)
            else:
                x = block(x, self.rotary, cache)
        x = self.transformer.ln_f(x)  # (B, T, C)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]  # (B, 1, C): only the last place is asked for
        if self.lm_head is None:
            logits = F.linear(x, self.transformer.wte.weight)
        else:
            logits = self.lm_head(x)
        logits = logits[..., : self.config.vocab_size]  # (B, T, V): the padding stays inside
        if targets is None:
            return logits
        # float32: the sum over V of exponentials is where bf16 would lose the loss's third digit
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

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
