"""Significance, set selection and compensation: against brute force, against Torch-Pruning, after training, in cost.

Trains its networks itself: a VGG and a ResNet with batch norm, and a small ViT, on Fashion-MNIST at 16x16. For each
seed a permutation of the training images: the first train the network, the next 2,048 are the pool of calibration
samples, which no network was trained on. Accuracies and what counts as the truth are measured on test images.

- ranking: Spearman correlation of each criterion (256 calibration samples) with brute force, single groups ablated on
  all test images: increase of the loss, and KL(full || ablated). The first rows say what can be reached: how far the
  truth from half of the images agrees with that from the other half, how far KL says what the loss does, and the same
  brute force on the calibration samples. KL says little where training has made the network too sure of itself: then
  removing a group lowers the loss on new images as often as it raises it. So a third network is ranked, a narrow VGG
  that was trained on 50,000 images, and that one carries the bar on the loss.
- cost: process time of gate statistics as a multiple of one forward and backward pass over the same samples, of the
  whole selection as a multiple of one training epoch, and its share outside passes over data. Peak memory is what the
  process grows by, each in a process of its own (Linux: /proc).
- sets, tune: test accuracy right after pruning to a share of the MACs, without any training, and after one epoch that
  is the same for all. `samples` are the calibration samples that the method looks at.
- noniid: one client of a Dirichlet(0.1) split, the largest of ten: whether its own scores order groups as global ones
  do and as ablation on its own held-out data does; and pruning by local, global and half-and-half samples.
- transformer: heads and MLP units of the ViT pruned by the same path.

Set-aware is ours. Baselines are all methods that judge groups one by one: `per group` widths come from
`cahfp_cli.pruning.selection.select`, `uniform` keeps the same share of every family. Torch-Pruning 1.6.1 ranks all
layers together (`global_pruning`), in one step with gradients of the full network, or in steps of 1% of the channels
with gradients measured anew at each, until its network has few enough MACs; what it removes is read as our groups, so
MACs and accuracies are measured alike. Its gradients are those of 256 calibration samples with their true labels. Its
criteria are as shipped: its Hessian is the last sample's squared gradient only, since `accumulate_grad` looks a
parameter up by name but stores it by the parameter itself; its Taylor leaves batch norm out. Its OBD-C does not run
without attention layers as shipped (`_prepare_model` walks over None); that one line is bridged. `samples` count what
a method looks at: gate criteria get the pool that set-aware gets, slower ones 256. Needs torch-pruning for `sets` and
`tune`, transformers for `transformer`.

    python scripts/bench_significance.py [--part sets tune] [--only vgg] [--seeds 3] [--quick] [-o significance.md]

Trained networks and finished results stay in the folder --cache, each in a file named after all its settings, so that
an interrupted run goes on and two runs may work side by side (one --only vgg, one --only resnet); the report says how
many were reused. A result is measured anew when the code of its criterion or selection has changed, comments aside.
--from-cache measures nothing, --more adds variants of methods. One thread. Tables have the mean over seeds ± the
standard deviation. --quick measures another, smaller network and fewer cases; bars that need the trained network of the
full run are then left out.

The last line is JSON: each figure, the bar beside it, and `holds`, over the bars of the parts that ran.
"""

import argparse
import ast
import copy
import functools
import hashlib
import json
import operator
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional

import cahfp_cli
from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.coupling.analysis import Analysis, analyse, cut
from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.device.cost import CostModel, compile_workload
from cahfp_cli.device.quantities import Share
from cahfp_cli.device.workload import make_workload
from cahfp_cli.models.resnet import resnet20
from cahfp_cli.models.vgg import vgg11
from cahfp_cli.pruning import set_selection
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.compensation import FoldedWeights
from cahfp_cli.pruning.selection import select, strongest, uniform
from cahfp_cli.pruning.set_selection import SetOptions, select_set
from cahfp_cli.pruning.target import target_of
from cahfp_cli.running.evaluation import evaluate
from cahfp_cli.significance.gates import predict
from cahfp_cli.significance.measure import Measuring, measure
from cahfp_cli.significance.registry import find_criterion
from cahfp_cli.significance.statistics import gate_statistics
from cahfp_cli.training.sgd import TrainOptions, train

PARTS = ("ranking", "cost", "sets", "tune", "noniid", "transformer")
PRUNED = ("vgg", "resnet")
CNNS = ("narrow", *PRUNED)
NAMES = {"narrow": "narrow VGG", "vgg": "VGG", "resnet": "ResNet", "vit": "ViT"}
FACTORIES = {"narrow": vgg11, "vgg": vgg11, "resnet": resnet20}
CPU = torch.device("cpu")
SHAPE = (1, 16, 16)
CLASSES = 10
BATCH = 64
CALIBRATION, POOL = 256, 2048
ORACLES = ("loss", "kl")
CLIENTS, CONCENTRATION, SHARED_OUT, CLIENT_GROUPS = 10, 0.1, 8000, 60

RANKING_BARS = {("vgg", "kl"): 0.97, ("narrow", "kl"): 0.97, ("resnet", "kl"): 0.97, ("narrow", "loss"): 0.93}
UNDER_ORACLE = 0.02
COST_BARS = {"top_3": 2.0, "exact": 5.0, "selection": 1.0, "bookkeeping": 1 / 3}
POINTS_BARS = {("vgg", 0.5): 4.0, ("vgg", 0.3): 7.0, ("vgg", 0.15): 16.0, ("resnet", 0.5): 6.0}
DENSE_BARS = {"narrow": 0.88, "vgg": 0.88, "resnet": 0.88, "vit": 0.85}

SCORING = ("significance/gates.py", "significance/statistics.py", "significance/registry.py", "significance/criteria")
SELECTING = ("significance/gates.py", "significance/divergence.py", "pruning/set_selection.py")
SELECTING += ("pruning/linearised.py", "pruning/greedy.py", "pruning/compensation.py", "pruning/budget.py")
"""Code that results depend on, within the package."""

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Json = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A network and its training: samples and epochs, learning rates of training and of the epoch after pruning."""

    architecture: str
    width: float = 1.0
    samples: int = 12000
    epochs: int = 10
    lr: float = 0.05
    tune_lr: float = 0.02


@dataclass(frozen=True)
class Scale:
    """How much is measured. held_out: test images for brute force; repeats: of timings, passes and selections."""

    recipes: tuple[Recipe, ...]
    groups: int
    held_out: int
    shares: tuple[float, ...]
    vit_shares: tuple[float, ...]
    methods: tuple[str, ...]
    criteria: tuple[str, ...]
    repeats: tuple[int, int]
    client_samples: tuple[str, ...]
    references: tuple[str, ...]
    left_out: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------- data and networks


@lru_cache
def images(split: str) -> Dataset:
    """All images of a split, reduced to 16x16 by averaging."""
    whole = load_data(f"fashion-mnist@{split}")
    x = functional.interpolate(torch.from_numpy(whole.x), size=SHAPE[1:], mode="area").numpy()
    return Dataset(x, whole.y, CLASSES, whole.name)


def take(dataset: Dataset, rows: Any) -> Dataset:
    return Dataset(dataset.x[rows], dataset.y[rows], dataset.classes, dataset.name)


class LogitsOf(nn.Module):
    """A model of `transformers` as one from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).logits


