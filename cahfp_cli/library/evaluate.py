"""How good a network is."""

from cahfp_cli.data.dataset import check_fits
from cahfp_cli.library.data import Data, dataset_of
from cahfp_cli.library.network import Network
from cahfp_cli.library.submodel import Submodel
from cahfp_cli.running.device import pick_device
from cahfp_cli.running.evaluation import Metrics
from cahfp_cli.running.evaluation import evaluate as evaluate_module


def evaluate(source: Network | Submodel, data: Data, *, batch_size: int = 256, device: str = "auto") -> Metrics:
    """Accuracy and mean loss (nats) of a network, which is left as it was.

    Args: device: `auto`, `cpu`, `cuda` or `mps`.
    Raises: InputError: the data do not fit, or the outputs are not finite.
    """
    about = source.metadata if isinstance(source, Submodel) else source
    dataset = dataset_of(data, about.classes)
    check_fits(dataset, about.input_shape, about.classes, about.input_dtype)
    found = evaluate_module(source.model, dataset, batch_size, pick_device(device))
    source.model.cpu()
    return found
