"""Sizes that the workload predicts for a mask, recounted on the network that the mask gives."""

import numpy as np
import torch
from hypothesis import given
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cahfp_cli.coupling.analysis import cut
from cahfp_cli.coupling.meta_run import ContiguousProducts
from cahfp_cli.coupling.verification import LAYOUT
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.workload import depends_on_input, make_workload
from tests.support.networks import IMAGE, Network, examples, masks, networks


def workload_of(network, analysis):
    return make_workload(analysis, {name: t.element_size() for name, t in network.model.state_dict().items()})


def elements(sizes, widths):
    def length(axis):
        return axis.constant + sum(multiplicity * int(widths[family]) for family, multiplicity in axis.terms)

    return [int(np.prod([length(axis) for axis in size.axes], dtype=int)) for size in sizes]


def layer_macs(model, x):
    """Multiply-accumulates of every convolution and linear layer, by hooks: weights a position x positions."""
    macs = []

    def hook(module, args, output):
        if isinstance(module, nn.ConvTranspose2d):
            macs.append(module.weight.numel() * args[0].shape[2:].numel() * len(output))
        elif isinstance(module, nn.Conv2d):
            macs.append(module.weight.numel() * output.shape[2:].numel() * len(output))
        else:
            macs.append(module.weight.numel() * output[..., 0].numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(macs)


class Written(TorchDispatchMode):
    """Name and elements of the outputs of every operator that depends on the given tensor."""

    def __init__(self, x):
        super().__init__()
        self.alive, self.entries = [x], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(value is known for value in flat for known in self.alive):
            tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
            self.alive += tensors
            self.entries.append((func.overloadpacket.__name__, [t.numel() for t in tensors]))
        return output


def named(entries):
    return [(LAYOUT.get(name, name), sizes) for name, sizes in entries if LAYOUT.get(name, name)]


@given(network=networks(), mask=masks)
@examples(25)
def test_predicted_sizes_equal_a_recount_on_the_sliced_network(network, mask):
    analysis = network.analyse()
    kept = mask.of(analysis.groups)
    widths = analysis.groups.widths(kept)
    compact, workload = cut(network.model, analysis, kept)[0], workload_of(network, analysis)
    cost = compile_workload(workload, None).cost(widths)
    stored = compact.state_dict().values()
    assert int(cost.params) == sum(tensor.numel() for tensor in stored)
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    empty = sum(t.numel() * t.element_size() for t in network.model.state_dict().values())
    full = compile_workload(workload, None).cost(np.array(workload.full_widths))
    assert int(full.storage_bytes - cost.storage_bytes) == empty - bytes_

    x = network.samples(1)
    products = sum(elements([op.product.macs], widths)[0] for op in workload.operators if op.product and op.weights)
    assert products == layer_macs(compact, x)
    meta, x = compact.to("meta"), x.to("meta")  # where attention is not one operator
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(x)
    assert int(cost.macs) * 2 == counter.get_total_flops()


@given(network=networks(), mask=masks)
@examples(12)
def test_predicted_outputs_equal_those_of_a_run_operator_by_operator(network, mask):
    analysis = network.analyse()
    kept = mask.of(analysis.groups)
    widths = analysis.groups.widths(kept)
    trace, workload = analysis.traces[0], workload_of(network, analysis)
    depends = depends_on_input(trace)
    operations = [op for op in trace.operations if any(depends[value] for value in op.outputs)]
    traced = [operator for operator in workload.operators if "+" not in operator.name]  # others: see STEPS
    assert len(operations) == len(traced)
    pairs = zip(operations, traced, strict=True)
    nothing = ("free", "view")  # what writes nothing of its own
    predicted = named((op.name, None if one.kind in nothing else elements(one.writes, widths)) for op, one in pairs)
    x = network.samples(1).to("meta")
    log = Written(x)
    with torch.no_grad(), ContiguousProducts(), log:
        cut(network.model, analysis, kept)[0].to("meta")(x)
    ran = named(log.entries)
    assert [name for name, _ in predicted] == [name for name, _ in ran]
    for (_, expected), (_, found) in zip(predicted, ran, strict=True):
        assert expected is None or expected == found  # None: in place of its neighbour's output


def test_a_transposed_convolution_is_counted_at_its_inputs():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Flatten(), nn.LazyLinear(3))
    network = Network(model.eval(), IMAGE)
    model(network.samples(1))
    analysis = network.analyse()
    kept = np.arange(analysis.groups.count) % 2 == 0
    cost = compile_workload(workload_of(network, analysis), None).cost(analysis.groups.widths(kept))
    assert int(cost.macs) == layer_macs(cut(model, analysis, kept)[0], network.samples(1))