def build(recipe: Recipe) -> nn.Module:
    """The untrained network."""
    if recipe.architecture != "vit":
        return FACTORIES[recipe.architecture](SHAPE, CLASSES, recipe.width)
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=SHAPE[1], patch_size=4, num_channels=SHAPE[0], num_labels=CLASSES, **sizes)
    return LogitsOf(ViTForImageClassification(config))


def train_with(recipe: Recipe, model: nn.Module, data: Dataset, epochs: int, lr: float, seed: int) -> None:
    """SGD with momentum, or AdamW for the ViT; both with a cosine schedule. Ends in evaluation mode."""
    if recipe.architecture != "vit":
        train(model, data, TrainOptions(epochs=epochs, lr=lr, batch_size=BATCH, seed=seed), CPU)
        return
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = epochs * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(epochs):
        for x, y in batches(data, BATCH, seed=(seed, epoch)):
            optimiser.zero_grad()
            functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimiser.step()
            schedule.step()
    model.eval()


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture trained with one seed; everything is made when first asked for."""

    recipe: Recipe
    seed: int
    store: "Store"

    @property
    def settings(self) -> Json:
        recipe = asdict(self.recipe)
        del recipe["tune_lr"]
        return {**recipe, "seed": self.seed}

    @property
    def title(self) -> str:
        return f"{self.recipe.architecture} seed {self.seed}"

    @cached_property
    def order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(len(images("train")))

    def samples(self, first: int, count: int) -> Dataset:
        """`count` training images of this seed's permutation from number `first` on."""
        return take(images("train"), self.order[first : first + count])

    @cached_property
    def data(self) -> Dataset:
        return self.samples(0, self.recipe.samples)

    def calibration(self, count: int) -> Dataset:
        return self.samples(self.recipe.samples, count)

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = build(self.recipe)

        def fit() -> None:
            train_with(self.recipe, model, self.data, self.recipe.epochs, self.recipe.lr, self.seed)

        self.store.network(self.title, self.settings, model, fit)
        return model.eval()

    @cached_property
    def analysis(self) -> Analysis:
        return analyse(self.model, SHAPE)

    @cached_property
    def cost(self) -> CostModel:
        itemsizes = {name: tensor.element_size() for name, tensor in self.model.state_dict().items()}
        return compile_workload(make_workload(self.analysis, itemsizes), None)

    def dense(self) -> Json | None:
        """Accuracy and sizes of the network as it is."""

        def found() -> Json:
            full = self.cost.full
            return {
                "accuracy": evaluate(self.model, images("test"), 250, CPU).accuracy,
                "params": int(full.params),
                "macs": int(full.macs),
                "groups": self.analysis.groups.count,
            }

        return self.store.result("dense", self.title, self.settings, ("device/cost.py",), found)

    def scores(self, criterion: str, samples: int, **how: Any) -> Floats | None:
        """Scores of all groups by a criterion on the first calibration samples; top or draws beside it."""

        def found() -> Json:
            measuring = Measuring(batch_size=BATCH, interactions=False, seed=self.seed, **how)
            calibration = self.calibration(samples)
            chosen = find_criterion(criterion)
            return {"scores": measure(self.model, self.analysis.groups, chosen, calibration, measuring).significance}

        settings = {**self.settings, "criterion": criterion, "samples": samples, **how}
        title = f"{self.title}: {criterion}, {samples} samples {how or ''}"
        result = self.store.result("scores", title, settings, SCORING, found)
        return None if result is None else np.array(result["scores"])


# --------------------------------------------------------------------------------------------------------- cache


class Store:
    """Networks and results in a folder, each in a file that is named after all its settings.

    measured, reused: files of results of this run. stale: those that were measured with code that has changed since,
    and missing: those that are not there; of both there are some only when nothing is to be measured.
    """

    def __init__(self, folder: Path, read_only: bool) -> None:
        self.folder, self.read_only = folder, read_only
        self.measured: set[Path] = set()
        self.reused: set[Path] = set()
        self.stale: set[Path] = set()
        self.missing: set[Path] = set()
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")

    def path(self, kind: str, settings: Mapping[str, Any], ending: str) -> Path:
        text = json.dumps(settings, sort_keys=True, default=list)
        label = [kind, *(str(settings[name]) for name in ("architecture", "seed") if name in settings)]
        return self.folder / f"{'-'.join(label)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.{ending}"

    def network(self, title: str, settings: Mapping[str, Any], model: nn.Module, fit: Callable[[], None]) -> None:
        """Put trained weights into `model`: those in the folder, or what `fit` makes of it."""
        path = self.path("network", settings, "safetensors")
        if path.exists():
            model.load_state_dict(load_file(path))
            return
        progress(f"{title}: training")
        fit()
        with atomic_file(path, force=True) as file:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    def result(
        self, kind: str, title: str, settings: Mapping[str, Any], sources: Sequence[str], found: Callable[[], Json]
    ) -> Json | None:
        """A result from the folder, or what `found` measures. sources: parts of the package that it depends on."""
        path = self.path(kind, settings, "json")
        code = code_of(tuple(sources))
        if path.exists():
            kept = json.loads(path.read_text())
            if self.read_only or kept["code"] == code:
                if path not in self.measured:
                    self.reused.add(path)
                if kept["code"] != code:
                    self.stale.add(path)
                return kept["result"]
        if self.read_only:
            self.missing.add(path)
            return None
        started = time.perf_counter()
        text = json.dumps({"settings": settings, "code": code, "result": found()}, default=plain)
        with atomic_file(path, force=True) as file:
            file.write_text(text)
        self.measured.add(path)
        progress(f"{title}: {time.perf_counter() - started:.1f} s")
        return json.loads(text)["result"]

    def counts(self) -> dict[str, int]:
        sets = {"cached": self.reused, "measured": self.measured, "missing": self.missing, "stale": self.stale}
        return {name: len(paths) for name, paths in sets.items()}


def plain(value: Any) -> Any:
    """What JSON does not know: arrays and NumPy's numbers."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value)


@lru_cache
def code_of(sources: tuple[str, ...]) -> str:
    """Digest of what the sources say, without comments, docstrings and layout."""
    root = Path(cahfp_cli.__file__).parent
    digest = hashlib.sha256()
    for source in sources:
        files = sorted((root / source).rglob("*.py")) if (root / source).is_dir() else [root / source]
        for file in files:
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Figure:
    """value: None where it was not measured; then it does not hold. sign: of the bar, >=, > or <=."""

    value: float | None
    sign: str
    bar: float

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return {">=": operator.ge, ">": operator.gt, "<=": operator.le}[self.sign](self.value, self.bar)

    def json(self) -> Json:
        value = None if self.value is None else round(self.value, 4)
        return {"value": value, "bar": f"{self.sign} {self.bar:.4g}", "holds": self.holds}


@dataclass
class Report:
    """Tables as they are printed, and the figures that have a bar."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def say(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        body = [f"| {' | '.join(row)} |" for row in rows]
        self.say(f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *body, "")

    def at_least(self, name: str, value: float | None, bar: float) -> None:
        self.figures[name] = Figure(value, ">=", bar)

    def at_most(self, name: str, value: float | None, bar: float) -> None:
        self.figures[name] = Figure(value, "<=", bar)

    def summary(self, left_out: Sequence[str]) -> Json:
        """Every figure with its bar; `holds` leaves out what the run cannot judge."""
        figures = {name: figure.json() for name, figure in self.figures.items()}
        holds = all(figure.holds for name, figure in self.figures.items() if name not in left_out)
        return {**figures, "left_out": [name for name in figures if name in left_out], "holds": holds}


