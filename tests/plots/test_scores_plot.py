"""`cahfp inspect SCORES --plot FILE`: the figure of significance a family, and what is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.errors import InputError
from cahfp_cli.plots.figure_file import save_figure
from cahfp_cli.plots.scores import KEPT, LARGEST, MOST_PANELS, REMOVED, draw_scores
from cahfp_cli.significance.scores import Scores, ScoresMetadata
from tests.support import damage
from tests.support.commands import Done, run, run_well
from tests.support.fleet import Fleet

MICROCONTROLLER = "stm32h743"


def made(significance: Any, families: int = 1, name: str = "layer{}.conv.weight", criterion: str = "l1") -> Scores:
    """Scores whose families take turns: group i is of family i modulo `families`."""
    values = np.array(significance, dtype=np.float64)
    metadata = ScoresMetadata(
        checkpoint="0" * 64,
        criterion=criterion,
        families=tuple(name.format(number) for number in range(families)),
        provenance=Provenance(tool="cahfp 0", command="test"),
    )
    return Scores(metadata, values, np.arange(len(values)) % families, np.ones(len(values), dtype=np.int64))


def markers(figure: Figure, gid: str) -> list[Any]:
    """The y values of the markers of one kind, a panel each."""
    return [line.get_ydata() for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def count(figure: Figure, gid: str) -> int:
    return sum(len(values) for values in markers(figure, gid))


def cuts(figure: Figure) -> list[float]:
    return [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_gid() == "cut"]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 600 <= image.width <= 2600 and 500 <= image.height <= 2000
        return {colour for _, colour in image.convert("RGB").getcolors(2**24)}


def of_hex(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


# The figure.


@pytest.mark.parametrize("families", [1, 5, MOST_PANELS, 60])
def test_every_family_has_a_panel_with_its_groups_in_order_until_there_are_too_many(
    tmp_path: Path, families: int
) -> None:
    rng = np.random.default_rng(families)
    scores = made(rng.lognormal(size=families * 16), families)
    kept = rng.random(families * 16) < 0.6
    figure = draw_scores(scores, kept)
    panels = min(families, MOST_PANELS)
    drawn = scores.family < panels
    assert len(figure.axes) == panels
    assert count(figure, "kept") == kept[drawn].sum() and count(figure, "removed") == (~kept)[drawn].sum()
    for number, (left, gone) in enumerate(zip(markers(figure, "kept"), markers(figure, "removed"), strict=True)):
        for values, mask in ((left, kept), (gone, ~kept)):
            own = scores.significance[mask & (scores.family == number)]
            assert values.tolist() == sorted(own.tolist(), reverse=True)
    assert titles(figure)[-1] == f"layer{panels - 1}.conv\n{kept[scores.family == panels - 1].sum()}/16"
    assert figure.axes[0].get_yscale() == "log"
    assert ("the first 48 of them shown" in figure.get_suptitle()) == (families > MOST_PANELS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"kept ({kept.sum()})",
        f"removed ({(~kept).sum()})",
    ]
    save_figure(figure, tmp_path / "figure.png")
    assert {of_hex(KEPT), of_hex(REMOVED)} <= colours(tmp_path / "figure.png")


def test_without_a_submodel_all_groups_are_alike(tmp_path: Path) -> None:
    figure = draw_scores(made([3, 2, 1, 5], families=2))
    assert (count(figure, "kept"), count(figure, "removed"), cuts(figure)) == (4, 0, [])
    assert titles(figure) == ["layer0.conv\n2 groups", "layer1.conv\n2 groups"]
    assert not figure.legends
    save_figure(figure, tmp_path / "figure.png")
    assert of_hex(REMOVED) not in colours(tmp_path / "figure.png")


def test_a_cut_is_drawn_only_where_one_rank_parts_kept_from_removed() -> None:
    significance = np.repeat([4.0, 3.0, 2.0, 1.0], 3)  # of three families, all alike
    kept = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=bool).ravel()
    assert cuts(draw_scores(made(significance, 3), kept)) == [2.5]
    ties = np.array([False, True, False, True])
    assert cuts(draw_scores(made([1, 1, 1, 1]), ties)) == [2.5]


@pytest.mark.parametrize(
    "significance",
    [
        [0.5, 0.0, 1e-9, 20.0],
        [-1e-3, 40.0, 0.0, -7.0],
        [-1.0, -20.0, -300.0],
        [0.0, 0.0],
        [-10.0, -10.0],
        [2.0, 3.0, 0.0],
        [7.0],
        [1.0, 1.0],
        [5e-324, 0.0, 1e-320],
        [5e-324, 1.7e308],
        [1.7e308, -1.7e308, 0.0],
        [1.7e308, 1.7e308],
    ],
    ids=str,
)
def test_every_finite_value_is_drawn_within_its_panel(tmp_path: Path, significance: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_scores(made(significance), np.arange(len(significance)) == 0)
        save_figure(figure, tmp_path / "figure.png")
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    values = np.concatenate([*markers(figure, "kept"), *markers(figure, "removed")])
    assert len(values) == len(significance)
    assert np.allclose(np.sort(values), np.sort(np.clip(significance, -LARGEST, LARGEST)))
    assert (low < values).all() and (values < high).all()


def test_with_negative_values_or_zeros_the_axis_is_symmetrically_logarithmic_and_labels_zero() -> None:
    for significance in ([0.0, 1e-6, 10.0], [-4.0, 1e-6, 10.0]):
        (axes,) = draw_scores(made(significance)).axes
        assert axes.get_yscale() == "symlog"
        assert 0 in axes.get_yticks() and 10 in axes.get_yticks()


def test_names_from_a_file_are_plain_text_and_short(tmp_path: Path) -> None:
    name = "$\\frac{" + "\n\x1b[31m中" * 100 + "{}.tail"
    figure = draw_scores(made([1, 2], name=name.replace("{", "{{", 1), criterion="$x^"))
    title, width = titles(figure)[0].split("\n")
    assert len(title) <= 30 and title.startswith("$") and title.endswith("0.tail") and width == "2 groups"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "figure.png")


def test_no_groups_are_refused() -> None:
    with pytest.raises(InputError, match="no channel group"):
        draw_scores(made([]))


def test_the_users_style_changes_no_byte(tmp_path: Path) -> None:
    import matplotlib

    scores = made(np.geomspace(1, 1e-5, 40), 4)
    for suffix in ("png", "svg", "pdf"):
        save_figure(draw_scores(scores), tmp_path / f"plain.{suffix}")
        with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "svg.hashsalt": None}):
            save_figure(draw_scores(scores), tmp_path / f"styled.{suffix}")
            assert matplotlib.rcParams["font.size"] == 20
        assert (tmp_path / f"plain.{suffix}").read_bytes() == (tmp_path / f"styled.{suffix}").read_bytes()


# The command.


@pytest.fixture(scope="module")
def submodel(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The microcontroller's submodel, with a `kept_groups` that fits its widths."""
    folder = tmp_path_factory.mktemp("plots") / "submodel"
    shutil.copytree(fleet.submodels[MICROCONTROLLER], folder)
    from cahfp_cli.significance.scores import read_scores

    scores = read_scores(fleet.scores)
    report = json.loads((folder / "report.json").read_text())
    if "kept_groups" not in report:
        kept: list[int] = []
        for family, width in enumerate(report["widths"]):
            own = np.flatnonzero(scores.family == family)
            kept += own[np.argsort(-scores.significance[own])][: width["kept"]].tolist()
        report["kept_groups"] = sorted(kept)
        (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def damaged(submodel: Path, tmp_path: Path) -> Path:
    """A copy of the submodel, to be damaged."""
    shutil.copytree(submodel, tmp_path / "damaged")
    return tmp_path / "damaged"


def change_report(folder: Path, **changes: Any) -> None:
    """Set keys of a report; None removes one."""
    report = {**json.loads((folder / "report.json").read_text()), **changes}
    (folder / "report.json").write_text(json.dumps({key: value for key, value in report.items() if value is not None}))


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 2
    assert all(word in done.stderr for word in words), done.stderr


def test_the_figure_is_written_once_and_with_force_again_to_the_same_bytes(
    fleet: Fleet, submodel: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.png"
    arguments = ("inspect", fleet.scores, "--plot", figure, "--submodel", submodel)
    told = run_well(*arguments, "--json")
    assert told.stderr == ""
    assert told.json == {**run_well("inspect", fleet.scores, "--json").json, "plot": str(figure)}
    found = colours(figure)
    assert len(found) > 50 and {of_hex(KEPT), of_hex(REMOVED)} <= found
    first = figure.read_bytes()
    figure.write_bytes(b"mine")
    refused(run(*arguments), 3, "figure.png exists", "--force")
    assert figure.read_bytes() == b"mine"
    assert f"plot: {figure}" in run_well(*arguments, "--force").stdout.splitlines()
    assert figure.read_bytes() == first
    run_well("inspect", fleet.scores, "--plot", figure, "--force")
    assert figure.read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_the_file_name_says_what_kind_of_figure(fleet: Fleet, tmp_path: Path, suffix: str, start: bytes) -> None:
    written = []
    for name in ("one", "two"):
        run_well("inspect", fleet.scores, "--plot", tmp_path / f"{name}{suffix}")
        written.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert written[0].startswith(start) and written[0] == written[1]


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "png"])
def test_another_suffix_is_refused(fleet: Fleet, tmp_path: Path, name: str) -> None:
    refused(run("inspect", fleet.scores, "--plot", tmp_path / name), 2, name, ".png, .svg, .pdf")
    assert not any(tmp_path.iterdir())


