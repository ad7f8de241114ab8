"""Where the time of a step goes: ranges put around the parts of a training from outside, and the profiler's operations sorted into them."""

import functools

import torch
from torch.profiler import record_function

ACTIVATIONS = ("topk", "amax", "sort", "kthvalue", "relu", "clamp_min", "gt", "threshold", "jump")
PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul", "embedding_bag", "baddbmm")


def ranged(owner, name, label):
    """owner.name runs inside a range from here on."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args, **kwargs):
        with record_function(label):
            return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def mark():
    """Puts ranges around the parts of src's training. Innermost ranges count."""
    from src import hooks, lm, model, sae
    from src.data import Rows
    from src.sae_training import Signum

    ranged(Rows, "batch", "bench:data")
    ranged(lm, "read_sites", "bench:LM")
    ranged(hooks, "read", "bench:gather")
    for cls in {sae.SAE, sae.Dictionary, *model.CLASSES.values()}:
        for method, label in (
            ("gather", "bench:gather"),
            ("autoencode", "bench:code"),
            ("loss", "bench:decode"),
            ("after_step", "bench:rest"),
        ):
            if method in vars(cls):
                ranged(cls, method, label)
    ranged(torch.Tensor, "backward", "bench:backward")
    ranged(torch.optim.Adam, "step", "bench:optimiser")
    ranged(Signum, "step", "bench:optimiser")


class Range:
    """A stretch of time with a label. A code's is cut where products and activations follow each other: encode and top-k in turns, since long
    batches are encoded in slices, then decode from the last product on."""

    def __init__(self, label, event):
        self.label, self.start, self.end = label, event.time_range.start, event.time_range.end
        self.inner, self.around, self.cuts, self.kernels = (
            0.0,
            False,
            [("encode", event.time_range.start)],
            [],
        )
        self.product = False

    def note(self, event):
        operation = event.name.split("::")[-1].rstrip("_")
        self.product |= operation in PRODUCTS
        stage = self.cuts[-1][0]
        if operation in PRODUCTS and stage == "top-k":
            self.cuts.append(("encode", event.time_range.start))
        elif operation in ACTIVATIONS and stage == "encode" and self.product:
            self.cuts.append(("top-k", event.time_range.start))
        self.kernels.append((event.time_range.start, event.self_device_time_total))

    def shares(self, cuda):
        """(stage, microseconds)"""
        if self.label != "code" or self.around:  # around another code lies routing
            label = "gather" if self.label == "code" else self.label
            return [
                (
                    label,
                    sum(took for _, took in self.kernels)
                    if cuda
                    else self.end - self.start - self.inner,
                )
            ]
        stages = [stage for stage, _ in self.cuts]
        if len(stages) > 1 and stages[-1] == "encode":
            stages[-1] = "decode"
        starts = [start for _, start in self.cuts]
        edges = list(zip(stages, starts, [*starts[1:], self.end], strict=True))
        if not cuda:
            return [(stage, end - start) for stage, start, end in edges]
        return [
            (stage, sum(took for at, took in self.kernels if start <= at < end))
            for stage, start, end in edges
        ]


def breakdown(profiler, seconds, tokens):
    """{stage: seconds a token}: on a CPU by the clock, on CUDA by kernels; what is in no stage is the rest."""
    events = [
        event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU
    ]
    cuda, ranges, open_ranges = any(event.self_device_time_total for event in events), [], []
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while open_ranges and open_ranges[-1].end <= event.time_range.start:
            open_ranges.pop()
        if event.name.startswith("bench:"):
            new = Range(event.name.removeprefix("bench:"), event)
            if open_ranges:
                open_ranges[-1].inner += new.end - new.start
                open_ranges[-1].around |= new.label == "code"
            ranges.append(new)
            open_ranges.append(new)
        elif open_ranges:
            open_ranges[-1].note(event)
    spent = dict.fromkeys(
        ("data", "LM", "gather", "encode", "top-k", "decode", "backward", "optimiser"), 0.0
    )
    for one in ranges:
        for stage, took in one.shares(cuda):
            if stage in spent:
                spent[stage] += took / 1e6 / tokens
    return spent | {"rest": seconds / tokens - sum(spent.values())}
