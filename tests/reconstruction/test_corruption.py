"""Whatever a client sends: it is refused with a message, or the result is what it would have been without the damage.

The cases are in damage.py; the fuzzer below is judged by an independent reader, the safetensors library.
"""

import copy
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors

from cahfp_cli.checkpoint.dtypes import DTYPES
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map_file import read_index_map
from cahfp_cli.reconstruction.gate import HEADER_BYTES
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.client_damage import DAMAGES, MAP, SUBMODEL, many_lists, path_of
from tests.support.clients_on_disk import PROVENANCE, Fleet, fleet, save_client

SECONDS = 20
COMMAND = Path(sys.executable).with_name("cahfp")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def merged(it: Fleet, folders: list[Path], **options: object) -> bytes:
    output = it.checkpoint.parent / "merged"
    output.unlink(missing_ok=True)
    reconstruct(it.checkpoint, folders, output, provenance=PROVENANCE, **options)
    return output.read_bytes()


def result(raw: bytes) -> tuple[dict, bytes]:
    """A merged file but for the sha256 of its inputs, which differ where a client's file does."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    record = json.loads(header["__metadata__"]["cahfp"])
    for entry in record["provenance"]["inputs"]:
        del entry["sha256"]
    header["__metadata__"]["cahfp"] = record
    return header, raw[end:]


class Honest:
    """A fleet on disk, its result with and without client 1, and the memory that the honest run takes."""

    def __init__(self, folder: Path, widths: tuple[int, int, int]) -> None:
        self.fleet = fleet(folder, 2, 3, widths=widths, compensated=True)
        self.whole = merged(self.fleet, self.fleet.folders)
        self.without = merged(self.fleet, [self.fleet.folders[0], self.fleet.folders[2]])
        self.peak = traced(lambda: merged(self.fleet, self.fleet.folders))

    def copy(self, folder: Path) -> Fleet:
        """The same fleet elsewhere, to be damaged."""
        shutil.copytree(self.fleet.checkpoint.parent, folder, ignore=shutil.ignore_patterns("merged"))
        other = copy.copy(self.fleet)
        object.__setattr__(other, "checkpoint", folder / self.fleet.checkpoint.name)
        object.__setattr__(other, "folders", [folder / path.name for path in self.fleet.folders])
        return other


def traced(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Honest:
    return Honest(tmp_path_factory.mktemp("honest"), (3, 160, 128))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_in_two_lines_and_little_memory_or_changes_nothing(honest, tmp_path, name):
    damage = DAMAGES[name]
    it = honest.copy(tmp_path / "fleet")
    damage.apply(it)

    def attempt() -> None:
        with time_limit(SECONDS):
            if damage.words is None:
                assert result(merged(it, it.folders)) == result(honest.whole)
                return
            with pytest.raises(InputError, match=damage.words) as error:
                merged(it, it.folders)
        assert str(it.folders[1]) in str(error.value)
        assert str(error.value).count("\n") <= 1
        assert len(str(error.value)) < 2000
        assert not (it.checkpoint.parent / "merged").exists()

    assert traced(attempt) <= 2 * honest.peak


def test_the_largest_header_that_passes_the_size_check_takes_little_memory(honest, tmp_path):
    it = honest.copy(tmp_path / "fleet")
    many_lists(SUBMODEL, HEADER_BYTES).apply(it)

    def attempt() -> None:
        with pytest.raises(InputError, match=r"exactly the keys|bytes"):
            merged(it, it.folders)

    assert traced(attempt) <= 2 * honest.peak


@pytest.mark.parametrize("name", DAMAGES)
def test_with_skip_invalid_the_result_is_that_of_a_run_without_the_damaged_client(honest, tmp_path, name):
    damage = DAMAGES[name]
    it = honest.copy(tmp_path / "fleet")
    damage.apply(it)
    output = tmp_path / "out"
    with time_limit(SECONDS):
        report = reconstruct(it.checkpoint, it.folders, output, provenance=PROVENANCE, skip_invalid=True)
    refused = [] if damage.words is None else [it.folders[1]]
    assert [client.path for client in report.refused] == refused
    assert {client.path for client in report.clients} == set(it.folders) - set(refused)
    if damage.words is None:
        assert result(output.read_bytes()) == result(honest.whole)
    else:
        assert output.read_bytes() == honest.without
        assert str(it.folders[1]) in report.refused[0].reason


def mutate(random: np.random.Generator, raw: bytes) -> bytes:
    """One to three random edits, in the length word, the header or the data."""
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(int(random.integers(1, 4))):
        region = [(0, 8), (8, header), (8, header), (header, len(raw))][int(random.integers(4))]
        first, last = (min(bound, len(raw)) for bound in region)
        at = int(random.integers(first, max(first + 1, last)))
        count = int(random.integers(1, 17))
        match int(random.integers(7)):
            case 0:
                flipped = bytes([raw[at] ^ 1 << int(random.integers(8))]) if at < len(raw) else b""
                raw = raw[:at] + flipped + raw[at + 1 :]
            case 1:
                raw = raw[:at] + random.bytes(count) + raw[at + count :]
            case 2:
                raw = raw[:at] + random.bytes(count) + raw[at:]
            case 3:
                raw = raw[:at] + raw[at + count :]
            case 4:
                raw = raw[:at] if random.random() < 0.3 else raw[:at] + b"0" + raw[at + 1 :]
            case 5:
                raw = raw[:at] + raw[at : at + count] + raw[at:]
            case _:  # digits are what a header's claims are made of
                raw = raw[:at] + str(int(random.integers(1000))).encode() + raw[at + 1 :]
    return raw


def as_read_by_others(it: Fleet, folder: Path) -> Path:
    """Client 1 saved afresh from what the safetensors library and the JSON library read in its files."""
    raw = path_of(it, SUBMODEL).read_bytes()
    tensors = {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(raw)
    }
    assert {(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        (name, tensor.shape, tensor.dtype) for name, tensor in it.submodels[1].items()
    }
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert all((tensor >= 0).all() for name, tensor in tensors.items() if name.endswith("running_var"))
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    examples = json.loads(header["__metadata__"]["cahfp"])["num_examples"]
    assert examples > 0
    safetensors.deserialize(path_of(it, MAP).read_bytes())
    return save_client(folder / "client1", tensors, read_index_map(path_of(it, MAP)), examples)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("file", [SUBMODEL, MAP])
def test_random_mutations_are_refused_or_are_what_an_honest_client_could_have_sent(tmp_path, file, seed):
    """250 for each of 8 seeds and files, so 2,000. A bit that flips in a number is a legal other update: then the
    result must be that of a sound file with the same contents, as another library reads them."""
    random = np.random.default_rng([seed, file == MAP])
    honest = Honest(tmp_path, (3, 6, 5))
    it = honest.fleet
    sound = path_of(it, file).read_bytes()
    refused = same = other = 0
    for number in range(250):
        path_of(it, file).write_bytes(mutate(random, sound))
        with time_limit(SECONDS):
            try:
                found = result(merged(it, it.folders))
            except InputError as error:
                refused += 1
                assert str(it.folders[1]) in str(error) or str(it.checkpoint) in str(error), number
                assert str(error).count("\n") <= 1
                assert not (tmp_path / "merged").exists()
                continue
        (tmp_path / "clean").mkdir(exist_ok=True)
        clean = as_read_by_others(it, tmp_path / "clean")
        assert found == result(merged(it, [it.folders[0], clean, it.folders[2]])), number
        same += found == result(honest.whole)
        other += found != result(honest.whole)
    assert refused > 125
    assert same + other > 0


def command(it: Fleet, output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command, of this source tree."""
    source = Path(inspect.getfile(reconstruct)).parents[2]
    return subprocess.run(
        [
            str(COMMAND),
            "reconstruct",
            str(it.checkpoint),
            *map(str, it.folders),
            "-o",
            str(output),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
    )


REPRESENTATIVE = (
    "submodel: NaN",
    "submodel: a FIFO",
    "submodel: length 2^63",
    "submodel: header nested deeply",
    "map: index out of range",
    "map: record digest of another checkpoint",
)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_command_exits_3_with_two_lines_at_most_and_writes_nothing(honest, tmp_path, name):
    it = honest.copy(tmp_path / "fleet")
    DAMAGES[name].apply(it)
    (tmp_path / "out").mkdir()
    done = command(it, tmp_path / "out" / "x")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert str(it.folders[1] / DAMAGES[name].file) in done.stderr
    assert done.stderr.count("\n") <= 2
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_command_leaves_a_damaged_client_out_on_request_and_says_why(honest, tmp_path, name):
    it = honest.copy(tmp_path / "fleet")
    DAMAGES[name].apply(it)
    done = command(it, tmp_path / "x", "--skip-invalid", "--json")
    assert done.returncode == 0, done.stderr
    told = {client["folder"]: client for client in json.loads(done.stdout)["clients"]}
    assert [told[str(folder)]["accepted"] for folder in it.folders] == [True, False, True]
    assert told[str(it.folders[0])]["reason"] is None
    assert str(it.folders[1]) in told[str(it.folders[1])]["reason"]
    remaining = copy.copy(it)
    object.__setattr__(remaining, "folders", [it.folders[0], it.folders[2]])
    assert command(remaining, tmp_path / "y", "--skip-invalid").returncode == 0
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.fixture
def own_maps(tmp_path) -> Path:
    return tmp_path / "maps"


def keep_maps(it: Fleet, folder: Path) -> None:
    """The server's own copies of all maps, from before any damage."""
    for client in it.folders:
        (folder / client.name).mkdir(parents=True)
        shutil.copy(client / MAP, folder / client.name / MAP)


@pytest.mark.parametrize("name", [name for name in DAMAGES if name.startswith("map: ")])
def test_with_the_servers_own_maps_no_damage_to_the_clients_copy_matters(honest, tmp_path, own_maps, name):
    it = honest.copy(tmp_path / "fleet")
    keep_maps(it, own_maps)
    DAMAGES[name].apply(it)
    with time_limit(SECONDS):
        assert merged(it, it.folders, maps=own_maps) == honest.whole


def test_a_client_whose_map_and_tensors_both_lie_about_its_channels_is_refused_by_the_servers_own_map(
    honest, tmp_path, own_maps
):
    it = honest.copy(tmp_path / "fleet")
    keep_maps(it, own_maps)
    save_client(it.folders[1], it.submodels[0], it.maps[0], it.examples[1])
    merged(it, it.folders)  # consistent in itself, and only the server knows that it had sent something else
    with pytest.raises(InputError, match="index map says") as error:
        merged(it, it.folders, maps=own_maps)
    assert str(path_of(it, SUBMODEL)) in str(error.value)
    assert merged(it, it.folders, maps=own_maps, skip_invalid=True) == honest.without


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv2.weight", 1e30),
        ("head.weight", -1e6),
        ("scale", 3e38),
        ("bn1.running_mean", 1e30),
    ],
)
def test_an_update_larger_than_the_limit_is_refused(honest, tmp_path, name, value):
    it = honest.copy(tmp_path / "fleet")
    tensors = {key: tensor.copy() for key, tensor in it.submodels[1].items()}
    tensors[name].reshape(-1)[-1] = value
    save_client(it.folders[1], tensors, it.maps[1], it.examples[1])
    with pytest.raises(InputError) as error:
        merged(it, it.folders, max_update=100)
    assert str(it.folders[1]) in str(error.value)
    assert str(error.value).count("\n") <= 1
    assert merged(it, it.folders, max_update=100, skip_invalid=True) == honest.without


