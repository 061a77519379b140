"""The fleet: what each device's submodel may cost, and the widest network of equal shares that fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cahfp_cli.coupling.analysis import Analysis
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import CostModel, compile_workload
from cahfp_cli.device.profile import DeviceProfile, parse_profile
from cahfp_cli.device.quantities import Share
from cahfp_cli.device.workload import make_workload
from cahfp_cli.errors import BudgetError, InputError, UsageError
from cahfp_cli.pruning.budget import Budget, budget_of_profile
from cahfp_cli.pruning.selection import uniform
from cahfp_cli.pruning.target import Widths, target_of

if TYPE_CHECKING:
    from cahfp_cli.federation.experiment import DeviceEntry


REPORTED = "reported"
"""Instead of the name of a profile, in a fleet whose nodes say what they are."""


@dataclass(frozen=True)
class Device:
    """One device. widths: int64 (families,), of the largest share, the same in every layer, that fits its budget."""

    name: str
    budget: Budget
    cost: CostModel
    widths: Widths

    @property
    def is_full(self) -> bool:
        """Whether the whole network fits."""
        return bool((self.widths == self.cost.full_widths).all())


def make_devices(
    entries: Sequence["DeviceEntry"], groups: ChannelGroups, analysis: Analysis, itemsizes: dict[str, int]
) -> tuple[Device, ...]:
    """The devices of a fleet, one a client, entry after entry.

    Args: itemsizes: bytes of an element of each tensor.
    Raises: UsageError: no such profile. InputError: a profile without a budget. BudgetError: a budget nothing fits.
    """
    workload = make_workload(analysis, itemsizes)
    devices: list[Device] = []
    for entry in entries:
        profile = profile_of(entry, len(devices))
        budget = Budget(
            keep=entry.keep,
            params=None if entry.params is None else Share(entry.params),
            macs=None if entry.macs is None else Share(entry.macs),
        )
        shares = [f"{name} {getattr(entry, name):g}" for name in ("keep", "params", "macs") if getattr(entry, name)]
        name = " ".join(([profile.name] if profile else []) + shares)
        place = f"client {len(devices)}, {name}" if entry.profile_text is not None else name
        if not budget and profile is not None:
            if profile.budget is None:
                raise InputError(f"{place}: the profile has no budget of its own: give keep, params or macs too.")
            budget = budget_of_profile(profile.budget)
        cost = compile_workload(workload, profile)
        try:
            widths = uniform(cost, target_of(budget, cost, groups.narrowest))
        except BudgetError as error:
            raise BudgetError(f"{place}: {error}") from None
        devices += [Device(name, budget, cost, widths)] * entry.count
    return tuple(devices)


def profile_of(entry: "DeviceEntry", client: int) -> DeviceProfile | None:
    """The profile of the entry whose first device is that of `client`, None where it has none.

    Raises: UsageError: no such profile, or it is still to be reported. InputError: it is damaged.
    """
    if entry.profile_text is not None:
        return parse_profile(entry.profile_text, f"profile of client {client}")
    if entry.profile == REPORTED:
        raise UsageError(
            f"the device of client {client} is not known: start its node with --node-config 'profile=\"...\"'."
        )
    return None if entry.profile is None else load_profile(entry.profile)


def smallest(devices: Sequence[Device]) -> Widths:
    """Widths that every device can hold, int64 (families,)."""
    return np.asarray(np.min([device.widths for device in devices], axis=0), np.int64)
