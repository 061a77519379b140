"""The whole pipeline on real data, each product checked with other tools than those that made it."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.support.commands import run_well
from tests.support.fleet import LIMITS, PROFILES, SHARES, SUBMODEL_FILES, Clients, Fleet

COSTS = {"latency_seconds", "memory_bytes", "storage_bytes", "macs", "params"}
devices = pytest.mark.parametrize("device", PROFILES.values())


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def metadata_of(path: Path) -> dict:
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["cahfp"])


def outputs(fleet: Fleet, clients: Clients) -> list[Path]:
    ours = [fleet.checkpoint, fleet.scores, clients.merged]
    folders = [*fleet.submodels.values(), *clients.folders.values()]
    return [*ours, *(file for folder in folders for file in sorted(folder.iterdir()))]


def test_every_output_is_there_and_nothing_else(fleet: Fleet, clients: Clients) -> None:
    made = {path.name for path in fleet.folder.iterdir()}
    assert made == {"global.safetensors", "scores.safetensors", "fleet", "said.json"}
    assert {path.name for path in (fleet.folder / "fleet").iterdir()} == set(PROFILES.values())
    for folder in fleet.submodels.values():
        assert {path.name for path in folder.iterdir()} == set(SUBMODEL_FILES)
    for name, folder in clients.folders.items():
        expected = set(SUBMODEL_FILES) - (set() if name == "stm32h743" else {"model.onnx"})
        assert {path.name for path in folder.iterdir()} == expected
    assert clients.merged.is_file()


def test_checkpoints_open_with_the_safetensors_library_and_the_merged_one_has_the_same_tensors(
    fleet: Fleet, clients: Clients
) -> None:
    before, after = load_file(fleet.checkpoint), load_file(clients.merged)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype)
        assert np.isfinite(after[name]).all()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    about = metadata_of(fleet.checkpoint)
    assert about["model"] == {"spec": "resnet20", "args": {"width": 0.25}}
    assert (about["input_shape"], about["classes"]) == ([1, 8, 8], 10)
    merged = metadata_of(clients.merged)
    assert {key: merged[key] for key in ("model", "input_shape", "classes")} == {
        key: about[key] for key in ("model", "input_shape", "classes")
    }
    assert merged["provenance"]["command"] == "reconstruct"


@devices
def test_submodel_is_what_numpy_gathers_from_the_global_checkpoint(fleet: Fleet, device: str) -> None:
    whole, folder = load_file(fleet.checkpoint), fleet.submodels[device]
    compact, arrays = load_file(folder / "submodel.safetensors"), load_file(folder / "index_map.safetensors")
    table = metadata_of(folder / "index_map.safetensors")["tensors"]
    assert whole.keys() == compact.keys() == table.keys()
    smaller = 0
    for name, entry in table.items():
        assert entry["shape"] == list(whole[name].shape)
        axes = [
            np.arange(length) if number is None else arrays[f"index.{number}"]
            for number, length in zip(entry["axes"], entry["shape"], strict=True)
        ]
        gathered = whole[name][np.ix_(*axes)] if axes else whole[name]
        assert gathered.dtype == compact[name].dtype
        assert gathered.tobytes() == compact[name].tobytes()
        smaller += gathered.size < whole[name].size
    assert all(array.dtype == np.int32 for array in arrays.values())
    assert smaller > 20


@devices
def test_report_has_what_is_promised(fleet: Fleet, device: str) -> None:
    report = report_of(fleet.submodels[device])
    assert report["profile"] == device
    assert report["budget"]["met"] is True
    assert report["predicted"].keys() == report["full"].keys() == COSTS
    assert report["onnx"].keys() == {"bytes", "parity", "outputs"}
    assert report["onnx"]["outputs"] == ["logits"]
    proto = onnx.load(fleet.submodels[device] / "model.onnx")
    assert ([entry.version for entry in proto.opset_import], proto.ir_version) == ([18], 8)
    assert report["not_modelled"] == []
    assert 0 <= report["onnx"]["parity"] <= 1e-4
    for when in ("before", "after"):
        assert 0 <= report["evaluation"][when]["accuracy"] <= 1
        assert report["evaluation"][when]["loss"] > 0
    assert 0 < report["groups"]["kept"] < report["groups"]["of"]
    assert sum(family["kept"] for family in report["widths"]) == report["groups"]["kept"]
    assert all(1 <= family["kept"] <= family["of"] for family in report["widths"])
    assert report["binding"] in report["budget"]["limits"]
    inputs = {entry["file"] for entry in report["provenance"]["inputs"]}
    assert inputs == {"global.safetensors", "scores.safetensors"}
    said = next(entry for entry in fleet.said["prune"].json["submodels"] if entry["profile"] == device)
    assert {key: said[key] for key in report if key != "format"} == {k: v for k, v in report.items() if k != "format"}


@devices
def test_budgets_hold_for_the_files_themselves(fleet: Fleet, device: str) -> None:
    folder, report = fleet.submodels[device], report_of(fleet.submodels[device])
    limits, full = report["budget"]["limits"], report["full"]
    assert limits == pytest.approx(
        {**LIMITS, "macs": LIMITS["macs"] * full["macs"], "params": LIMITS["params"] * full["params"]}
    )
    elements = sum(tensor.size for tensor in load_file(folder / "submodel.safetensors").values())
    assert elements == report["predicted"]["params"] <= limits["params"]
    assert full["params"] == sum(tensor.size for tensor in load_file(fleet.checkpoint).values())
    size = (folder / "model.onnx").stat().st_size
    assert size == report["onnx"]["bytes"] <= limits["storage"]
    assert size <= report["predicted"]["storage_bytes"] <= limits["storage"]
    assert macs_of(folder / "model.onnx") == report["predicted"]["macs"] <= limits["macs"]
    assert report["predicted"]["latency_seconds"] <= limits["latency"]


def test_the_devices_differ(fleet: Fleet) -> None:
    reports = [report_of(folder) for folder in fleet.submodels.values()]
    assert len({report["predicted"]["macs"] for report in reports}) > 1
    assert len({report["binding"] for report in reports}) > 1


def test_predict_on_a_submodel_agrees_with_what_prune_predicted_for_it(fleet: Fleet) -> None:
    folder = fleet.submodels["stm32h743"]
    predicted = run_well("profile", "predict", folder, "--profile", "stm32", "--json").json
    assert {name: predicted[name] for name in COSTS} == pytest.approx(report_of(folder)["predicted"])


def macs_of(path: Path) -> int:
    """Multiply-accumulates at batch 1 of the convolutions and matrix products in an ONNX file."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return total


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("which", [*PROFILES.values(), "trained"])
def test_onnx_computes_what_torch_does(fleet: Fleet, clients: Clients, which: str, batch: int) -> None:
    import torch

    from cahfp_cli.data.spec import load_data
    from cahfp_cli.pruning.submodel import load_submodel

    folder = clients.folders["stm32h743"] if which == "trained" else fleet.submodels[which]
    x = load_data("digits@test").x[100 : 100 + batch]
    with torch.inference_mode():
        expected = load_submodel(folder).model(torch.from_numpy(x)).numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    assert found.shape == expected.shape == (batch, 10)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@devices
