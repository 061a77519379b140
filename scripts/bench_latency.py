"""Predicted latency against ONNX Runtime on this machine: one thread, thread CPU time, batch 1.

The machine's profile is measured in the same run, by the microbenchmarks of `cahfp profile measure` alone.

- predict: networks at random non-uniform widths, which no microbenchmark looks like; half of them keep multiples of
  four channels in every layer, as selection does for this runtime, the others any number. Beside our prediction stand
  operations alone, and a single roofline (the larger of operations and bytes at one rate each, and an overhead for each
  operator), both scaled so that their median error is zero: better than they could be before measuring. Networks of
  the kinds marked * served to design the kernel classes; no other did.
- slower: a network of which each layer is narrower, and which takes longer.
- budgets: prune runs with latency budgets from 30% to 90% of the full network, measured; with and without `--verify`.

    python scripts/bench_latency.py [--part predict slower budgets] [--quick]

The last line is JSON: each figure, the bar beside it, and `holds`, over the parts that ran. torch runs one thread.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import densenet, mobilenet, vit
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, analyse, cut
from cahfp_cli.device.cost import CostModel, compile_workload
from cahfp_cli.device.measurement import Measured, measure_device, measured_by, written
from cahfp_cli.device.microbenchmarks import microbenchmarks
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.workload import make_workload
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.models.resnet import resnet18, resnet20, resnet56
from cahfp_cli.models.vgg import vgg11, vgg16
from cahfp_cli.output import table
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.selection import Selection, select
from cahfp_cli.pruning.verified import select_verified
from cahfp_cli.running.stopwatch import seconds_a_call, stopwatch

PARTS = ("predict", "slower", "budgets")
LINKS = {name: {"value": 1.0, "unit": "Mbit/s", "source": "not used here"} for name in ("uplink", "downlink")}
BARS = {"median": 0.08, "p90": 0.15, "max": 0.25}
ROUNDS = 5
"""Visits to each network, one round through all after the other; the fastest counts, as in `profile measure`."""
BETTER, WITHIN, WITHIN_VERIFIED, SLACK, UNUSED = 2.0, 0.95, 1.0, 0.05, 0.15


# --------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Kind:
    """A network, how many widths of it are tried, and whether it served to design the model."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    count: int
    designed: bool = False


SMALL, LARGE = (1, 28, 28), (3, 32, 32)
PLAN = ((1, 24, 1, 1), (6, 36, 2, 1), (6, 60, 2, 2), (6, 120, 3, 2))
KINDS = (
    Kind("resnet18*", partial(resnet18, LARGE, 10, 0.5), LARGE, 2, designed=True),
    Kind("vgg11*", partial(vgg11, LARGE, 10), LARGE, 2, designed=True),
    Kind("resnet18 at 28x28", partial(resnet18, SMALL, 10), SMALL, 4),
    Kind("resnet20 at 32x32", partial(resnet20, LARGE, 10, 2.0), LARGE, 6),
    Kind("resnet56", partial(resnet56, LARGE, 10), LARGE, 4),
    Kind("vgg11 at 28x28", partial(vgg11, SMALL, 10, 0.5), SMALL, 6),
    Kind("vgg16", partial(vgg16, LARGE, 10, 0.75), LARGE, 4),
    Kind("mobile", partial(mobilenet, 48, PLAN), LARGE, 4),
    Kind("dense", partial(densenet, 12, (6, 6, 6), 1), SMALL, 4),
    Kind("vit", partial(vit, 96, 6, 4, 28, 7, 384, 1), SMALL, 4),
)
BUDGETED = ("resnet18 at 28x28", "resnet20 at 32x32", "vgg11 at 28x28")
QUICK = ("resnet20 at 32x32", "vgg11 at 28x28", "mobile", "vit")