def mean(values: Sequence[float | None]) -> float | None:
    """None unless all are there."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None


def deviation(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return statistics.stdev(present) if len(present) > 1 else 0.0


def shown(values: Sequence[float | None], form: str = ".3f", factor: float = 1.0) -> str:
    """0.970 ± 0.003 of those values that are there, or -."""
    present = [factor * value for value in values if value is not None]
    if not present:
        return "-"
    middle = f"{statistics.fmean(present):{form}}"
    return f"{middle} ± {deviation(present):{form}}" if len(present) > 1 else middle


def percent(values: Sequence[float | None]) -> str:
    return shown(values, ".1f", 100)


# ------------------------------------------------------------------------------------------------------- ranking


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Rank correlation; ties share their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def ablation(case: Case, data: Dataset, groups: NDArray[np.int64]) -> Json:
    """What removing each of the groups alone does on `data`: change of the mean loss, and KL(full || ablated); `halves`
    has the same of every other sample."""
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)

    def log_probabilities() -> torch.Tensor:
        return predict(case.model, x, 250).double().log_softmax(1)

    weights = FoldedWeights(case.model, case.analysis.groups)
    full = log_probabilities()
    found = np.zeros((len(groups), 2, len(data)))
    for number, group in enumerate(groups):
        gates = np.ones(case.analysis.groups.count)
        gates[group] = 0.0
        weights.set(gates)
        difference = full - log_probabilities()
        found[number, 0] = difference.gather(1, y[:, None])[:, 0]
        found[number, 1] = (full.exp() * difference).sum(1)
    weights.set(np.ones(case.analysis.groups.count))
    halves = [found[:, :, half::2].mean(2) for half in range(2)]
    of_all = {name: found[:, column].mean(1) for column, name in enumerate(ORACLES)}
    return {**of_all, "halves": [{n: half[:, column] for column, n in enumerate(ORACLES)} for half in halves]}


def sampled(case: Case, count: int) -> NDArray[np.int64]:
    """A random sample of groups, all if there are no more, in order."""
    total = (case.dense() or {}).get("groups", 0)
    chosen = np.random.default_rng((case.seed, 1)).choice(total, min(count, total), replace=False)
    return np.sort(chosen)


def ranking(cases: Mapping[str, Sequence[Case]], scale: Scale, report: Report) -> None:
    report.say(
        "## Ranking of single groups",
        "",
        f"Spearman correlation with ablation of up to {scale.groups} groups on {scale.held_out} test images; criteria "
        f"see {CALIBRATION} calibration samples.",
        "",
    )
    found: dict[str, dict[tuple[str, str], list[float | None]]] = {}
    for architecture, its in cases.items():
        for case in its:
            for row, correlations in correlations_of(case, scale).items():
                for oracle, value in correlations.items():
                    found.setdefault(row, {}).setdefault((architecture, oracle), []).append(value)
    columns = [(architecture, oracle) for architecture in cases for oracle in ORACLES]
    report.table(
        ["score", *(f"{NAMES[a]}, {'loss' if o == 'loss' else 'KL'}" for a, o in columns)],
        [[row, *(shown(values.get(column, [])) for column in columns)] for row, values in found.items()],
    )
    for architecture in cases:
        ours = {oracle: mean(found["gate-ggn"][architecture, oracle]) for oracle in ORACLES}
        for oracle in ORACLES:
            if (architecture, oracle) in RANKING_BARS:
                bar = RANKING_BARS[architecture, oracle]
                report.at_least(f"{architecture}_ranking_{oracle}", ours[oracle], bar)
        best = mean(found["KL by ablation on the calibration samples"][architecture, "loss"])
        if architecture == "resnet":
            under = None if best is None or ours["loss"] is None else best - ours["loss"]
            report.at_most("resnet_ranking_loss_under_oracle", under, UNDER_ORACLE)


def correlations_of(case: Case, scale: Scale) -> dict[str, dict[str, float | None]]:
    """Row of the table -> correlation with each oracle on held-out data, None where it was not measured."""
    groups = sampled(case, scale.groups)
    held_out = take(images("test"), slice(scale.held_out)) if not case.store.read_only else None

    def oracle(name: str, data: Callable[[], Dataset], **settings: Any) -> Json | None:
        return case.store.result(
            "brute-force",
            f"{case.title}: ablation of {len(groups)} groups on {name}",
            {**case.settings, "groups": len(groups), **settings},
            ("pruning/compensation.py",),
            lambda: ablation(case, data(), groups),
        )

    truth = oracle("test images", lambda: held_out, held_out=scale.held_out)
    own = oracle("calibration samples", lambda: case.calibration(CALIBRATION), calibration=CALIBRATION)
    rows: dict[str, dict[str, float | None]] = {}

    def compare(row: str, values: Any) -> None:
        rows[row] = {o: None if truth is None or values is None else spearman(values, truth[o]) for o in ORACLES}

    halves = truth and truth["halves"]
    rows["(one half of the test images, with the other)"] = {
        o: halves and spearman(halves[0][o], halves[1][o]) for o in ORACLES
    }
    compare("(KL by ablation on the same test images)", truth and truth["kl"])
    compare("KL by ablation on the calibration samples", own and own["kl"])
    compare("loss by ablation on the calibration samples", own and own["loss"])
    for row, (criterion, how) in RANKED.items():
        if criterion in scale.criteria:
            of_all = case.scores(criterion, CALIBRATION, **how)
            compare(row, None if of_all is None else of_all[groups])
    return rows


ONE_WAY = ["gate-magnitude", "gate-fisher", "gate-taylor", "gate-taylor-signed", "gate-loss", "weight-fisher"]
ONE_WAY += ["obd", "l1", "l2", "bn-scale", "lamp", "random"]
RANKED: dict[str, tuple[str, Json]] = {
    "gate-ggn": ("gate-ggn", {}),
    "gate-ggn, 3 likeliest classes": ("gate-ggn", {"top": 3}),
    "gate-ggn, 2 likeliest classes": ("gate-ggn", {"top": 2}),
    "gate-ggn, 1 drawn label": ("gate-ggn", {"draws": 1}),
    **{name: (name, {}) for name in ONE_WAY},
}
"""Rows of the table: criterion, and how its gates are measured. One likeliest class alone has no curvature."""


# ---------------------------------------------------------------------------------------------------------- cost


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def alternating(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Process seconds of each, in turn, after one run of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            seconds = seconds_of(work)
            times[name] += [seconds] * (repeat > 0)
    return times


def forward_and_backward(model: nn.Module, data: Dataset) -> None:
    """One pass of training over the samples, without the optimiser's step; batch statistics stay as they were."""
    state = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.train()
    for x, y in batches(data, BATCH, seed=None):
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])


