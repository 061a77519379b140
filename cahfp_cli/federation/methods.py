"""Every method on the harness: a selection for training, one for deployment, and what else sets it apart.

All are merged by the experiment's rule, except FedRolex, which is defined with the average over those who hold an
entry.
With devices that hold the whole network all methods are FedAvg, bit for bit.
"""

from dataclasses import dataclass, replace
from typing import Literal

from cahfp_cli.federation import selections
from cahfp_cli.federation.selections import Choose, remembered

Scoring = Literal["none", "experiment", "gate-taylor"]


@dataclass(frozen=True)
class Method:
    """choose: what a client trains. deploy: what is cut for its device from the global network.

    rule: an aggregation rule instead of the experiment's. scaler: activations of a narrowed layer are divided by its
    share of the width in training (Diao et al. 2021, section 3.2). scoring: by which criterion clients score, if they
    do. mix: instead of the experiment's `score_mix`. widths: how wide scored masks are in each layer, a name in
    `scoring.SIZED`. nesting: whether clients train parts of their masks at times, see the experiment's `nesting`.
    insulated: whether a start from random weights is changed as `insulation` says. strong_only: only devices that hold
    the whole network take part. network: what of the global checkpoint is the method's global network.
    """

    choose: Choose
    deploy: Choose
    rule: str | None = None
    scaler: bool = False
    scoring: Scoring = "none"
    mix: float | None = None
    widths: Literal["even", "layered"] = "even"
    nesting: bool = False
    insulated: bool = False
    strong_only: bool = False
    network: Choose = selections.full


CAHFP = Method(remembered, remembered, scoring="experiment", nesting=True, insulated=True)

METHODS: dict[str, Method] = {
    "fedavg": Method(selections.full, selections.magnitude),
    "fedavg-smallest": Method(
        selections.smallest_common, selections.smallest_common, network=selections.smallest_common
    ),
    "fedavg-strong": Method(selections.full, selections.magnitude, strong_only=True),
    "heterofl": Method(selections.prefix, selections.prefix, scaler=True),
    "heterofl-unscaled": Method(selections.prefix, selections.prefix),
    "fedrolex": Method(selections.rolling, selections.rolling, rule="covered"),
    "fjord": Method(selections.ordered, selections.prefix),
    "random": Method(selections.random, selections.random),
    "magnitude": Method(selections.magnitude, selections.magnitude),
    "taylor": Method(remembered, remembered, scoring="gate-taylor"),
    "cahfp": CAHFP,
    "cahfp-own": replace(CAHFP, mix=0.0),
    "cahfp-covered": replace(CAHFP, rule="covered"),
    "cahfp-apart": replace(CAHFP, nesting=False),
    "cahfp-felt": replace(CAHFP, insulated=False),
    "cahfp-layers": replace(CAHFP, widths="layered"),
    "cahfp-unscored": replace(CAHFP, scoring="none"),
    "heterofl-insulated": Method(selections.prefix, selections.prefix, scaler=True, insulated=True),
}
"""From `cahfp-own` on, one thing is different from `cahfp` in each, or from `heterofl`, to show what it brings."""
