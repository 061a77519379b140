"""Coupling over a zoo of architectures: is every model pruned exactly, or pinned, and how much of it can be pruned?

Each model runs in a process of its own, with a time limit: random initialisation (batch-norm statistics and vectors
randomised too) -> trace and groups -> a random 45% of each family's channels removed -> evaluation and one training
step -> equality with the full model whose removed entries are zero (families where that must hold) -> gather and
scatter -> ONNX parity. Needs torchvision, timm and transformers (`pip install 'cahfp[vision]'`).

    python scripts/zoo.py [torchvision] [timm] [transformers] [--quick] [--only NAME] [-o docs/zoo.md]

How to read the table: `share` of the parameters that can be pruned; `kept` of them after this pruning; `masked` is
the largest difference to the masked full model, relative; `onnx` the same to the exported file; `trace` CPU seconds of
trace, solve and proof. The last line is JSON: each figure, the bar beside it, and `holds`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BARS = {
    "torchvision": {"ran": 1.0, "masked_exact": 1.0, "scatter_exact": 1.0, "share_0.99": 1.0, "onnx": 0.98},
    "timm": {"ran": 1.0, "share_0.95": 0.95},
    "transformers": {"ran": 1.0, "share_0.95": 0.8},
}
QUICK = {
    "torchvision": ["resnet18", "vgg11_bn", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "vit_b_16"],
    "timm": ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"],
    "transformers": ["bert", "gpt2", "llama", "vit", "convnext", "resnet"],
}
REMOVED = 0.45


def transformers_configs() -> dict[str, tuple[str, dict[str, Any], str]]:
    """Architecture -> (model class, configuration, kind of input); small, random, with grouped queries for Llama."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    image = {"image_size": 64, "num_labels": 10}
    return {
        "bert": ("BertForSequenceClassification", {**text, "vocab_size": 99}, "tokens"),
        "roberta": ("RobertaForSequenceClassification", {**text, "vocab_size": 99}, "tokens"),
        "distilbert": (
            "DistilBertForSequenceClassification",
            {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
            "tokens",
        ),
        "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}, "tokens"),
        "llama": ("LlamaForCausalLM", {**text, "num_key_value_heads": 2, "vocab_size": 99}, "tokens"),
        "t5": (
            "T5ForTokenClassification",
            {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
            "tokens",
        ),
        "vit": ("ViTForImageClassification", {**text, **image, "patch_size": 16}, "image"),
        "deit": ("DeiTForImageClassification", {**text, **image, "patch_size": 16}, "image"),
        "swin": (
            "SwinForImageClassification",
            {**image, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
            "image",
        ),
        "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 32, 64, 96], **image}, "image"),
        "resnet": ("ResNetForImageClassification", {"embedding_size": 32, **image}, "image"),
        "mobilenet_v2": ("MobileNetV2ForImageClassification", image, "image"),
        "segformer": (
            "SegformerForImageClassification",
            {**image, "hidden_sizes": [16, 32, 64, 96], "num_attention_heads": [1, 2, 2, 4]},
            "image",
        ),
        "whisper": (
            "WhisperForAudioClassification",
            {
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "max_source_positions": 50,
                "num_mel_bins": 20,
                "num_labels": 10,
            },
            "audio",
        ),
    }


def build(library: str, name: str) -> tuple[Any, tuple[int, ...], Any]:
    """A randomly initialised model, the shape of one sample, and the sample's dtype."""
    import torch

    if library == "torchvision":
        import torchvision

        size = 299 if name == "inception_v3" else 224
        extra = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
        return torchvision.models.get_model(name, weights=None, **extra), (3, size, size), torch.float32
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=1000)
        return model, tuple(model.default_cfg["input_size"]), torch.float32
    import transformers

    class_name, fields, kind = transformers_configs()[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**fields))
    shapes = {"tokens": (16,), "image": (3, 64, 64), "audio": (20, 100)}
    return model, shapes[kind], torch.int64 if kind == "tokens" else torch.float32


def names_of(library: str) -> list[str]:
    """Every torchvision classifier, one small variant of every timm family, the transformers above."""
    if library == "torchvision":
        import torchvision

        return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]
    if library == "timm":
        import timm

        families: dict[str, str] = {}
        for module in sorted(timm.list_modules()):
            names = [n for n in timm.list_models(module=module) if not n.startswith("test_")]
            if names:
                families[module] = min(names, key=lambda n: (variant_size(n), n))
        return list(families.values())
    return list(transformers_configs())


