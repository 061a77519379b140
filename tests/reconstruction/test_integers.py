"""Integers and flags that training changes are no fault of a client: counters go on, tables stay."""

import numpy as np
import pytest

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.dtypes import dtype_code
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, load, save_client, save_global

DTYPES = (np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


def clients_of(tmp_path, tensors, brought, axes=(None,)):
    """A global checkpoint, and one client for each array of `state` that is brought, with two examples each."""
    save_global(tmp_path / "global", tensors)
    maps = {
        name: TensorMap(array.shape, dtype_code(array.dtype), (None,) * array.ndim) for name, array in tensors.items()
    }
    held = axes if isinstance(axes, list) else [axes] * len(brought)
    folders = []
    for number, (own, along) in enumerate(zip(brought, held, strict=True)):
        shape, code = tensors["state"].shape, dtype_code(tensors["state"].dtype)
        mapping = IndexMap(arrays_digest(tensors), maps | {"state": TensorMap(shape, code, along if shape else ())})
        folders.append(save_client(tmp_path / f"c{number}", tensors | {"state": own}, mapping, 2))
    return folders


def merged(tmp_path, folders, rule="fill", name="out"):
    reconstruct(tmp_path / "global", folders, tmp_path / name, rule=rule, provenance=PROVENANCE, force=True)
    return load(tmp_path / name)["state"]


@pytest.mark.parametrize("rule", ["fill", "median"])
@pytest.mark.parametrize("kind", DTYPES, ids=lambda kind: kind.__name__)
def test_what_all_clients_counted_becomes_the_largest(tmp_path, kind, rule):
    tensors = {"w": np.ones(3), "state": np.asarray(0, kind)}
    found = merged(tmp_path, clients_of(tmp_path, tensors, [np.asarray(n, kind) for n in (100, 7, 31)]), rule)
    assert found.dtype == kind and found == kind(100)


def test_numbers_at_the_ends_of_their_type_are_merged_without_arithmetic(tmp_path):
    tensors = {"w": np.ones(3), "state": np.array([0, 2**64 - 1], np.uint64)}
    brought = [np.array([2**64 - 1, 2**64 - 2], np.uint64), np.array([2**63, 5], np.uint64)]
    assert merged(tmp_path, clients_of(tmp_path, tensors, brought)).tolist() == [2**64 - 1, 2**64 - 2]


def test_what_one_client_left_as_it_was_stays_so_that_no_single_client_changes_a_table(tmp_path):
    tensors = {"w": np.ones(3), "state": np.array([4, 1, 0, 2])}
    folders = clients_of(tmp_path, tensors, [np.array([9, 1, 0, 10**9]), tensors["state"], np.array([9, 1, 0, 3])])
    assert merged(tmp_path, folders).tolist() == [4, 1, 0, 2]
    assert merged(tmp_path, folders[::2]).tolist() == [9, 1, 0, 10**9]


def test_only_clients_that_hold_a_coordinate_have_a_say(tmp_path):
    tensors = {"w": np.ones(3), "state": np.array([5, 5, 5, 5])}
    first, second = np.array([0, 1], np.int32), np.array([1, 2], np.int32)
    folders = clients_of(tmp_path, tensors, [np.array([8, 5]), np.array([9, 2])], [(first,), (second,)])
    assert merged(tmp_path, folders).tolist() == [8, 5, 2, 5]


@pytest.mark.parametrize("brought", [(3, 9, 4), (3, 0, 4), (0, 0, 2)])
def test_a_tree_of_aggregates_gives_what_all_clients_give(tmp_path, brought):
    tensors = {"w": np.ones(3), "state": np.zeros(2, np.uint8)}
    folders = clients_of(tmp_path, tensors, [np.array([n, n + 1], np.uint8) for n in brought])
    flat = merged(tmp_path, folders)
    low = tmp_path / "low.partial.safetensors"
    reconstruct(tmp_path / "global", folders[:2], low, partial=True, provenance=PROVENANCE)
    assert merged(tmp_path, [low, folders[2]], name="tree").tolist() == flat.tolist()
    assert flat[0] == (0 if 0 in brought else max(brought))


def test_a_counter_of_batches_must_count_some_also_where_it_is_narrow(tmp_path):
    tensors = {"w": np.ones(3), "state": np.asarray(1), "num_batches_tracked": np.asarray(3, np.int8)}
    folders = clients_of(tmp_path, tensors, [np.asarray(2)])
    maps = {n: TensorMap(a.shape, dtype_code(a.dtype), (None,) * a.ndim) for n, a in tensors.items()}
    bad = tensors | {"num_batches_tracked": np.asarray(-1, np.int8)}
    save_client(folders[0], bad, IndexMap(arrays_digest(tensors), maps))
    with pytest.raises(InputError, match="counts no batches"):
        merged(tmp_path, folders)
