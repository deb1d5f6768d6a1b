"""What the chapters share: options, predictions, tables, measures, figures, and workloads with names.

A chapter is a script with `# %%` cells: run it, or open it in an editor that shows cells. All of them take

    --device cpu|cuda    --model FOLDER    --figures (draw into tutorial/figures/, needs matplotlib)

Lines that begin with ~ hold seconds of the machine at hand; everything else is counted, and the same everywhere.
"""

import argparse
import contextlib
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # the four modules, where they are not installed


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
    earlier waits to be read, and what comes later can not be caught up with faster than one reads.
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


# ---- workloads ------------------------------------------------------------------------------------------------------


class Arrival(NamedTuple):
    """A request of a workload: when it comes (seconds), and how many tokens go in and out."""

    at: float
    prompt: int
    output: int


# Medians of prompt and output tokens, and how far lengths spread: the sigma of a lognormal, ln(P90 / P50) / 1.28 where
# the source has a P90, 1.0 where not. Chapters divide lengths by a scale, so that they fit a small model's context.
WORKLOADS = {
    "chat": ((1020, 1.0), (129, 1.0)),  # Azure's conversation trace, Splitwise arXiv:2311.18677 (medians)
    "code": ((1500, 1.0), (13, 1.0)),  # Azure's coding trace, the same
    "summarize": ((7059, 0.48), (208, 0.45)),  # arxiv_summarization as in Sarathi-Serve arXiv:2403.02310
    "assistant": ((1730, 0.93), (415, 0.55)),  # ShareGPT conversations as in Sarathi-Serve
}


def workload(name: str, count: int, seed: int = 0, *, scale: float = 8, rate: float = math.inf, burst: float = 1.0,
             longest: int = 1024) -> list[Arrival]:
    """Requests with the lengths of a named workload, arriving at `rate` per second; all at once if that is infinite.

    Gaps between arrivals have the coefficient of variation `burst`: 1 is Poisson, more is burstier (a gamma distribution,
    as BurstGPT arXiv:2401.17644 fits to its traces). Prompt and output together are at most `longest`.
    """
    rng, at, found = random.Random(f"{name} {seed}"), 0.0, []
    for _ in range(count):
        at += rng.gammavariate(1 / burst**2, burst**2 / rate) if rate < math.inf else 0.0
        prompt, output = (max(1, round(rng.lognormvariate(math.log(median / scale), sigma)))
                          for median, sigma in WORKLOADS[name])
        output = min(output, longest // 2)
        found.append(Arrival(at, min(prompt, longest - output), output))
    return found


def token_ids(count: int, seed, vocab: int) -> list[int]:
    """Random tokens, without the first few, which mean something."""
    rng = random.Random(f"tokens {seed}")
    return [rng.randrange(min(16, vocab // 2), vocab) for _ in range(count)]