def measured_passes(model: nn.Module, analysis: Analysis, data: Dataset) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass, and gate statistics of as many samples."""

    def statistics_of(**how: Any) -> Callable[[], Any]:
        return lambda: gate_statistics(model, analysis.groups, data.x, data.y, batch_size=BATCH, **how)

    return {
        "pass": lambda: forward_and_backward(model, data),
        "top_3": statistics_of(top=3),
        "exact": statistics_of(),
        "top_3_diagonal": statistics_of(top=3, interactions=False),
        "exact_diagonal": statistics_of(interactions=False),
    }


STATISTICS = {
    "top_3": "gate statistics, 3 likeliest classes",
    "top_3_diagonal": "the same without interactions",
    "exact": "gate statistics, all 10 classes",
    "exact_diagonal": "the same without interactions",
}


def cost_of_passes(case: Case, repeats: int) -> Json:
    times = alternating(measured_passes(case.model, case.analysis, case.calibration(CALIBRATION)), repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["pass"] for name in STATISTICS}
    memory = {name: memory_of(case.recipe, name) for name in ("pass", *STATISTICS, "selection")}
    return {"seconds": medians, "ratios": ratios, "memory": memory}


def cost_of_selection(case: Case, repeats: int) -> Json:
    """One selection at half of the MACs against one epoch of training, and what of it is not a pass over data."""
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.process_time() - started

        return run

    pool, budget = case.calibration(POOL), Budget(macs=Share(0.5))
    model = copy.deepcopy(case.model)
    options = TrainOptions(epochs=1, lr=case.recipe.tune_lr, batch_size=BATCH, seed=case.seed)
    selections, epochs, shares = [], [], []
    for _ in range(repeats):
        with ExitStack() as stack:
            for name in ("predict", "gate_jacobian"):
                function = timed(getattr(set_selection, name))
                stack.enter_context(mock.patch.object(set_selection, name, function))
            inside = 0.0
            selections.append(seconds_of(lambda: select_set(case.model, case.analysis, case.cost, budget, pool)))
        shares.append(1 - inside / selections[-1])
        epochs.append(seconds_of(lambda: train(model, case.data, options, CPU)))
    selection, epoch = statistics.median(selections), statistics.median(epochs)
    return {
        "selection": selection,
        "epoch": epoch,
        "ratio": selection / epoch,
        "bookkeeping": statistics.median(shares),
    }


def memory_of(recipe: Recipe, work: str) -> int:
    """Bytes by which a process that does only that grows."""
    command = [sys.executable, __file__, "--memory", work, recipe.architecture, str(recipe.width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory of {work}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def grow(work: str, architecture: str, width: float) -> int:
    """In a process of its own: how much memory `work` takes at its peak, with random weights and samples.

    Not by getrusage: its peak counts the process that this one was forked from.
    """
    model = build(Recipe(architecture, width)).eval()
    analysis = analyse(model, SHAPE)
    random = np.random.default_rng(0)

    def run(samples: int) -> None:
        x = random.random((samples, *SHAPE), dtype=np.float32)
        data = Dataset(x, random.integers(CLASSES, size=samples), CLASSES, "random")
        if work != "selection":
            measured_passes(model, analysis, data)[work]()
            return
        sizes = {name: tensor.element_size() for name, tensor in model.state_dict().items()}
        cost = compile_workload(make_workload(analysis, sizes), None)
        options = replace(SetOptions(), rounds=2, polish=0)  # the first rounds look at the most groups
        select_set(model, analysis, cost, Budget(macs=Share(0.5)), data, options)

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    run(2)  # libraries load what they need
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(POOL if work == "selection" else CALIBRATION)
    return status("VmHWM") - before


def cost(cases: Mapping[str, Sequence[Case]], scale: Scale, report: Report) -> None:
    first = next(iter(cases.values()))[0]
    report.say(
        "## Cost",
        "",
        f"Seed {first.seed}, one thread, process time. Passes: {CALIBRATION} samples in batches of {BATCH}. Selection: "
        f"default options, half of the MACs, a pool of {POOL} samples of which each round looks at "
        f"{SetOptions().at_once}; epoch: {first.recipe.samples} samples.",
        "",
    )
    rows = []
    for architecture, its in cases.items():
        case = its[0]
        passes_repeats, selection_repeats = scale.repeats
        passes = case.store.result(
            "passes",
            f"{case.title}: cost of passes",
            {**case.settings, "repeats": passes_repeats, "samples": CALIBRATION},
            SCORING,
            functools.partial(cost_of_passes, case, passes_repeats),
        )
        whole = case.store.result(
            "selection",
            f"{case.title}: cost of selection",
            {**case.settings, "repeats": selection_repeats, "options": asdict(SetOptions()), "samples": POOL},
            SELECTING,
            functools.partial(cost_of_selection, case, selection_repeats),
        )
        name = NAMES[architecture]
        if passes:
            seconds, ratios, memory = passes["seconds"], passes["ratios"], passes["memory"]

            def megabytes(work: str, memory: Json = memory) -> str:
                return f"{memory[work] / 1e6:.0f} MB"

            rows.append([name, "forward + backward", f"{seconds['pass']:.3f} s", "1", "", megabytes("pass")])
            for work, text in STATISTICS.items():
                bar = f"<= {COST_BARS[work]:g}" if work in COST_BARS else ""
                rows.append([name, text, f"{seconds[work]:.3f} s", f"{ratios[work]:.2f}", bar, megabytes(work)])
        if whole:
            memory_text = megabytes("selection") if passes else "-"
            rows.append([name, "training epoch", f"{whole['epoch']:.1f} s", "1", "", ""])
            rows.append(
                [name, "selection", f"{whole['selection']:.1f} s", f"{whole['ratio']:.2f}", "<= 1", memory_text]
            )
            rows.append([name, "of it outside passes over data", "", f"{whole['bookkeeping']:.2f}", "<= 1/3", ""])
        for work in ("top_3", "exact"):
            report.at_most(f"{architecture}_cost_{work}", passes and passes["ratios"][work], COST_BARS[work])
        report.at_most(f"{architecture}_cost_selection", whole and whole["ratio"], COST_BARS["selection"])
        report.at_most(f"{architecture}_cost_bookkeeping", whole and whole["bookkeeping"], COST_BARS["bookkeeping"])
    report.table(["network", "work", "time", "ratio", "bar", "peak memory"], rows)


# ---------------------------------------------------------------------------------------------- methods of pruning


@dataclass(frozen=True)
class Choice:
    """The groups to keep, boolean (groups,), and gates to fold into the weights, float64 (groups,) or None."""

    kept: Mask
    gates: Floats | None = None


@dataclass(frozen=True)
class Method:
    """A way to choose what to keep at a share of the MACs. samples: that it looks at. sources: code that it uses."""

    name: str
    ours: bool
    samples: int
    choose: Callable[[Case, float], Choice]
    sources: tuple[str, ...]
    settings: Json


def set_aware(name: str, samples: int = POOL, **changes: Any) -> Method:
    options = replace(SetOptions(), **changes)

    def choose(case: Case, share: float) -> Choice:
        calibration, budget = case.calibration(samples), Budget(macs=Share(share))
        selection = select_set(case.model, case.analysis, case.cost, budget, calibration, options)
        return Choice(selection.kept, selection.gates)

    return Method(name, True, samples, choose, SELECTING, asdict(options))


def scored(criterion: str, samples: int, widths: str) -> Method:
    """The most significant groups by a criterion; widths by `select`, or the same share of every family."""

    def choose(case: Case, share: float) -> Choice:
        significance = case.scores(criterion, samples or CALIBRATION)
        assert significance is not None
        groups, budget = case.analysis.groups, Budget(macs=Share(share))
        if widths == "per group":
            return Choice(select(significance, groups.family, case.cost, budget, groups.narrowest).kept)
        kept = uniform(case.cost, target_of(budget, case.cost, groups.narrowest))
        return Choice(strongest(significance, groups.family, kept))

    sources = (*SCORING, "pruning/selection.py", "pruning/budget.py")
    return Method(f"{criterion}, {widths}", False, samples, choose, sources, {})


def random_widths() -> Method:
    """A random share of each family, all scaled alike until they fit; random groups of it."""

    def choose(case: Case, share: float) -> Choice:
        groups, random = case.analysis.groups, np.random.default_rng((case.seed, 2))
        target = target_of(Budget(macs=Share(share)), case.cost, groups.narrowest)
        full_widths = case.cost.full_widths
        shares = random.uniform(0.2, 1.0, len(full_widths))

        def widths(factor: float) -> NDArray[np.int64]:
            return np.maximum(np.round(full_widths * np.minimum(factor * shares, 1.0)).astype(np.int64), target.least)

        low, high = 0.0, 5.0
        for _ in range(40):
            middle = (low + high) / 2
            fits = bool(target.limits.fit(case.cost.cost(widths(middle))).all())
            low, high = (middle, high) if fits else (low, middle)
        return Choice(strongest(random.random(groups.count), groups.family, widths(low)))

    return Method("random groups, random widths", False, 0, choose, ("pruning/selection.py",), {})


TORCH_PRUNING, STEPS, TRIALS = "1.6.1", 100, 8


def torch_pruning(kind: str, steps: int) -> Method:
    """In so many steps, of which each goes on from the last; or in one, whose pruning ratio is found by bisection."""

    def in_one_step(case: Case, share: float) -> Mask:
        low, high, kept = 0.0, 1.0, np.zeros(0, dtype=bool)
        for _ in range(TRIALS):
            middle = (low + high) / 2
            trial = TorchPruning(case, kind, 1, middle)
            trial.step()
            if trial.macs() <= share:
                high, kept = middle, trial.checked()
            else:
                low = middle
        return kept

    def choose(case: Case, share: float) -> Choice:
        return Choice(in_one_step(case, share) if steps == 1 else torch_pruning_path(case, kind).at(share))

    name = f"Torch-Pruning {kind}, {'1 step' if steps == 1 else f'{steps} steps'}"
    settings = {"version": TORCH_PRUNING, "steps": steps, "trials": TRIALS}
    return Method(name, False, 0 if kind == "Magnitude" else CALIBRATION, choose, (), settings)


class TorchPruning:
    """Torch-Pruning at work on a copy of a network; what it removes is read as our groups.

    kept: boolean (groups,).
    """

    def __init__(self, case: Case, kind: str, steps: int, ratio: float) -> None:
        import torch_pruning as tp

        if version("torch-pruning") != TORCH_PRUNING:
            raise SystemExit(f"the comparison is with torch-pruning=={TORCH_PRUNING}: pip install that version")
        warnings.filterwarnings("ignore", message=".*[bB]ackward hook.*")
        self.case, self.kind, self.model = case, kind, copy.deepcopy(case.model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.kept = np.ones(case.analysis.groups.count, dtype=bool)
        self.importance = {
            "Magnitude": tp.importance.GroupMagnitudeImportance,
            "Taylor": tp.importance.GroupTaylorImportance,
            "Hessian": tp.importance.GroupHessianImportance,
            "OBD-C": functools.partial(tp.importance.OBDCImportance, num_classes=CLASSES),
        }[kind]()
        self.pruner = tp.pruner.MetaPruner(
            self.model,
            torch.zeros(1, *SHAPE),
            self.importance,
            global_pruning=True,
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES],
        )
        self.pruner._downstream_node_as_root_if_attention = lambda group: group  # else OBD-C's preparation gets None

    def macs(self) -> float:
        """As a share of the full network's."""
        full = np.asarray(self.case.cost.workload.full_widths)
        return float(
            self.case.cost.cost(self.case.analysis.groups.widths(self.kept)).macs / self.case.cost.cost(full).macs
        )

    def at(self, share: float) -> Mask:
        """The groups of the first network on the way that has at most this share of the MACs; ask for less next."""
        while self.macs() > share:
            if self.pruner.current_step == self.pruner.iterative_steps:
                raise SystemExit(f"Torch-Pruning {self.kind} ends at {self.macs():.0%} of the MACs")
            self.step()
        return self.checked()

    def step(self) -> None:
        """Measure gradients anew and prune once."""
        if self.kind != "Magnitude":
            self.accumulate()
        for group in self.pruner.step(interactive=True):
            dependency, channels = group[0]
            labels = self.case.analysis.groups.labels[f"{self.names[dependency.target.module]}.weight"][0]
            self.kept[labels[self.kept[labels]][channels]] = False  # a layer numbers its channels as it is now
            group.prune()
        if self.kind == "OBD-C":
            self.importance._rm_hooks(self.model)
            self.importance._clear_buffer()

    def accumulate(self) -> None:
        """Gradients of the loss on calibration samples, as its authors' benchmarks and tests do it."""
        calibration = self.case.calibration(CALIBRATION)
        if self.kind == "Hessian":  # each sample replaces the one before
            calibration = take(calibration, slice(CALIBRATION - 1, None))
        if self.kind == "OBD-C":
            self.importance._prepare_model(self.model, self.pruner)
        self.model.zero_grad()
        for x, y in batches(calibration, BATCH, seed=None):
            functional.cross_entropy(self.model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            if self.kind == "Hessian":
                self.importance.accumulate_grad(self.model)
            if self.kind == "OBD-C":
                self.importance.step()

    def checked(self) -> Mask:
        """The groups left; its network is the one that they make."""
        x = torch.from_numpy(images("test").x[:16])
        own, _ = cut(self.case.model, self.case.analysis, self.kept)
        with torch.no_grad():
            difference = float((self.model(x) - own(x)).abs().max())
        if difference > 1e-3:
            raise SystemExit(f"Torch-Pruning {self.kind}: its network differs from ours by {difference}")
        return self.kept.copy()


@lru_cache(maxsize=1)
def torch_pruning_path(case: Case, kind: str) -> TorchPruning:
    return TorchPruning(case, kind, STEPS, 1.0)


METHODS = [
    set_aware("set-aware"),
    set_aware("set-aware, 256 samples", CALIBRATION),
    set_aware("set-aware, not compensated", compensate=False),
    set_aware("set-aware, quadratic", model="quadratic"),
    scored("gate-ggn", POOL, "per group"),
    scored("gate-taylor", POOL, "per group"),
    scored("obd", CALIBRATION, "per group"),
    *(scored(criterion, 0, "per group") for criterion in ("l2", "bn-scale", "lamp")),
    *(scored(criterion, POOL, "uniform") for criterion in ("gate-ggn", "gate-taylor")),
    *(scored(criterion, 0, "uniform") for criterion in ("l2", "random")),
    random_widths(),
    *(torch_pruning(kind, steps) for kind in ("Magnitude", "Taylor", "Hessian", "OBD-C") for steps in (1, STEPS)),
]
DEFAULT = "set-aware"
MORE = {
    "set-aware, 256 samples",
    "set-aware, quadratic",
    *(f"{criterion}, per group" for criterion in ("gate-taylor", "obd", "l2", "bn-scale", "lamp")),
    *(f"Torch-Pruning {kind}, {STEPS} steps" for kind in ("Magnitude", "Hessian", "OBD-C")),
}
"""Variants that come near another row: only with --more, since each takes minutes a network."""
VIT_METHODS = ("set-aware", "gate-taylor, per group", "l2, per group")


def network_of(case: Case, choice: Choice) -> nn.Module:
    """The compact network, with the gates in its weights."""
    network, _ = cut(case.model, case.analysis, choice.kept)
    if choice.gates is not None:
        FoldedWeights(network, case.analysis.groups.restricted(choice.kept)).set(choice.gates[choice.kept])
    return network


def pruned(case: Case, method: Method, share: float) -> Json | None:
    """What a method keeps, and the test accuracy without any training."""

    def found() -> Json:
        seconds = time.process_time()
        choice = method.choose(case, share)
        seconds = time.process_time() - seconds
        widths = case.analysis.groups.widths(choice.kept)
        full = case.cost.full
        return {
            "accuracy": evaluate(network_of(case, choice), images("test"), 250, CPU).accuracy,
            "macs": float(case.cost.cost(widths).macs / full.macs),
            "seconds": seconds,
            "widths": dict(zip(case.analysis.groups.names, widths.tolist(), strict=True)),
            "full": dict(zip(case.analysis.groups.names, case.cost.workload.full_widths, strict=True)),
            "kept": np.flatnonzero(choice.kept),
            "gates": choice.gates,
        }

    settings = {**case.settings, "method": method.name, "share": share, "samples": method.samples, **method.settings}
    return case.store.result("pruned", f"{case.title}: {method.name} at {share:.0%}", settings, method.sources, found)


def tuned(case: Case, method: Method, share: float) -> float | None:
    """Test accuracy after one epoch of training."""
    result = pruned(case, method, share)
    if result is None:
        return None

    def found() -> Json:
        kept = np.zeros(case.analysis.groups.count, dtype=bool)
        kept[result["kept"]] = True
        network = network_of(case, Choice(kept, None if result["gates"] is None else np.array(result["gates"])))
        train_with(case.recipe, network, case.data, 1, case.recipe.tune_lr, case.seed)
        return {"accuracy": evaluate(network, images("test"), 250, CPU).accuracy}

    what = hashlib.sha256(json.dumps([result["kept"], result["gates"]]).encode()).hexdigest()
    settings = {**case.settings, "lr": case.recipe.tune_lr, "network": what}
    title = f"{case.title}: {method.name} at {share:.0%}, tuned"
    after = case.store.result("tuned", title, settings, ("training/sgd.py",), found)
    return after and after["accuracy"]


@dataclass(frozen=True)
class Accuracies:
    """Of one method at one share, over the seeds: right after pruning, and after one epoch (empty if not asked for);
    macs: the shares of the full network's that it really has."""

    pruned: list[float | None] = field(default_factory=list)
    tuned: list[float | None] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)


