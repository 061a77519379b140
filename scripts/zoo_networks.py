"""The networks of the zoo: every classifier of torchvision, one small variant of every family of timm, 14 kinds of
transformers from configurations; each with the smallest input that it takes, since what is tried depends on none."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = 4
END, TOKENS = 2, 32
"""The size of the transformers' vocabulary."""
SIDES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
LIBRARIES = ("torchvision", "timm", "transformers")
QUICK = {
    "torchvision": ["squeezenet1_1", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_v2_t"],
    "timm": ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "skresnet18"],
    "transformers": ["bert", "gpt2", "vit", "swin", "convnext"],
}


@dataclass(frozen=True)
class Subject:
    """A network as a user would name it. args: for --model-arg; tokens: whether its inputs are integers."""

    spec: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    tokens: bool = False

    def options(self) -> list[str]:
        """How a foreign checkpoint of it is opened."""
        pairs = [word for key, value in self.args.items() for word in ("--model-arg", f"{key}={json.dumps(value)}")]
        shape = "x".join(map(str, self.shape))
        return ["--model", self.spec, *pairs, "--input-shape", shape, "--classes", str(CLASSES)]

    def build(self, seed: int = 0) -> Any:
        """The network with its library's random weights."""
        from cahfp_cli.checkpoint.metadata import ModelSpec
        from cahfp_cli.models.spec import build

        return build(ModelSpec(spec=self.spec, args=self.args), self.shape, CLASSES, seed)


def names_of(library: str) -> list[str]:
    """Torchvision by number of parameters, timm by family, transformers as they stand here."""
    if library == "torchvision":
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        return sorted(map(str, names), key=lambda name: parameters_of(name))
    if library == "timm":
        import timm

        families = {}
        for module in sorted(timm.list_modules()):
            names = [n for n in timm.list_models(module=module) if not n.startswith("test_")]
            if names:
                families[module] = min(names, key=lambda n: (variant_size(n), n))
        return list(families.values())
    return list(configurations())


def parameters_of(name: str) -> int:
    """Of torchvision's published weights; nothing is fetched."""
    import torchvision

    weights = torchvision.models.get_model_weights(name)
    return int(next(iter(weights)).meta["num_params"])


def variant_size(name: str) -> int:
    """Small variants first, by the words that timm uses for sizes."""
    small = ["zepto", "atto", "femto", "pico", "nano", "xxs", "tiny", "mini", "xs", "small"]
    large = ["base", "medium", "large", "huge", "giant", "gigantic", "enormous"]
    for size, word in enumerate(small):
        if word in name:
            return size
    return next((len(small) + 1 + size for size, word in enumerate(large) if word in name), len(small))


def subject_of(library: str, name: str, folder: Path) -> tuple[Subject, Any]:
    """A network with the smallest input that it takes, and one of it that was built.

    Args: folder: where a transformer's config.json is written.
    Raises: RuntimeError: it takes none that we try; the last one's reason.
    """
    if library == "transformers":
        subject = transformer(name, folder)
        return subject, subject.build()
    reason = ""
    for subject in candidates(library, name):
        try:
            model = subject.build()
            try_out(model, subject.shape)
            return subject, model
        except Exception as error:  # whatever a network's code raises on a size that it cannot take
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    raise RuntimeError(f"takes no input that we tried: {reason[:200]}")


def candidates(library: str, name: str) -> Iterator[Subject]:
    """Subjects with inputs that grow; of networks that have a size in their code, with the argument that sets it."""
    spec = f"{library}:{name}"
    channels, usual = 3, 299 if name == "inception_v3" else 224
    argument = "image_size" if library == "torchvision" else "img_size"
    if library == "timm":
        import timm

        channels, usual, _ = timm.get_pretrained_cfg(name).input_size
    for side in SIDES:
        if side < usual and not (library == "torchvision" and not name.startswith("vit_")):
            at = side - side % 14 if name.endswith("_14") else side
            yield Subject(spec, {argument: at}, (channels, at, at))
        if side < usual:
            yield Subject(spec, {}, (channels, side, side))
    yield Subject(spec, {}, (channels, usual, usual))


def try_out(model: Any, shape: tuple[int, ...]) -> None:
    """Raises whatever the network does on two samples, evaluated or trained."""
    import torch

    x = torch.rand(2, *shape)
    with torch.no_grad():
        model.eval()(x)
        model.train()(x)
    model.eval()


def transformer(name: str, folder: Path) -> Subject:
    """A transformer whose configuration is written to `folder`/NAME/config.json."""
    architecture, fields, shape = configurations()[name]
    home = folder / name
    home.mkdir(exist_ok=True)
    import transformers

    config = getattr(transformers, architecture).config_class(**fields, num_labels=CLASSES)
    entries = {**config.to_dict(), "architectures": [architecture]}
    (home / "config.json").write_text(json.dumps(entries, default=str))
    return Subject(f"transformers:{home}", {}, shape, tokens=len(shape) == 1)


def configurations() -> dict[str, tuple[str, dict[str, Any], tuple[int, ...]]]:
    """Name -> (class, configuration, shape of a sample); small and random, grouped queries for Llama."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    special = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    image: dict[str, Any] = {"image_size": 64}
    tokens, pixels = (16,), (3, 64, 64)
    return {
        "bert": ("BertForSequenceClassification", {**text, **special}, tokens),
        "roberta": ("RobertaForSequenceClassification", {**text, **special}, tokens),
        "distilbert": (
            "DistilBertForSequenceClassification",
            {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **special},
            tokens,
        ),
        "gpt2": ("GPT2ForSequenceClassification", {"n_embd": 64, "n_layer": 2, "n_head": 4, **special}, tokens),
        "llama": ("LlamaForSequenceClassification", {**text, "num_key_value_heads": 2, **special}, tokens),
        "t5": (
            "T5ForSequenceClassification",
            {
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 4,
                **special,
                "decoder_start_token_id": 0,
            },
            tokens,
        ),
        "vit": ("ViTForImageClassification", {**text, **image, "patch_size": 16}, pixels),
        "deit": ("DeiTForImageClassification", {**text, **image, "patch_size": 16}, pixels),
        "swin": (
            "SwinForImageClassification",
            {**image, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
            pixels,
        ),
        "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 32, 64, 96], **image}, pixels),
        "resnet": ("ResNetForImageClassification", {"embedding_size": 32, "depths": [2, 2, 2, 2]}, pixels),
        "mobilenet_v2": ("MobileNetV2ForImageClassification", image, pixels),
        "segformer": (
            "SegformerForImageClassification",
            {**image, "hidden_sizes": [16, 32, 64, 96], "num_attention_heads": [1, 2, 2, 4]},
            pixels,
        ),
        "whisper": (
            "WhisperForAudioClassification",
            {
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "decoder_layers": 2,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 128,
                **special,
                "max_source_positions": 50,
                "num_mel_bins": 20,
            },
            (20, 100),
        ),
    }


def randomise(model: Any, seed: int) -> None:
    """Statistics, scales and shifts as a trained network would have them: none zero or one by construction."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or tensor.dim() > 2:
                continue
            noise = torch.empty_like(tensor).uniform_(generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.dim() < 2 or not tensor.any():
                tensor.add_(0.4 * (noise - 0.5))
