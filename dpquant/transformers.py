"""Transformers for private training and for costing: a vision transformer, a BERT and a GPT-2, of torch's own layers.

Every parameter sits in a Linear, Conv2d, Embedding or LayerNorm, positions and the class token too, because those are
the layers whose per-example gradients are known. No weights are shared: a tied output layer's per-example gradient has
cross terms between its two uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulation.errors import InputError


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, width]."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended [B, T, width]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, width))
        return result


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with a residual; the norms before (ViT, GPT-2) or after (BERT)."""

    def __init__(self, width: int, heads: int, hidden: int, *, causal: bool = False, norm_first: bool = True) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, width] for ``x`` [B, T, width]."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        else:
            x = self.norm1(x + self.attention(x))
            out = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return out


def _positions(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device).expand(batch, length)


class VisionTransformer(nn.Module):
    """A vision transformer over square images [B, in_channels, image_size, image_size] (ViT-B/16 by default)."""

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise InputError(f"image_size={image_size} is not a multiple of patch={patch}")
        self.conv_proj = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Embedding(1, width)
        self.positions = nn.Embedding((image_size // patch) ** 2 + 1, width)
        self.layers = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        batch = x.shape[0]
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        token = self.class_token(torch.zeros(batch, 1, dtype=torch.long, device=x.device))
        x = torch.cat([token, patches], 1)
        x = x + self.positions(_positions(batch, x.shape[1], x.device))
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


class Bert(nn.Module):
    """A BERT encoder with its pooler and a classifier over token ids [B, T] (BERT-base by default)."""

    def __init__(
        self,
        *,
        num_classes: int = 2,
        vocabulary: int = 30522,
        length: int = 512,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Block(width, heads, hidden, norm_first=False) for _ in range(depth)))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, num_classes]; every token is of the first segment, none is masked."""
        places = _positions(tokens.shape[0], tokens.shape[1], tokens.device)
        x = self.words(tokens) + self.positions(places) + self.segments(torch.zeros_like(tokens))
        x = self.layers(self.norm(x))
        logits: Tensor = self.classifier(torch.tanh(self.pooler(x[:, 0])))
        return logits


class Gpt2(nn.Module):
    """A GPT-2 language model over token ids [B, T] (the 124M one by default, its output layer untied)."""

    def __init__(
        self,
        *,
        vocabulary: int = 50257,
        length: int = 1024,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Block(width, heads, 4 * width, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary] of the next token."""
        x = self.words(tokens) + self.positions(_positions(tokens.shape[0], tokens.shape[1], tokens.device))
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


class SequenceClassifier(nn.Module):
    """A small transformer encoder that classifies token sequences [B, T] by their mean (6 layers by default)."""

    def __init__(
        self,
        *,
        num_classes: int = 2,
        vocabulary: int = 1000,
        length: int = 128,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        x = self.words(tokens) + self.positions(_positions(tokens.shape[0], tokens.shape[1], tokens.device))
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits
