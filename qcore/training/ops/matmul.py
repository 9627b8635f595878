"""Matrix products, and attention, which is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.elementwise import plain
from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported, carrier


def gemm(node: OpNode) -> Function:
    """Build Gemm-13: alpha * A' B' + beta * C."""
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    trans_a, trans_b = bool(node.integer("transA")), bool(node.integer("transB"))

    def run_linear(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        return F.linear(a, b, c) if c is None or c.dim() == 1 else F.linear(a, b) + c

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        y = (a.t() if trans_a else a) @ (b.t() if trans_b else b)
        y = y if alpha == 1.0 else (y * alpha).to(y.dtype)
        return y if c is None else y + (c if beta == 1.0 else (c * beta).to(c.dtype))

    return run_linear if trans_b and not trans_a and alpha == beta == 1.0 else run


def einsum(node: OpNode) -> Function:
    """Build Einsum-12."""
    equation = node.text("equation", "").replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """The attributes of one Attention node."""

    scale: float | None
    causal: bool
    heads: tuple[int, int]
    softcap: float
    precision: torch.dtype | None
    shown: int
    window: tuple[int, int]


def attention(node: OpNode) -> Function:
    """Build Attention-25: q, k, v of (n, heads, length, width) or (n, length, heads * width).

    Rows that may attend to nothing give 0. Source: ONNX Attention-25 and its reference implementation.
    """
    precision = node.integer("softmax_precision")
    options = _Attention(
        scale=node.real("scale", 0.0) or None,
        causal=bool(node.integer("is_causal")),
        heads=(node.integer("q_num_heads"), node.integer("kv_num_heads")),
        softcap=node.real("softcap", 0.0),
        precision=carrier(ir.DataType(precision)) if precision else None,
        shown=node.integer("qk_matmul_output_mode"),
        window=(node.integer("left_window_size", -1), node.integer("right_window_size", -1)),
    )
    several = len(node.outputs) > 1
    if options.shown not in (0, 1, 2, 3):
        raise Unsupported(f"qk_matmul_output_mode {options.shown}")

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None) -> Tensor:
        mask, past_k, past_v, lengths = (*more, None, None, None, None)[:4]
        flat = q.dim() == 3
        if flat:
            q, k, v = _headed(q, options.heads[0]), _headed(k, options.heads[1]), _headed(v, options.heads[1])
        k = k if past_k is None else torch.cat([past_k, k], 2)
        v = v if past_v is None else torch.cat([past_v, v], 2)
        bias = None if mask is None else _mask_bias(mask, k.shape[2], q.dtype)
        for allowed in _limits(q, k, _offset(q, past_k, lengths), lengths, options):
            limit = _minus_infinity_outside(allowed, q.dtype)
            bias = limit if bias is None else bias + limit
        y, scores = _attend(q, k, v, bias, options)
        y = y.transpose(1, 2).flatten(2) if flat else y
        return (y, k, v, scores)[: len(node.outputs)] if several else y

    return run


def _headed(x: Tensor, heads: int) -> Tensor:
    """Return (n, length, heads * width) as (n, heads, length, width)."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def _offset(q: Tensor, past_k: Tensor | None, lengths: Tensor | None) -> Tensor | int:
    """Return how many keys stand before the first query: a number, or (n, 1, 1, 1)."""
    if past_k is not None:
        return int(past_k.shape[2])
    return 0 if lengths is None else (lengths - q.shape[2]).reshape(-1, 1, 1, 1)


def _mask_bias(mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return what `mask` adds to the scores; keys that it says nothing about are hidden."""
    bias = _minus_infinity_outside(mask, dtype) if mask.dtype == torch.bool else mask
    missing = columns - mask.shape[-1]
    return F.pad(bias, (0, missing), value=-torch.inf) if missing > 0 else bias


def _limits(q: Tensor, k: Tensor, offset: Tensor | int, lengths: Tensor | None, options: _Attention) -> list[Tensor]:
    """Return the Boolean masks that the attributes ask for: True where a query may attend to a key."""
    places = torch.arange(k.shape[2], device=q.device)
    distance = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + offset - places
    left, right = options.window
    limits = [distance >= 0] if options.causal else []
    limits += [distance <= left] if left >= 0 else []
    limits += [distance >= -right] if right >= 0 else []
    return limits if lengths is None else [*limits, places < lengths.reshape(-1, 1, 1, 1)]


def _minus_infinity_outside(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `allowed` is True and -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: _Attention) -> tuple[Tensor, Tensor]:
    """Return the attended values and the scores that the node shows."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = (options.scale or q.shape[3] ** -0.5) ** 0.5
    scores = (q * root) @ (k.transpose(2, 3) * root)
    stages = [scores]
    if options.softcap > 0:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    stages.append(scores)
    scores = scores if bias is None else scores + bias
    stages.append(scores)
    weights = torch.softmax(scores if options.precision is None else scores.to(options.precision), -1).to(q.dtype)
    if bias is not None:
        nothing = bias.amax(-1, keepdim=True) == -torch.inf
        weights = torch.where(nothing, torch.zeros_like(weights), weights)
    stages.append(weights)
    return weights @ v, stages[options.shown]


def rotary_embedding(node: OpNode) -> Function:
    """Build RotaryEmbedding-23: x (n, heads, length, width) or (n, length, heads * width)."""
    heads, width, interleaved = (
        node.integer("num_heads"),
        node.integer("rotary_embedding_dim"),
        bool(node.integer("interleaved")),
    )

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        headed = _headed(x, heads) if x.dim() == 3 else x
        if positions is not None:
            cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = headed[..., : width or headed.shape[-1]]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            y = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            y = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
        y = torch.cat([y, headed[..., y.shape[-1] :]], -1)
        return y.transpose(1, 2).flatten(2) if x.dim() == 3 else y

    return run


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "Attention": attention,
        "Einsum": einsum,
        "Gemm": gemm,
        "MatMul": plain(torch.matmul),
        "RotaryEmbedding": rotary_embedding,
    }
)