def accuracies(
    cases: Sequence[Case], methods: Sequence[Method], shares: Sequence[float], tune: bool
) -> dict[tuple[str, float], Accuracies]:
    """Largest share first: Torch-Pruning goes on from one to the next."""
    found = {(method.name, share): Accuracies() for method in methods for share in shares}
    for case in cases:
        for method in methods:
            for share in sorted(shares, reverse=True):
                result = pruned(case, method, share)
                found[method.name, share].pruned.append(result and result["accuracy"])
                found[method.name, share].macs.extend([result["macs"]] if result else [])
                if tune:
                    found[method.name, share].tuned.append(tuned(case, method, share))
    return found


def methods_table(
    methods: Sequence[Method],
    shares: Sequence[float],
    found: Mapping[tuple[str, float], Accuracies],
    tune: bool,
    report: Report,
) -> None:
    stages = ["one-shot", "one epoch"] if tune else ["one-shot"]
    rows = []
    for method in methods:
        row = [f"**{method.name}**" if method.ours else method.name, str(method.samples or "")]
        for share in shares:
            values = found[method.name, share]
            row += [percent(values.pruned), percent(values.tuned)] if tune else [percent(values.pruned)]
        rows.append(row)
    columns = [f"{share:.0%} MACs, {stage}" for share in shares for stage in stages]
    report.table(["method", "samples", *columns], rows)
    for share in shares:
        reached = {method.name: min(found[method.name, share].macs, default=share) for method in methods}
        least = min(reached, key=lambda name: reached[name])
        report.say(f"- {share:.0%}: every network has at least {reached[least]:.1%} of the MACs ({least} the fewest).")
    report.say("")


