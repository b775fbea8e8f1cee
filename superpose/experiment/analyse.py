"""What bears on superposition in a prepared corpus: how much tokens tell about each other at a distance, and how they repeat.

Mutual information is I(d) = H(shuffled pairs) − H(pairs at distance d), in nats, both by Grassberger's estimator of entropy
(arXiv physics/0307138). Counting alone is badly biased: with a large vocabulary most pairs are rare, and independent tokens
seem to inform each other. Shuffled pairs have the same marginals and no information, so they take most of the bias off, and
Grassberger's estimator most of what is left, which is the part that grows with the information. The rest is downwards, by more
the more pairs are seen but once; `docs/planning.md` has the errors on Markov chains whose information is known.
"""

import csv
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from superpose.bags import DCLM_FIT, position_weights
from superpose.data.store import TokenStore
from superpose.errors import InputError
from superpose.experiment.plots import BASELINE_COLOUR, COLOURS, GREY, STYLE
from superpose.experiment.summary import quantity

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]

#: Distances in tokens: every one within a bag of 8, then fewer.
DISTANCES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
BAG_SIZES = (2, 4, 8, 16)
NGRAMS = (2, 4, 8, 16, 32)
#: Pieces of the split that are looked at, where that is longer than what may be.
PIECES = 64
#: Tokens whose text is compressed.
COMPRESSED = 2**20
#: Vocabularies whose pairs are counted in a table of this many entries; larger ones are sorted.
DENSE = 2**24
#: Share of pairs seen once above which the information is said to be too low.
SPARSE = 0.04


@dataclass(frozen=True)
class Information:
    """Mutual information in nats at each of ``distances``. ``counted``: by plain counting, for comparison."""

    distances: tuple[int, ...]
    corrected: Array
    counted: Array
    #: share of the pairs at distance 1 that are the only one of their kind
    seen_once: float


@dataclass(frozen=True)
class Repetition:
    """Of bags of ``bag_size`` tokens, each over all tokens: shares in [0, 1]."""

    bag_size: int
    #: tokens that occurred earlier in their own bag
    within: float
    #: tokens that occur in the bag before theirs, from which they are predicted
    from_previous: float


@dataclass(frozen=True)
class Analysis:
    """``tokens`` of a split were looked at. ``entropy``: of single tokens, nats. ``fit``: C0, a, k of I(d) ≈ C0 + a·d^k."""

    data: Path
    split: str
    tokens: int
    vocab_size: int
    entropy: float
    information: Information
    fit: tuple[float, float, float]
    #: UTF-8 bytes a token
    bytes_per_token: float
    #: bytes of text divided by their size after zlib
    compression: float
    #: n: share of the n-grams that occurred earlier in what was looked at
    repeated: dict[int, float]
    bags: tuple[Repetition, ...]


def analyse(data: str | Path, *, split: str = "train", tokens: int = 2**23, seed: int = 0) -> Analysis:
    """Analyse at most ``tokens`` tokens of a store, in pieces spread evenly over the split. ``seed``: of the shuffle.

    Memory is about 64 bytes a token looked at. Raises InputError for what is not a store, or is too short.
    """
    store = TokenStore(data, split)
    pieces = read_pieces(store, tokens)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("counting", total=len(DISTANCES) + 1 + len(NGRAMS) + len(BAG_SIZES))

        def advance() -> None:
            bar.advance(task)

        information = mutual_information(pieces, store.vocab_size, DISTANCES, seed=seed, advance=advance)
        repeated = {}
        for n in NGRAMS:
            repeated[n] = repeated_ngrams(pieces, n)
            advance()
        bags = []
        for bag_size in BAG_SIZES:
            bags.append(repetition(pieces, bag_size))
            advance()
    return Analysis(
        data=Path(data),
        split=split,
        tokens=pieces.size,
        vocab_size=store.vocab_size,
        entropy=_entropy(np.bincount(pieces.ravel())),
        information=information,
        fit=fit_power_law(information.distances, information.corrected),
        bytes_per_token=store.bytes_per_token,
        compression=_compression(store, pieces),
        repeated=repeated,
        bags=tuple(bags),
    )


def read_pieces(store: TokenStore, tokens: int) -> Tokens:
    """``[pieces, length]``: the whole split as one piece, or `PIECES` spread evenly over it, ``tokens`` in all at most."""
    least = PIECES * 2 * max(DISTANCES)
    if min(tokens, len(store)) < least:
        raise InputError(
            f"{store.path}, split {store.split}: {min(tokens, len(store)):,} tokens are too few, {least:,} are needed"
        )
    if tokens >= len(store):
        return store.read(0, len(store))[None]
    length = tokens // PIECES
    starts = np.linspace(0, len(store) - length, PIECES).astype(np.int64)
    return np.stack([store.read(int(start), length) for start in starts])


