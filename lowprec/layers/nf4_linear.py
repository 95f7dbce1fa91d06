"""The layer of the scheme ``nf4``.

Forward: Y = X dq(W)^T + b. Input gradient: E_X = E_Y dq(W). There is no weight gradient, and nothing but the packed
weight is kept for backward.
"""

import bitsandbytes as bnb
import torch
from torch import nn


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' layer, which PEFT recognises, with its weight packed from the beginning."""

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool):
        with torch.device("meta"):
            super().__init__(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=linear.weight.dtype,
                compress_statistics=double_quant,
                quant_type="nf4",
            )
        weight: nn.Parameter = bnb.nn.Params4bit(
            linear.weight.detach(),
            requires_grad=False,
            blocksize=block_size,
            compress_statistics=double_quant,
            quant_type="nf4",
            module=self,
        )
        self.weight = weight.to(linear.weight.device)  # bitsandbytes packs when told to move, also to where it is
        assert self.weight.dtype == torch.uint8
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, multiplied in the compute dtype and given back in the dtype of ``x``.

        bitsandbytes' own forward is not used for two reasons: on a CPU with AVX512-BF16 it repacks the weight at the
        first call in ``eval`` mode, and from then on no gradient passes the layer; and it stores a trained fp32 bias
        back in the dtype of ``x``.
        """
        y = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight, quant_state=self.weight.quant_state)  # type: ignore[attr-defined]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` that the products use, in the compute dtype."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)  # type: ignore[attr-defined]