def sets(cases: Mapping[str, Sequence[Case]], scale: Scale, report: Report, one_shot: bool, tune: bool) -> None:
    methods = [method for method in METHODS if method.name in scale.methods]
    report.say("## Pruned networks", "", "Test accuracy in %; set-aware methods in bold, the others are baselines.", "")
    for architecture, its in cases.items():
        dense = [(case.dense() or {}).get("accuracy") for case in its]
        report.say(f"### {NAMES[architecture]}, dense {percent(dense)}", "")
        found = accuracies(its, methods, scale.shares, tune)
        methods_table(methods, scale.shares, found, tune, report)
        for share in scale.shares if one_shot else ():
            if (architecture, share) in POINTS_BARS:
                after, before = mean(found[DEFAULT, share].pruned), mean(dense)
                lost = None if after is None or before is None else 100 * (before - after)
                bar = POINTS_BARS[architecture, share]
                report.at_most(f"{architecture}_points_lost_at_{100 * share:.0f}%", lost, bar)
        if tune:
            judge_tuned(architecture, methods, scale.shares, found, report)


def judge_tuned(
    architecture: str,
    methods: Sequence[Method],
    shares: Sequence[float],
    found: Mapping[tuple[str, float], Accuracies],
    report: Report,
) -> None:
    """Our default against the best baseline by mean; the spread is the larger standard deviation of the two."""
    leads = []
    for share in shares:
        ours = found[DEFAULT, share].tuned
        means = {m.name: mean(found[m.name, share].tuned) for m in methods if not m.ours}
        present = {name: value for name, value in means.items() if value is not None}
        middle = mean(ours)
        name = f"{architecture}_tuned_lead_at_{100 * share:.0f}%"
        if middle is None or not present or len(present) < len(means):
            report.at_least(name, None, 0.0)
            continue
        best = max(present, key=lambda one: present[one])
        spread = max(deviation(ours), deviation(found[best, share].tuned))
        leads.append(100 * (middle - present[best]))
        report.say(f"- {share:.0%}: best baseline after one epoch is {best}; ours leads by {leads[-1]:+.2f} points.")
        report.at_least(name, leads[-1], -100 * spread)
    report.say("")
    report.figures[f"{architecture}_tuned_lead_somewhere"] = Figure(max(leads, default=None), ">", 0.0)


