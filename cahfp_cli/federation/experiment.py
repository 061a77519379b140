"""EXPERIMENT.toml: what is simulated. Every key is checked before anything runs."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cahfp_cli.checkpoint.metadata import ModelSpec, Record
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation.devices import REPORTED
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.partition import ON_DEVICE, parse_partition
from cahfp_cli.reconstruction.rules import RULES
from cahfp_cli.significance.registry import find_criterion

Whole = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(gt=0, le=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, lt=1e30)]
MOST_CLASSES = 1_000_000
LONGEST_PROFILE = 65_536
"""Characters."""
BUDGETS = ("keep", "params", "macs")


class Data(Record):
    """Data specs as on the command line. public: a split that the server holds, for a start from it and for statistics
    of norms. train, classes: with the partition `on-device` there is no `train`, and `classes` is the number of classes
    of all clients together, which no single client may know."""

    train: str | None = None
    test: str
    public: str | None = None
    classes: Annotated[int, Field(strict=True, ge=2, le=MOST_CLASSES)] | None = None


class DeviceEntry(Record):
    """`count` devices alike: of a profile (with the budget in it), or with a share of the full network's channels
    (`keep`, in every layer), parameters or multiply-accumulates; shares given beside a profile replace its budget.

    profile: a name or a file, or `reported`: nodes of Flower say what they are. profile_text: what is in such a file.
    """

    count: Whole
    profile: str | None = None
    profile_text: Annotated[str, Field(max_length=LONGEST_PROFILE)] | None = None
    keep: Share | None = None
    params: Share | None = None
    macs: Share | None = None

    @model_validator(mode="after")
    def _says_how_large(self) -> "DeviceEntry":
        if self.profile is not None and self.profile_text is not None:
            raise ValueError("gives profile and profile_text: one of them is enough")
        if self.profile is None and self.profile_text is None and all(getattr(self, name) is None for name in BUDGETS):
            raise ValueError("says not how large its devices' submodels are: give profile, keep, params or macs")
        return self


class Training(Record):
    """A client's own SGD in a round: `epochs` over its data, or exactly `steps` steps instead.

    balanced: whether what a client learns shall not depend on how often it has each class, see `TrainOptions`; in the
    local epoch after deployment it does. schedule: of the learning rate over the rounds, `lr` in all of them
    (constant), or falling from `lr` in the first to nearly nothing in the last (cosine).
    """

    epochs: Whole = 1
    steps: Whole | None = None
    batch_size: Annotated[int, Field(strict=True, ge=2, le=2**31 - 1)] = 32
    lr: LearningRate = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, lt=1e30)] = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"
    balanced: Annotated[bool, Field(strict=True)] = False


class SelectionTable(Record):
    """How scored masks are chosen and how they change.

    by: who chooses them: the server, from the scores that clients send, or each client, from its own scores, which then
    do not leave it. criterion: of CA-HFP. samples: of a client's own that it scores on. rescore_every: rounds that
    scores and masks stay. score_mix: of the server, 0 for a client's own scores, 1 for the mean over all clients.
    decay: what a new score leaves of the moving average. churn: share of a layer's kept groups that one new mask may
    exchange. nesting: how often a client trains only the part of its mask that the smallest device has.
    """

    by: Literal["server", "client"] = "server"
    criterion: str = "gate-ggn"
    samples: Whole = 64
    rescore_every: Whole = 5
    score_mix: UnitInterval = 1.0
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    churn: UnitInterval = 0.1
    nesting: UnitInterval = 0.5


class Start(Record):
    """Where training starts: `checkpoint`, or from scratch; then `public_epochs` passes over the public split."""

    checkpoint: str | None = None
    public_epochs: Natural = 0
    lr: LearningRate = 0.05

    @property
    def cold(self) -> bool:
        """Whether training begins with random weights."""
        return self.checkpoint is None and self.public_epochs == 0


class Evaluation(Record):
    """When and on what to measure. every: rounds between evaluations (the last round always has one). samples: of each
    client in the phase that returns statistics of norms alone, if there is no public split. tuning_lr: of the local
    epoch after deployment, `train.lr` if it is not given. bound_terms: measure the terms of the convergence bound in
    every round, see bound.py."""

    every: Whole = 5
    tuning_lr: LearningRate | None = None
    samples: Annotated[int, Field(strict=True, ge=2, le=2**31 - 1)] = 64
    bound_terms: Annotated[bool, Field(strict=True)] = False


class Experiment(Record):
    """A whole experiment: every method runs on every partition with every seed, on equal terms."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+([-_.][a-z0-9]+)*$")] = "experiment"
    model: ModelSpec
    data: Data
    partitions: Annotated[tuple[str, ...], Field(min_length=1)]
    fleet: Annotated[tuple[DeviceEntry, ...], Field(min_length=1)]
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    rule: str = "fill"
    rounds: Whole
    clients_per_round: Whole
    quorum: Whole = 1
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    train: Training = Training()
    selection: SelectionTable = SelectionTable()
    start: Start = Start()
    evaluation: Evaluation = Evaluation()

    @property
    def clients(self) -> int:
        """One a device."""
        return sum(entry.count for entry in self.fleet)

    @property
    def reported(self) -> bool:
        """Whether nodes say what devices they are."""
        return any(entry.profile == REPORTED for entry in self.fleet)

    def with_reports(self, profiles: Mapping[int, str]) -> "Experiment":
        """With the devices that nodes said they are.

        Args: profiles: text of a profile, by client.
        Raises: InputError: a client whose device should be reported is not among them.
        """
        fleet: list[DeviceEntry] = []
        for entry in self.fleet:
            if entry.profile != REPORTED:
                fleet.append(entry)
                continue
            first = sum(one.count for one in fleet)
            for client in range(first, first + entry.count):
                if client not in profiles:
                    raise InputError(f"client {client} has not reported the profile of its device.")
                own = {"count": 1, "profile": None, "profile_text": profiles[client]}
                fleet.append(entry.model_copy(update=own))
        return self.model_copy(update={"fleet": tuple(fleet)})

    @property
    def on_device(self) -> bool:
        """Whether the clients alone have the training data."""
        return ON_DEVICE in self.partitions

    @field_validator("partitions")
    @classmethod
    def _partitions_are_known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for text in given:
            parse_partition(text)
        return _without_repetition(given)

    @field_validator("methods")
    @classmethod
    def _methods_are_known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            _check_known(name, tuple(METHODS))
        return _without_repetition(given)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        return _without_repetition(given)

    @field_validator("rule")
    @classmethod
    def _rule_is_known(cls, name: str) -> str:
        _check_known(name, tuple(RULES))
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        if self.clients_per_round > self.clients:
            raise ValueError(f"clients_per_round is {self.clients_per_round}, but the fleet has {self.clients} devices")
        if self.quorum > self.clients_per_round:
            raise ValueError(f"quorum is {self.quorum}, more than the {self.clients_per_round} clients_per_round")
        if self.start.public_epochs and self.data.public is None:
            raise ValueError("start.public_epochs needs data.public, the split to train on")
        self._check_selection()
        self._check_data()
        return self

    def _check_selection(self) -> None:
        table, default = self.selection, SelectionTable()
        try:
            criterion = find_criterion(table.criterion)
        except UsageError as error:
            raise ValueError(f"selection.criterion: {error}") from None
        if table.by == "server":
            if criterion.signed:
                raise ValueError(
                    f"selection.criterion {criterion.name!r} may be negative, and scores that are sent must not: "
                    "take another, or by = 'client'"
                )
            return
        for key in ("score_mix", "decay"):
            if getattr(table, key) != getattr(default, key):
                raise ValueError(
                    f"selection.{key} is of scores that clients send, and with by = 'client' they send none"
                )
        if "cahfp-own" in self.methods:
            raise ValueError("with selection.by = 'client' every client goes by its own scores: leave out cahfp-own")

    def _check_data(self) -> None:
        if not self.on_device:
            if self.data.train is None:
                raise ValueError("'data.train' is missing: only clients of the partition on-device have their own data")
            if self.data.classes is not None:
                raise ValueError("data.classes belongs to the partition on-device; else data.train shows them")
            return
        if len(self.partitions) > 1:
            raise ValueError("the partition on-device goes with no other")
        if self.data.train is not None:
            raise ValueError(
                "with the partition on-device each node names its own data, so data.train must be left out"
            )
        if self.data.public is None or self.data.classes is None:
            raise ValueError("the partition on-device needs data.public, for statistics of norms, and data.classes")
        if self.evaluation.bound_terms:
            raise ValueError("evaluation.bound_terms needs all training data, which the partition on-device has not")


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file.

    Raises: InputError: it cannot be read, is not TOML, or breaks the schema; the file and the key are named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:  # also of integers with too many digits
        raise InputError(f"{path}: not valid TOML: {error}") from None
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


def _check_known(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"there is no {name!r}; choose from {', '.join(known)}")


def _without_repetition(given: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(given)) < len(given):
        raise ValueError("something is named twice")
    return given


def _explain(error: ValidationError) -> str:
    """The first problem in a sentence; unknown keys go first, since a missing key is often the shadow of one."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _sentence(problems[0]) + more


def _sentence(problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys here are {', '.join(known)}"
        return f"unknown key '{key}': {hint}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = re.sub(r"^(Value error, |Input )", "", problem["msg"])
    return f"'{key}': {message}" if key else message


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at a place of the schema."""
    record: type[BaseModel] = Experiment
    for part in location:
        if isinstance(part, str):
            record = _record_in(record.model_fields[part].annotation) or record
    return list(record.model_fields)


def _record_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((record for part in get_args(annotation) if (record := _record_in(part)) is not None), None)
