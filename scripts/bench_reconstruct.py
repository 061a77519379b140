"""`cahfp reconstruct` against the floor, loading everything with torch, and mergekit: CPU time and memory.

One run makes random files in a temporary folder: a global checkpoint (blocks of a transformer, a stack of convolutions
with batch norm) and eight clients that keep a random half of the channels of each width, so that rows and columns are
gathered. Then the candidates take turns, each time in a fresh process, and the median counts:

    raw             reads global and clients and writes as many bytes as the output has, in blocks of 1 MB: the floor
    ours            `merge.reconstruct`, with the allocator set as by the command
    ours, 2 threads the same with `threads=2`
    ours, command   `cahfp reconstruct`, start and imports included, and its whole memory
    torch           safetensors.torch.load_file of everything, index_select and index_add in float32, save_file
    sha256          hashing the bytes of global, clients and output once each, from memory: a part of `ours`

CPU is user + system time of the work after imports, on one thread unless said otherwise; RSS is the highest resident
memory during the work beyond what was resident before it. Only bytes in the page cache are read: the files were just
written.

Then, with smaller files, 64 clients against 8 of the same size (8 distinct ones, hard links for the rest) and against a
single client that keeps one channel of each width. The last one is what the global checkpoint itself costs, which has
to be read and written however few clients there are; `clients_ratio` is 64:8 of what is beyond it and has the bar,
`whole_ratio` is that of the whole times, which must be below it.

At last mergekit's linear merge as a peer, which only merges models of full width: the same llama-like files, all
channels kept. It needs an environment of its own:

    python -m venv mergekit-env && cd mergekit-env
    bin/pip install torch==2.13.0 'tqdm<5' 'click<9' 'safetensors<1' 'pydantic<3' immutables huggingface_hub \\
        tokenizers sentencepiece protobuf numpy psutil pyyaml packaging requests regex
    bin/pip install --no-deps mergekit==0.1.5 'transformers>=5,<6' accelerate peft scipy

    python scripts/bench_reconstruct.py [--quick] [--mergekit mergekit-env/bin/python]

--quick has smaller files and three turns instead of five. The full run needs 12 GB of disk where temporary files go.
The last line is JSON: each figure, its bar (none: it is only reported), and `holds`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each candidate runs in a process that has only what it needs, one of them in an environment without this package: what
# is beyond the standard library is imported where it is used.

BLOCK = 1 << 20
MB = 1e6
TENSORS, INDEX_MAP, MODEL = "submodel.safetensors", "index_map.safetensors", "model.safetensors"
RAW_BAR, TORCH_BAR, RSS_BAR, SCALE_BARS = 6.0, 4.0, 1.5, (7.0, 9.0)

Axis = tuple[str, int]
"""Family of widths ("" for an axis that is never cut) and length."""
Layout = dict[str, tuple[Axis, ...]]


@dataclass(frozen=True)
class Size:
    """How much to do. main, scale, peer: kind of network and its width; models: merged at full width."""

    main: tuple[str, int]
    scale: tuple[str, int]
    peer: tuple[str, int]
    models: int
    runs: int


FULL = Size(("mixed", 2048), ("mixed", 1024), ("llama", 1024), 8, 5)
QUICK = Size(("mixed", 1024), ("mixed", 512), ("llama", 512), 4, 3)


# ----------------------------------------------------------------------------------------------------------- networks


def mixed(width: int) -> Layout:
    """Two transformer blocks, a square mixer, and six convolutions with batch norm; 516 MB of float32 at 2048."""
    hidden = ("hidden", width)
    layout: Layout = {
        "embed.weight": (("", 4 * width), hidden),
        "mixer.weight": (("mixed", 2 * width), ("", 2 * width)),
    }
    for block in range(2):
        inner, wide = (f"attention{block}", width), (f"mlp{block}", 2 * width)
        for name in "qkv":
            layout[f"blocks.{block}.{name}.weight"] = (inner, hidden)
        layout[f"blocks.{block}.o.weight"] = (hidden, inner)
        layout[f"blocks.{block}.up.weight"], layout[f"blocks.{block}.up.bias"] = (wide, hidden), (wide,)
        layout[f"blocks.{block}.down.weight"], layout[f"blocks.{block}.down.bias"] = (hidden, wide), (hidden,)
        layout[f"blocks.{block}.norm.weight"] = (hidden,)
    before: Axis = ("", 3)
    for stage, share in enumerate((4, 4, 4, 2, 2, 2)):
        after = (f"stage{stage}", width // share)
        layout[f"stages.{stage}.conv.weight"] = (after, before, ("", 3), ("", 3))
        for name in ("weight", "bias", "running_mean", "running_var"):
            layout[f"stages.{stage}.bn.{name}"] = (after,)
        layout[f"stages.{stage}.bn.num_batches_tracked"] = ()
        before = after
    return layout


def llama(width: int) -> Layout:
    """The tensors of a llama, by the names that mergekit expects; 505 MB of float32 at 1024."""
    hidden, layers = ("hidden", width), llama_config(width)["num_hidden_layers"]
    vocabulary = ("", llama_config(width)["vocab_size"])
    layout: Layout = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    layout["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        prefix, inner, wide = f"model.layers.{layer}", (f"attention{layer}", width), (f"mlp{layer}", 3 * width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            layout[f"{prefix}.{name}.weight"] = (hidden,)
        for name in "qkv":
            layout[f"{prefix}.self_attn.{name}_proj.weight"] = (inner, hidden)
        layout[f"{prefix}.self_attn.o_proj.weight"] = (hidden, inner)
        layout[f"{prefix}.mlp.gate_proj.weight"] = layout[f"{prefix}.mlp.up_proj.weight"] = (wide, hidden)
        layout[f"{prefix}.mlp.down_proj.weight"] = (hidden, wide)
    return layout


def llama_config(width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 7,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 16 * width,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


LAYOUTS: Mapping[str, Callable[[int], Layout]] = {"mixed": mixed, "llama": llama}


# -------------------------------------------------------------------------------------------------------------- tasks
# What runs in processes of its own. Each imports first and returns the work to be measured.


def task_make(folder: str, kind: str, width: int, clients: int, keep: float) -> Callable[[], None]:
    """Write global.safetensors and the submodel folders 0, 1, ...; keep: share of each width, 0 for one channel."""
    import numpy as np

    from cahfp_cli.checkpoint.digest import arrays_digest
    from cahfp_cli.checkpoint.dtypes import dtype_code
    from cahfp_cli.checkpoint.metadata import (
        CheckpointMetadata,
        ModelSpec,
        Provenance,
        SubmodelMetadata,
        dump_metadata,
    )
    from cahfp_cli.checkpoint.writer import save_arrays
    from cahfp_cli.formats.gathering import gather
    from cahfp_cli.formats.index_map import IndexMap, TensorMap
    from cahfp_cli.formats.index_map_file import write_index_map

    layout = LAYOUTS[kind](width)
    provenance = Provenance(tool="bench", command="bench_reconstruct")
    model = ModelSpec(spec="bench:network")
    random = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        last = name.rpartition(".")[2]
        if last == "num_batches_tracked":
            return np.asarray(random.integers(1, 1000), np.int64)
        drawn = random.standard_normal(shape, dtype=np.float32)
        return np.abs(drawn) + np.float32(0.1) if last == "running_var" else drawn

    def surviving(length: int) -> np.ndarray:
        count = max(1, round(keep * length))
        return np.sort(random.choice(length, count, replace=False)).astype(np.int32)

    def work() -> None:
        tensors = {name: values(name, tuple(length for _, length in axes)) for name, axes in layout.items()}
        save_arrays(
            Path(folder, "global.safetensors"), tensors, dump_metadata(CheckpointMetadata(provenance=provenance))
        )
        digest = arrays_digest(tensors)
        widths = {family: length for axes in layout.values() for family, length in axes if family}
        for number in range(clients):
            kept = {family: surviving(length) if keep < 1 else None for family, length in widths.items()}
            maps = {
                name: TensorMap(
                    tensors[name].shape,
                    dtype_code(tensors[name].dtype),
                    tuple(kept[family] if family else None for family, _ in axes),
                )
                for name, axes in layout.items()
            }
            submodel = {}
            for name, entry in maps.items():
                submodel[name] = gather(tensors[name], entry)
                if entry.dtype == "F32":
                    submodel[name] *= 1 + 0.1 * random.random(submodel[name].shape, dtype=np.float32)
            target = Path(folder, str(number))
            target.mkdir()
            write_index_map(target / INDEX_MAP, IndexMap(digest, maps), provenance)
            record = SubmodelMetadata(
                model=model,
                input_shape=(3, 32, 32),
                classes=10,
                checkpoint=digest,
                num_examples=100 + 10 * number,
                provenance=provenance,
            )
            save_arrays(target / TENSORS, submodel, dump_metadata(record))
            if kind == "llama":
                (target / MODEL).hardlink_to(target / TENSORS)
                (target / "config.json").write_text(json.dumps(llama_config(width)))

    return work


def task_raw(checkpoint: str, folders: list[str], output: str) -> Callable[[], None]:
    def copy(source: str, target: int | None) -> None:
        handle = os.open(source, os.O_RDONLY)
        while block := os.read(handle, BLOCK):
            if target is not None:
                os.write(target, block)
        os.close(handle)

    def work() -> None:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        copy(checkpoint, target)
        os.close(target)
        for folder in folders:
            copy(os.path.join(folder, TENSORS), None)  # noqa: PTH118

    return work


def task_ours(checkpoint: str, folders: list[str], output: str, threads: int = 1) -> Callable[[], None]:
    from cahfp_cli.checkpoint.metadata import Provenance
    from cahfp_cli.reconstruction.allocator import keep_freed_memory
    from cahfp_cli.reconstruction.merge import reconstruct

    keep_freed_memory()
    provenance = Provenance(tool="bench", command="reconstruct")

    def work() -> None:
        paths = [Path(folder) for folder in folders]
        reconstruct(
            Path(checkpoint), paths, Path(output), rule="fill", threads=threads, force=True, provenance=provenance
        )

    return work


def task_torch(checkpoint: str, folders: list[str], output: str) -> Callable[[], None]:
    """The rule `fill` as one writes it with everything in memory; running variances are averaged like weights."""
    import torch
    from safetensors.torch import load_file, save_file

    from cahfp_cli.checkpoint.metadata import SubmodelMetadata, read_metadata
    from cahfp_cli.checkpoint.safetensors_file import open_safetensors
    from cahfp_cli.formats.index_map_file import read_index_map

    torch.set_num_threads(1)

    def work() -> None:
        merged = load_file(checkpoint)
        previous = {name: tensor.clone() for name, tensor in merged.items()}
        clients = []
        for folder in folders:
            with open_safetensors(Path(folder, TENSORS)) as file:
                examples = read_metadata(file, SubmodelMetadata).num_examples or 1
            clients.append((examples, read_index_map(Path(folder, INDEX_MAP)), load_file(Path(folder, TENSORS))))
        total = sum(examples for examples, _, _ in clients)
        for examples, index_map, submodel in clients:
            for name, tensor in submodel.items():
                if not tensor.is_floating_point():
                    merged[name] = torch.maximum(merged[name], tensor)
                    continue
                chosen = [
                    None if axis is None else torch.from_numpy(axis).long() for axis in index_map.tensors[name].axes
                ]
                old = previous[name]
                for axis, indices in enumerate(chosen):
                    old = old if indices is None else old.index_select(axis, indices)
                update = (tensor - old) * (examples / total)
                for axis in range(1, len(chosen)):
                    if (indices := chosen[axis]) is not None:
                        wide = update.new_zeros(
                            [*update.shape[:axis], previous[name].shape[axis], *update.shape[axis + 1 :]]
                        )
                        update = wide.index_copy_(axis, indices, update)
                if chosen[0] is None:
                    merged[name] += update
                else:
                    merged[name].index_add_(0, chosen[0], update)
        save_file(merged, output)

    return work


def task_sha256(checkpoint: str, folders: list[str], output: str) -> Callable[[], None]:
    import hashlib

    size = 2 * Path(checkpoint).stat().st_size + sum(Path(folder, TENSORS).stat().st_size for folder in folders)
    block = os.urandom(BLOCK)

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(size // BLOCK):
            digest.update(block)

    return work


def task_mergekit(checkpoint: str, folders: list[str], output: str) -> Callable[[], None]:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    torch.set_num_threads(1)
    weights = [100 + 10 * int(Path(folder).name) for folder in folders]
    models = [
        {"model": folder, "parameters": {"weight": weight}} for folder, weight in zip(folders, weights, strict=True)
    ]
    config = {"merge_method": "linear", "dtype": "float32", "models": models}
    configuration = MergeConfiguration.model_validate(config)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, device="cpu")

    def work() -> None:
        run_merge(configuration, output, options)

    return work


TASKS: Mapping[str, Callable[..., Callable[[], None]]] = {
    "make": task_make,
    "raw": task_raw,
    "ours": task_ours,
    "torch": task_torch,
    "sha256": task_sha256,
    "mergekit": task_mergekit,
}


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Spent:
    """cpu, wall: seconds; rss: bytes."""

    cpu: float
    wall: float
    rss: float


def resident(field: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM for the highest so far. `ru_maxrss` would count what the parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {field}")


def run_task(name: str, arguments: list[Any]) -> None:
    """In the child: import, forget the highest memory of the imports, work, print what it took."""
    work = TASKS[name](*arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    rss = resident("VmRSS")
    work()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([cpu, wall, max(0, resident("VmHWM") - rss)]))


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measured(task: str, *arguments: Any, python: str = sys.executable) -> Spent:
    """Run a task in a fresh process. Raises: SystemExit: it failed, so nothing can be measured."""
    command = [python, str(Path(__file__).resolve()), "--task", json.dumps([task, arguments])]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        sys.exit(f"{task} failed with exit code {done.returncode}:\n{done.stderr}")
    return Spent(*json.loads(done.stdout.splitlines()[-1]))


def measured_command(checkpoint: str, folders: list[str], output: str) -> Spent:
    """The installed command as a whole."""
    cahfp = str(Path(sys.executable).with_name("cahfp"))
    command = [cahfp, "reconstruct", checkpoint, *folders, "-o", output, "--force", "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"cahfp reconstruct failed with exit code {process.returncode}")
    return Spent(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024)


def in_turns(candidates: Mapping[str, Callable[[], Spent]], runs: int) -> dict[str, Spent]:
    """Medians of each."""
    spent: dict[str, list[Spent]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, candidate in candidates.items():
            spent[name].append(candidate())
    return {
        name: Spent(*(statistics.median(getattr(one, field) for one in found) for field in ("cpu", "wall", "rss")))
        for name, found in spent.items()
    }


def show(title: str, spent: Mapping[str, Spent], base: str) -> None:
    from cahfp_cli.output import table

    rows = [
        [name, f"{it.cpu:.2f}", f"{it.cpu / spent[base].cpu:.2f}", f"{it.wall:.2f}", f"{it.rss / MB:.1f}"]
        for name, it in spent.items()
    ]
    print(f"\n{title}\n")
    print(table(("candidate", "CPU s", f"of {base}", "wall s", "RSS MB"), rows), flush=True)


def megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / MB


# -------------------------------------------------------------------------------------------------------------- parts

Figures = dict[str, dict[str, Any]]


def figure(figures: Figures, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
    bounds = [f"{sign} {bar:g}" for sign, bar in ((">=", least), ("<=", most)) if bar is not None]
    holds = (least is None or value >= least) and (most is None or value <= most)
    figures[name] = {"value": round(value, 3), "bar": " and ".join(bounds) or None, "holds": holds if bounds else None}


def made(folder: Path, network: tuple[str, int], clients: int, keep: float) -> tuple[str, list[str]]:
    """Global checkpoint and submodel folders."""
    folder.mkdir()
    measured("make", str(folder), *network, clients, keep)
    return str(folder / "global.safetensors"), [str(folder / str(number)) for number in range(clients)]


def check_equal(left: Path, right: Path) -> None:
    """Two ways to the same numbers must lead there, or their times mean nothing. Running variances differ by design."""
    import numpy as np

    from cahfp_cli.checkpoint.digest import row_blocks
    from cahfp_cli.checkpoint.safetensors_file import open_safetensors

    with open_safetensors(left) as ours, open_safetensors(right) as theirs:
        for name, info in ours.tensors.items():
            if name.endswith(("running_var", "num_batches_tracked")):
                continue
            for rows in row_blocks(info):
                if not np.allclose(ours.read_rows(name, *rows), theirs.read_rows(name, *rows), rtol=1e-4, atol=1e-5):
                    sys.exit(f"{name}: ours and theirs differ, so that their times cannot be compared")


def half_width(folder: Path, size: Size, figures: Figures) -> None:
    checkpoint, folders = made(folder, size.main, 8, 0.5)
    outputs = {name: str(folder / f"{name}.out") for name in ("raw", "ours", "command", "torch", "sha256")}
    candidates: dict[str, Callable[[], Spent]] = {
        name: lambda name=name: measured(name, checkpoint, folders, outputs[name])  # type: ignore[misc]
        for name in ("raw", "ours", "torch", "sha256")
    }
    candidates["ours, 2 threads"] = lambda: measured("ours", checkpoint, folders, outputs["ours"], 2)
    candidates["ours, command"] = lambda: measured_command(checkpoint, folders, outputs["command"])
    spent = in_turns(candidates, size.runs)
    check_equal(Path(outputs["ours"]), Path(outputs["torch"]))
    of_clients = megabytes([Path(client, TENSORS) for client in folders])
    show(f"8 half-width clients, {of_clients:.0f} MB, into {megabytes([Path(checkpoint)]):.0f} MB", spent, "raw")
    largest = largest_tensor(Path(checkpoint))
    print(f"largest tensor: {largest / MB:.1f} MB; sha256 is {spent['sha256'].cpu / spent['ours'].cpu:.0%} of ours")
    figure(figures, "global_mb", megabytes([Path(checkpoint)]))
    figure(figures, "ours_cpu_seconds", spent["ours"].cpu)
    figure(figures, "cpu_of_raw", spent["ours"].cpu / spent["raw"].cpu, most=RAW_BAR)
    figure(figures, "cpu_of_raw_without_sha256", (spent["ours"].cpu - spent["sha256"].cpu) / spent["raw"].cpu)
    figure(figures, "torch_cpu_of_ours", spent["torch"].cpu / spent["ours"].cpu, least=TORCH_BAR)
    figure(figures, "rss_growth_of_largest_tensor", spent["ours"].rss / largest, most=RSS_BAR)
    figure(figures, "two_threads_wall_of_one", spent["ours, 2 threads"].wall / spent["ours"].wall)
    figure(figures, "torch_rss_of_ours", spent["torch"].rss / spent["ours"].rss)


def largest_tensor(path: Path) -> int:
    from cahfp_cli.checkpoint.safetensors_file import open_safetensors

    with open_safetensors(path) as file:
        return max(info.nbytes for info in file.tensors.values())


def scaling(folder: Path, size: Size, figures: Figures) -> None:
    checkpoint, folders = made(folder, size.scale, 8, 0.5)
    _, single = made(folder / "single", size.scale, 1, 0.0)  # same seed, so the same global checkpoint
    copies = []
    for number in range(8, 64):
        copy, source = folder / str(number), Path(folders[number % 8])
        copy.mkdir()
        for name in (TENSORS, INDEX_MAP):
            (copy / name).hardlink_to(source / name)
        copies.append(str(copy))
    output = str(folder / "out.safetensors")
    candidates = {
        "1 of one channel": lambda: measured("ours", checkpoint, single, output),
        "8 clients": lambda: measured("ours", checkpoint, folders, output),
        "64 clients": lambda: measured("ours", checkpoint, [*folders, *copies], output),
    }
    spent = in_turns(candidates, size.runs)
    each = megabytes([Path(folders[0], TENSORS)])
    show(f"half-width clients of {each:.0f} MB into {megabytes([Path(checkpoint)]):.0f} MB", spent, "8 clients")
    constant, eight, many = (it.cpu for it in spent.values())
    figure(figures, "clients_ratio_64_to_8", (many - constant) / (eight - constant), *SCALE_BARS)
    figure(figures, "whole_ratio_64_to_8", many / eight, most=SCALE_BARS[1])
    figure(figures, "rss_64_of_8", spent["64 clients"].rss / spent["8 clients"].rss)


def peer(folder: Path, size: Size, python: str | None, figures: Figures) -> None:
    if python is None:
        print("\nmergekit: not measured; name its environment's interpreter with --mergekit")
        figures["mergekit_cpu_of_ours"] = {"value": None, "bar": None, "holds": None}
        return
    checkpoint, folders = made(folder, size.peer, size.models, 1.0)
    outputs = {"ours": str(folder / "ours.out"), "mergekit": str(folder / "merged")}
    candidates = {
        "ours": lambda: measured("ours", checkpoint, folders, outputs["ours"]),
        "mergekit": lambda: measured("mergekit", checkpoint, folders, outputs["mergekit"], python=python),
    }
    spent = in_turns(candidates, size.runs)
    results = list(Path(outputs["mergekit"]).glob("*.safetensors"))
    if len(results) == 1:
        check_equal(Path(outputs["ours"]), results[0])
    show(f"{size.models} llama-like models of {megabytes([Path(checkpoint)]):.0f} MB at full width", spent, "ours")
    figure(figures, "mergekit_cpu_of_ours", spent["mergekit"].cpu / spent["ours"].cpu)
    figure(figures, "mergekit_wall_of_ours", spent["mergekit"].wall / spent["ours"].wall)
    figure(figures, "mergekit_rss_of_ours", spent["mergekit"].rss / spent["ours"].rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller files, three turns; under four minutes")
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter of an environment that has mergekit")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        name, arguments = json.loads(options.task)
        run_task(name, arguments)
        return
    size = QUICK if options.quick else FULL
    figures: Figures = {}
    for part in (half_width, scaling):
        with tempfile.TemporaryDirectory() as folder:
            part(Path(folder, "work"), size, figures)
    with tempfile.TemporaryDirectory() as folder:
        peer(Path(folder, "work"), size, options.mergekit, figures)
    holds = all(found["holds"] is not False for found in figures.values())
    print(json.dumps({"quick": options.quick, **figures, "holds": holds}))


if __name__ == "__main__":
    main()