def test_only_scores_are_drawn(fleet: Fleet, submodel: Path, tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    for path, kind in (
        (fleet.checkpoint, "checkpoint"),
        (submodel, "submodel folder"),
        (submodel / "report.json", "report"),
    ):
        refused(run("inspect", path, "--plot", figure), 2, str(path), kind, "scores")
    refused(run("inspect", fleet.checkpoint, "--groups", "--plot", figure), 2, "--plot", "--groups")
    refused(run("inspect", fleet.scores, "--submodel", submodel), 2, "--submodel goes with --plot")
    refused(run("inspect", fleet.scores, "--force"), 2, "--force goes with --plot")
    assert not figure.exists()


def test_a_submodel_of_another_checkpoint_is_refused(fleet: Fleet, submodel: Path, tmp_path: Path) -> None:
    def of_another(tensors: damage.Tensors, record: dict[str, Any]) -> None:
        record["checkpoint"] = "0" * 64

    other = damage.rewritten(fleet.scores, tmp_path / "other.safetensors", of_another)
    figure = tmp_path / "figure.png"
    refused(
        run("inspect", other, "--plot", figure, "--submodel", submodel),
        3,
        "index_map.safetensors",
        "another checkpoint",
    )
    assert not figure.exists()


def test_what_is_no_submodel_folder_is_refused(fleet: Fleet, damaged: Path, tmp_path: Path) -> None:
    arguments = ("inspect", fleet.scores, "--plot", tmp_path / "figure.png", "--submodel")
    refused(run(*arguments, tmp_path / "nothing"), 3, "nothing", "not a folder")
    refused(run(*arguments, tmp_path), 3, "index_map.safetensors", "no such file")
    (damaged / "report.json").unlink()
    refused(run(*arguments, damaged), 3, "report.json", "no such file")
    (damaged / "report.json").write_text('{"format": ')
    refused(run(*arguments, damaged), 3, "report.json", "not JSON")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    "kept",
    [None, "all", {}, 7, [3, 2], [2, 2], [-1, 2], [0, 10**6], [0, 1.0], [False, 1], ["0"], [None], [[0]], [10**400]],
    ids=lambda kept: str(kept)[:20],
)
def test_damaged_kept_groups_are_refused(fleet: Fleet, damaged: Path, tmp_path: Path, kept: Any) -> None:
    change_report(damaged, kept_groups=kept)
    figure = tmp_path / "figure.png"
    refused(run("inspect", fleet.scores, "--plot", figure, "--submodel", damaged), 3, "report.json", "kept_groups")
    assert not figure.exists()


def test_kept_groups_that_contradict_the_widths_are_refused(fleet: Fleet, damaged: Path, tmp_path: Path) -> None:
    change_report(damaged, kept_groups=[0, 1])
    arguments = ("inspect", fleet.scores, "--plot", tmp_path / "figure.png", "--submodel", damaged)
    refused(run(*arguments), 3, "report.json", "widths", "kept_groups")


def test_without_matplotlib_the_message_says_what_to_install(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['matplotlib'] = None  # as if it were not installed\n"
    )
    done = run("inspect", fleet.scores, "--plot", tmp_path / "figure.png", env={"PYTHONPATH": str(tmp_path)})
    refused(done, 2, "matplotlib", "pip install 'cahfp[plots]'")


def test_drawing_needs_no_torch(fleet: Fleet, submodel: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    arguments = ("inspect", fleet.scores, "--plot", tmp_path / "figure.png", "--submodel", submodel)
    done = run(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert done.code == 0, done.stderr
