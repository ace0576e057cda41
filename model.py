"""GPT-2: token ids -> logits or loss.

Sizes in the comments: B batch, T time (tokens), C channels (n_embd), H heads, D = C / H head size, V vocabulary.
Modules have the names of Hugging Face's GPT-2, so that state dicts are alike; matrices lie as nn.Linear has them,
(out, in). The paper: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import ModelConfig, SamplingConfig
from flatgpt.kernels.attention import Rope, RotaryEmbedding, attention, rotate
from flatgpt.kernels.cross_entropy import CHUNK_ROWS, fused_loss, fused_loss_outside_graph, use_fused_loss
from flatgpt.kernels.parameters import skip_init, tie_parameters

if TYPE_CHECKING:
    from flatgpt.inference.decoder import KVCache

ACTIVATIONS = {"gelu_tanh": partial(nn.GELU, approximate="tanh"), "gelu": nn.GELU, "relu": nn.ReLU}


class Attention(nn.Module):
    """Causal self-attention: each token reads the values of the tokens up to itself, weighted by query times key."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, bias = config.n_embd, config.bias if config.attn_bias is None else config.attn_bias
        self.c_attn = nn.Linear(C, 3 * C, bias=bias)  # queries, keys and values of all heads in one product
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
            q, k = rotate(q, rope), rotate(k, rope)  # (B, H, T, D)
        mask = None  # causal
        if cache is not None:
            # (B, H, S, D): with the S - T tokens before; the mask is (B, 1, 1, S) or None, true: visible
            k, v, mask = cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout, self.manual)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C): the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two Linear layers with a non-linearity between them, applied to each token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = round(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))  # (B, T, C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream and added to it (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole network. `config.vocab_size` has to be set.

    The embedding and the head have a multiple of 64 rows, for which matrix units are faster. The padding does not
    affect loss, probabilities or samples: logits are cut to vocab_size.
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
        self.rotary = RotaryEmbedding(config) if config.position == "rope" else None
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.context_length, C)
        with skip_init() if config.tie_weights else contextlib.nullcontext():
            self.lm_head = nn.Linear(C, padded, bias=config.head_bias)
        if config.tie_weights:
            tie_parameters(self, "transformer.wte.weight", "lm_head.weight")
        self.fused_loss = fused_loss
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1 / sqrt(2 n_layer), biases zero."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for table in (self.transformer.wte, self.lm_head):
            table.weight[self.config.vocab_size :] = 0  # the padding

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean", cache: KVCache | None = None
    ) -> Tensor:
        """Compute logits, or the loss where targets are given.

        Args:
            idx: (B, T) int64 token ids, T at most context_length.
            targets: (B, T) int64, the next token of each position; -1 where there is none to score.
            reduction: of the losses: "mean", or "none" for each of them, 0 where there is none to score.
            cache: keys and values of the tokens before idx, which starts at cache.position; those of idx are stored.

        Returns:
            with targets: cross-entropy in nats, float32: a scalar, or (B T) with reduction "none".
            with a cache: (B, 1, V) logits of the last position.
            else: (B, T, V) logits.
        """
        x = self.hidden_states(idx, cache)  # (B, T, C)
        if targets is None:
            return self.compute_logits(x if cache is None else x[:, -1:])
        x, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
        if reduction == "none":  # in chunks, for evaluation: float32 logits of all rows take more memory than training
            rows = CHUNK_ROWS[x.device.type]
            chunks = zip(x.split(rows), targets.split(rows), strict=True)
            return torch.cat([self._cross_entropy(*chunk, reduction) for chunk in chunks])  # (B T)
        if reduction == "mean" and use_fused_loss(len(x), self.transformer.wte.num_embeddings):
            weight, bias = self.lm_head.weight, self.lm_head.bias
            return self.fused_loss(x, weight, bias, targets, self.config.vocab_size, self.adjust_logits)
        return self._cross_entropy(x, targets, reduction)

    def _cross_entropy(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        # float32: in bf16 the sum over V of exponentials would lose the third digit of the loss
        return F.cross_entropy(self.compute_logits(x).float(), targets, ignore_index=-1, reduction=reduction)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute what the head reads, (B, T, C); arguments as in `forward`."""
        if idx.size(1) > self.config.context_length:
            raise ValueError(f"{idx.size(1)} tokens: context_length = {self.config.context_length}")
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.next_positions(idx.size(1))
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.rotary is None:
            x = x + self.transformer.wpe(positions)  # (T, C), or (B, 1, C) where rows have positions of their own
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
        """Compute logits (..., V) of hidden states (..., C).

        Args:
            padded: return the columns of the padding too, as -inf: a softmax copies rows that are cut.
        """
        logits = self.lm_head(x)  # (..., V padded)
        cut = logits[..., : self.config.vocab_size]  # (..., V)
        adjusted = self.adjust_logits(cut)
        if not padded:
            return adjusted
        if adjusted is not cut:
            return F.pad(adjusted, (0, logits.size(-1) - cut.size(-1)), value=-torch.inf)
        logits[..., self.config.vocab_size :] = -torch.inf
        return logits

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Change logits (..., V) in training, evaluation and sampling alike, by `15 * torch.tanh(logits / 15)`, say.

        The argument is not to be changed in place.
        """
        return logits

    def exclude_loss_from_compile(self) -> None:
        """Call before torch.compile: the fused loss reuses memory chunk by chunk, which a compiled graph would not."""
        self.fused_loss = fused_loss_outside_graph(self.transformer.wte.weight.device)

    @classmethod
    def on_meta_device(cls, config: ModelConfig) -> GPT:
        """Build the network without memory for its weights, for load_state_dict(..., assign=True) or its sizes."""
        with torch.device("meta"), skip_init():
            return cls(config)

    @classmethod
    def from_pretrained(cls, name: str, device: str = "cpu") -> GPT:
        """Load a model in evaluation mode: a run's folder, a checkpoint, a Hugging Face folder or name, a ckpt.pt."""
        from flatgpt.interop.loading import find, load

        return load(find(name), device, model_class=cls)[0]

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """Continue each row of idx.

        Args:
            idx: (B, T) int64 token ids, T at least 1.
            sampling: settings of SamplingConfig: temperature (0.8), greedy, top_k, top_p, min_p, repetition_penalty,
                seed. Row r draws from a generator of its own, seeded by seed and r.

        Returns:
            (B, T + max_new_tokens) int64: idx and the new ids. End-of-text does not stop a row.
        """
        from flatgpt.inference.decoder import Decoder
        from flatgpt.inference.sampling import generate_batch

        options = SamplingConfig(**sampling)
        if problems := options.problems():
            raise ValueError("; ".join(problems))
        steps = generate_batch(Decoder(self), idx.tolist(), max_new_tokens, options)
        new = torch.tensor([*steps], dtype=torch.int64, device=idx.device).view(-1, len(idx))  # (max_new_tokens, B)
        return torch.cat((idx, new.T), dim=1)

    def num_params(self) -> int:
        """Count parameters without the vocabulary's padding: 124,439,808 for GPT-2 124M."""
        return self.config.num_params()

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L C T (Chowdhery et al., PaLM, appendix B, 2022).

        N counts the parameters in matrix products: the head, but no position table and no untied input embedding.
        """
        c = self.config
        lookups = c.context_length * (c.position == "learned") + c.vocab_size * (not c.tie_weights)  # rows
        return 6 * (c.num_params() - lookups * c.n_embd) + 12 * c.n_layer * c.n_embd * c.context_length
