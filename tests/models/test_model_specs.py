"""Model specs: what each builds, and what each refuses."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.checkpoint.metadata import ModelSpec
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.outputs import logits_of
from cahfp_cli.models.spec import BUILT_IN, build, is_code, parse_model_args, resolve_spec


def spec(name: str, **args: Any) -> ModelSpec:
    return ModelSpec(spec=name, args=args)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 17, 19)])
def test_every_network_of_ours_trains_on_any_image_size(name: str, shape: tuple[int, ...]) -> None:
    model = build(spec(name, width=0.25), shape, classes=7)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parameter_counts_are_those_of_the_papers() -> None:
    # He et al. 2016, table 6: 0.27M and 0.85M without projections, which add 2,560 weights and 192 of norms.
    assert parameters(build(spec("resnet20"), (3, 32, 32), 10)) == 272_474
    assert parameters(build(spec("resnet56"), (3, 32, 32), 10)) == 855_770
    # torchvision's ResNet-18 has 11,689,512 with a 7x7 stem and 1000 classes.
    stem, head = 64 * 3 * (49 - 9), 990 * 513
    assert parameters(build(spec("resnet18"), (3, 32, 32), 10)) == 11_689_512 - stem - head
    convolutions = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    expected = sum(9 * a * b + 2 * b for a, b in pairwise(convolutions)) + 513 * 10
    assert parameters(build(spec("vgg11"), (3, 32, 32), 10)) == expected


def test_parameter_names_do_not_depend_on_the_input_size() -> None:
    for name in ("vgg16", "resnet20"):
        small, large = (build(spec(name, width=0.1), (1, side, side), 3).state_dict() for side in (8, 40))
        assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in large.items()}
    assert "layer2.0.downsample.0.weight" in build(spec("resnet20"), (1, 8, 8), 3).state_dict()


def test_width_scales_channels_and_never_goes_below_four() -> None:
    assert build(spec("resnet20", width=0.5), (1, 8, 8), 3).get_parameter("conv1.weight").shape == (8, 1, 3, 3)
    assert build(spec("resnet20", width=0.01), (1, 8, 8), 3).get_parameter("conv1.weight").shape == (4, 1, 3, 3)


def test_weights_depend_on_the_seed_alone_and_the_global_random_state_stays() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build(spec("resnet20"), (1, 8, 8), 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "args", "shape", "says"),
    [
        ("resnet21", {}, (1, 8, 8), "Did you mean 'resnet"),
        ("resnet20", {}, (1, 7, 8), "from 8 pixels a side up; the input shape is 1x7x8"),
        ("vgg11", {}, (64,), "the input shape is 64"),
        ("vgg11", {"width": 0}, (1, 8, 8), "width must be a positive number such as 0.5, not 0"),
        ("vgg11", {"width": "wide"}, (1, 8, 8), "not 'wide'"),
        ("vgg11", {"widht": 1.0}, (1, 8, 8), "takes no argument 'widht'. It takes: classes, input_shape, width"),
        ("vgg11", {"classes": 4}, (1, 8, 8), "use --classes instead"),
        ("no_such_package_of_ours.net:make", {}, (1, 8, 8), "no module 'no_such_package_of_ours.net'"),
        ("no/such/file.py:make", {}, (1, 8, 8), "no file 'no/such/file.py'"),
        (":make", {}, (1, 8, 8), "not a module name"),
        ("transformers:no/such/folder", {}, (1, 8, 8), "Give a local folder with config.json"),
        ("timm:resnet18", {"pretrained": True}, (3, 8, 8), "'pretrained' is not allowed"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, (3, 8, 8), "'checkpoint_path' is not allowed"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, (3, 8, 8), "'weights' is not allowed"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_usage_error(
    name: str, args: dict[str, Any], shape: tuple[int, ...], says: str
) -> None:
    if name.startswith("transformers:") and importlib.util.find_spec("transformers") is None:
        says = "pip install"
    with pytest.raises(UsageError) as caught:
        build(spec(name, **args), shape, 10)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_a_missing_library_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = __import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", without)
    with pytest.raises(UsageError, match=r"pip install cahfp\[vision\]"):
        build(spec(f"{library}:resnet18"), (3, 32, 32), 10)


FACTORIES = """
from torch import nn
import helper_beside

limit = 3

def net(classes, input_shape, hidden=4):
    c, h, w = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, hidden), nn.ReLU(), nn.Linear(hidden, classes))

def plain():
    return nn.Linear(3, helper_beside.OUTPUTS)

def needy(depth):
    return nn.Identity()

def fails():
    raise RuntimeError("first line\\nlast line")

def leaves():
    raise SystemExit(3)

def wrong():
    return {}
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside.py").write_text("OUTPUTS = 2\n")
    (tmp_path / "nets.py").write_text(FACTORIES)
    return tmp_path / "nets.py"


