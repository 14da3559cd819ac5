"""curves.png of a run: what is drawn, when, and what happens if it cannot be drawn."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from configs.config import option
from rlhf.steps import Meter
from runtime import curves, run_folder
from runtime.checkpoint import Saving
from runtime.curves import STAGES, Curves, draw, draw_panel, new_figure, running_mean, smoothing
from runtime.files import as_lines
from runtime.processes import Processes
from runtime.run import Run


def lines(*keys, steps=40):
    chance = np.random.default_rng(0)
    return [{"step": i, **{key: chance.uniform(0.1, 0.9) for key in keys}} for i in range(1, steps + 1)]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function (lines) -> (the figure's axes that were drawn, its title)."""
    kept = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (kept.append(self), savefig(self, *args, **kw)))

    def of(rows):
        draw(rows, "run", tmp_path / "x.png")
        return [ax for ax in kept[-1].axes if ax.axison], kept[-1].get_suptitle()

    return of


@pytest.mark.parametrize("key, step", [(key, step) for key, (step, _) in STAGES.items()])
def test_each_stage_has_its_panels_with_titles_and_units(drawn, key, step):
    _, panels = STAGES[key]
    axes, title = drawn(lines(*{k for panel in panels for k in panel.keys}))
    assert [ax.get_title() for ax in axes] == [panel.title for panel in panels]
    assert all(ax.get_xlabel() == step and ax.get_ylabel() for ax in axes)
    assert f"up to {step} 40" in title and "bands" not in title


def test_only_what_was_logged_is_drawn(drawn):
    axes, _ = drawn(lines("reward", "frac_reward_zero_std", "clipped_ratio"))
    assert [ax.get_title().split()[0] for ax in axes] == ["Reward,", "Shares"]
    assert drawn([])[1] == "run"  # before the first line: an empty picture
    assert drawn(lines("loss", steps=1))[0][0].get_lines()[-1].get_marker() == "o"  # one point is no line


@pytest.mark.statement("curves")
def test_points_means_and_bands_are_those_of_the_lines():
    rows = [{"step": i, "reward": float(i % 5), "reward_se": 0.1 * (1 + i % 3)} for i in range(1, 49)]
    figure, [ax] = new_figure(4, 3, 1)
    draw_panel(ax, STAGES["frac_reward_zero_std"][1][0], rows)
    values, width = [row["reward"] for row in rows], 7
    assert smoothing(values) == width
    points, line = ax.get_lines()[:2]
    assert list(points.get_ydata()) == values and list(points.get_xdata()) == list(range(1, 49))
    near = [values[max(0, i - 3) : i + 4] for i in range(48)]
    np.testing.assert_allclose(line.get_ydata(), [np.mean(x) for x in near])
    # the variance of a mean of independent steps: the sum of their variances over the square of their number
    errors = [row["reward_se"] for row in rows]
    se = [math.sqrt(sum(x**2 for x in errors[max(0, i - 3) : i + 4])) / len(near[i]) for i in range(48)]
    [band] = ax.collections
    low, high = (np.array(x) for x in zip(*[(np.mean(n) - 1.96 * s, np.mean(n) + 1.96 * s) for n, s in zip(near, se)]))
    corners = band.get_paths()[0].vertices
    for i in range(48):
        at = corners[corners[:, 0] == i + 1, 1]
        np.testing.assert_allclose([at.min(), at.max()], [low[i], high[i]])


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17])
def test_the_running_mean_shrinks_at_both_ends(n):
    values = list(np.random.default_rng(1).normal(size=n))
    for width in (1, 3, 5):
        half = width // 2
        expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(n)]
        np.testing.assert_allclose(running_mean(values, width), expected)


@pytest.mark.statement("curves")
def test_the_standard_error_is_that_of_the_prompts_over_all_processes():
    class Two(Processes):
        def gather(self, value):
            return [value, other.totals]

    meter, other = Meter(), Meter()
    for value in (0.0, 0.5):
        meter.sample(reward=value)
    for value in (1.0, 0.25):
        other.sample(reward=value)
    other.sample(gold=1.0)  # one prompt has no standard error
    found = meter.collect(Two())
    assert found == {"reward_se": pytest.approx(torch.tensor([0.0, 0.5, 1.0, 0.25]).std().item() / 2)}


@dataclass
class Config(Saving):
    out: str = option("", identity=False)
    overwrite: bool = False


@pytest.fixture
def run(tmp_path):
    run = Run(Config(out=str(tmp_path / "run")), str(tmp_path / "run"), total_steps=3)
    run.restart()
    yield run
    run_folder.release(run.folder)


def test_a_finished_run_has_an_opaque_picture(run):
    run.log(1, loss=1.0, nats_per_token=2.0)
    run.finish({})
    picture = Image.open(run.folder / "curves.png").convert("RGBA")
    assert picture.size[0] > 700 and picture.getpixel((0, 0)) == (255, 255, 255, 255)
    assert np.asarray(picture)[..., 3].min() == 255  # nothing shines through on a dark page
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.statement("curves")
def test_a_picture_that_cannot_be_drawn_ends_no_run_and_is_one_line(run, monkeypatch, capsys):
    (run.folder / "curves.png").mkdir()  # what cannot be replaced by a file
    monkeypatch.setattr(curves, "SHARE", math.inf)
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    said = capsys.readouterr().out
    assert said.count("curves.png is not drawn: IsADirectoryError") == 1
    run.finish({})
    assert (run.folder / "manifest.json").is_file()


@pytest.mark.statement("curves")
def test_a_picture_takes_a_two_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(curves.time, "monotonic", lambda: now[0])
    costs = iter([2.0, 0.5, 0.5])
    drawn = []

    def slow(rows, name, path):
        now[0] += next(costs)
        drawn.append(now[0] - 1000)
        path.touch()

    monkeypatch.setattr(curves, "draw", slow)
    found = Curves(tmp_path)
    while len(drawn) < 3:
        now[0] += 1
        found.draw_if_due()
    # the first one is expected to take 0.6 s, and takes 2: the next comes after 400 s, the third after 100 s more
    assert drawn == [120 + 2, 122 + 400 + 0.5, 522.5 + 100 + 0.5]


def test_after_a_kill_the_picture_is_made_of_what_metrics_has_then(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(curves, "draw", lambda rows, name, path: (seen.append(rows), path.touch()))
    (tmp_path / "metrics.jsonl").write_text(as_lines(lines("loss", steps=3)) + '{"step": 4, "lo')
    Curves(tmp_path).draw()
    assert seen == [lines("loss", steps=3)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == seen[0][0]
