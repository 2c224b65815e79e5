"""From a model to its structure."""

from collections.abc import Sequence

from torch import nn

from lightning_opt.forward import Inputs
from lightning_opt.pruning.structure.attributes import tie_shared_numbers
from lightning_opt.pruning.structure.groups import find_groups, find_refusals, freeze_ignored, freeze_repeats
from lightning_opt.pruning.structure.program import export
from lightning_opt.pruning.structure.provenance import find_calls
from lightning_opt.pruning.structure.structure import Structure
from lightning_opt.pruning.structure.verify import Verifier
from lightning_opt.pruning.structure.walk import Walk


def trace(model: nn.Module, example_inputs: Inputs, *, ignore: Sequence[str] = (), verify: bool = True) -> Structure:
    """Find out which units of a model can be cut, and what must be cut with them.

    The model is traced by torch.export in eval mode; it is not changed, and its parameters are not read.

    Args:
        model: Any module that torch.export can trace.
        example_inputs: What `forward` takes.
        ignore: Patterns of parameter or module names whose axes stay, such as "classifier" or "*.embeddings.*".
        verify: Also cut a copy of the model, trace it again, and compare it with the model whose units are zeroed; what
            the model's own code cannot follow is refused. Takes about twice the time of tracing.

    Raises:
        ConfigError: The model cannot be traced; the message names the operation.
        ValueError: A pattern of `ignore` matches nothing.
    """
    program = export(model, example_inputs)
    parameters = dict(model.named_parameters())
    walk = Walk(program, parameters, dict(model.named_buffers()))
    calls = find_calls(model, example_inputs)
    tie_shared_numbers(model, walk.links, calls)
    freeze_repeats(walk)
    freeze_ignored(walk, ignore)

    def structure() -> Structure:
        return Structure(
            groups=tuple(find_groups(walk, parameters)),
            refused=tuple(find_refusals(walk, parameters)),
            _model=model,
            _tensors=walk.tensors,
            _links=walk.links,
            _calls=calls,
            _costs=walk.costs,
        )

    return Verifier(model, example_inputs, walk.shapes).freeze_unfollowed(structure) if verify else structure()