def test_a_factory_gets_what_its_signature_takes(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(spec(f"{factories}:net", hidden=6), (1, 2, 2), 5)
    assert [tuple(p.shape) for p in model.parameters()] == [(6, 4), (6,), (5, 6), (5,)]
    assert parameters(build(spec(f"{factories}:plain"), (1, 2, 2), None)) == 8
    monkeypatch.chdir(factories.parent)
    assert parameters(build(spec("nets:plain"), (1, 2, 2), None)) == 8
    assert parameters(build(spec("nets.py:plain"), (1, 2, 2), None)) == 8


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nett", UsageError, "'nett' does not exist in"),
        ("nett", UsageError, "Did you mean 'net'? It has: fails, leaves, needy, net, plain, wrong"),
        ("limit", UsageError, "'limit' is not callable"),
        ("needy", UsageError, "needs the argument 'depth': pass --model-arg depth=VALUE"),
        ("net", UsageError, "needs the argument 'classes': pass --classes N"),
        ("fails", InputError, "RuntimeError: last line"),
        ("leaves", InputError, "SystemExit: 3"),
        ("wrong", InputError, "returned a dict, not a torch.nn.Module"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(name: str, error: type[Exception], says: str, factories: Path) -> None:
    with pytest.raises(error) as caught:
        build(spec(f"{factories}:{name}"), (1, 2, 2), None)
    assert says in str(caught.value)


@pytest.mark.parametrize("source", ["import no_such_package_of_ours", "def net(:", "1 / 0"])
def test_a_file_that_does_not_import_is_an_input_error(source: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(InputError, match=r"failed: (ModuleNotFoundError|SyntaxError|ZeroDivisionError)"):
        build(spec(f"{tmp_path / 'broken.py'}:net"), (1, 8, 8), 10)


@pytest.mark.parametrize("name", ["os:system", "nets.py:net", "/a/b.py:c", "a.b:c", "Timm:x", " timm:x", ":", "x:"])
def test_specs_that_run_code_are_told_apart(name: str) -> None:
    assert is_code(name)


@pytest.mark.parametrize("name", ["vgg11", "torchvision:resnet18", "timm:a", "transformers:/a/b.py:c", "os", ""])
def test_specs_that_run_no_code_of_their_own_are_told_apart(name: str) -> None:
    assert not is_code(name)


def test_a_file_may_name_our_networks_but_no_code_to_run(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    ours, theirs = spec("resnet20", width=0.5), spec("evil.py:net", depth=3)
    assert resolve_spec(None, {}, ours, path) == ours
    assert resolve_spec("vgg11", {"width": 2}, ours, path) == spec("vgg11", width=2)
    assert resolve_spec("evil.py:net", {}, theirs, path) == spec("evil.py:net", depth=3)
    assert resolve_spec("moved/evil.py:net", {"depth": 4}, theirs, path) == spec("moved/evil.py:net", depth=4)
    assert resolve_spec("evil.py:other", {}, theirs, path) == spec("evil.py:other")
    assert resolve_spec("resnet20", {}, ours, path) == ours
    with pytest.raises(UsageError, match=r"pass --model 'evil\.py:net' yourself, with --model-arg 'depth=3'"):
        resolve_spec(None, {}, theirs, path)
    with pytest.raises(UsageError, match="records no model: pass --model"):
        resolve_spec(None, {}, None, path)
    with pytest.raises(UsageError, match="--model-arg needs --model"):
        resolve_spec(None, {"width": 1}, ours, path)


def test_model_arguments_are_json_scalars_or_text() -> None:
    given = ["a=1", "b=0.5", "c=true", "d=null", 'e="1"', "f=relu", "g=[1]", "h=NaN", "i=x=y", "j="]
    expected = {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": None,
        "e": "1",
        "f": "relu",
        "g": "[1]",
        "h": "NaN",
        "i": "x=y",
        "j": "",
    }
    assert parse_model_args(given) == expected
    for wrong in (["width"], ["=1"], ["a-b=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--model-arg"):
            parse_model_args(wrong)


def test_logits_are_found_in_what_networks_return() -> None:
    logits = torch.ones(2, 3)

    class Output:
        def __init__(self, **fields: torch.Tensor) -> None:
            self.__dict__.update(fields)

    assert logits_of(logits) is logits
    assert logits_of((logits, None)) is logits
    assert logits_of({"logits": logits, "loss": None}) is logits
    assert logits_of(Output(logits=logits)) is logits
    hidden = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(logits_of(Output(last_hidden_state=hidden)), hidden.mean(1))
    for wrong in (None, (), {"loss": 1}, np.ones(3)):
        with pytest.raises(InputError, match="must return a tensor of logits"):
            logits_of(wrong)


def test_transformers_configs_give_the_head_they_name_and_the_input_shape_given(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = {"model_type": "vit", "image_size": 224, "patch_size": 8, "num_channels": 3, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(vit))
    model = build(spec(f"transformers:{tmp_path}"), (1, 16, 16), 7).eval()
    assert logits_of(model(torch.zeros(2, 1, 16, 16))).shape == (2, 7)
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 1, "n_head": 2}
    (tmp_path / "lm.json").write_text(json.dumps({**gpt2, "vocab_size": 50}))
    assert type(build(spec(f"transformers:{tmp_path / 'lm.json'}"), (6,), 7)).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "nonesuch", "auto_map": {"AutoConfig": "x.Y"}}', "{}"])
def test_a_transformers_config_that_is_none_is_an_input_error(content: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        build(spec(f"transformers:{tmp_path}"), (3, 8, 8), 2)


def test_torchvision_and_timm_networks_take_any_channel_count() -> None:
    for library in ("torchvision", "timm"):
        pytest.importorskip(library)
        model = build(spec(f"{library}:resnet18"), (2, 32, 32), 6).eval()
        assert model(torch.zeros(1, 2, 32, 32)).shape == (1, 6)
        with pytest.raises(UsageError, match=r"has no model 'resnet19'\. Did you mean"):
            build(spec(f"{library}:resnet19"), (3, 32, 32), 6)