def mutual_information(
    pieces: Tokens,
    vocab_size: int,
    distances: tuple[int, ...],
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Information:
    """Mutual information of tokens of ``pieces [n, length]`` at each distance; ``advance`` is called once, then after each."""
    first, second = pieces[:, :-1].ravel(), pieces[:, 1:].ravel()
    shuffled = _counts(first, np.random.default_rng(seed).permutation(second), vocab_size)
    marginals = _plain_entropy(np.bincount(first)) + _plain_entropy(np.bincount(second))
    independent = _entropy(shuffled)
    advance()
    corrected, counted, seen_once = [], [], 0.0
    for distance in distances:
        counts = _counts(pieces[:, :-distance].ravel(), pieces[:, distance:].ravel(), vocab_size)
        corrected.append(independent - _entropy(counts))
        counted.append(marginals - _plain_entropy(counts))
        if distance == distances[0]:
            seen_once = float((counts == 1).sum() / counts.sum())
        advance()
    return Information(distances, np.array(corrected), np.array(counted), seen_once)


def fit_power_law(distances: tuple[int, ...], values: Array) -> tuple[float, float, float]:
    """C0, a, k of the least squares fit of ``C0 + a·d^k``, with C0 ≥ 0, a ≥ 0 and −5 ≤ k < 0: no weight is negative."""
    d, low, high = np.array(distances, np.float64), -5.0, -0.01
    for _ in range(4):
        exponents = np.linspace(low, high, 101)
        fits = [_fit_scale(d**k, values) for k in exponents]
        best = int(np.argmin([error for error, _, _ in fits]))
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, 100)]
    _, constant, scale = fits[best]
    return round(constant, 4), round(scale, 4), round(float(exponents[best]), 4)


def _fit_scale(power: Array, values: Array) -> tuple[float, float, float]:
    """Error, C0 and a, neither negative, of the fit at one exponent."""
    centred = power - power.mean()
    scale = max(0.0, float(centred @ values / (centred @ centred)))
    constant = float(values.mean() - scale * power.mean())
    if constant < 0:
        constant, scale = 0.0, max(0.0, float(power @ values / (power @ power)))
    return float(np.square(values - constant - scale * power).sum()), constant, scale


