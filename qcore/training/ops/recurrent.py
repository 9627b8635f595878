"""RNN, GRU and LSTM, step by step; lengths of sequences, all directions and activations.

Source: ONNX RNN-22, GRU-22, LSTM-22. Gates stand in ONNX's order: GRU update, reset, hidden; LSTM input, output,
forget, cell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softsign": F.softsign, "softplus": F.softplus}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """What one direction computes with: w (gates * h, x), r (gates * h, h), biases (gates * h,), peepholes (3 * h,)."""

    w: Tensor
    r: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    peepholes: Tensor | None = None


Step = Callable[[Tensor, State, _Weights, list[Activation]], State]


@dataclass(frozen=True, slots=True)
class _Direction:
    """One pass over a sequence, from its start or backward from its end."""

    step: Step
    weights: _Weights
    functions: list[Activation]
    backward: bool


def rnn_step(x: Tensor, state: State, weights: _Weights, functions: list[Activation]) -> State:
    """Return the next state (h,) of an RNN."""
    return (functions[0](_input_part(x, weights) + _hidden_part(state[0], weights)),)


def gru_step(x: Tensor, state: State, weights: _Weights, functions: list[Activation]) -> State:
    """Return the next state (h,) of a GRU whose reset gate acts before the hidden product."""
    (h,) = state
    size = h.shape[1]
    a = _input_part(x, weights)
    gates = F.linear(h, weights.r[: 2 * size], None if weights.hidden_bias is None else weights.hidden_bias[: 2 * size])
    update, reset = functions[0](a[:, : 2 * size] + gates).chunk(2, 1)
    last = None if weights.hidden_bias is None else weights.hidden_bias[2 * size :]
    new = functions[1](a[:, 2 * size :] + F.linear(reset * h, weights.r[2 * size :], last))
    return ((1 - update) * new + update * h,)


def gru_step_reset_after(x: Tensor, state: State, weights: _Weights, functions: list[Activation]) -> State:
    """Return the next state (h,) of a GRU whose reset gate acts behind the hidden product (linear_before_reset)."""
    (h,) = state
    size = h.shape[1]
    a, b = _input_part(x, weights), _hidden_part(h, weights)
    update, reset = functions[0](a[:, : 2 * size] + b[:, : 2 * size]).chunk(2, 1)
    new = functions[1](a[:, 2 * size :] + reset * b[:, 2 * size :])
    return ((1 - update) * new + update * h,)


def lstm_step(x: Tensor, state: State, weights: _Weights, functions: list[Activation]) -> State:
    """Return the next state (h, c) of an LSTM."""
    h, c = state
    inward, outward, forget, cell = (_input_part(x, weights) + _hidden_part(h, weights)).chunk(4, 1)
    if weights.peepholes is not None:
        p_in, p_out, p_forget = weights.peepholes.chunk(3)
        inward, forget = inward + p_in * c, forget + p_forget * c
    c = functions[0](forget) * c + functions[0](inward) * functions[1](cell)
    if weights.peepholes is not None:
        outward = outward + p_out * c
    return functions[0](outward) * functions[2](c), c


def _input_part(x: Tensor, weights: _Weights) -> Tensor:
    return F.linear(x, weights.w, weights.input_bias)


def _hidden_part(h: Tensor, weights: _Weights) -> Tensor:
    return F.linear(h, weights.r, weights.hidden_bias)


def recurrent(defaults: tuple[str, ...]) -> OpFunction:
    """Return the operator function of a recurrent operator with these default activations."""

    def build(node: OpNode) -> Function:
        direction = node.choice("direction", ("forward", "reverse", "bidirectional"))
        for name in ("clip", "input_forget"):
            if node.attributes.get(name) is not None and node.attributes[name].value:
                raise Unsupported(f"the attribute {name}")
        step = _step(node)
        backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        functions = _functions(node, defaults, len(backwards))
        batch_first, outputs, states = bool(node.integer("layout")), len(node.outputs), 2 if step is lstm_step else 1

        def run(x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None) -> Tensor:
            bias, lengths, *initial = (*more, *(None,) * 5)[: 2 + states + 1]
            x = x.transpose(0, 1) if batch_first else x
            sequences, lasts = [], []
            for d, backward in enumerate(backwards):
                weights = _weights_of(d, w, r, bias, initial[2] if states == 2 else None)
                state = _initial(initial[:states], d, batch_first, x.new_zeros(x.shape[1], r.shape[2]))
                ys, last = _sequence(x, state, lengths, _Direction(step, weights, functions[d], backward))
                sequences.append(ys)
                lasts.append(last)
            y = torch.stack(sequences, 1)
            finals = [torch.stack([last[i] for last in lasts]) for i in range(states)]
            if batch_first:
                y, finals = y.permute(2, 0, 1, 3), [f.transpose(0, 1) for f in finals]
            return (y, *finals)[:outputs] if outputs > 1 else y

        return run

    return build


def _step(node: OpNode) -> Step:
    if node.op_type == "GRU":
        return gru_step_reset_after if node.integer("linear_before_reset") else gru_step
    return lstm_step if node.op_type == "LSTM" else rnn_step


def _functions(node: OpNode, defaults: tuple[str, ...], directions: int) -> list[list[Activation]]:
    names = [name.lower() for name in node.texts("activations")] or list(defaults) * directions
    unknown = [name for name in names if name not in _ACTIVATIONS]
    if unknown or node.attributes.get("activation_alpha") or node.attributes.get("activation_beta"):
        raise Unsupported(f"activations {', '.join(unknown or names)} with parameters")
    count = len(defaults)
    return [[_ACTIVATIONS[name] for name in names[d * count : (d + 1) * count]] for d in range(directions)]


def _weights_of(d: int, w: Tensor, r: Tensor, bias: Tensor | None, peepholes: Tensor | None) -> _Weights:
    of_input, of_hidden = (None, None) if bias is None else bias[d].chunk(2)
    return _Weights(
        w=w[d],
        r=r[d],
        input_bias=of_input,
        hidden_bias=of_hidden,
        peepholes=None if peepholes is None else peepholes[d],
    )


def _initial(given: list[Tensor | None], d: int, batch_first: bool, zero: Tensor) -> State:
    return tuple(zero if g is None else (g[:, d] if batch_first else g[d]) for g in given)


def _sequence(x: Tensor, state: State, lengths: Tensor | None, direction: _Direction) -> tuple[Tensor, State]:
    """Return the outputs (length, n, h), 0 behind the end of a sequence, and the last state."""
    ys: list[Tensor] = []
    order = range(x.shape[0] - 1, -1, -1) if direction.backward else range(x.shape[0])
    for t in order:
        new = direction.step(x[t], state, direction.weights, direction.functions)
        if lengths is not None:
            inside = (lengths > t).unsqueeze(1)
            new = tuple(torch.where(inside, n, old) for n, old in zip(new, state, strict=True))
            ys.append(torch.where(inside, new[0], torch.zeros_like(new[0])))
        else:
            ys.append(new[0])
        state = new
    return torch.stack(ys[::-1] if direction.backward else ys), state


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "GRU": recurrent(("sigmoid", "tanh")),
        "LSTM": recurrent(("sigmoid", "tanh", "tanh")),
        "RNN": recurrent(("tanh",)),
    }
)
