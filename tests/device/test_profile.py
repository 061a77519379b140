"""The profile schema and the catalogue: what ships is sound, and what is wrong is named."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cahfp_cli.device.catalogue import all_profiles, load_profile, profile_names
from cahfp_cli.device.profile import DeviceProfile, Figure, read_profile
from cahfp_cli.device.quantities import Count, Share
from cahfp_cli.errors import InputError, UsageError

pytestmark = pytest.mark.quick

TEN = {
    "jetson-nano",
    "jetson-orin-nano",
    "jetson-agx-orin",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "coral-dev-board",
    "phone-mid",
    "phone-flagship",
    "intel-n100",
    "stm32h743",
}

MINIMAL = """
format = "cahfp.profile/1"
name = "my-board"
description = "a board"
[runtime]
name = "onnxruntime"
threads = 2
[compute.fp32]
peak = { value = 10, unit = "GFLOP/s", source = "data sheet" }
efficiency = { value = 0.5, unit = "share", source = "estimate" }
[memory]
bandwidth = { value = 8, unit = "GB/s", source = "data sheet" }
efficiency = { value = 0.5, unit = "share", source = "estimate" }
[capacity]
ram = { value = 1, unit = "GB", source = "data sheet" }
model_ram = { value = 500, unit = "MB", source = "estimate" }
model_storage = { value = 1, unit = "GB", source = "estimate" }
[training]
memory_factor = { value = 4, unit = "times", source = "estimate" }
[links]
uplink = { value = 8, unit = "Mbit/s", source = "measured" }
downlink = { value = 80, unit = "Mbit/s", source = "measured" }
[overheads]
operator = { value = 5, unit = "us", source = "measured" }
call = { value = 50, unit = "us", source = "measured" }
"""


@pytest.fixture(params=sorted(TEN))
def profile(request: pytest.FixtureRequest) -> DeviceProfile:
    return load_profile(request.param)


def read(folder: Path, text: str) -> DeviceProfile:
    path = folder / "board.toml"
    path.write_text(text, encoding="utf-8")
    return read_profile(path)


def test_the_ten_devices_ship_and_file_names_are_profile_names() -> None:
    assert set(profile_names()) == TEN
    assert [profile.name for profile in all_profiles()] == list(profile_names())


def test_every_figure_is_finite_and_has_a_unit_and_a_source(profile: DeviceProfile) -> None:
    figures = dict(profile.figures())
    assert {"compute.fp32.peak", "memory.bandwidth", "capacity.ram", "links.uplink", "overheads.call"} <= figures.keys()
    for key, figure in figures.items():
        assert math.isfinite(figure.si), key
        assert figure.unit in type(figure).UNITS, key
        assert len(figure.source) > 10, key


def test_no_number_of_a_profile_stands_outside_a_figure(profile: DeviceProfile) -> None:
    """Threads are a setting and the budget is a choice with its reason; everything else is a fact with a source."""

    def numbers(value: object, key: str = "") -> list[str]:
        if isinstance(value, Figure):
            return []
        if isinstance(value, int | float):
            return [key]
        fields = value if hasattr(value, "model_fields_set") else ()
        return [found for name, part in fields for found in numbers(part, f"{key}.{name}".lstrip("."))]

    assert all(key == "runtime.threads" or key.startswith("budget.") for key in numbers(profile))


def test_default_budgets_fit_the_device_and_a_deep_network_can_meet_them(profile: DeviceProfile) -> None:
    """No pruning removes overheads, so a network of 200 operators must leave time to compute."""
    budget = profile.budget
    assert budget is not None
    assert budget.latency is not None and budget.memory is not None and budget.storage is not None
    assert budget.memory <= profile.capacity.model_ram.si
    assert budget.storage <= profile.capacity.model_storage.si
    assert budget.latency > profile.overheads.call.si + 200 * profile.overheads.operator.si


def test_reached_bandwidth_never_exceeds_the_paper_rate(profile: DeviceProfile) -> None:
    assert 0 < profile.memory.reached <= profile.memory.bandwidth.si


def test_names_and_aliases_are_unambiguous_and_resolve() -> None:
    counts = Counter(name for profile in all_profiles() for name in (profile.name, *profile.aliases))
    assert max(counts.values()) == 1
    for profile in all_profiles():
        for alias in profile.aliases:
            assert load_profile(alias) is profile
    assert load_profile("jetson").name == "jetson-orin-nano"
    assert load_profile("pi4").name == "raspberry-pi-4"
    assert load_profile("Raspberry_Pi_5").name == "raspberry-pi-5"


@pytest.mark.parametrize(
    ("typo", "nearest"), [("jetsn-nano", "jetson-nano"), ("rasberry-pi-5", "raspberry-pi-5"), ("jetsen", "jetson")]
)
def test_an_unknown_name_suggests_the_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"unknown profile '{typo}': did you mean '{nearest}'"):
        load_profile(typo)


def test_a_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(UsageError, match="profile list"):
        load_profile("zzzzzzzz")


def test_a_path_loads_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "anything.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    profile = load_profile(str(path))
    assert profile.name == "my-board"
    assert profile.compute.fp32.reached == 5e9
    assert profile.memory.reached == 4e9
    assert profile.links.uplink.si == 1e6
    assert profile.budget is None


def test_a_missing_file_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        load_profile("nowhere.toml")


def test_measured_copies_count_twice_because_each_byte_is_read_and_written(tmp_path: Path) -> None:
    copy = 'copy_bandwidth = { value = 3, unit = "GB/s", source = "tinymembench" }'
    assert read(tmp_path, replace("memory", "efficiency", copy)).memory.reached == 6e9


def figure(value: str, unit: str) -> str:
    return f'{{ value = {value}, unit = "{unit}", source = "x" }}'


def replace(table: str, key: str, line: str) -> str:
    """MINIMAL with one line of one table replaced."""
    head, found, tail = MINIMAL.partition(f"[{table}")
    before, start, rest = tail.partition(f"\n{key} ")
    assert found and start
    return f"{head}{found}{before}\n{line}\n{rest.partition(chr(10))[2]}"


def peak(value: str, unit: str = "GFLOP/s") -> str:
    return replace("compute", "peak", f"peak = {figure(value, unit)}")


def budget(*lines: str, reason: str = 'reason = "x"') -> str:
    return "\n".join([MINIMAL, "[budget]", reason, *lines])


def alignment(hard: str, step: str) -> str:
    return f"{MINIMAL}[alignment]\nhard = {figure(hard, 'channels')}\nstep = {figure(step, 'channels')}\n"


PEAK = "'compute.fp32.peak"
MISTAKES = [
    # mistyped keys
    (
        replace("compute", "peak", f"peek = {figure('1', 'GFLOP/s')}"),
        "unknown key 'compute.fp32.peek': did you mean 'peak'",
    ),
    (
        replace("memory", "bandwidth", f"bandwith = {figure('1', 'GB/s')}"),
        "'memory.bandwith': did you mean 'bandwidth'",
    ),
    (replace("capacity", "ram", 'ram = { valeu = 1, unit = "GB", source = "x" }'), "ram.valeu': did you mean 'value'"),
    (MINIMAL.replace("[links]", "[lnks]"), "unknown key 'lnks': did you mean 'links'"),
    (MINIMAL + "[compute.fp8]\n", "unknown key 'compute.fp8': did you mean 'fp"),
    (MINIMAL + "[zzz]\n", "unknown key 'zzz': known keys here are format, name"),
    (budget('latencey = "5ms"'), "unknown key 'budget.latencey': did you mean 'latency'"),
    # figures that are not figures
    (peak("-1"), f"{PEAK}.value' should be greater than 0"),
    (peak("nan"), f"{PEAK}.value' should be"),
    (peak("inf"), f"{PEAK}.value' should be"),
    (peak('"9"'), f"{PEAK}.value' should be a valid number"),
    (peak("true"), f"{PEAK}.value' should be a valid number"),
    (peak("9", "GB/s"), "unit 'GB/s' is not one of MFLOP/s, GFLOP/s"),
    (replace("compute", "peak", "peak = 9"), f"{PEAK}' must be a table: write {{ value = NUMBER, unit ="),
    (replace("compute", "peak", 'peak = { value = 9, source = "x" }'), f"{PEAK}.unit' is missing"),
    (replace("compute", "peak", 'peak = { value = 9, unit = "GFLOP/s" }'), f"{PEAK}.source' is missing"),
    (replace("compute", "peak", 'peak = { value = 9, unit = "GFLOP/s", source = " " }'), f"{PEAK}.source' is empty"),
    (
        replace("overheads", "call", f"call = {figure('-1', 'us')}"),
        "'overheads.call.value' should be greater than or equal to 0",
    ),
    (replace("compute", "efficiency", f"efficiency = {figure('1.2', 'share')}"), "should be less than or equal to 1"),
    (alignment("1.5", "6"), "'alignment.hard.value' should be a valid integer"),
    # figures that contradict one another
    (replace("memory", "efficiency", ""), "'memory': give one of copy_bandwidth"),
    (replace("memory", "efficiency", f"copy_bandwidth = {figure('7', 'GB/s')}"), "at most half of bandwidth"),
    (replace("capacity", "model_ram", f"model_ram = {figure('2', 'GB')}"), "more than the installed ram"),
    (alignment("4", "6"), "'alignment': step is not a multiple of hard"),
    # the rest of the file
    (MINIMAL.replace("cahfp.profile/1", "cahfp.profile/2"), "'format' should be 'cahfp.profile/1'"),
    (MINIMAL.replace("my-board", "My Board"), "'name' is not a name"),
    (MINIMAL.replace("threads = 2", "threads = 0"), "'runtime.threads' should be greater"),
    (budget("latency = 5"), "'budget.latency': 5 has no unit"),
    (budget('latency = "5 parsec"'), "'budget.latency': '5 parsec' is not a time"),
    (budget("keep = 1.5"), "'budget.keep': '1.5' is not a share"),
    (budget(), "'budget': limits nothing"),
    (budget('latency = "5ms"', reason=""), "'budget.reason' is missing"),
    ("name = ", "not valid TOML"),
    ("", "'format' is missing"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_bad_profile_is_refused_with_its_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "board.toml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_profile(tmp_path / "board.toml")


def test_a_budget_is_read_as_typed_values(tmp_path: Path) -> None:
    lines = ('latency = "5ms"', 'memory = "2MiB"', 'storage = "1MB"', "macs = 0.5", 'params = "3M"', "keep = 0.25")
    limits = read(tmp_path, budget(*lines)).budget
    assert limits is not None
    assert (limits.latency, limits.memory, limits.storage) == (0.005, 2**21, 10**6)
    assert (limits.macs, limits.params, limits.keep) == (Share(0.5), Count(3_000_000), 0.25)


def test_profiles_need_no_torch_and_no_command_line() -> None:
    code = (
        "import sys; import cahfp_cli.device.cost; from cahfp_cli.device.catalogue import load_profile; "
        "load_profile('jetson'); sys.exit(bool({'torch', 'typer', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