def variant_size(name: str) -> int:
    """Small variants first, by the words that timm uses for sizes."""
    small = ["zepto", "atto", "femto", "pico", "nano", "xxs", "tiny", "mini", "xs", "small"]
    large = ["base", "medium", "large", "huge", "giant", "gigantic", "enormous"]
    for size, word in enumerate(small):
        if word in name:
            return size
    return next((len(small) + 1 + size for size, word in enumerate(large) if word in name), len(small))


def randomise(model: Any, seed: int) -> None:
    """Statistics, scales, shifts and heads as a trained network would have them: none zero or one by construction."""
    import torch

    from cahfp_cli.coupling.slicing import tensors_of

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if not tensor.is_floating_point() or tensor.dim() > 2:
                continue
            noise = torch.empty_like(tensor).uniform_(generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.dim() < 2 or not tensor.any():
                tensor.add_(0.4 * (noise - 0.5))


def random_mask(groups: Any, seed: int) -> Any:
    """Keeps 55% of each family's groups, but never fewer than its narrowest width."""
    import numpy as np

    random = np.random.default_rng(seed)
    kept = np.ones(groups.count, dtype=bool)
    for family in range(len(groups.names)):
        members = np.flatnonzero(groups.family == family)
        removed = min(round(REMOVED * len(members)), len(members) - groups.narrowest[family])
        kept[random.choice(members, removed, replace=False)] = False
    return kept


def masked(model: Any, indices: Any) -> Any:
    """The full model with every entry that the slice drops set to zero (a variance of zero would divide by it)."""
    import torch

    from cahfp_cli.coupling.slicing import copy_with

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


def examine(library: str, name: str, seed: int, skip_onnx: bool = False) -> dict[str, Any]:
    """All checks on one model."""
    import copy
    import tempfile

    import numpy as np
    import torch

    from cahfp_cli.coupling.adapters import adapt
    from cahfp_cli.coupling.analysis import analyse, cut
    from cahfp_cli.errors import CahfpError
    from cahfp_cli.export.onnx_file import export_onnx
    from cahfp_cli.models.checkpoint_io import state_arrays
    from cahfp_cli.models.outputs import logits_of
    from cahfp_cli.pruning.submodel import gather_all, make_index_map

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model, shape, dtype = build(library, name)
    randomise(model, seed)
    model = adapt(model).eval()
    started = time.process_time()
    analysis = analyse(model, shape, dtype)
    seconds = time.process_time() - started
    groups = analysis.groups
    parameters = dict(model.named_parameters())
    whole = sum(p.numel() for p in parameters.values())
    prunable = sum(p.numel() for n, p in parameters.items() if any((axis >= 0).any() for axis in groups.labels[n]))
    reasons: dict[str, int] = {}
    for (tensor, _), reason in groups.pinned.items():
        if tensor in parameters and all((axis < 0).all() for axis in groups.labels[tensor]):
            reasons[reason] = reasons.get(reason, 0) + parameters[tensor].numel()
    kept = random_mask(groups, seed)
    compact, rewrites = cut(model, analysis, kept)
    sample = torch.rand(2, *shape) if dtype.is_floating_point else torch.randint(0, 90, (2, *shape))

    with torch.no_grad():
        finite = bool(torch.isfinite(logits_of(compact.eval()(sample))).all())
    loss = logits_of(copy.deepcopy(compact).train()(sample)).float().square().mean()
    loss.backward()
    exact = kept.copy()
    for family in groups.not_mask_equivalent:
        exact[groups.family == family] = True
    indices = groups.indices(exact)
    with torch.no_grad():
        expected = logits_of(masked(model, indices).eval()(sample))
        found = logits_of(cut(model, analysis, exact)[0].eval()(sample))
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    arrays = state_arrays(model)
    index_map = make_index_map(arrays, groups, kept, "0" * 64)
    cut = state_arrays(compact)
    scatter = all(np.array_equal(cut[n], a) for n, a in gather_all(arrays, index_map).items())
    onnx: float | str
    with tempfile.TemporaryDirectory() as folder:
        try:
            if skip_onnx:
                raise CahfpError("skipped")
            onnx = export_onnx(compact, shape, Path(folder) / "model.onnx", {}, dtype=dtype).parity
        except CahfpError as error:
            onnx = str(error).splitlines()[0][:160]
    return {
        "share": prunable / whole,
        "kept": sum(p.numel() for p in compact.parameters()) / whole,
        "masked": difference,
        "ran": finite and bool(torch.isfinite(loss)),
        "scatter": scatter,
        "onnx": onnx,
        "trace": seconds,
        "parameters": whole,
        "groups": groups.count,
        "rewrites": len(rewrites),
        "pinned": max(reasons, key=lambda r: reasons[r]) if reasons else "",
    }


def run_one(library: str, name: str, seed: int, limit: float, skip_onnx: bool) -> dict[str, Any]:
    """`examine` in a process of its own."""
    command = [sys.executable, __file__, "--one", f"{library}:{name}", "--seed", str(seed)]
    command += ["--skip-onnx"] if skip_onnx else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"ran": False, "error": f"more than {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    return {"ran": False, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-2 else f"{value:.4g}"
    return "" if value is None else str(value)


def summary(library: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of runs that reach each bar."""
    count = len(results)

    def share(test: Any) -> float:
        return sum(bool(test(r)) for r in results) / count if count else 0.0

    figures = {
        "ran": share(lambda r: r["ran"]),
        "masked_exact": share(lambda r: r.get("masked", 1.0) <= 1e-5),
        "scatter_exact": share(lambda r: r.get("scatter")),
        "share_0.99": share(lambda r: r.get("share", 0) >= 0.99),
        "share_0.95": share(lambda r: r.get("share", 0) >= 0.95),
        "onnx": share(lambda r: isinstance(r.get("onnx"), float) and r["onnx"] <= 1e-4),
    }
    bars = BARS[library]
    return {
        "runs": count,
        **{name: {"value": round(figures[name], 4), "bar": bars.get(name)} for name in figures},
        "holds": all(figures[name] >= bar for name, bar in bars.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[[], *BARS], help="all three without any")
    parser.add_argument("--only", action="append", help="only models whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a few small models, one seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--skip-onnx", action="store_true")
    parser.add_argument("--limit", type=float, default=900, help="seconds a model")
    parser.add_argument("-o", "--output", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        library, _, name = options.one.partition(":")
        print(json.dumps(examine(library, name, options.seed, options.skip_onnx)))
        return
    columns = ["model", "seed", "share", "kept", "masked", "scatter", "onnx", "trace", "largest pinned part, or error"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    print("\n".join(lines))
    summaries = {}
    for library in options.libraries or list(BARS):
        names = QUICK[library] if options.quick else names_of(library)
        results = []
        for seed in range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds)):
            for name in names:
                if options.only and not any(part in name for part in options.only):
                    continue
                result = run_one(library, name, seed, options.limit, options.skip_onnx)
                results.append(result)
                cells = [f"{library}:{name}", str(seed), *(shown(result.get(c)) for c in columns[2:-1])]
                line = f"| {' | '.join(cells)} | {result.get('error') or result.get('pinned', '')} |"
                lines.append(line)
                print(line, flush=True)
        summaries[library] = summary(library, results)
    if options.output:
        options.output.write_text(
            "# Zoo\n\nMade by `scripts/zoo.py`; how to read it stands there.\n\n" + "\n".join(lines) + "\n"
        )
    print(json.dumps({**summaries, "holds": all(s["holds"] for s in summaries.values())}))


if __name__ == "__main__":
    main()