def test_onnx_is_sound_self_contained_and_names_its_origin(fleet: Fleet, device: str) -> None:
    path = fleet.submodels[device] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["cahfp.profile"] == device
    assert about["cahfp.input_shape"] == "1x8x8"
    digest = metadata_of(fleet.submodels[device] / "submodel.safetensors")["checkpoint"]
    assert about["cahfp.checkpoint"] == digest
    assert json.loads(about["cahfp.model"])["spec"] == "resnet20"
    assert about["cahfp.tool"].startswith("cahfp ")


def test_no_output_holds_a_path_of_this_machine(fleet: Fleet, clients: Clients) -> None:
    import sys

    places = {fleet.folder, fleet.folder.parent, Path.home(), Path.cwd(), Path(__file__).parents[2], Path(sys.prefix)}
    needles = {str(place).encode() for place in places if len(place.parts) > 1}
    needles |= {b"/tmp/", b"/home/", b"site-packages", b"Traceback", b'File "'}
    for path in outputs(fleet, clients):
        content = path.read_bytes()
        assert not [needle for needle in needles if needle in content], path


def test_clients_carry_the_number_of_their_examples_and_their_share_counts_in_the_merge(clients: Clients) -> None:
    merged = {Path(client["folder"]).name: client for client in clients.said["reconstruct"].json["clients"]}
    for name, folder in clients.folders.items():
        examples = len(np.load(clients.folder / f"{name}.npz")["y"])
        report = report_of(folder)
        assert report["num_examples"] == examples == merged[name]["num_examples"]
        assert metadata_of(folder / "submodel.safetensors")["num_examples"] == examples
        assert report["training"]["steps"] >= 1
        assert set(np.unique(np.load(clients.folder / f"{name}.npz")["y"])) <= set(SHARES[name])


def test_fill_is_the_weighted_mean_of_the_clients_completed_with_the_global_weights(
    fleet: Fleet, clients: Clients
) -> None:
    whole, merged = load_file(fleet.checkpoint), load_file(clients.merged)
    weights = {name: report_of(folder)["num_examples"] for name, folder in clients.folders.items()}
    name = "layer2.1.conv1.weight"
    total = np.zeros(whole[name].shape)
    for client, folder in clients.folders.items():
        arrays = load_file(folder / "index_map.safetensors")
        entry = metadata_of(folder / "index_map.safetensors")["tensors"][name]
        axes = [
            np.arange(length) if number is None else arrays[f"index.{number}"]
            for number, length in zip(entry["axes"], entry["shape"], strict=True)
        ]
        completed = whole[name].astype(np.float64)
        completed[np.ix_(*axes)] = load_file(folder / "submodel.safetensors")[name]
        total += weights[client] * completed
    np.testing.assert_array_max_ulp(merged[name], (total / sum(weights.values())).astype(np.float32), maxulp=1)


def test_evaluate_agrees_on_the_submodel_its_onnx_file_and_the_report(fleet: Fleet) -> None:
    folder = fleet.submodels["raspberry-pi-4"]
    expected = report_of(folder)["evaluation"]["after"]
    for network in (folder, folder / "model.onnx"):
        found = run_well("evaluate", network, "--data", "digits@test", "--threads", "1", "--no-latency", "--json").json
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1 / 355)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["samples"] == 355
        assert "latency" not in found


def test_evaluate_measures_the_merged_checkpoint_with_its_latency(clients: Clients) -> None:
    done = run_well("evaluate", clients.merged, "--data", "digits", "--threads", "1")
    labels = [line.split()[0] for line in done.stdout.splitlines()]
    assert labels == ["accuracy", "loss", "size", "latency"]
    assert "digits" in done.stdout
