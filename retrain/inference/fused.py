"""The fast way to decode: the forward pass of Llama-like models in few operations, on a merged copy of their weights.

Layers that read the same input become one product (queries, keys and values; gate and up), a group's prompt is computed
and kept once, and nothing is copied to make room for a token. `obstacle` says which models cannot be decoded like this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrain.backend.model import Policy
from retrain.inference.cache import GroupCache
from retrain.inference.decode import padded
from retrain.inference.merge import is_adapted, merged_weight, plain

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary embeddings whose frequencies do not depend on how long the sequence has become.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")

Attend = Callable[[int, Tensor], Tensor]


def obstacle(policy: Policy) -> str | None:
    """Why this model cannot be decoded here, or None."""
    config = policy.lm.config
    if config.model_type not in ARCHITECTURES:
        return f"there is no fused form of {config.model_type}"
    if getattr(config, "sliding_window", None):
        return "its attention has a sliding window"
    rope = config.rope_parameters["rope_type"]
    return None if rope in STATIC_ROPE else f'its rotary embedding is of type "{rope}"'


class Projection:
    """Linear layers that read the same input, as one map [N, in] -> [N, sum of out], each with its adapter merged in.

    On the CPU the weights are laid out for oneDNN. Elsewhere, layers without an adapter stay where the base has them.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.modules, self.dtype = modules, dtype
        self.adapted = any(map(is_adapted, modules))
        self.load()

    def load(self) -> None:
        weights = [merged_weight(module).to(self.dtype) for module in self.modules]
        layers = [plain(module) for module in self.modules]
        biases = [None if (b := getattr(layer, "bias", None)) is None else b.to(self.dtype) for layer in layers]
        self.packed = can_pack(weights[0].device, self.dtype)
        if self.packed or self.adapted:
            weights = [torch.cat(weights)]
            biases = [None if biases[0] is None else torch.cat([b for b in biases if b is not None])]
        if self.packed:
            weights = [torch.ops.mkldnn._reorder_linear_weight(weights[0])]
        self.parts = list(zip(weights, biases, strict=True))

    def __call__(self, x_ND: Tensor) -> Tensor:
        if self.packed:
            ((weight, bias),) = self.parts
            return torch.ops.mkldnn._linear_pointwise.default(x_ND, weight, bias, "none", [], "")
        outputs = [F.linear(x_ND, weight, bias) for weight, bias in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes weights laid out for it: a fifth to a half off the time of a product of few rows."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Layer:
    """One transformer block. head_norm: RMSNorm weight [H + K, D] of queries and keys, or None."""

    attention_norm: Tensor
    qkv: Projection
    head_norm: Tensor | None
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    act: nn.Module
    down: Projection


class FusedDecoder:
    """See `retrain.inference.decode.Decoder`. dtype: of the copy. cache_dtype: of keys and values, to be set freely."""

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.policy, self.dtype, self.cache_dtype = policy, dtype, dtype
        model, config = policy.lm.model, policy.lm.config
        self.path = f"fused {config.model_type}"
        attention = model.layers[0].self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.eps = torch.tensor(config.rms_norm_eps, device=policy.device)
        self.embedding, self.norm = model.embed_tokens.weight.to(dtype), model.norm.weight.to(dtype)
        self.layers = [self._layer(block) for block in model.layers]
        self.head = Projection([policy.head], dtype)

    def _layer(self, block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            both = (attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.kv_heads, -1))
            head_norm = torch.cat(both).to(self.dtype)
        return Layer(
            attention_norm=block.input_layernorm.weight.to(self.dtype),
            qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj], self.dtype),
            head_norm=head_norm,
            out=Projection([attention.o_proj], self.dtype),
            mlp_norm=block.post_attention_layernorm.weight.to(self.dtype),
            gate_up=Projection([mlp.gate_proj, mlp.up_proj], self.dtype),
            act=mlp.act_fn,
            down=Projection([mlp.down_proj], self.dtype),
        )

    def _projections(self) -> Iterator[Projection]:
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)

    def refresh(self) -> None:
        for projection in self._projections():
            if projection.adapted:
                projection.load()

    @torch.inference_mode()
    def start(self, prompts: Sequence[np.ndarray], size: int, limit: int) -> tuple[Tensor, FusedRows]:
        tokens_PS, lengths_P = padded(prompts, self.policy.eos_ids[0], self.policy.device, left=False)
        count, width = tokens_PS.shape
        angles = self._angles(width + limit)
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, qkv: Tensor) -> Tensor:
            # Padding stands on the right, where no token of the prompt looks.
            heads = qkv.view(count, width, -1, self.head_dim).transpose(1, 2)
            query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            kept.append((key.to(self.cache_dtype).contiguous(), value.to(self.cache_dtype).contiguous()))
            grouped = self.heads != self.kv_heads
            seen = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
            return seen.transpose(1, 2).reshape(count * width, -1)

        positions_N = torch.arange(width, device=tokens_PS.device).repeat(count)
        hidden_PSD = self.hidden(tokens_PS.flatten(), angles[:, positions_N], attend).view(count, width, -1)
        last_PD = hidden_PSD[torch.arange(count, device=tokens_PS.device), lengths_P - 1]
        cache = GroupCache(kept, lengths_P, size, limit, self.heads)
        rows = FusedRows(self, cache, lengths_P.repeat_interleave(size), angles)
        return self.head(last_PD).repeat_interleave(size, dim=0), rows

    def hidden(self, tokens_N: Tensor, angles_2ND: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [N, D] of tokens whose rotary angles are given."""
        cos, sin = angles_2ND[:, :, None]
        half, rotated = self.head_dim // 2, self.heads + self.kv_heads
        x = self.embedding[tokens_N]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.attention_norm)).view(len(x), -1, self.head_dim)
            qk = qkv[:, :rotated]
            if layer.head_norm is not None:
                qk = self._norm(qk, layer.head_norm)
            torch.addcmul(qk * cos, qk.roll(half, -1), sin, out=qkv[:, :rotated])
            x = x + layer.out(attend(index, qkv))
            gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(layer.act(gate) * up)
        return self._norm(x, self.norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension. Few operations: that is what a small step's time goes into."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * inverse).mul_(weight).to(x.dtype)

    def _angles(self, length: int) -> Tensor:
        """Cosine and sine of every position, [2, length, D]; the sine's first half is negated, so that rolling the
        heads by half their size does what the model's rotation does."""
        positions = torch.arange(length, device=self.policy.device)
        cos, sin = self.policy.lm.model.rotary_emb(self.embedding, positions[None])
        half = self.head_dim // 2
        return torch.stack((cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)))


@dataclass
class FusedRows:
    """See `retrain.inference.decode.Rows`. positions_B: int64, of each row's next token. angles: of all positions."""

    decoder: FusedDecoder
    cache: GroupCache
    positions_B: Tensor
    angles_2LD: Tensor

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        hidden_BD = self.decoder.hidden(tokens_B, self.angles_2LD[:, self.positions_B], self._attend)
        self.cache.advance()
        self.positions_B = self.positions_B + 1
        return self.decoder.head(hidden_BD)

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        return self.cache.attend(layer, qkv, self.decoder.scale)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.positions_B = self.positions_B[rows]
