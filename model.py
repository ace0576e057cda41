"""GPT-2: token ids -> logits or loss.

Sizes in the comments: B batch, T time (tokens), C channels (n_embd), H heads, D = C / H head size, V vocabulary.
Modules are named as in Hugging Face's GPT-2, so that state dicts have the same keys. Matrices have nn.Linear's layout,
(out, in). The paper: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
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
    """Multi-head causal self-attention: each token attends to itself and to earlier tokens."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, bias = config.n_embd, config.bias if config.attn_bias is None else config.attn_bias
        self.c_attn = nn.Linear(C, 3 * C, bias=bias)  # queries, keys and values of all heads in one product
        self.c_proj = nn.Linear(C, C, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        # None: chosen by attention(). In training on a CPU, setup.py sets the faster of "fused" and "plain".
        self.path = "manual" if config.attention == "manual" else None

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
            # k, v: (B, H, S, D), cached and new tokens; mask: (B, 1, 1, S), true if visible, or None: causal
            k, v, mask = cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout, self.path)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C): heads concatenated
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token."""

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
    """Pre-norm transformer block: x = x + attention(norm(x)), then x = x + MLP(norm(x))."""

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
    """The GPT-2 language model. `config.vocab_size` must be set.

    The embedding and the head are padded to a multiple of 64 rows, which makes matrix products faster. The padding does
    not affect loss, probabilities or samples: logits are cut to vocab_size.
    """

    name = "the model"  # in messages; loading.load sets it to the path

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError(f"vocab_size = {config.vocab_size}: the number of token ids is expected")
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
        self.loss_path: str | None = None  # as Attention.path
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as GPT-2: N(0, 0.02), residual projections scaled by 1 / sqrt(2 n_layer), biases zero."""
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
        """Compute logits, or the loss if targets are given.

        Args:
            idx: (B, T) int64 token ids, T at most context_length.
            targets: (B, T) int64, the next token at each position; -1 is ignored.
            reduction: "mean" of the losses, or "none": the loss of each target, 0 if it is ignored.
            cache: keys and values of the tokens before idx. Those of idx are added to it.

        Returns:
            with targets: cross-entropy in nats, float32; a scalar, or (B * T) with reduction "none".
            with a cache: (B, 1, V) logits of the last token.
            otherwise: (B, T, V) logits.
        """
        x = self.hidden_states(idx, cache)  # (B, T, C)
        if targets is None:
            return self.compute_logits(x if cache is None else x[cache.last][:, None])
        x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T)
        if reduction == "none":  # evaluation: in chunks, as float32 logits of all rows need much memory
            rows = CHUNK_ROWS[x.device.type]
            chunks = zip(x.split(rows), targets.split(rows), strict=True)
            return torch.cat([self._cross_entropy(*chunk, reduction) for chunk in chunks])  # (B * T)
        if reduction == "mean" and use_fused_loss(len(x), self.transformer.wte.num_embeddings, self.loss_path):
            weight, bias = self.lm_head.weight, self.lm_head.bias
            return self.fused_loss(x, weight, bias, targets, self.config.vocab_size, self.adjust_logits)
        return self._cross_entropy(x, targets, reduction)

    def _cross_entropy(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        # float32: summing V exponentials in bfloat16 would make the third digit of the loss wrong
        return F.cross_entropy(self.compute_logits(x).float(), targets, ignore_index=-1, reduction=reduction)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute the input of lm_head, (B, T, C). Arguments as in `forward`."""
        if idx.size(1) > self.config.context_length:
            raise ValueError(f"{idx.size(1)} tokens are more than context_length = {self.config.context_length}")
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.next_positions(idx.size(1))
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.rotary is None:
            x = x + self.transformer.wpe(positions)  # (T, C), or (B, 1, C) if positions differ by row
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
            padded: keep the padding columns, set to -inf. Softmax would copy logits that are cut.
        """
        logits = self.lm_head(x)  # (..., V padded)
        unpadded = logits[..., : self.config.vocab_size]  # (..., V)
        adjusted = self.adjust_logits(unpadded)
        if not padded:
            return adjusted
        if adjusted is not unpadded:
            return F.pad(adjusted, (0, logits.size(-1) - unpadded.size(-1)), value=-torch.inf)
        logits[..., self.config.vocab_size :] = -torch.inf
        return logits

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Transform logits (..., V) in training, evaluation and sampling. Edit this method to change them.

        Example: `return 15 * torch.tanh(logits / 15)`. The argument must not be modified in place.
        """
        return logits

    def exclude_loss_from_compile(self, compile: Callable) -> None:
        """Exclude the fused loss from a later torch.compile, which would not reuse memory between chunks.

        Args:
            compile: as in fused_loss_outside_graph.
        """
        self.fused_loss = fused_loss_outside_graph(self.transformer.wte.weight.device, compile)

    @classmethod
    def on_meta_device(cls, config: ModelConfig) -> GPT:
        """Build the model without memory for weights, for load_state_dict(..., assign=True) or to read its sizes."""
        with torch.device("meta"), skip_init():
            return cls(config)

    @classmethod
    def from_pretrained(cls, name: str, device: str = "cpu") -> GPT:
        """Load a model for evaluation: a run's folder, a checkpoint, a Hugging Face folder or name, or a ckpt.pt."""
        from flatgpt.interop.loading import find, load

        return load(find(name), device, model_class=cls)[0]

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """Generate max_new_tokens token ids after each row of idx.

        Args:
            idx: (B, T) int64 token ids, T at least 1.
            sampling: settings of SamplingConfig: temperature (0.8), greedy, top_k, top_p, min_p, repetition_penalty,
                seed. Row r has its own generator, seeded with seed and r.

        Returns:
            (B, T + max_new_tokens) int64: idx and the new ids. Rows continue after end-of-text.
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
        """Return the number of parameters without the padding of the vocabulary: 124,439,808 for GPT-2 124M."""
        padded = {*self.transformer.wte.parameters(), *self.lm_head.parameters()}  # a set: they may be tied
        # no slices: of a sharded tensor they would need all ranks
        padding = sum((len(p) - self.config.vocab_size) * math.prod(p.shape[1:]) for p in padded)
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Return the FLOPs of training on one token: 6 N + 12 L C T (Chowdhery et al., PaLM, 2022, appendix B).

        L is the number of layers. N counts the parameters without position table and untied input embedding.
        """
        c = self.config
        lookups = c.context_length * (c.position == "learned") + c.vocab_size * (not c.tie_weights)  # rows
        return 6 * (self.num_params() - lookups * c.n_embd) + 12 * c.n_layer * c.n_embd * c.context_length
