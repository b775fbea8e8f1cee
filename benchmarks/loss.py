"""The loss, forward and backward: one log-sum-exp without the full logits, against the published ways and torch's own."""

from collections.abc import Callable

import torch
from timing import Figures, Row, Table, Target, in_turn, peak_of_tensors, peak_resident
from torch import Tensor
from torch.nn import functional

from superpose import linear_multi_hot_cross_entropy, reference
from superpose.loss import CPU_BFLOAT16

WIDTH, BAG_SIZES = 512, (1, 2, 4, 8, 16)
#: Rows at each vocabulary: as many logits at each of the larger two, so that all of it is done in minutes.
ROWS = {4096: 2048, 50304: 512, 128256: 256}
#: The vocabulary of the bounds, and its rows there: those of 8 sequences of 256 positions.
JUDGED, JUDGED_ROWS = 50304, 2048
#: In bfloat16 where its products are emulated, at down to a hundredth of the speed, the smallest vocabulary alone.
EMULATED, EMULATED_BAG_SIZES = {4096: 128}, (1, 8)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Rows, vocabulary, bag size, dtype.
Shape = tuple[int, int, int, torch.dtype]


def listing(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The published listing: a cross-entropy over the full logits for each target of the bag."""
    return reference.multi_hot_cross_entropy(hidden @ weight.T, targets)


def patch_level(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Patch-level training's form: one log-softmax of the full logits, then a gather for each target."""
    log_probabilities = torch.log_softmax((hidden @ weight.T).float(), -1)
    losses = [functional.nll_loss(log_probabilities, target) for target in targets.unbind(-1)]
    return torch.stack(losses).mean()


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """One log-sum-exp and one gather, in the full logits."""
    logits = (hidden @ weight.T).float()
    return (torch.logsumexp(logits, -1) - logits.gather(-1, targets).mean(-1)).mean()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets[:, 0])


def torch_full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.linear_cross_entropy(hidden, weight, targets[:, 0])


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.linear_cross_entropy(hidden, weight, targets[:, 0], options=torch.nn.LinearCrossEntropyOptions())


OURS, LISTING, CHUNKED = "superpose", "published listing", "torch, chunked"
MULTI_HOT: dict[str, Loss] = {
    OURS: linear_multi_hot_cross_entropy,
    LISTING: listing,
    "patch-level": patch_level,
    "naive, full logits": naive,
}
ONE_HOT: dict[str, Loss] = {"linear + cross_entropy": plain}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    ONE_HOT |= {"torch, full": torch_full, CHUNKED: torch_chunked}
#: What the time of ours at s = 8 may be of another loss's at a bag size, at most.
TIME_BOUNDS = {(LISTING, 8): 1 / 2, (OURS, 1): 1.10} | ({(CHUNKED, 1): 1.0} if CHUNKED in ONE_HOT else {})


def run(*, quick: bool) -> Figures:
    seconds = 2 if quick else 10
    rows, bag_sizes = ({1024: 256, 4096: 256}, (1, 8)) if quick else (ROWS, BAG_SIZES)
    figures = Figures([])
    _measure(figures, torch.float32, rows, bag_sizes, seconds)
    if not quick:
        _judge(figures, torch.float32, 9 * seconds)
    if CPU_BFLOAT16:
        _measure(figures, torch.bfloat16, rows, bag_sizes, seconds)
        if not quick:
            _judge(figures, torch.bfloat16, 9 * seconds)
    else:
        _measure(figures, torch.bfloat16, EMULATED, EMULATED_BAG_SIZES, seconds)
        figures.notes.append(
            "this processor has no bfloat16 instructions: torch emulates the products of the others and superpose takes "
            "float32 ones, so bfloat16 is measured on few rows and not judged"
        )
    return figures


def _measure(figures: Figures, dtype: torch.dtype, rows: dict[int, int], bag_sizes: tuple[int, ...], seconds: float) -> None:
    for vocabulary, count in rows.items():
        table = Table(f"loss, forward and backward, V = {vocabulary}, {count} rows, width {WIDTH}, {_name(dtype)}")
        for bag_size in bag_sizes:
            shape = (count, vocabulary, bag_size, dtype)
            candidates = {name: (name, shape) for name in (MULTI_HOT | ONE_HOT if bag_size == 1 else MULTI_HOT)}
            for name, row in _compare(f"{table.title}, s = {bag_size}", candidates, seconds).items():
                table.rows.append({"s": bag_size, "loss": name, **row})
        figures.tables.append(table)


def _compare(comparison: str, candidates: dict[str, tuple[str, Shape]], seconds: float) -> dict[str, Row]:
    """Times in turn and both peaks of each candidate: a loss and its shape."""
    calls = {label: prepare(name, *shape) for label, (name, shape) in candidates.items()}
    tensors = {label: peak_of_tensors(call) for label, call in calls.items()}
    rows = in_turn(comparison, calls, seconds, warm_up=False)
    del calls
    return {
        label: {**row, "tensors bytes": tensors[label], "resident bytes": peak_resident(prepare, name, *shape)}
        for (label, row), (name, shape) in zip(rows.items(), candidates.values(), strict=True)
    }


def prepare(name: str, rows: int, vocabulary: int, bag_size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The named loss with its backward pass, on inputs allocated here; it has run once on a small shape."""
    loss = (MULTI_HOT | ONE_HOT)[name]

    def inputs(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(vocabulary, WIDTH, generator=generator).mul_(0.02).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(vocabulary, (rows, bag_size), generator=generator)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        loss(hidden, weight, targets).backward()
        hidden.grad = weight.grad = None

    call(*inputs(16, 64))
    given = inputs(rows, vocabulary)
    return lambda: call(*given)


def _judge(figures: Figures, dtype: torch.dtype, seconds: float) -> None:
    """The bounds at s = 8, all from one comparison."""
    own, published = f"{OURS}, s = 8", f"{LISTING}, s = 8"
    chosen = {own: (OURS, 8)} | {f"{name}, s = {bag_size}": (name, bag_size) for name, bag_size in TIME_BOUNDS}
    candidates = {label: (name, (JUDGED_ROWS, JUDGED, bag_size, dtype)) for label, (name, bag_size) in chosen.items()}
    where = f"s = 8, V = {JUDGED}, {JUDGED_ROWS} rows, {_name(dtype)}"
    table = Table(f"loss, what the bounds are judged by: {where}")
    rows = _compare(table.title, candidates, seconds)
    table.rows += [{"loss": label, **row} for label, row in rows.items()]
    figures.tables.append(table)
    peak, logits = rows[own]["tensors bytes"], 4 * JUDGED_ROWS * JUDGED
    figures.targets.append(
        Target(f"{where}: peak memory over that of the {LISTING}", peak / rows[published]["tensors bytes"], 1 / 20)
    )
    figures.targets.append(Target(f"{where}: peak memory over one float32 copy of the logits", peak / logits, 1 / 2))
    for (name, bag_size), bound in TIME_BOUNDS.items():
        label = f"{name}, s = {bag_size}"
        figures.targets.append(Target(f"{where}: time over that of {label}", 1 / rows[label]["× first"], bound))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
