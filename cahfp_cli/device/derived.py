"""What follows from a network's cost and a profile: a training step, the way to the server and back, energy."""

from dataclasses import dataclass

from cahfp_cli.device.cost import Cost
from cahfp_cli.device.profile import DeviceProfile

BACKWARD = 2.0
"""A backward pass multiplies twice as much as the forward pass: for the gradients of inputs and of weights."""


@dataclass(frozen=True)
class Derived:
    """training_step_seconds: forward and backward of one sample, as the device infers. training_memory_bytes: the
    profile's multiple of inference memory. upload_seconds, download_seconds: of all stored tensors. energy_joules: of
    one inference, None where the profile has no power."""

    training_step_seconds: float
    training_memory_bytes: float
    upload_seconds: float
    download_seconds: float
    energy_joules: float | None


def derived(cost: Cost, profile: DeviceProfile) -> Derived:
    """Args: cost: of one candidate on this profile's device."""
    assert cost.latency_seconds is not None  # it was made with the profile
    seconds, stored = float(cost.latency_seconds), float(cost.storage_bytes)
    return Derived(
        training_step_seconds=seconds * (1 + BACKWARD),
        training_memory_bytes=float(cost.memory_bytes) * profile.training.memory_factor.si,
        upload_seconds=stored / profile.links.uplink.si,
        download_seconds=stored / profile.links.downlink.si,
        energy_joules=None if profile.power is None else seconds * profile.power.active.si,
    )
