"""loss.png: the curves of training and held-out loss. Drawn without a display."""

from __future__ import annotations

from pathlib import Path

from loriner.train.job import Job

FILE = "loss.png"
_SMOOTH = 0.9  # of the moving average


def write_plot(folder: Path, job: Job) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [r.step for r in job.steps], [r.loss for r in job.steps]
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1)
    axes.plot(steps, smoothed(losses), color="C0", label="train (moving average)")
    if job.evals:
        xs, ys = [r.step for r in job.evals], [r.eval_loss for r in job.evals]
        axes.plot(xs, ys, color="C1", marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss per learnt token", title=job.settings.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / FILE)


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, without a bias towards zero at its start."""
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTH * total + (1 - _SMOOTH) * value
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        averages.append(total / weight)
    return averages
