"""Submodels through real files and back into the global checkpoint."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, ModelSpec, Provenance, SubmodelMetadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.formats.index_map_file import read_index_map
from cahfp_cli.models.checkpoint_io import save_checkpoint
from cahfp_cli.pruning.submodel import gather_all, make_index_map, write_submodel
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.networks import CLASSES, examples, masks, networks

PROVENANCE = Provenance(tool="cahfp 0", command="test")
MODEL = ModelSpec(spec="tests:network")


def read(path):
    with open_safetensors(path) as file:
        return {name: file.read(name) for name in file.tensors}, content_digest(file)


@given(network=networks(), client_masks=st.lists(masks, min_size=1, max_size=3), data=st.data())
@examples(15)
def test_untouched_submodels_leave_the_global_checkpoint_as_it_is_to_the_bit(
    tmp_path_factory, network, client_masks, data
):
    folder = tmp_path_factory.mktemp("files")
    whole = folder / "global.safetensors"
    about = {"model": MODEL, "input_shape": network.input_shape, "classes": CLASSES, "provenance": PROVENANCE}
    with torch.no_grad():  # values on which arithmetic slips: signed zero, the smallest, the largest
        for parameter in network.model.parameters():
            parameter.view(-1)[0] = data.draw(st.sampled_from([-0.0, 1e-45, 3e38, 0.1]))
    save_checkpoint(whole, network.model, CheckpointMetadata(**about), force=False)
    arrays, digest = read(whole)
    groups = network.analyse().groups
    clients = []
    for number, mask in enumerate(client_masks):
        index_map = make_index_map(arrays, groups, mask.of(groups), digest)
        metadata = SubmodelMetadata(**about, checkpoint=digest, num_examples=data.draw(st.integers(1, 10**6)))
        clients.append(folder / f"client{number}")
        write_submodel(clients[-1], network.model, gather_all(arrays, index_map), index_map, metadata, {}, onnx=False)
        restored = read_index_map(clients[-1] / "index_map.safetensors")
        compact, _ = read(clients[-1] / "submodel.safetensors")
        assert {n: a.tobytes() for n, a in gather_all(arrays, restored).items()} == {
            n: a.tobytes() for n, a in compact.items()
        }
    for rule in ("fill", "covered"):
        output = folder / f"{rule}.safetensors"
        report = reconstruct(whole, clients, output, rule=rule, provenance=PROVENANCE)
        merged, merged_digest = read(output)
        assert {n: a.tobytes() for n, a in merged.items()} == {n: a.tobytes() for n, a in arrays.items()}
        assert report.digest == merged_digest == digest
