"""What reconstruction computes, against an independent float64 computation and against exact identities."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.digest import arrays_digest, file_sha256
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, Provenance, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import UsageError
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.reconstruction.merge import reconstruct
from cahfp_cli.reconstruction.report import Coverage
from tests.support.clients_on_disk import (
    PROVENANCE,
    bits,
    cut,
    fleet,
    index_map,
    load,
    merge,
    network,
    oracle,
    places,
    save_client,
    save_global,
)

FLOATS = ["F16", "BF16", "F32", "F64"]
quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("rule", ["fill", "covered"])
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 4))
@quick
def test_several_clients_equal_an_independent_float64_computation_within_one_ulp(rule, seed, clients):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients)
        merged, _ = merge(it, rule)
        for name, tensor in merged.items():
            if tensor.dtype == np.float32:
                expected = oracle(it, rule, name).astype(np.float32)
                assert np.all(np.abs(tensor - expected) <= np.spacing(np.abs(expected))), name


@pytest.mark.parametrize("rule", ["fill", "covered"])
@pytest.mark.parametrize("dtype", FLOATS)
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 4))
@quick
def test_untouched_submodels_leave_the_global_checkpoint_bit_identical(rule, dtype, seed, clients):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients, dtype, trained=False)
        merged, report = merge(it, rule)
        assert {name: bits(tensor) for name, tensor in merged.items()} == {
            name: bits(tensor) for name, tensor in it.tensors.items()
        }
        assert report.digest == arrays_digest(it.tensors)


@pytest.mark.parametrize("rule", ["fill", "covered"])
@pytest.mark.parametrize("dtype", FLOATS)
@given(seed=st.integers(0, 2**32))
@quick
def test_one_full_coverage_submodel_equals_itself_bit_for_bit(rule, dtype, seed):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, 1, dtype, full=True)
        merged, _ = merge(it, rule)
        assert {name: bits(t) for name, t in merged.items()} == {name: bits(t) for name, t in it.submodels[0].items()}


@pytest.mark.parametrize("rule", ["fill", "covered"])
@given(seed=st.integers(0, 2**32), order=st.permutations(range(4)))
@quick
def test_any_order_of_clients_gives_the_same_bytes(rule, seed, order):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, 4)
        output = it.checkpoint.parent / "merged.safetensors"
        merge(it, rule)
        first = output.read_bytes()
        merge(it, rule, folders=[it.folders[i] for i in order])
        assert output.read_bytes() == first


@pytest.mark.parametrize("dtype", FLOATS)
def test_coordinates_that_no_client_covers_keep_the_global_bits(tmp_path, dtype):
    it = fleet(tmp_path, 3, 2, dtype)
    for rule in ("fill", "covered"):
        merged, report = merge(it, rule)
        untouched = 0
        for name, tensor in it.tensors.items():
            held = {outside for mapping in it.maps for _, outside in places(mapping.tensors[name])}
            for place in np.ndindex(tensor.shape):
                if place not in held:
                    untouched += 1
                    assert bits(merged[name][place]) == bits(tensor[place])
        assert untouched == report.coverage.none


def test_coverage_and_kept_shares_count_entries(tmp_path):
    it = fleet(tmp_path, 11, 3)
    _, report = merge(it)
    counts = []
    for name, tensor in it.tensors.items():
        if tensor.dtype == np.float32:
            held = np.zeros(tensor.shape, int)
            for mapping in it.maps:
                for _, outside in places(mapping.tensors[name]):
                    held[outside] += 1
            counts += held.reshape(-1).tolist()
    assert report.coverage == Coverage(counts.count(0), counts.count(1) + counts.count(2), counts.count(3))
    by_folder = {client.path: client for client in report.clients}
    for folder, submodel, examples in zip(it.folders, it.submodels, it.examples, strict=True):
        size = sum(tensor.size for tensor in submodel.values() if tensor.dtype == np.float32)
        assert by_folder[folder].kept == size / len(counts)
        assert by_folder[folder].num_examples == examples


def test_batch_norm_statistics_equal_those_of_the_pooled_samples(tmp_path):
    random = np.random.default_rng(5)
    samples = [random.normal(random.normal(0, 3, 7), random.random(7) + 0.1, (count, 7)) for count in (40, 90, 10)]
    tensors = {"bn.running_mean": np.zeros(7), "bn.running_var": np.ones(7)}
    save_global(tmp_path / "global.safetensors", tensors)
    whole = IndexMap(arrays_digest(tensors), {name: TensorMap((7,), "F64", (None,)) for name in tensors})
    folders = [
        save_client(tmp_path / f"c{len(x)}", {"bn.running_mean": x.mean(0), "bn.running_var": x.var(0)}, whole, len(x))
        for x in samples
    ]
    for rule in ("fill", "covered"):
        output = tmp_path / f"{rule}.safetensors"
        reconstruct(tmp_path / "global.safetensors", folders, output, rule=rule, provenance=PROVENANCE)
        pooled = np.concatenate(samples)
        np.testing.assert_allclose(load(output)["bn.running_mean"], pooled.mean(0), rtol=1e-12)
        np.testing.assert_allclose(load(output)["bn.running_var"], pooled.var(0), rtol=1e-12)


def test_batch_counter_is_the_largest_of_the_clients_even_below_the_global(tmp_path):
    random = np.random.default_rng(1)
    tensors = network(random) | {"bn1.num_batches_tracked": np.asarray(1000, np.int64)}
    save_global(tmp_path / "global.safetensors", tensors)
    mapping = index_map(random, tensors)
    folders = [
        save_client(
            tmp_path / f"c{count}", cut(tensors, mapping) | {"bn1.num_batches_tracked": np.asarray(count)}, mapping
        )
        for count in (7, 12)
    ]
    reconstruct(tmp_path / "global.safetensors", folders, tmp_path / "out.safetensors", provenance=PROVENANCE)
    assert load(tmp_path / "out.safetensors")["bn1.num_batches_tracked"] == 12


def test_values_near_the_largest_number_do_not_overflow(tmp_path):
    tensors = {"w": np.array([1.7e308, -1.7e308, 5e-324])}
    save_global(tmp_path / "global.safetensors", tensors)
    whole = IndexMap(arrays_digest(tensors), {"w": TensorMap((3,), "F64", (None,))})
    half = IndexMap(arrays_digest(tensors), {"w": TensorMap((3,), "F64", (np.array([0], np.int32),))})
    folders = [
        save_client(tmp_path / "a", {"w": np.array([1.6e308, -1.7e308, 5e-324])}, whole, 4999),
        save_client(tmp_path / "b", {"w": np.array([1.5e308])}, half, 4999),
    ]
    reconstruct(tmp_path / "global.safetensors", folders, tmp_path / "out.safetensors", provenance=PROVENANCE)
    np.testing.assert_allclose(load(tmp_path / "out.safetensors")["w"], [1.55e308, -1.7e308, 5e-324], rtol=1e-15)


def test_large_tensors_are_merged_in_blocks_with_the_same_result(tmp_path, monkeypatch):
    it = fleet(tmp_path, 8, 3, widths=(3, 40, 30))
    whole, _ = merge(it)
    calls = []
    for module in ("cahfp_cli.checkpoint.digest", "cahfp_cli.reconstruction.round"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", 100)
    blocked, _ = merge(it, on_progress=lambda done, total: calls.append((done, total)))
    assert {name: bits(tensor) for name, tensor in blocked.items()} == {name: bits(t) for name, t in whole.items()}
    assert len(calls) > 40
    assert calls[-1][0] == calls[-1][1]


def test_weights_come_from_the_option_then_metadata_then_report_and_else_are_equal(tmp_path):
    random = np.random.default_rng(1)
    tensors = network(random)
    checkpoint = save_global(tmp_path / "global.safetensors", tensors)
    mapping = index_map(random, tensors)
    given, recorded, reported = (
        save_client(tmp_path / name, cut(tensors, mapping), mapping, count)
        for name, count in (("given", 5), ("recorded", 6), ("reported", None))
    )
    (reported / "report.json").write_text(json.dumps({"num_examples": 7}))

    def weights_of(*folders, **options):
        report = reconstruct(checkpoint, folders, tmp_path / "o", provenance=PROVENANCE, dry_run=True, **options)
        return {client.path.name: client.num_examples for client in report.clients}, report.warnings

    found, warnings = weights_of(given, recorded, reported, weights={given: 2.5})
    assert found == {"given": 2.5, "recorded": 6, "reported": 7}
    assert not warnings
    (reported / "report.json").write_text("{}")
    other = save_client(tmp_path / "other", cut(tensors, mapping), mapping, None)
    found, warnings = weights_of(reported, other)
    assert found == {"reported": 1, "other": 1}
    assert "num_examples" in warnings[0]
    found, warnings = weights_of(reported, recorded)
    assert found == {"reported": 1, "recorded": 6}  # what others record is no reason to leave one out
    assert len(warnings) == 1 and f"{reported} records no num_examples" in warnings[0]
    assert weights_of(reported, recorded, rule="median")[1] == ()
    with pytest.raises(UsageError, match="count the same"):
        weights_of(reported, recorded, rule="median", weights={reported: 3.0})
    for most in (float("nan"), float("inf"), 0.0):
        with pytest.raises(UsageError, match="--max-examples"):
            weights_of(reported, recorded, max_examples=most)
    assert not (tmp_path / "o").exists()


def test_output_keeps_the_globals_metadata_with_new_provenance(tmp_path):
    it = fleet(tmp_path, 1, 1)
    new = Provenance(tool="cahfp 9", command="reconstruct")
    reconstruct(it.checkpoint, it.folders, tmp_path / "out", provenance=new)
    with open_safetensors(tmp_path / "out") as file, open_safetensors(it.checkpoint) as before:
        old = read_metadata(before, CheckpointMetadata)
        made = read_metadata(file, CheckpointMetadata)
        assert made.provenance.model_copy(update={"inputs": ()}) == new
        assert made.model_copy(update={"provenance": old.provenance}) == old
        named = {entry.file: entry.sha256 for entry in made.provenance.inputs}
        files = [it.checkpoint, *(it.folders[0] / name for name in ("submodel.safetensors", "index_map.safetensors"))]
        assert sorted(named.values()) == sorted(map(file_sha256, files))


def test_foreign_metadata_is_kept_in_full(tmp_path):
    it = fleet(tmp_path, 1, 1)
    save_arrays(it.checkpoint, it.tensors, {"author": "someone", "format": "other"})
    reconstruct(it.checkpoint, it.folders, tmp_path / "out", provenance=PROVENANCE)
    with open_safetensors(tmp_path / "out") as file:
        assert file.metadata["author"] == "someone"
        assert file.metadata["format"] == "other"
        made = read_metadata(file, CheckpointMetadata)
        assert made == CheckpointMetadata(provenance=made.provenance)


def test_requests_that_do_not_fit_together_are_usage_errors(tmp_path):
    it = fleet(tmp_path, 1, 2)
    (tmp_path / "link").symlink_to(it.folders[0])
    for folders, options, words in [
        ([], {}, "no submodel folder"),
        ([*it.folders, tmp_path / "link"], {}, "listed twice"),
        (it.folders, {"weights": {tmp_path / "x": 1.0}}, "not one of"),
        (it.folders, {"weights": {it.folders[0]: 0.0}}, "a weight is"),
        (it.folders, {"weights": {it.folders[0]: float("nan")}}, "a weight is"),
        (it.folders, {"rule": "mean"}, "fill, covered"),
    ]:
        with pytest.raises(UsageError, match=words):
            reconstruct(it.checkpoint, folders, tmp_path / "out", provenance=PROVENANCE, **options)
    assert not (tmp_path / "out").exists()
