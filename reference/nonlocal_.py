"""Dense attention as published: the non-local block, and the dense baseline of the ISA authors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import dense_attention
from .modules import ConvNormReLU


class NonLocal(nn.Module):
    """The non-local block, embedded Gaussian: Wang et al., arXiv 1711.07971, section 3.

    x + BN(W softmax(theta(x)^T phi(x) / sqrt(C/2)) g(x)): theta, phi and g are conv1x1 to C/2 channels, W leads back
    to C. Batch normalisation starts at zero, so the block starts as the identity.

    Args:
        channels: C, even.

    x [B, C, H, W] -> [B, C, H, W].

    >>> NonLocal(16)(torch.randn(2, 16, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, width, 1) for _ in range(3))
        self.output, self.norm = nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).permute(0, 2, 3, 1).unsqueeze(3) for f in (self.theta, self.phi, self.g))  # [B, H, W, 1, C/2]
        context = self.attend(q, k, v).squeeze(3).permute(0, 3, 1, 2)  # [B, C/2, H, W]
        return self.norm(self.output(context)) + x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v)


class SA(nn.Module):
    """The ISA authors' dense baseline ("Base-OC" of openseg.pytorch): dense attention, fused with its input.

    Key and query are two conv1x1 + BN + ReLU each, value one conv1x1, scores are scaled by K**-0.5. The output conv1x1
    starts at zero; its result beside x goes through conv1x1 + BN + ReLU + dropout. Biases that batch normalisation
    would take away again are left out.

    Args:
        in_channels, key_channels, value_channels, out_channels: widths; 512, 256, 256, 512 as published.
        dropout: probability that a channel of the result is dropped in training.

    x [B, in_channels, H, W] -> [B, out_channels, H, W].

    >>> SA(16, 4, 6, 8)(torch.randn(2, 16, 5, 7)).shape
    torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self, in_channels: int, key_channels: int, value_channels: int, out_channels: int, dropout: float = 0.05
    ) -> None:
        super().__init__()

        def twice() -> nn.Sequential:
            return nn.Sequential(ConvNormReLU(in_channels, key_channels), ConvNormReLU(key_channels, key_channels))

        self.query, self.key = twice(), twice()
        self.value, self.output = nn.Conv2d(in_channels, value_channels, 1), nn.Conv2d(value_channels, in_channels, 1)
        self.fuse, self.dropout = ConvNormReLU(2 * in_channels, out_channels), nn.Dropout2d(dropout)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).permute(0, 2, 3, 1).unsqueeze(3) for f in (self.query, self.key, self.value))  # [B, H, W, 1, .]
        context = self.output(self.attend(q, k, v).squeeze(3).permute(0, 3, 1, 2))
        return self.dropout(self.fuse(torch.cat([context, x], 1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v)