# ------------------------------------------------------------------------------------------------------- non-IID


@dataclass(frozen=True)
class Client:
    """The largest client: what it calibrates with, and its held-out fifth."""

    own: Dataset
    held_out: Dataset


CLIENT_SCORES: dict[str, tuple[str, Json]] = {
    "gate-ggn": ("gate-ggn", {}),
    **{f"gate-loss, gradient less {s} standard errors": ("gate-loss", {"shrink": float(s)}) for s in (0, 1, 2, 4)},
}


def client_of(case: Case) -> Client:
    """Each class shared out among the clients in proportions from a Dirichlet distribution (Hsu et al. 2019)."""
    data = case.samples(case.recipe.samples + POOL, SHARED_OUT)
    random = np.random.default_rng((case.seed, 3))
    owner = np.zeros(len(data), dtype=np.int64)
    for label in range(CLASSES):
        members = random.permutation(np.flatnonzero(data.y == label))
        proportions = random.dirichlet([CONCENTRATION] * CLIENTS)
        ends = np.round(np.cumsum(proportions) * len(members)).astype(np.int64)
        owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right").clip(max=CLIENTS - 1)
    largest = int(np.bincount(owner, minlength=CLIENTS).argmax())
    members = random.permutation(np.flatnonzero(owner == largest))
    fifth = len(members) // 5
    return Client(take(data, members[fifth:]), take(data, members[:fifth]))


def client_scores(case: Case, groups_looked_at: int) -> Json:
    """The client's scores, and the truth on its held-out data for some of the groups."""
    client = client_of(case)
    own = take(client.own, slice(CALIBRATION))
    groups = sampled(case, groups_looked_at)
    measuring = Measuring(batch_size=BATCH, interactions=False, seed=case.seed)
    return {
        "samples": len(client.own),
        "held_out": len(client.held_out),
        "classes": np.bincount(client.own.y, minlength=CLASSES),
        "dense": evaluate(case.model, client.held_out, 250, CPU).accuracy,
        "scores": {
            row: measure(
                case.model, case.analysis.groups, find_criterion(criterion), own, replace(measuring, **how)
            ).significance
            for row, (criterion, how) in CLIENT_SCORES.items()
        },
        "groups": groups,
        "truth": ablation(case, client.held_out, groups),
    }


def client_pruning(case: Case, samples: str, reference: str) -> Json:
    """Half of the MACs, chosen on as many local or global samples, or half of each."""
    client = client_of(case)
    count = min(len(client.own), POOL)
    own, everyone = take(client.own, slice(count)), case.calibration(count)
    half = count // 2
    mixed = Dataset(
        np.concatenate([own.x[:half], everyone.x[: count - half]]),
        np.concatenate([own.y[:half], everyone.y[: count - half]]),
        CLASSES,
        "mixed",
    )
    order = np.random.default_rng(case.seed).permutation(count)  # rounds look at some of the samples each
    data = take({"local": own, "global": everyone, "mixed": mixed}[samples], order)
    options = replace(SetOptions(), reference=reference)
    selection = select_set(case.model, case.analysis, case.cost, Budget(macs=Share(0.5)), data, options)
    network = network_of(case, Choice(selection.kept, selection.gates))
    return {
        "local": evaluate(network, client.held_out, 250, CPU).accuracy,
        "global": evaluate(network, images("test"), 250, CPU).accuracy,
    }


def noniid(cases: Sequence[Case], scale: Scale, report: Report) -> None:
    settings = {"clients": CLIENTS, "concentration": CONCENTRATION, "shared_out": SHARED_OUT}
    correlations: dict[tuple[str, str], list[float | None]] = {}
    sizes, local = [], []
    for case in cases:
        found = case.store.result(
            "client-scores",
            f"{case.title}: client's scores",
            {**case.settings, **settings, "groups": CLIENT_GROUPS, "rows": list(CLIENT_SCORES)},
            SCORING,
            functools.partial(client_scores, case, CLIENT_GROUPS),
        )
        if found is None:
            continue
        local.append(found["dense"])
        classes = sum(count > 0 for count in found["classes"])
        sizes.append(f"{found['samples']} of {classes} classes ({found['held_out']} held out)")
        groups = np.array(found["groups"])
        for row, (criterion, how) in CLIENT_SCORES.items():
            of_all = case.scores(criterion, CALIBRATION, **how)
            for whose, scores in (("local", np.array(found["scores"][row])), ("global", of_all)):
                for oracle in ORACLES:
                    value = None if scores is None else spearman(scores[groups], found["truth"][oracle])
                    correlations.setdefault((f"{row}, {whose}", oracle), []).append(value)
            value = None if of_all is None else spearman(found["scores"][row], of_all)
            correlations.setdefault((f"{row}, local", "global"), []).append(value)
    report.say(
        "## A client's own data",
        "",
        f"VGG; the largest of {CLIENTS} clients by Dirichlet({CONCENTRATION}) over classes; samples: "
        f"{'; '.join(sizes) or '-'}. Spearman correlation of scores from {CALIBRATION} of the client's samples, or of "
        f"everyone's, with ablation of {CLIENT_GROUPS} groups on the client's held-out data:",
        "",
    )
    columns = {"loss": "client's loss", "kl": "client's KL", "global": "same score, global data"}
    names = list(dict.fromkeys(name for name, _ in correlations))
    report.table(
        ["score", *columns.values()],
        [[name, *(shown(correlations.get((name, column), [])) for column in columns)] for name in names],
    )
    dense = [(case.dense() or {}).get("accuracy") for case in cases]
    rows = [["(dense)", "", percent(local), percent(dense)]]
    for reference in scale.references:
        for samples in scale.client_samples:
            results = [
                case.store.result(
                    "client-pruning",
                    f"{case.title}: client, {samples} samples, {reference}",
                    {**case.settings, **settings, **asdict(SetOptions()), "of": samples, "reference": reference},
                    SELECTING,
                    functools.partial(client_pruning, case, samples, reference),
                )
                for case in cases
            ]
            accuracy = {where: [result and result[where] for result in results] for where in ("local", "global")}
            rows.append([samples, reference, percent(accuracy["local"]), percent(accuracy["global"])])
    report.say("Set-aware at 50% of the MACs without training, accuracy in %:", "")
    report.table(["samples", "reference", "client's held-out data", "global test set"], rows)


