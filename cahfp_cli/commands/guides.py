"""What help and the reference page say beside the options: examples, where to read on, exit codes, variables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guide:
    """What stands under a command's help.

    examples: command lines that run as they stand after README's quick start, in this order. page: where to read on.
    """

    examples: tuple[str, str]
    page: str


GUIDES = {
    "train": Guide(
        (
            "cahfp train --model resnet20 --data digits@train --epochs 8 -o own.safetensors",
            "cahfp train submodels/stm32h743 --data 'digits@train[0:500]' --epochs 3 \\\n    --lr 0.02 -o trained",
        ),
        "docs/tutorial/two-boards.md",
    ),
    "score": Guide(
        (
            "cahfp score global.safetensors --data digits@train -o worth.safetensors",
            "cahfp score global.safetensors --criterion l2 -o norms.safetensors",
        ),
        "docs/explanation/significance.md",
    ),
    "prune": Guide(
        (
            "cahfp prune global.safetensors --calibration digits@train --profile jetson \\\n"
            "    --memory 400KB --data digits@test -o fleet",
            "cahfp prune global.safetensors --scores scores.safetensors --macs 50% -o half",
        ),
        "docs/explanation/method.md",
    ),
    "evaluate": Guide(
        (
            "cahfp evaluate global.safetensors --data digits@test",
            "cahfp evaluate submodels/stm32h743/model.onnx --data digits@test --threads 1",
        ),
        "docs/reference/onnx.md",
    ),
    "reconstruct": Guide(
        (
            "cahfp reconstruct global.safetensors trained-stm32 trained-custom \\\n    -o merged.safetensors",
            "cahfp reconstruct global.safetensors trained-stm32 trained-custom \\\n"
            "    --rule median --clip median --report merged.json -o robust.safetensors",
        ),
        "docs/explanation/reconstruction.md",
    ),
    "inspect": Guide(
        ("cahfp inspect submodels/stm32h743", "cahfp inspect global.safetensors --groups"),
        "docs/reference/files.md",
    ),
    "simulate": Guide(
        (
            "cahfp simulate scripts/federation_local.toml -o simulated",
            "cahfp simulate scripts/federation_local.toml -o simulated --resume",
        ),
        "docs/how-to/federate.md",
    ),
    "profile list": Guide(("cahfp profile list", "cahfp profile list --json"), "docs/reference/profiles.md"),
    "profile show": Guide(
        ("cahfp profile show stm32h743", "cahfp profile show jetson --json"), "docs/reference/profiles.md"
    ),
    "profile predict": Guide(
        (
            "cahfp profile predict global.safetensors --profile stm32h743",
            "cahfp profile predict resnet20 --input-shape 3x32x32 --profile jetson",
        ),
        "docs/explanation/latency-model.md",
    ),
    "profile measure": Guide(
        (
            "cahfp profile measure -o here.toml",
            "cahfp profile measure --threads 2 --name laptop -o laptop.toml",
        ),
        "docs/how-to/own-device.md",
    ),
    "doctor": Guide(("cahfp doctor", "cahfp doctor --json"), "docs/README.md"),
}
"""By command, without the `cahfp` in front."""

EXIT_CODES = {
    0: "done",
    1: "a defect in cahfp: please report it",
    2: "usage: an option, a name or a combination that does not exist",
    3: "bad input: a file, schema, digest, shape or number",
    4: "the budget cannot be met; the message has the smallest reachable value",
    5: "a result failed its own check (ONNX parity, agreement of a quantised file, index map) and was not kept",
    130: "interrupted by Ctrl-C",
}

VARIABLES = {
    "CAHFP_DEBUG": "1 shows the traceback of every error; without it an error is one or two lines.",
    "_CAHFP_COMPLETE": "Set by the shell's completion that `cahfp --install-completion` installs; not for people.",
}
"""Environment variables that cahfp itself reads; PyTorch and ONNX Runtime read their own, such as OMP_NUM_THREADS."""