@pytest.mark.parametrize("name", ["bn1.running_mean", "bn2.running_var", "conv1.weight", "head.bias"])
def test_one_clients_largest_finite_numbers_do_not_stop_the_others(honest, tmp_path, name):
    """Without a limit on updates the client may be averaged or left out, but it must not deny the round."""
    it = honest.copy(tmp_path / "fleet")
    tensors = {key: tensor.copy() for key, tensor in it.submodels[1].items()}
    tensors[name][...] = 3e38
    save_client(it.folders[1], tensors, it.maps[1], it.examples[1])
    merged(it, it.folders, skip_invalid=True)


@pytest.mark.parametrize("count", [-1, 2**63 - 1])
def test_a_counter_that_no_training_reaches_is_refused(honest, tmp_path, count):
    it = honest.copy(tmp_path / "fleet")
    tensors = it.submodels[1] | {"bn1.num_batches_tracked": np.asarray(count, np.int64)}
    save_client(it.folders[1], tensors, it.maps[1], it.examples[1])
    with pytest.raises(InputError, match=r"bn1\.num_batches_tracked"):
        merged(it, it.folders)
    assert merged(it, it.folders, skip_invalid=True) == honest.without


def test_too_few_sound_clients_are_no_quorum(honest, tmp_path):
    it = honest.copy(tmp_path / "fleet")
    DAMAGES["submodel: NaN"].apply(it)
    assert merged(it, it.folders, skip_invalid=True, min_clients=2) == honest.without
    with pytest.raises(InputError, match="NaN") as error:
        merged(it, it.folders, skip_invalid=True, min_clients=3)
    assert str(error.value).count("\n") <= 1
    assert not (it.checkpoint.parent / "merged").exists()
