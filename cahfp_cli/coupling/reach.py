"""What no run of a network reached: it stays whole, and so does what another run could hand to it.

A parameter that no traced run read has no ties, so nothing says what must go with it. Where the code looks at values,
other data may take it: experts, branches, loops that stop early. Whatever flows through the module that decides then
keeps its widths, since the code that did not run may read it.
"""

from collections.abc import Mapping, Sequence

from cahfp_cli.coupling.registry import Axes, Couplings
from cahfp_cli.coupling.trace import Trace

UNREACHED = "no run of the network reaches it"
OTHER_WAY = "other data may take a part of the network that no run reached"


def pin_unreached(couplings: Couplings, labels: Mapping[str, Axes], traces: Sequence[Trace]) -> None:
    """Pin the parameters and buffers that no trace read, and what flows where they might be read.

    Args: labels: of every parameter and buffer by name; tied ones share theirs.
    """
    reached = {id(labels[name]) for trace in traces for name in trace.reached}
    unreached = [name for name, axes in labels.items() if id(axes) not in reached]
    for name in unreached:
        for axis in labels[name]:
            couplings.atoms.pin(axis, UNREACHED)
    if unreached and any(trace.reads_values for trace in traces):
        ran = {module for trace in traces for module in trace.ran}
        for module in sorted({owner(name, ran) for name in unreached}):
            for trace in traces:
                pin_passing(couplings, trace, module)


def owner(name: str, ran: set[str]) -> str:
    """The innermost module that ran of those that hold a tensor: its code chose not to use it."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in ran:
            return name
    return ""


def pin_passing(couplings: Couplings, trace: Trace, module: str) -> None:
    """Pin all that a module's own code handles, and what goes into or comes out of the modules that it calls."""
    made_in: dict[int, str] = {}
    for operation in trace.operations:
        touched = [(value, made_in.get(value)) for value in operation.inputs]
        for value in operation.outputs:
            made_in.setdefault(value, operation.module)
            touched.append((value, operation.module))
        for value, where in touched:
            if trace.values[value].parameter is not None:
                continue
            inside = is_inside(operation.module, module)
            crosses = where is not None and part(where, module, trace.ran) != part(operation.module, module, trace.ran)
            if operation.module == module or (crosses and (inside or is_inside(where or "", module))):
                for axis in trace.values[value].axes:
                    couplings.atoms.pin(axis, OTHER_WAY)


def is_inside(path: str, module: str) -> bool:
    """Whether a module is another or one of its parts."""
    return not module or path == module or path.startswith(f"{module}.")


def part(path: str, module: str, ran: frozenset[str]) -> str | None:
    """The outermost part of a module that ran and has a path in it: '' for the module's own code, None outside it."""
    if not is_inside(path, module):
        return None
    names = path.removeprefix(module).removeprefix(".").split(".")
    prefixes = (".".join((*([module] if module else []), *names[:count])) for count in range(1, len(names) + 1))
    return next((prefix for prefix in prefixes if prefix in ran and prefix != module), "")
