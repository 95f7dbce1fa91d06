"""What an operator multiplies, and what its CUDA kernel takes for itself while it runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lowprec.plan.tape import Product

aten = torch.ops.aten

KIND_OF = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
ATTENTION = "attention"
"""Product kind of fused attention: m queries, n keys, k the width of a head, count the heads times rows times passes
over the scores (2 products in forward, 5 in backward), halved by the causal mask."""


def products_of(func: Any, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> Iterable[Product]:
    """The matrix products of one call; none for an operator that only moves bytes."""
    find = _PRODUCTS.get(func.overloadpacket)
    return find(args, outputs) if find is not None else ()


def hidden_bytes(func: Any, args: Sequence[Any], kwargs: dict, outputs: Sequence[torch.Tensor]) -> int:
    """Device memory that the kernel allocates and frees inside the call, beside its results."""
    find = _HIDDEN.get(func.overloadpacket)
    return find(args, kwargs) if find is not None else 0


def _mm(a: torch.Tensor, b: torch.Tensor) -> tuple[Product, ...]:
    *batch, m, k = a.shape
    count = 1
    for size in batch:
        count *= size
    return (Product(KIND_OF.get(a.dtype, "fp32"), m, b.shape[-1], k, count),)


def _codes(args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> tuple[Product, ...]:
    from lowprec.ops.scaled_matmul import FUSED_RANK  # imported already: the operator exists

    a, b = args[0], args[2]  # lowprec::scaled_matmul: [M, K], [N, K]
    (m, k), n = a.shape, b.shape[0]
    low = args[7] if len(args) > 7 else None  # [M, r]
    if low is None:
        return (Product(KIND_OF[a.dtype], m, n, k),)
    if low.shape[1] > FUSED_RANK:
        return Product(KIND_OF[a.dtype], m, n, k), Product(KIND_OF[low.dtype], m, n, low.shape[1])
    # Part of the same kernel, which writes its result once: told apart, the term would be charged for that again.
    return (Product(KIND_OF[a.dtype], m, n, k + low.shape[1]),)


def _groups(args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> tuple[Product, ...]:
    """As one product of all rows, since a single kernel runs over the groups: the same operations. That it reads every
    group's matrix takes longer only where a group has fewer than a few hundred rows."""
    a, b = args[0], args[2]  # lowprec::scaled_grouped_matmul: [M, K], [groups, N, K]
    return (Product(KIND_OF[a.dtype], a.shape[0], b.shape[1], a.shape[1]),)


def _packed(args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> tuple[Product, ...]:
    a, shape = args[0], args[2]  # bitsandbytes::gemm_4bit
    return (Product(KIND_OF[a.dtype], a.numel() // a.shape[-1], shape[0], shape[1]),)


def _attention(products: int, query_at: int) -> Callable:
    def find(args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> tuple[Product, ...]:
        query, key = args[query_at], args[query_at + 1]
        rows, heads, m, k = query.shape
        return (Product(ATTENTION, m, key.shape[2], k, rows * heads * products),)

    return find


_PRODUCTS: dict[Any, Callable] = {
    aten.mm: lambda args, outputs: _mm(args[0], args[1]),
    aten.bmm: lambda args, outputs: _mm(args[0], args[1]),
    aten.addmm: lambda args, outputs: _mm(args[1], args[2]),
    aten.addmm_: lambda args, outputs: _mm(args[1], args[2]),
    aten.baddbmm: lambda args, outputs: _mm(args[1], args[2]),
    aten._grouped_mm: lambda args, outputs: _mm(args[0], args[1]),  # of all rows: see _groups
    aten._scaled_mm: lambda args, outputs: _mm(args[0], args[1]),
    aten._scaled_dot_product_flash_attention: _attention(2, 0),
    aten._scaled_dot_product_flash_attention_backward: _attention(5, 1),
    aten._scaled_dot_product_efficient_attention: _attention(2, 0),
    aten._scaled_dot_product_efficient_attention_backward: _attention(5, 1),
}


def _flash_backward(args: Sequence[Any], kwargs: dict) -> int:
    """fp32 sums of the query's gradient, one fp32 a query, and with grouped heads the keys' and values' gradients of
    every head before they are added up (aten/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd)."""
    query, key = args[1], args[2]
    rows, heads, m, width = query.shape
    width, m = -(-width // 32) * 32, -(-m // 128) * 128
    grouped = 2 * rows * heads * key.shape[2] * width * key.element_size() if key.shape[1] != heads else 0
    return rows * heads * m * (width + 1) * 4 + grouped


def _decoded(args: Sequence[Any], kwargs: dict) -> int:
    """bitsandbytes decodes the weight, and its scales, before it multiplies more than a few tokens."""
    activations, shape = args[0], args[2]
    scales = kwargs.get("absmax_8bit", args[7] if len(args) > 7 else None)
    return shape[0] * shape[1] * activations.element_size() + (0 if scales is None else 4 * scales.numel())


_HIDDEN: dict[Any, Callable] = {
    aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    # fp32 sums of the query's gradient where it is 16-bit (attention_backward.cu, the kernel's accumulation workspace)
    aten._scaled_dot_product_efficient_attention_backward: lambda args, kwargs: (
        args[1].numel() * 4 if args[1].element_size() == 2 else 0
    ),
}


def know_bitsandbytes() -> None:
    """Add its operators. They exist once it is imported, which takes seconds and which only 4-bit layers need."""
    packed = torch.ops.bitsandbytes.gemm_4bit
    _PRODUCTS[packed], _HIDDEN[packed] = _packed, _decoded


def know_lowprec() -> None:
    """Add lowprec's operators, which exist once ``lowprec.ops`` is imported."""
    _PRODUCTS[torch.ops.lowprec.scaled_matmul] = _codes
    _PRODUCTS[torch.ops.lowprec.scaled_grouped_matmul] = _groups