@dataclass(frozen=True)
class Case:
    """A network at full width, its structure, its cost on the measured machine."""

    model: nn.Module
    analysis: Analysis
    cost: CostModel
    shape: tuple[int, ...]

    @staticmethod
    def of(kind: Kind, profile: DeviceProfile | None) -> "Case":
        torch.manual_seed(0)
        model = kind.build().eval()
        analysis = analyse(model, kind.shape)
        sizes = {name: tensor.element_size() for name, tensor in model.state_dict().items()}
        return Case(model, analysis, compile_workload(make_workload(analysis, sizes), profile), kind.shape)

    def mask(self, widths: np.ndarray) -> np.ndarray:
        """The first groups of each family, as many as `widths` says."""
        family = self.analysis.groups.family
        rank = np.array([np.count_nonzero(family[:i] == f) for i, f in enumerate(family)])
        return rank < widths[family]

    def write(self, kept: np.ndarray, path: Path) -> None:
        """The network with these groups, as ONNX."""
        compact, _ = cut(self.model, self.analysis, kept)
        export_onnx(compact, self.shape, path, {})

    def measured(self, kept: np.ndarray) -> float:
        """Seconds of a call of the network with these groups."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            self.write(kept, path)
            return seconds_a_call(path)


# ------------------------------------------------------------------------------------------------------------ parts


def random_widths(case: Case, number: int) -> np.ndarray:
    """Each family between 30% and all of its groups; multiples of four for even numbers."""
    full = case.cost.full_widths
    random = np.random.default_rng((number, 17))
    widths = np.maximum(np.round(full * random.uniform(0.3, 1, len(full))), 1).astype(np.int64)
    if number % 2 == 0:
        widths = np.minimum(-(-widths // 4) * 4, full)
    return np.maximum(widths, np.minimum(case.analysis.groups.narrowest, full))


def roofline(case: Case, widths: np.ndarray, profile: DeviceProfile) -> float:
    """One rate of computing, one of moving, one overhead for every operator."""
    plain = compile_workload(case.cost.workload, profile.model_copy(update={"calibration": None, "alignment": None}))
    parts = plain.breakdown(widths)
    return float((np.maximum(parts.compute, parts.memory) + parts.overhead).sum() + parts.call_overhead)


def predict(names: tuple[str, ...] | None, figures: dict[str, Any]) -> DeviceProfile:
    """Returns the profile that was measured on the way."""
    rows, errors = [], {"ours": [], "roofline": [], "operations": []}
    raw: dict[str, list[float]] = {"roofline": [], "operations": []}
    times = []
    tried = [
        (kind, case, number, random_widths(case, number))
        for kind in KINDS
        if names is None or kind.name in names
        for case in [Case.of(kind, None)]
        for number in range(kind.count)
    ]
    # The machine changes within minutes, so microbenchmarks and networks take turns.
    benchmarks = tuple(microbenchmarks())
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.onnx" for number in range(len(tried))]
        for (_, case, _, widths), path in zip(tried, paths, strict=True):
            case.write(case.mask(widths), path)
        paths = [*written(benchmarks, Path(folder)), *paths]
        seconds_of_all = np.min([[stopwatch(path, 1)() for path in paths] for _ in range(ROUNDS)], axis=0)
    measured = measured_by(benchmarks, seconds_of_all[: len(benchmarks)], "this-machine", 1, LINKS)
    profile = measured.profile
    describe(measured)
    for (kind, old, number, widths), seconds in zip(tried, seconds_of_all[len(benchmarks) :].tolist(), strict=True):
        case = replace(old, cost=compile_workload(old.cost.workload, profile))
        found = case.cost.cost(widths)
        error = float(found.latency_seconds) / seconds - 1
        rows.append([kind.name, str(number), f"{found.latency_seconds * 1e6:.0f}", f"{seconds * 1e6:.0f}", error])
        if not kind.designed:
            errors["ours"].append(error)
            times.append(seconds)
            raw["roofline"].append(roofline(case, widths, profile))
            raw["operations"].append(float(found.macs))
    for name, values in raw.items():
        ratio = np.array(values) / np.array(times)
        errors[name] = list(ratio / np.median(ratio) - 1)
    print(
        table(("network", "widths", "predicted, us", "measured, us", "error"), [[*r[:4], f"{r[4]:+.1%}"] for r in rows])
    )
    summary = {}
    for name, values in errors.items():
        size = np.abs(values)
        summary[name] = {"median": np.median(size), "p90": np.quantile(size, 0.9), "max": size.max()}
    print()
    shown = [[name, *(f"{value:.1%}" for value in found.values())] for name, found in summary.items()]
    print(table((f"{len(times)} networks", "median", "p90", "max"), shown))
    for name, bar in BARS.items():
        at_most(figures, f"error_{name}", summary["ours"][name], bar)
    for name in ("roofline", "operations"):
        at_least(figures, f"times_better_than_{name}", summary[name]["median"] / summary["ours"]["median"], BETTER)
    return profile


def slower(profile: DeviceProfile, figures: dict[str, Any]) -> None:
    """Every family at 60 of 64 channels and so on against one channel less: no multiple of four any more."""
    case = Case.of(next(kind for kind in KINDS if kind.name == "vgg11*"), profile)
    wide = case.cost.settled(np.round(case.cost.full_widths * 0.5).astype(np.int64))
    rows, found = [], {}
    for name, widths in (("half", wide), ("half less one", wide - 1)):
        found[name] = case.measured(case.mask(widths)), float(case.cost.cost(widths).latency_seconds)
        rows.append([name, f"{found[name][1] * 1e6:.0f}", f"{found[name][0] * 1e6:.0f}"])
    print(table(("VGG-11, every layer", "predicted, us", "measured, us"), rows))
    for place, what in ((0, "measured"), (1, "predicted")):
        at_least(figures, f"narrower_is_slower_{what}", found["half less one"][place] / found["half"][place], 1.0)


def budgets(profile: DeviceProfile, counts: tuple[int, ...], figures: dict[str, Any]) -> None:
    """Select and write all networks first; then time them in turns, as `predict` does."""
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        for kind in (kind for kind in KINDS if kind.name in BUDGETED):
            rows += budgeted(Case.of(kind, profile), kind.name, counts[BUDGETED.index(kind.name)], folder)
        paths = [path for row in rows for path in row.paths]
        seconds = np.min([[stopwatch(path, 1)() for path in paths] for _ in range(ROUNDS)], axis=0).reshape(-1, 2)
    shares = seconds / np.array([row.limit for row in rows])[:, None]
    shown = [
        [row.name, f"{row.share:.0%}", f"{row.limit * 1e6:.0f}", *(f"{x:.2f}" for x in found), str(row.tries)]
        for row, found in zip(rows, shares, strict=True)
    ]
    print(table(("network", "of full", "budget, us", "measured / budget", "verified / budget", "tries"), shown))
    for name, values, bar in (("", shares[:, 0], WITHIN), ("_verified", shares[:, 1], WITHIN_VERIFIED)):
        at_least(figures, f"within_budget{name}", float(np.mean(values <= 1 + SLACK)), bar)
        at_most(figures, f"most_unused{name}", float(1 - np.min(values)), UNUSED)


@dataclass(frozen=True)
class Budgeted:
    """limit: seconds. paths: of the networks without and with verification, which took so many tries."""

    name: str
    share: float
    limit: float
    paths: tuple[Path, Path]
    tries: int


def budgeted(case: Case, name: str, count: int, folder: Path) -> list[Budgeted]:
    """Networks for budgets from 30% to 90% of the full latency, as measured."""
    groups = case.analysis.groups
    scores = np.random.default_rng(0).random(groups.count)
    full = min(case.measured(np.ones(groups.count, dtype=bool)) for _ in range(ROUNDS))

    def chosen(budget: Budget) -> Selection:
        return select(scores, groups.family, case.cost, budget, groups.narrowest)

    rows = []
    for share in np.linspace(0.3, 0.9, count).tolist():
        budget = Budget(latency=share * full)
        once = chosen(budget)
        verified = select_verified(budget, chosen, lambda selection: case.measured(selection.kept))
        paths = (folder / f"{name}-{share:.2f}-once.onnx", folder / f"{name}-{share:.2f}-verified.onnx")
        for selection, path in zip((once, verified.selection), paths, strict=True):
            case.write(selection.kept, path)
        rows.append(Budgeted(name, share, share * full, paths, verified.tries))
    return rows


def describe(measured: Measured) -> None:
    """Print what was calibrated, and how well it explains the microbenchmarks."""
    profile, residuals = measured.profile, np.abs(measured.fit.residuals)
    assert profile.alignment is not None
    print(
        f"{profile.description}: {len(residuals)} microbenchmarks, median error {statistics.median(residuals):.1%}, "
        f"channel step {profile.alignment.step.value}, multiples of {profile.alignment.hard.value}"
    )


def at_most(figures: dict[str, Any], name: str, value: float, bar: float) -> None:
    figures[name] = {"value": round(float(value), 4), "bar": f"<= {bar:g}", "holds": bool(value <= bar)}


def at_least(figures: dict[str, Any], name: str, value: float, bar: float) -> None:
    figures[name] = {"value": round(float(value), 4), "bar": f">= {bar:g}", "holds": bool(value >= bar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer networks and budgets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if "predict" in options.part:
        profile = predict(QUICK if options.quick else None, figures)
    else:
        measured = measure_device("this-machine", 1, LINKS)
        describe(measured)
        profile = measured.profile
    if "slower" in options.part:
        print()
        slower(profile, figures)
    if "budgets" in options.part:
        print()
        budgets(profile, (0, 3, 3) if options.quick else (10, 10, 10), figures)
    holds = all(figure["holds"] for figure in figures.values())
    print(json.dumps({"quick": options.quick, **figures, "holds": holds}))


if __name__ == "__main__":
    main()
