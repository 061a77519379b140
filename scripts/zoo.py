"""Every command over a zoo of architectures: what runs, what comes out of it, and what is refused and why.

Each network runs in a process of its own, with a limit on time and memory, from a checkpoint of random weights:

    coupling      a random 45% of each family's channels goes; equality with the full network whose removed entries are
                  zero, where that must hold; a training step; gather and scatter
    score         `cahfp score` as it comes, on a few samples
    prune         calibrated, to 60% of the MACs; the folder's tensors against what NumPy gathers from the checkpoint
    onnx          the file that prune wrote, with its parity
    load          `cahfp evaluate` of the folder, and the same loss from the ONNX file
    train         one step on the folder
    reconstruct   merges the trained folder; and the untrained one, which must give the checkpoint back bit by bit

    python scripts/zoo.py [torchvision] [timm] [transformers] [--quick] [--only NAME] [--shard 1/4] -o results.jsonl
    python scripts/zoo.py --table docs/results/zoo.md -o results.jsonl      writes the table of what is in the file

The results file gets one JSON line a network; networks that it has for this commit are not run again without --again.
Needs torchvision, timm and transformers (`pip install 'cahfp[vision]'`). The last line printed is JSON: of each library
the share of networks that each command took, the bar beside it, and `holds`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from forked import Limits, each  # noqa: E402
from zoo_networks import CLASSES, END, LIBRARIES, QUICK, TOKENS, Subject, names_of, randomise, subject_of  # noqa: E402

STAGES = ("coupling", "score", "prune", "onnx", "load", "train", "reconstruct")
BARS = {"torchvision": 1.0, "timm": 0.97, "transformers": 0.9}
"""The least share of networks that every command takes."""
REMOVED = 0.45
SAMPLES = 4
EXACT, CLOSE = 1e-5, 1e-3
QUIET = ("--threads", "1", "--quiet")
Record = dict[str, Any]


class FailedError(Exception):
    """A stage did not do what it must; the reason, for the table."""


@dataclass(frozen=True)
class Bench:
    """One network's files: the checkpoint, data of `SAMPLES` samples to measure on and as many held out."""

    folder: Path
    subject: Subject
    model: Any
    onnx: bool

    @property
    def checkpoint(self) -> Path:
        return self.folder / "global.safetensors"

    @property
    def data(self) -> str:
        return f"npz:{self.folder / 'data.npz'}"

    def samples(self, count: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(1)
        if self.subject.tokens:
            tokens = torch.randint(3, TOKENS, (count, *self.subject.shape), generator=generator)
            tokens[:, -1] = END  # where sentences end, which T5 looks for
            return tokens
        return torch.rand(count, *self.subject.shape, generator=generator)

    def write(self) -> None:
        import numpy as np
        from safetensors.torch import save_file

        save_file({n: t.detach().clone().contiguous() for n, t in self.model.state_dict().items()}, self.checkpoint)
        labels = np.arange(2 * SAMPLES) % CLASSES
        np.savez(self.folder / "data.npz", x=self.samples(2 * SAMPLES).numpy(), y=labels, classes=np.int64(CLASSES))


def well(*arguments: object) -> Record:
    """What a command that must succeed printed with --json. Raises: FailedError: it did not; its code and message."""
    from tests.support.commands import run_here

    said = run_here(*arguments, "--json", "--quiet")
    if said.code != 0:
        raise FailedError(f"exit {said.code}: {said.error[-400:]}")
    result: Record = said.json
    return result


# --- what is done with one network ----------------------------------------------------------------------------------


def couple(bench: Bench) -> Record:
    """Groups, a random cut, and what it must be equal to; by the library, since no command shows it."""
    import copy

    import numpy as np
    import torch

    from cahfp_cli.coupling.adapters import adapt
    from cahfp_cli.coupling.analysis import analyse, cut
    from cahfp_cli.models.outputs import logits_of
    from cahfp_cli.models.tensors import state_arrays
    from cahfp_cli.pruning.submodel import gather_all, make_index_map

    model = adapt(copy.deepcopy(bench.model)).eval()
    sample = bench.samples(2)
    analysis = analyse(model, bench.subject.shape, sample.dtype, sample)
    groups = analysis.groups
    parameters = dict(model.named_parameters())
    whole = sum(p.numel() for p in parameters.values())
    prunable = sum(p.numel() for n, p in parameters.items() if any((axis >= 0).any() for axis in groups.labels[n]))
    reasons: dict[str, int] = {}
    for (tensor, _), reason in groups.pinned.items():
        if tensor in parameters and all((axis < 0).all() for axis in groups.labels[tensor]):
            reasons[reason] = reasons.get(reason, 0) + parameters[tensor].numel()
    kept = random_mask(groups)
    compact, rewrites = cut(model, analysis, kept)
    arrays = state_arrays(model)
    small = state_arrays(compact)
    index_map = make_index_map(arrays, groups, kept, "0" * 64, rewrites)
    scatter = all(np.array_equal(small[n], a) for n, a in gather_all(arrays, index_map).items())
    exact = kept.copy()
    for family in groups.not_mask_equivalent:
        exact[groups.family == family] = True
    with torch.no_grad():
        expected = logits_of(masked(model, groups.indices(exact)).eval()(sample))
        found = logits_of(cut(model, analysis, exact)[0].eval()(sample))
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    logits_of(compact.train()(sample)).float().square().mean().backward()
    result = {
        "share": prunable / whole,
        "kept": sum(p.numel() for p in compact.parameters()) / whole,
        "masked": difference,
        "groups": groups.count,
        "rewrites": len(rewrites),
        "pinned": max(reasons, key=lambda r: reasons[r]) if reasons else "",
    }
    if not scatter:
        raise FailedError("gathering gives other tensors than cutting")
    if not difference <= EXACT:
        raise FailedError(f"differs from the masked network by {difference:.1e}")
    return result


def random_mask(groups: Any) -> Any:
    """Keeps 55% of each family's groups, but never fewer than its narrowest width."""
    import numpy as np

    random = np.random.default_rng(0)
    kept = np.ones(groups.count, dtype=bool)
    for family in range(len(groups.names)):
        members = np.flatnonzero(groups.family == family)
        removed = min(round(REMOVED * len(members)), len(members) - groups.narrowest[family])
        kept[random.choice(members, removed, replace=False)] = False
    return kept


def masked(model: Any, indices: Any) -> Any:
    """The full model with every entry that the slice drops set to zero (a variance of zero would divide by it)."""
    import torch

    from cahfp_cli.coupling.copying import copy_with

    def zeroed(name: str, tensor: Any) -> Any:
        tensor = tensor.clone()
        if name in indices and not name.endswith("running_var"):
            for axis, index in enumerate(indices[name]):
                if index is not None:
                    gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
                    gone[torch.from_numpy(index).long()] = False
                    tensor.index_fill_(axis, gone.nonzero()[:, 0], 0)
        return tensor

    return copy_with(model, zeroed)


def score(bench: Bench) -> Record:
    how = ("--samples", SAMPLES, "--held-out", SAMPLES, "-o", bench.folder / "scores.safetensors")
    said = well("score", bench.checkpoint, *opened(bench), "--data", bench.data, *how, *QUIET)
    return {"groups": said["groups"]}


def prune(bench: Bench) -> Record:
    """Calibrated; without the ONNX file where only that fails, which then is the stage `onnx`'s to tell."""
    from safetensors.torch import load_file

    from tests.support.independent import faults_of_map

    scores = bench.folder / "scores.safetensors"
    if not scores.exists():  # as `score` says itself; what comes after is tried all the same
        well("score", bench.checkpoint, *opened(bench), "--criterion", "l1", "-o", scores, *QUIET)
    folder = bench.folder / "sub"
    how = ("--scores", scores, "--calibration", bench.data, "--samples", SAMPLES, "--rounds", 1, "--macs", "0.6")
    command = ("prune", bench.checkpoint, *opened(bench), *how, *QUIET, "-o", folder)
    refusal = ""
    try:
        said = well(*command, *(() if bench.onnx else ("--no-onnx",)))
    except FailedError as failed:
        refusal = str(failed)
        said = well(*command, "--no-onnx")
    report = said["submodels"][0]
    faults = faults_of_map(load_file(bench.checkpoint), folder)
    if faults:
        raise FailedError("; ".join(faults[:3]))
    predicted, full = report["predicted"], report["full"]
    return {
        "params": predicted["params"] / full["params"],
        "divergence": (report.get("divergence") or {}).get("measured"),
        "parity": report.get("onnx", {}).get("parity"),
        "refusal": refusal,
    }


def load(bench: Bench) -> Record:
    """The folder's loss; the same from its ONNX file."""
    command = ("--data", bench.data, "--no-latency", "--threads", 1)
    said = well("evaluate", bench.folder / "sub", *command)
    exported = bench.folder / "sub" / "model.onnx"
    if exported.exists():
        other = well("evaluate", exported, *command)
        if not abs(said["loss"] - other["loss"]) <= CLOSE * max(1.0, abs(said["loss"])):
            raise FailedError(f"the loss is {said['loss']:.5g}, and {other['loss']:.5g} from the ONNX file")
    return {"loss": said["loss"]}


def train(bench: Bench) -> Record:
    step = ("--steps", 1, "--batch-size", SAMPLES, "--lr", "1e-4", "--no-onnx", *QUIET)
    said = well("train", bench.folder / "sub", "--data", bench.data, *step, "-o", bench.folder / "trained")
    return {"loss": said["training"]["loss"]}


def reconstruct(bench: Bench) -> Record:
    from safetensors.torch import load_file

    from tests.support.independent import differing

    whole = load_file(bench.checkpoint)
    same, merged = bench.folder / "same.safetensors", bench.folder / "merged.safetensors"
    well("reconstruct", bench.checkpoint, bench.folder / "sub", "-o", same)
    wrong = differing(whole, load_file(same))
    if wrong:
        raise FailedError(f"an untrained submodel changes {len(wrong)} tensors, {wrong[0]} among them")
    same.unlink()
    if not (bench.folder / "trained").exists():
        return {"changed": 0}
    well("reconstruct", bench.checkpoint, bench.folder / "trained", "-o", merged)
    changed = differing(whole, load_file(merged))
    if not changed:
        raise FailedError("a trained submodel changes nothing")
    return {"changed": len(changed)}


def opened(bench: Bench) -> list[str]:
    """How the foreign checkpoint is opened."""
    return [*bench.subject.options(), *(("--input-dtype", "int64") if bench.subject.tokens else ())]


DONE_IN_TURN: dict[str, Callable[[Bench], Record]] = {
    "coupling": couple,
    "score": score,
    "prune": prune,
    "load": load,
    "train": train,
    "reconstruct": reconstruct,
}
NEEDS = {"load": "sub", "train": "sub", "reconstruct": "sub"}


# --- processes ------------------------------------------------------------------------------------------------------


def work(named: tuple[str, str], folder: Path, onnx: bool) -> None:
    """All stages of one network, in a process of its own; each leaves a line in `folder`/stages.jsonl."""
    import torch

    library, name = named
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with (folder / "stages.jsonl").open("w") as log:

        def timed(stage: str, run: Callable[[], Record]) -> bool:
            log.write(json.dumps({"stage": stage, "begun": True}) + "\n")
            log.flush()
            before, found = time.process_time(), {}
            try:
                found = {"ok": True, **run()}
            except FailedError as failed:
                found = {"ok": False, "why": str(failed)}
            except Exception as error:
                text = (str(error).splitlines() or [""])[0]
                found = {"ok": False, "why": f"{type(error).__name__}: {text[:200]}"}
            found |= {"cpu": round(time.process_time() - before, 2)}
            log.write(json.dumps({"stage": stage, **found}) + "\n")
            log.flush()
            return bool(found["ok"])

        made: list[Bench] = []

        def setup() -> Record:
            subject, model = subject_of(library, name, folder)
            randomise(model, 0)
            made.append(Bench(folder, subject, model.eval(), onnx))
            made[0].write()
            numbers = sum(p.numel() for p in model.parameters())
            return {"spec": subject.spec, "args": subject.args, "shape": subject.shape, "parameters": numbers}

        if timed("setup", setup):
            for stage, run in DONE_IN_TURN.items():
                if stage not in NEEDS or (folder / NEEDS[stage] / "report.json").exists():
                    timed(stage, lambda run=run: run(made[0]))  # type: ignore[misc]
                if stage == "coupling":
                    made[0] = replace(made[0], model=None)  # commands have their own
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.write(json.dumps({"stage": "end", "peak_mb": peak // 1024}) + "\n")


def gathered(library: str, name: str, folder: Path, ending: str, onnx: bool) -> Record:
    """One network's record from the lines that its process left; `ending` says why there may be too few."""
    stages: dict[str, Record] = {}
    lines = (folder / "stages.jsonl").read_text().splitlines() if (folder / "stages.jsonl").exists() else []
    for line in lines:
        entry = json.loads(line)
        stages[entry.pop("stage")] = entry
    for entry in stages.values():
        if entry.pop("begun", False):
            entry |= {"ok": False, "why": ending or "the process ended"}
    setup, end = stages.pop("setup", {"ok": False, "why": ending}), stages.pop("end", {})
    prune = stages.get("prune", {})
    parity, refusal = prune.pop("parity", None), prune.pop("refusal", "")
    if prune.get("ok") and onnx:
        stages["onnx"] = {"ok": parity is not None, "parity": parity, **({"why": refusal} if refusal else {})}
    cpu = round(sum(entry.get("cpu", 0.0) for entry in (setup, *stages.values())), 1)
    left_out = [] if onnx else ["onnx"]
    return {"library": library, "name": name, "cpu": cpu, **end, "setup": setup, "stages": stages, "left_out": left_out}


def preload(libraries: list[str]) -> None:
    """Import what every process would import; none of it starts threads."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    import importlib

    names = ["torch", "torch._dynamo", "torch.export", "torch.onnx", "onnx", "onnxscript", "onnxruntime", "scipy.stats"]
    for name in [*names, "safetensors.torch", "cahfp_cli.app", *libraries]:
        importlib.import_module(name)


# --- results --------------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit that is tried, with a mark where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def read_results(path: Path) -> list[Record]:
    """The last record of every network."""
    latest: dict[tuple[str, str], Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        latest[record["library"], record["name"]] = {"left_out": [], **record}
    order = {library: number for number, library in enumerate(LIBRARIES)}
    return sorted(latest.values(), key=lambda r: (order[r["library"]], r["name"]))


def took(record: Record, stage: str) -> bool:
    return bool(record["stages"].get(stage, {}).get("ok"))


def row(record: Record) -> list[str]:
    """A table's row: a column a command, and the reasons of those that refused."""
    setup, stages = record["setup"], record["stages"]
    coupling = stages.get("coupling", {})
    reasons = [f"{stage}: {entry['why']}" for stage, entry in [("setup", setup), *stages.items()] if entry.get("why")]
    parity = stages.get("onnx", {}).get("parity")
    cells = [
        f"{record['library']}:{record['name']}",
        "x".join(map(str, setup.get("shape", []))),
        f"{setup['parameters'] / 1e6:.3g}M" if "parameters" in setup else "",
        f"{coupling['share']:.4g}" if "share" in coupling else "",
        f"{coupling['masked']:.0e}" if "masked" in coupling else "no",
    ]
    cells += [
        (f"{parity:.0e}" if stage == "onnx" and parity else "yes")
        if took(record, stage)
        else ("-" if stage in record["left_out"] else "no")
        for stage in STAGES[1:]
    ]
    pinned = coupling.get("pinned", "")
    return [*cells, f"{record['cpu']:.0f}", "; ".join(reasons).replace("|", "/").replace("\n", " ") or pinned]


def markdown(results: list[Record]) -> str:
    columns = ["network", "input", "numbers", "share", *STAGES, "CPU s", "refused, or the largest part kept whole"]
    lines = [columns, ["---"] * len(columns), *map(row, results)]
    counts = [["", *STAGES], ["---"] * (len(STAGES) + 1)]
    for library in LIBRARIES:
        own = [r for r in results if r["library"] == library]
        if own:
            tried = {
                stage: [took(record, stage) for record in own if stage not in record["left_out"]] for stage in STAGES
            }
            counts.append([library, *(f"{sum(found)} of {len(found)}" for found in tried.values())])
    commits = sorted({record["commit"] for record in results})

    def table(rows: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

    return (
        "# Zoo\n\nEvery command on every classifier of torchvision, one small variant of each family of timm and 14"
        " kinds of\ntransformers from configurations, with random weights. Made by `scripts/zoo.py`, which says what"
        f" each column\nchecks, on commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}.\n\n{table(counts)}\n\n"
        "`share`: of the parameters that can be pruned. `coupling`: the largest difference to the full network with the"
        "\nremoved entries zero, relative. `onnx`: the parity of the file; -: not\nwritten in that run.\n\n"
        f"{table(lines)}\n"
    )


def summary(results: list[Record]) -> Record:
    """Of each library the share of networks that each command took."""
    found: Record = {}
    for library in dict.fromkeys(record["library"] for record in results):
        own = [record for record in results if record["library"] == library]
        tried = {stage: [took(record, stage) for record in own if stage not in record["left_out"]] for stage in STAGES}
        shares = {stage: round(sum(found) / len(found), 4) for stage, found in tried.items() if found}
        found[library] = {
            "networks": len(own),
            **shares,
            "bar": BARS[library],
            "holds": min(shares.values()) >= BARS[library],
            "cpu_seconds": round(sum(record["cpu"] for record in own)),
        }
    return {**found, "holds": all(entry["holds"] for entry in found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[[], *LIBRARIES], help="all three without any")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results, one JSON line a network")
    parser.add_argument("--table", type=Path, help="write the table of all results there, and run nothing")
    parser.add_argument("--only", action="append", help="only networks whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a few small networks of each")
    parser.add_argument("--again", action="store_true", help="also those that the results have for this commit")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="a fifth of the time, and no such column")
    parser.add_argument("--shard", default="1/1", help="every n-th network: 2/3 is the second third")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--limit", type=float, default=900, help="seconds a network")
    parser.add_argument("--memory", type=float, default=10, help="GB a network")
    parser.add_argument("--folder", type=Path, help="where the networks' files are while they are tried")
    options = parser.parse_args()
    if options.table:
        options.table.write_text(markdown(read_results(options.output)))
        return
    tried = commit()
    there = {(r["library"], r["name"]) for r in read_results(options.output) if r["commit"] == tried}
    part, _, of = options.shard.partition("/")
    jobs = []
    for library in options.libraries or LIBRARIES:
        names = QUICK[library] if options.quick else names_of(library)
        wanted = [n for n in names if not options.only or any(word in n for word in options.only)]
        jobs += [(library, name) for name in wanted if options.again or (library, name) not in there]
    jobs = jobs[int(part) - 1 :: int(of)]
    print(f"{len(jobs)} networks on {tried}", file=sys.stderr)
    preload(sorted({library for library, _ in jobs}))
    limits = Limits(options.limit, options.memory, options.jobs, options.folder)
    for (library, name), folder, ending in each(jobs, partial(work, onnx=options.onnx), limits):
        record = {**gathered(library, name, folder, ending, options.onnx), "commit": tried}
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(" | ".join(row(record)), flush=True)
    print(json.dumps(summary([r for r in read_results(options.output) if r["commit"] == tried])))


if __name__ == "__main__":
    main()
