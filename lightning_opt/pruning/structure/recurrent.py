"""Rules for recurrent layers: one size of hidden state for all gates, layers and directions."""

from lightning_opt.pruning.structure.axes import (
    Axis,
    freeze,
    leaves,
    mark,
    new_axis,
    regroup,
    size_of,
    sum_axis,
)
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@operation("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Answer:
    value: Value = call["input"]
    weights: list[Value] | None = call["params"]
    if weights is None or call["batch_sizes"] is not None:
        return call.refuse("is a packed sequence")
    states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    directions, layers = 2 if call["bidirectional"] else 1, call["num_layers"]
    each = len(weights) // (directions * layers)
    if each != (4 if call["has_biases"] else 2):
        return call.refuse("has projections")
    hidden = states[0].axes[-1]
    for state in states:
        call.unify(hidden, state.axes[-1])
        freeze(state.axes[0], call.reason("counts layers"))
    inputs = value.axes[-1]
    call.link(inputs, "input_size")
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            if not _tie_layer(call, inputs, hidden, weights[start : start + each]):
                return call.refuse("has gates that do not follow the parts of its state")
            call.cost(*value.axes[:-1], *weights[start].axes)
            call.cost(*value.axes[:-1], *weights[start + 1].axes)
        inputs = sum_axis([hidden] * directions)
    call.link(hidden, "hidden_size")
    mark(hidden, "linear")
    lead = value.axes[:-1]
    output = Value([*lead, inputs])
    finals = [Value([new_axis(call.shapes[1][0]), *state.axes[1:-1], hidden]) for state in states]
    for axis in (*lead, *(final.axes[0] for final in finals)):
        freeze(axis, call.reason("is an axis of time, samples or layers"))
    return (output, *finals)


def _tie_layer(call: Call, inputs: Axis, hidden: Axis, weights: list[Value]) -> bool:
    """Tie the weights `(G * H, I)` and `(G * H, H)` and the biases `(G * H,)` of one layer and direction."""
    gates = _GATES[call.name]
    call.unify(inputs, weights[0].axes[1])
    call.unify(hidden, weights[1].axes[1])
    for weight in weights:
        parts = regroup([weight.axes[0]], [gates, size_of(hidden)])
        if parts is None:
            return False
        freeze(parts[0], call.reason("counts gates"))
        call.unify(parts[1], hidden)
    return len(list(leaves(hidden))) > 0
