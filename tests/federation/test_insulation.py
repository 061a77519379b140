"""A start in which no submodel feels what it lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.federation.cutting import compact
from cahfp_cli.federation.insulation import insulated
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.rounds import first_memory
from cahfp_cli.federation.run import write_first
from cahfp_cli.federation.setting import Setting, make_setting, prepare, write_start
from cahfp_cli.models.tensors import state_arrays, to_tensor
from tests.support.experiments import PROVENANCE, experiment

MODELS = [{"spec": "vgg11", "args": {"width": 0.125}}, {"spec": "resnet20", "args": {"width": 0.5}}]


def setting_of(**changes: object) -> Setting:
    return make_setting(prepare(experiment(**changes), PROVENANCE), "iid", 0)


def outputs(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(x)


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["spec"])
def test_every_submodel_begins_as_the_same_function(model: dict[str, object]) -> None:
    setting = setting_of(model=model)
    network, analysis = setting.common.network, setting.common.analysis
    masks = first_memory(setting, METHODS["cahfp"]).masks
    assert len(np.unique(masks, axis=0)) == 3
    x = torch.randn(4, *setting.common.input_shape)
    before = [outputs(compact(network, analysis, mask), x) for mask in masks[::2]]
    assert apart(before[0], before[2]) > 0.3
    arrays = insulated(state_arrays(network), analysis.groups, masks)
    network.load_state_dict({name: to_tensor(array) for name, array in arrays.items()})
    whole = outputs(network, x)
    for mask in masks:
        assert apart(outputs(compact(network, analysis, mask), x), whole) < 1e-5


def test_exactly_the_weights_of_groups_that_a_reader_may_be_without_are_zero() -> None:
    setting = setting_of()
    groups, random = setting.common.analysis.groups, np.random.default_rng(0)
    masks = random.random((5, groups.count)) < 0.7  # not nested: each reader has others that it must not read
    arrays = {name: np.where(array == 0, 1, array) for name, array in state_arrays(setting.common.network).items()}
    found = insulated(arrays, groups, masks)

    def holds(mask: np.ndarray, group: int) -> bool:
        return bool(group == KEPT or mask[group])

    contracted = {consumer.tensor for consumer in groups.consumers}
    for name, array in arrays.items():
        if name not in contracted:
            assert (found[name] == array).all(), name
            continue
        outs, ins = groups.labels[name][:2]
        for row, reader in enumerate(outs):
            for column, read in enumerate(ins):
                felt = any(holds(mask, reader) and not holds(mask, read) for mask in masks)
                assert (found[name][row, column] == (0 if felt else array[row, column])).all()


def test_only_a_start_from_random_weights_is_changed(tmp_path: Path) -> None:
    cold = setting_of(rounds=1)
    warm = setting_of(
        rounds=1,
        data={"train": "digits@train[0:400]", "test": "digits@test", "public": "digits@train[400:500]"},
        start={"public_epochs": 1},
    )
    for setting, method, changed in ((cold, "cahfp", True), (cold, "cahfp-felt", False), (warm, "cahfp", False)):
        start, first = tmp_path / "start.safetensors", tmp_path / "first.safetensors"
        write_start(setting.common, 0, start)
        write_first(setting, METHODS[method], start, first, first_memory(setting, METHODS[method]))
        with open_safetensors(start) as left, open_safetensors(first) as right:
            same = [np.array_equal(left.read(name), right.read(name)) for name in left.tensors]
        assert all(same) is not changed
        start.unlink()