# --------------------------------------------------------------------------------------------------- transformer


def transformer(cases: Sequence[Case], scale: Scale, report: Report) -> None:
    methods = [method for method in METHODS if method.name in VIT_METHODS]
    dense = [(case.dense() or {}).get("accuracy") for case in cases]
    report.say("## Transformer", "", f"A ViT of 4 layers, dense {percent(dense)}; test accuracy in %.", "")
    found = accuracies(cases, methods, scale.vit_shares, tune=True)
    methods_table(methods, scale.vit_shares, found, True, report)
    report.at_least("vit_dense", mean(dense), DENSE_BARS["vit"])
    smallest = min(scale.vit_shares)
    ours = next(method for method in methods if method.name == DEFAULT)
    kinds = {"heads": "attention", "MLP units": "mlp", "width of the residual stream": "embeddings"}
    rows, pruned_in_all = [], {"heads": 1.0, "MLP units": 1.0}
    for case in cases:
        result = pruned(case, ours, smallest)
        if result is None:
            pruned_in_all = dict.fromkeys(pruned_in_all, 0.0)
            continue
        row = [str(case.seed)]
        for kind, word in kinds.items():
            names = [name for name in result["widths"] if word in name]
            kept, full = (sum(result[key][name] for name in names) for key in ("widths", "full"))
            row.append(f"{kept} of {full}")
            if kind in pruned_in_all and not 0 < kept < full:
                pruned_in_all[kind] = 0.0
        rows.append(row)
    report.say(f"What set-aware keeps at {smallest:.0%} of the MACs:", "")
    report.table(["seed", *kinds], rows)
    for kind, value in pruned_in_all.items():
        report.at_least(f"vit_{kind.replace(' ', '_')}_pruned", value, 1.0)


# ---------------------------------------------------------------------------------------------------------- main

VIT = Recipe("vit", samples=24000, epochs=16, lr=1e-3, tune_lr=3e-4)
FULL = Scale(
    recipes=(
        Recipe("narrow", width=0.125, samples=50000, epochs=4),
        Recipe("vgg", width=0.5),
        Recipe("resnet"),
        VIT,
    ),
    groups=100,
    held_out=10000,
    shares=(0.5, 0.3, 0.15),
    vit_shares=(0.7, 0.5),
    methods=tuple(method.name for method in METHODS if method.name not in MORE),
    criteria=tuple(criterion for criterion, _ in RANKED.values()),
    repeats=(5, 3),
    client_samples=("local", "global", "mixed"),
    references=("network", "labels"),
)
QUICK = replace(
    FULL,
    recipes=(Recipe("vgg", width=0.25, epochs=3), replace(VIT, samples=6000, epochs=2)),
    groups=60,
    held_out=500,
    shares=(0.5,),
    vit_shares=(0.5,),
    methods=("set-aware", "gate-taylor, per group", "l2, uniform", "Torch-Pruning Taylor, 1 step"),
    repeats=(3, 1),
    client_samples=("local", "global"),
    references=("network",),
    left_out=("vgg_dense", "vit_dense", "vgg_ranking_loss", "vgg_cost_selection"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES), help="architectures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", type=int, help="groups ablated for the ranking")
    parser.add_argument("--cache", type=Path, default=Path(".cache-significance"))
    parser.add_argument("--from-cache", action="store_true", help="only tabulate what is there")
    parser.add_argument("--quick", action="store_true", help="a small VGG and ViT, one seed, few cases")
    parser.add_argument("--more", action="store_true", help="more variants of methods")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there, as Markdown")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's linear algebra has threads of its own
    if options.memory:
        work, architecture, width = options.memory
        print(grow(work, architecture, float(width)))
        return
    scale, seeds = (QUICK, 1) if options.quick else (FULL, options.seeds)
    if options.more:
        scale = replace(scale, methods=tuple(method.name for method in METHODS))
    scale = replace(scale, groups=options.groups or scale.groups)
    store = Store(options.cache, options.from_cache)
    cases = {
        recipe.architecture: [Case(recipe, seed, store) for seed in range(seeds)]
        for recipe in scale.recipes
        if recipe.architecture in options.only
    }
    report = run(cases, scale, options.part)
    counts = store.counts()
    note = f"{counts['cached']} results were in the cache"
    note += f", {counts['missing']} are missing" if store.read_only else f", {counts['measured']} this run measured"
    note += f"; {counts['stale']} were measured with code that has changed since" if counts["stale"] else ""
    report.say(f"Seeds: {seeds}. {note}.{' A quick run: other networks than in the full one.' * options.quick}")
    if options.output:
        head = "# Significance\n\nMade by `scripts/bench_significance.py`, where it stands what is measured and how."
        options.output.write_text(f"{head}\n\n" + "\n".join(report.lines) + "\n")
    print(json.dumps({"quick": options.quick, **counts, **report.summary(scale.left_out)}))


def run(cases: Mapping[str, Sequence[Case]], scale: Scale, parts: Sequence[str]) -> Report:
    """The parts that were asked for, as far as they apply to these architectures."""
    report = Report()
    ranked = {architecture: its for architecture, its in cases.items() if architecture in CNNS and "ranking" in parts}
    others = {architecture: its for architecture, its in cases.items() if architecture in PRUNED}
    cnns = ranked or others
    if cnns and set(parts) - {"transformer"}:
        networks(cnns, report)
    if ranked:
        ranking(ranked, scale, report)
    if others and "cost" in parts:
        cost(others, scale, report)
    if others and ("sets" in parts or "tune" in parts):
        sets(others, scale, report, "sets" in parts, "tune" in parts)
    if "vgg" in cases and "noniid" in parts:
        noniid(cases["vgg"], scale, report)
    if "vit" in cases and "transformer" in parts:
        transformer(cases["vit"], scale, report)
    return report


def networks(cases: Mapping[str, Sequence[Case]], report: Report) -> None:
    """What the tables are about."""
    rows = []
    for architecture, its in cases.items():
        found = [case.dense() for case in its]
        accuracy = [result and result["accuracy"] for result in found]
        report.at_least(f"{architecture}_dense", mean(accuracy), DENSE_BARS[architecture])
        sizes = next((result for result in found if result), None)
        if sizes:
            figures = [f"{sizes['params'] / 1e6:.2f}M", f"{sizes['macs'] / 1e6:.1f}M", str(sizes["groups"])]
            rows.append([NAMES[architecture], percent(accuracy), *figures])
    report.say("## Networks", "")
    report.table(["network", "test accuracy, %", "parameters", "MACs", "groups"], rows)


if __name__ == "__main__":
    main()
