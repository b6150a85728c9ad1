"""Loss curves: the content of the plot, read from the figure and from its pixels."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking.plots import _smooth, draw_loss_curves


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def falling(steps: int = 200, stage: str = "train", first: int = 0) -> list[dict[str, Any]]:
    records = []
    for step in range(10, steps + 1, 10):
        records.append({"step": first + step, "stage": stage, "train/loss": 2 + 4 * math.exp(-step / 50)})
        if step % 50 == 0:
            records[-1]["valid/loss"] = 3 + abs(step - 150) / 100
    return records


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn in a test."""
    made: list[Figure] = []
    build = Figure.__init__

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Figure, "__init__", remember)
    return made


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_labels_show_the_last_and_best_loss(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path / "cost_$x_{$", falling())
    path = draw_loss_curves(tmp_path / "cost_$x_{$")
    assert path == tmp_path / "cost_$x_{$" / "loss.png"
    assert imread(path).shape == (864, 1536, 4)
    said = texts(figures[0])
    assert {"cost_$x_{$", "validation 3.500", "best 3.000 at step 150"} <= set(said)
    assert any(text.startswith("train 2.0") for text in said)


def test_lines_show_the_recorded_values(tmp_path: Path, figures: list[Figure]) -> None:
    records = falling()
    write(tmp_path, records)
    draw_loss_curves(tmp_path)
    raw, smooth, valid, _best = figures[0].axes[0].lines
    np.testing.assert_array_equal(raw.get_xdata(), [record["step"] for record in records])
    np.testing.assert_array_equal(raw.get_ydata(), [record["train/loss"] for record in records])
    assert len(smooth.get_ydata()) == len(records) and smooth.get_linewidth() > raw.get_linewidth()
    np.testing.assert_array_equal(valid.get_ydata(), [r["valid/loss"] for r in records if "valid/loss" in r])


def test_stages_have_names_and_separate_curves(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, falling(200, "pretrain") + falling(100, "instruct", first=200))
    draw_loss_curves(tmp_path)
    axes = figures[0].axes[0]
    assert {"pretrain", "instruct"} <= set(texts(figures[0]))
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (200, 300)
    assert max(axes.lines[0].get_xdata()) == 200 and min(axes.lines[2].get_xdata()) == 210


def test_single_stage_has_no_name(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, falling(stage="only"))
    draw_loss_curves(tmp_path)
    assert "only" not in texts(figures[0]) and not figures[0].axes[0].patches


@pytest.mark.parametrize(("floor", "scale"), [(2.0, "linear"), (0.01, "log")])
def test_scale_is_logarithmic_only_for_a_large_range(
    tmp_path: Path, figures: list[Figure], floor: float, scale: str
) -> None:
    write(tmp_path, [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": floor}])
    draw_loss_curves(tmp_path)
    assert figures[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("last", [(2.0, 2.0), (2.0, 2.01), (2.01, 2.0), (5.9, 2.0), (0.0, 0.0)])
def test_labels_do_not_overlap_and_stay_inside(
    tmp_path: Path, figures: list[Figure], last: tuple[float, float]
) -> None:
    end = {"step": 123_000, "train/loss": last[0], "valid/loss": last[1]}
    write(tmp_path, [{"step": 122_000, "train/loss": 6.0, "valid/loss": 0.5}, end])
    draw_loss_curves(tmp_path)
    axes = figures[0].axes[0]
    labels = [text for text in axes.texts if text.get_text().startswith(("train", "validation", "best", "smoothed"))]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 4
    for place, box in enumerate(boxes):
        assert box.x1 < figures[0].bbox.x1 and box.y0 >= axes.bbox.y0 - 1
        assert not any(box.overlaps(other) for other in boxes[:place])


@pytest.mark.parametrize("name", ["train/loss", "valid/loss"])
def test_single_point_is_plotted(tmp_path: Path, figures: list[Figure], name: str) -> None:
    write(tmp_path, [{"step": 0, name: 4.0}])
    draw_loss_curves(tmp_path)
    assert any(text.endswith(" 4.000") for text in texts(figures[0]))


def test_nonfinite_values_are_not_plotted(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, [*falling(), {"step": 210, "train/loss": "NaN"}, {"step": 220, "train/loss": "Infinity"}])
    draw_loss_curves(tmp_path)
    assert max(figures[0].axes[0].lines[0].get_xdata()) == 200


@pytest.mark.parametrize("records", [[], [{"step": 1, "train/loss": "NaN"}], [{"step": 1, "other": 1.0}]])
def test_run_without_losses_is_a_user_error(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    write(tmp_path, records)
    with pytest.raises(UserError, match="no loss to draw"):
        draw_loss_curves(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_plot_is_deterministic_and_leaves_matplotlib_settings(tmp_path: Path) -> None:
    write(tmp_path, falling())
    settings = dict(matplotlib.rcParams)
    first = draw_loss_curves(tmp_path).read_bytes()
    assert draw_loss_curves(tmp_path).read_bytes() == first
    assert dict(matplotlib.rcParams) == settings


def test_smoothing_preserves_lines_and_averages_noise() -> None:
    line = np.linspace(5.0, 1.0, 200)
    # The last window is one-sided and may lag by half of its width.
    np.testing.assert_allclose(_smooth(line, np.arange(200))[:190], line[:190])
    noise = np.random.default_rng(0).normal(size=2000)
    assert _smooth(noise, np.arange(200, 2000)).std() < 0.15 * noise.std()
    np.testing.assert_array_equal(_smooth(np.array([3.0]), np.array([0])), [3.0])