def repeated_ngrams(pieces: Tokens, n: int) -> float:
    """Share of the n-grams of ``pieces`` that occurred before, by their hashes of 64 bits."""
    starts = pieces.shape[1] - n + 1
    hashes = np.zeros((len(pieces), starts), np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
        hashes += pieces[:, offset : offset + starts].astype(np.uint64) + np.uint64(1)
    hashes.shape = (-1,)
    hashes.sort()
    return float((hashes[1:] == hashes[:-1]).sum() / hashes.size)


def repetition(pieces: Tokens, bag_size: int) -> Repetition:
    """How often tokens repeat within their bag, and from the bag before."""
    bags = pieces[:, : pieces.shape[1] // bag_size * bag_size].reshape(len(pieces), -1, bag_size)
    ordered = np.sort(bags, axis=-1)
    within = (ordered[..., 1:] == ordered[..., :-1]).sum() / bags.size
    previous, following = bags[:, :-1], bags[:, 1:]
    found = np.zeros(following.shape, bool)
    for offset in range(bag_size):
        found |= following == previous[..., offset, None]
    return Repetition(bag_size, float(within), float(found.mean()))


def _compression(store: TokenStore, pieces: Tokens) -> float:
    tokenizer = Tokenizer.from_file(str(store.tokenizer_file))
    share = min(COMPRESSED // len(pieces), pieces.shape[1])
    text = "".join(tokenizer.decode(piece[:share].tolist()) for piece in pieces).encode()
    return len(text) / len(zlib.compress(text)) if text else math.nan


def _counts(first: Tokens, second: Tokens, vocab_size: int) -> NDArray[np.int64]:
    """How often each pair occurs, for those that do, in any order."""
    pairs = first * vocab_size + second
    if vocab_size**2 <= DENSE:
        counts = np.bincount(pairs)
        return counts[counts > 0]
    pairs.sort()
    ends = np.append(np.flatnonzero(pairs[1:] != pairs[:-1]) + 1, pairs.size)
    return np.diff(ends, prepend=0)


def _entropy(counts: NDArray[np.int64]) -> float:
    """Grassberger's estimate in nats: ln N − Σ n G(n) / N, where G(n) is near ln n for large n."""
    counts, total = counts[counts > 0], counts.sum()
    logs = np.where(counts < len(_G), _G[np.minimum(counts, len(_G) - 1)], np.log(counts))
    return float(np.log(total) - counts @ logs / total)


def _plain_entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _grassberger(size: int) -> Array:
    """G(n) for n below ``size``: G(1) = −γ − ln 2, G(2n + 1) = G(2n), G(2n + 2) = G(2n) + 2 / (2n + 1), G(2) = 2 + G(1)."""
    values = np.zeros(size)
    values[1] = -np.euler_gamma - math.log(2)
    values[2:] = values[1] + np.cumsum([2 / (n - 1) if n % 2 == 0 else 0.0 for n in range(2, size)])
    return values


_G = _grassberger(4096)


def tables(analysis: Analysis) -> list[Table]:
    """Information against distance, and repetition."""
    information, (constant, scale, exponent) = analysis.information, analysis.fit
    distance_table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("distance", "information, nats", "fit", "by counting alone"):
        distance_table.add_column(name, justify="right")
    for distance, corrected, counted in zip(information.distances, information.corrected, information.counted, strict=True):
        fitted = constant + scale * distance**exponent
        distance_table.add_row(f"{distance}", f"{corrected:.4f}", f"{fitted:.4f}", f"{counted:.4f}")
    bag_table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("bag size", "tokens repeated in their bag", "tokens found in the bag before"):
        bag_table.add_column(name, justify="right", overflow="fold")
    for bag in analysis.bags:
        bag_table.add_row(f"{bag.bag_size}", f"{bag.within:.1%}", f"{bag.from_previous:.1%}")
    ngram_table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("n", "n-grams that occurred before"):
        ngram_table.add_column(name, justify="right")
    for n, share in analysis.repeated.items():
        ngram_table.add_row(f"{n}", f"{share:.1%}")
    return [distance_table, bag_table, ngram_table]


def sentences(analysis: Analysis) -> list[str]:
    """The figures that are no table, and the fit as a recipe takes it."""
    constant, scale, exponent = analysis.fit
    lines = [
        f"{quantity(analysis.tokens)} tokens of {analysis.data}, split {analysis.split}, vocabulary {analysis.vocab_size:,}: "
        f"{analysis.entropy:.3f} nats of entropy a token, {analysis.bytes_per_token:.2f} bytes a token; "
        f"zlib makes the text {analysis.compression:.2f} times smaller.",
        f"Information at distance d is about {constant:g} + {scale:g}·d^{exponent:g} nats. As position weights:",
        f"  superposition.weighting='[{constant:g}, {scale:g}, {exponent:g}]'",
    ]
    for bag_size in BAG_SIZES[1:3]:
        weights = position_weights(analysis.fit, bag_size).tolist()
        lines.append(f"  in a bag of {bag_size}: {', '.join(f'{weight:.3f}' for weight in weights)}")
    once = analysis.information.seen_once
    if once > SPARSE:
        lines.append(
            f"warning: {once:.0%} of the pairs of neighbours occur but once. These are few tokens for this vocabulary, and the "
            "information is too low; give more --tokens, if the corpus has them"
        )
    return lines


def write_analysis(analysis: Analysis, out: Path) -> list[Path]:
    """Write analysis.png and information.csv into ``out``, made if need be, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "analysis.png", out / "information.csv"]
    with mpl.rc_context(STYLE):
        draw_analysis(analysis).savefig(paths[0])
    information = analysis.information
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["distance", "information_nats", "counted_nats"])
        rows = zip(information.distances, information.corrected.tolist(), information.counted.tolist(), strict=True)
        writer.writerows((distance, round(corrected, 6), round(counted, 6)) for distance, corrected, counted in rows)
    return paths


def draw_analysis(analysis: Analysis) -> Figure:
    """Information against distance with its fit, and the position weights that follow beside the others."""
    information, (constant, scale, exponent) = analysis.information, analysis.fit
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    distances = np.array(information.distances, np.float64)
    fine = np.geomspace(distances[0], distances[-1], 200)
    shown = information.corrected > 0
    left.loglog(distances, information.counted, color=GREY, linestyle=":", label="by counting alone (biased)")
    left.loglog(distances[shown], information.corrected[shown], "o", color=COLOURS[0], label="bias taken off")
    label = f"{constant:g} + {scale:g}·d^{exponent:g}"
    left.loglog(fine, constant + scale * fine**exponent, color=COLOURS[1], linewidth=1.6, label=label)
    for axis, locator in ((left.xaxis, LogLocator(2)), (left.yaxis, LogLocator(10, subs=(1, 2, 5)))):
        axis.set_major_locator(locator)
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    left.set_xlabel("distance in tokens")
    left.set_ylabel("nats")
    left.set_title("mutual information of two tokens")
    left.legend(fontsize=8.5)
    bag_size = 8
    weightings = (
        ("uniform", "uniform", BASELINE_COLOUR),
        ("power law, 1/i", "power-law", COLOURS[2]),
        ("fitted here", analysis.fit, COLOURS[1]),
        ("the paper's fit to DCLM", DCLM_FIT, COLOURS[3]),
    )
    for name, weighting, colour in weightings:
        weights = position_weights(weighting, bag_size).tolist()
        right.plot(range(1, bag_size + 1), weights, "o-", color=colour, markersize=4, label=name)
    right.set_ylim(bottom=0)
    right.set_xlabel("position in the bag")
    right.set_title(f"position weights in a bag of {bag_size}")
    right.legend(fontsize=8.5)
    return figure
