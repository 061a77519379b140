"""Training, links and energy from a cost, by hand."""

from types import SimpleNamespace

import pytest

from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.derived import derived

pytestmark = pytest.mark.quick

COST = SimpleNamespace(latency_seconds=0.01, memory_bytes=3e6, storage_bytes=2.5e6)


def test_training_links_and_energy_follow_from_the_profile() -> None:
    pi = load_profile("pi5")  # 20 and 100 Mbit/s, 11 W, four times the memory
    found = derived(COST, pi)  # type: ignore[arg-type]
    assert found.training_step_seconds == pytest.approx(0.03)
    assert found.training_memory_bytes == pytest.approx(12e6)
    assert found.upload_seconds == pytest.approx(1.0)
    assert found.download_seconds == pytest.approx(0.2)
    assert found.energy_joules == pytest.approx(0.11)
    assert derived(COST, pi.model_copy(update={"power": None})).energy_joules is None  # type: ignore[arg-type]
