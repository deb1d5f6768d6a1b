"""What the chapters share: options, predictions, tables, measures, figures; and `workload`, which is also what bench runs.

A chapter is a script with `# %%` cells: run it, or open it in an editor that shows cells. All of them take

    --device cpu|cuda    --model FOLDER    --figures (draw into tutorial/figures/, needs matplotlib)

Lines that begin with ~ hold seconds of the machine at hand; everything else is counted, and the same everywhere.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # the four modules, where they are not installed

from nanoserve import Arrival, num_weights, token_ids, workload  # noqa: E402, F401


def options(doc: str) -> argparse.Namespace:
    """The chapter's options; unknown ones, as notebooks pass them, are ignored."""
    title = doc.strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda, where something is timed")
    parser.add_argument("--model", help="a folder in Hugging Face format instead of the small model that comes along")
    parser.add_argument("--figures", action="store_true", help="draw the figures anew")
    args, _ = parser.parse_known_args()
    print(f"{title}\n{'=' * len(title)}")
    return args


def predicted(what: str, guess: float, measured: float, arithmetic: str) -> None:
    """Hold the reader's guess against the measurement, and show how one could have known."""
    ratio = max(guess, measured) / min(guess, measured) if guess > 0 and measured > 0 else math.inf
    verdict = "well predicted" if ratio < 1.15 else f"off by a factor of {ratio:.1f}"
    print(f"\n{what}\n  you said  {guess:,.4g}\n  measured  {measured:,.4g}   ({verdict})\n  because   {arithmetic}")


def table(headers: str, rows, title: str = "") -> None:
    """Print rows under headers (names separated by |), numbers right, texts left."""
    names = [name.strip() for name in headers.split("|")]
    shown = [[f"{x:,}" if isinstance(x, int) else f"{x:,.3g}" if isinstance(x, float) and abs(x) < 1000 else
              f"{x:,.0f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(line[i]) for line in [names, *shown]) for i in range(len(names))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(names))]
    print("\n" + title if title else "")
    for line in [names, ["-" * width for width in widths], *shown]:
        cells = (x.ljust(width) if is_left else x.rjust(width) for x, width, is_left in zip(line, widths, left))
        print("  " + "  ".join(cells).rstrip())


def bars(values: dict[str, float], unit: str = "", title: str = "") -> None:
    """A bar chart in text."""
    most, width = max(values.values()) or 1, max(map(len, values))
    print("\n" + title if title else "")
    for name, value in values.items():
        print(f"  {name:<{width}}  {'#' * round(48 * value / most):<48}  {value:,.4g} {unit}".rstrip())


def quantile(values, share: float) -> float:
    """The value that `share` of the values lie below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def experience(at: float, times: list[float], first: float, reads: float) -> float:
    """Quality of experience of an answer asked for `at` whose tokens came at `times`: 1 if its reader never waited.

    After Andes (arXiv:2404.16283): 1 - (delay of what is read, summed over tokens) / (the same had all been read at the
    very end). The reader wishes the first token `first` after asking, and then `reads` tokens per unit of time: what comes
    earlier waits to be read, and what comes later cannot be caught up with faster than one reads.
    """
    due, read, last = [at + first + i / reads for i in range(len(times))], [], -math.inf
    for wish, came in zip(due, times):
        read.append(last := max(wish, came, last + 1 / reads))
    return 1.0 if last <= due[-1] else 1 - (sum(read) - sum(due)) / (len(due) * last - sum(due))


class Timer:
    """`with Timer() as t: ...` then t.seconds."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start


def median_seconds(run, times: int = 9, wait=lambda: None) -> float:
    """Median seconds of run() and then wait(), on a GPU torch.cuda.synchronize: who launches has not waited yet."""
    seconds = []
    for _ in range(times):
        with Timer() as t:
            run()
            wait()
        seconds.append(t.seconds)
    return statistics.median(seconds)


# ---- figures --------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart by the colour-blind, and by their lightness in print.
BLUE, ORANGE, GREEN, RED, SKY, YELLOW, PINK, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#F0E442", "#CC79A7", "#000000")
STYLE = {"figure.dpi": 110, "savefig.dpi": 110, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#DDDDDD", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
         "lines.linewidth": 2, "lines.markersize": 5, "figure.constrained_layout.use": True, "svg.hashsalt": "nanoserve"}


@contextlib.contextmanager
def figure(args: argparse.Namespace, name: str, columns: int = 1, size: tuple[float, float] = (8, 3.4)):
    """Axes to draw on, saved as tutorial/figures/NAME.png; None without --figures. Write `if axes is not None:`."""
    if not args.figures:
        yield None
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    with plt.rc_context(STYLE):
        drawing, axes = plt.subplots(1, columns, figsize=size)
        yield axes
        (HERE / "figures").mkdir(exist_ok=True)
        path = HERE / "figures" / f"{name}.png"
        drawing.savefig(path, metadata={"Software": None})
        with Image.open(path) as image:  # a third of the bytes, and nobody sees it
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        plt.close(drawing)
