"""The loss, forward and backward: one log-sum-exp without the full logits, against the published ways and torch's own."""

from collections.abc import Callable

import torch
from timing import Figures, Row, Table, Target, in_turn, peak_growth
from torch import Tensor
from torch.nn import functional

from superpose import linear_multi_hot_cross_entropy, reference

ROWS, WIDTH = 2048, 512
BAG_SIZES, VOCABULARIES = (1, 2, 4, 8, 16), (4096, 50304, 128256)
#: The vocabulary of the targets.
JUDGED = 50304
#: For the time it takes, the largest vocabulary has only these, and so have the larger two in bfloat16.
FEW_BAG_SIZES = (1, 8)
#: Candidates that would need more than this are left out.
MEMORY_LIMIT = 12e9

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def run(*, quick: bool) -> Figures:
    rows, vocabularies, bag_sizes = (256, (1024, 4096), (1, 8)) if quick else (ROWS, VOCABULARIES, BAG_SIZES)
    seconds = 2 if quick else 10
    figures = Figures([])
    dtypes = [torch.float32]
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        dtypes.append(torch.bfloat16)
    else:
        figures.notes.append("bfloat16 not measured: no bf16 instructions, products would be emulated")
    for dtype in dtypes:
        for vocabulary in vocabularies:
            name = str(dtype).removeprefix("torch.")
            table = Table(f"loss, forward and backward, V = {vocabulary}, {rows} rows, width {WIDTH}, {name}")
            few = vocabulary >= (max(VOCABULARIES) if dtype == torch.float32 else JUDGED)
            for bag_size in FEW_BAG_SIZES if few else bag_sizes:
                table.rows += _compare(rows, vocabulary, bag_size, dtype, seconds, figures.notes)
            figures.tables.append(table)
            if vocabulary == JUDGED:
                _judge(figures, table, dtype, 4 * seconds)
    return figures


def _compare(rows: int, vocabulary: int, bag_size: int, dtype: torch.dtype, seconds: float, notes: list[str]) -> list[Row]:
    shape = (rows, vocabulary, bag_size, dtype)
    candidates, table = {}, []
    for name in [*MULTI_HOT, *(ONE_HOT if bag_size == 1 else [])]:
        predicted = _predicted_bytes(name, rows, vocabulary, bag_size)
        if predicted > MEMORY_LIMIT:
            notes.append(f"{name} skipped at V = {vocabulary}, s = {bag_size}: it would take {predicted / 1e9:.0f} GB")
        else:
            candidates[name] = prepare(name, *shape)
    for name, row in in_turn(candidates, seconds, warm_up=vocabulary < JUDGED).items():
        table.append({"s": bag_size, "loss": name, **row, "peak bytes": peak_growth(prepare, name, *shape)})
    return table


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


def _predicted_bytes(name: str, rows: int, vocabulary: int, bag_size: int) -> float:
    """Full logits: themselves, what the backward pass keeps, their gradient and its parts."""
    kept = {OURS: 0, CHUNKED: 0, LISTING: bag_size + 3}.get(name, 4)
    return 4 * vocabulary * (kept * rows + 2 * WIDTH)


def _judge(figures: Figures, measured: Table, dtype: torch.dtype, seconds: float) -> None:
    """The bounds at s = 8, each ratio from rounds of one comparison, peaks from the table of the vocabulary."""
    judged = {f"{OURS}, s = 8": (OURS, 8), f"{OURS}, s = 1": (OURS, 1), f"{LISTING}, s = 8": (LISTING, 8)}
    if CHUNKED in ONE_HOT:
        judged[f"{CHUNKED}, one-hot"] = (CHUNKED, 1)
    candidates = {label: prepare(name, ROWS, JUDGED, bag_size, dtype) for label, (name, bag_size) in judged.items()}
    peaks = {(row["loss"], row["s"]): row["peak bytes"] for row in measured.rows}
    where = f"s = 8, V = {JUDGED}, {str(dtype).removeprefix('torch.')}"
    table = Table(f"what the bounds are judged by: {where}")
    ratios = {}
    for label, row in in_turn(candidates, seconds, warm_up=False).items():
        ratios[label] = 1 / row["× first"]
        table.rows.append({"loss": label, **row, "peak bytes": peaks[judged[label]]})
    figures.tables.append(table)
    ours, its = peaks[OURS, 8], peaks[LISTING, 8]
    bounds = [1 / 2, 1.10, 1.0]
    figures.targets.append(Target(f"{where}: peak memory over the {LISTING}'s", ours / its, 1 / 20))
    figures.targets.append(
        Target(f"{where}: peak memory over one float32 copy of the logits", ours / (4 * ROWS * JUDGED), 1 / 2)
    )
    for label, bound in zip([f"{LISTING}, s = 8", f"{OURS}, s = 1", f"{CHUNKED}, one-hot"], bounds, strict=True):
        if label in ratios:
            figures.targets.append(Target(f"{where}: time over that of {label}", ratios[label], bound))
