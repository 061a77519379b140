"""Curvature-aware, device-specific structured pruning with model reconstruction.

The names below come from the packages underneath when they are first used, so that the command line starts without
torch. docs/reference/api.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cahfp_cli.coupling.analysis import Analysis, analyse
    from cahfp_cli.data.dataset import Dataset
    from cahfp_cli.device.catalogue import load_profile
    from cahfp_cli.device.profile import DeviceProfile as Profile
    from cahfp_cli.device.quantities import Count, Share
    from cahfp_cli.errors import BudgetError, CahfpError, InputError, UsageError, VerificationError
    from cahfp_cli.formats.index_map import IndexMap
    from cahfp_cli.library.evaluate import evaluate
    from cahfp_cli.library.merge import Merging, reconstruct
    from cahfp_cli.library.network import Network, load, save
    from cahfp_cli.library.prune import prune
    from cahfp_cli.library.pruning_job import Pruning
    from cahfp_cli.library.score import Scoring, save_scores, score
    from cahfp_cli.library.submodel import Submodel, export_onnx, load_submodel, save_submodel
    from cahfp_cli.pruning.budget import Budget
    from cahfp_cli.reconstruction.report import ReconstructionReport
    from cahfp_cli.running.evaluation import Metrics
    from cahfp_cli.significance.scores import Scores, read_scores

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Budget",
    "BudgetError",
    "CahfpError",
    "Count",
    "Dataset",
    "IndexMap",
    "InputError",
    "Merging",
    "Metrics",
    "Network",
    "Profile",
    "Pruning",
    "ReconstructionReport",
    "Scores",
    "Scoring",
    "Share",
    "Submodel",
    "UsageError",
    "VerificationError",
    "analyse",
    "evaluate",
    "export_onnx",
    "load",
    "load_profile",
    "load_submodel",
    "prune",
    "read_scores",
    "reconstruct",
    "save",
    "save_scores",
    "save_submodel",
    "score",
]
HOMES = {
    "coupling.analysis": ("Analysis", "analyse"),
    "data.dataset": ("Dataset",),
    "device.catalogue": ("load_profile",),
    "device.profile": ("Profile",),
    "device.quantities": ("Count", "Share"),
    "errors": ("BudgetError", "CahfpError", "InputError", "UsageError", "VerificationError"),
    "formats.index_map": ("IndexMap",),
    "library.evaluate": ("evaluate",),
    "library.merge": ("Merging", "reconstruct"),
    "library.network": ("Network", "load", "save"),
    "library.prune": ("prune",),
    "library.pruning_job": ("Pruning",),
    "library.score": ("Scoring", "save_scores", "score"),
    "library.submodel": ("Submodel", "export_onnx", "load_submodel", "save_submodel"),
    "pruning.budget": ("Budget",),
    "reconstruction.report": ("ReconstructionReport",),
    "running.evaluation": ("Metrics",),
    "significance.scores": ("Scores", "read_scores"),
}
CALLED = {"Profile": "DeviceProfile"}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), CALLED.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
