"""Where the time of a step goes.

Ranges are put around the parts of a training from outside, and the profiler's operations are sorted
into them.
"""

import functools

import torch
from torch.profiler import record_function

ACTIVATIONS = ("topk", "amax", "sort", "kthvalue", "relu", "clamp_min", "gt", "threshold", "jump")
STAGES = ("data", "LM", "gather", "encode", "top-k", "decode", "backward", "optimiser")
PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul", "embedding_bag", "baddbmm")


def ranged(owner, name, label):
    """Replace owner.name by the same function inside a range."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def function_in_range(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    setattr(owner, name, function_in_range)


METHODS = {
    "gather": "bench:gather",
    "autoencode": "bench:code",
    "loss": "bench:decode",
    "after_step": "bench:rest",
}


def mark():
    """Put ranges around the parts of src's training. Time counts for the innermost range."""
    from src import hooks, lm, model, sae
    from src.data import Rows
    from src.sae_training import Signum

    ranged(Rows, "batch", "bench:data")
    ranged(lm, "read_sites", "bench:LM")
    ranged(hooks, "read", "bench:gather")
    for cls in {sae.SAE, sae.Dictionary, *model.CLASSES.values()}:
        for method, label in METHODS.items():
            if method in vars(cls):
                ranged(cls, method, label)
    ranged(torch.Tensor, "backward", "bench:backward")
    ranged(torch.optim.Adam, "step", "bench:optimiser")
    ranged(Signum, "step", "bench:optimiser")


class Range:
    """A stretch of time with a label; times are in microseconds.

    A range `code` is cut into stages where products and activations follow each other. Encode and
    top-k alternate, because long batches are encoded in slices. Decode begins with the last
    product.
    """

    def __init__(self, label, event):
        self.label, self.start, self.end = label, event.time_range.start, event.time_range.end
        self.inner_time = 0.0  # of the ranges inside this one
        self.contains_code = False
        self.cuts = [("encode", self.start)]  # (stage, start)
        self.kernels = []  # (start of the operation, time on the device)
        self.has_product = False

    def note(self, event):
        """Take an operation of this range into account."""
        operation = event.name.split("::")[-1].rstrip("_")
        start = event.time_range.start
        self.has_product |= operation in PRODUCTS
        stage = self.cuts[-1][0]
        if operation in PRODUCTS and stage == "top-k":
            self.cuts.append(("encode", start))
        elif operation in ACTIVATIONS and stage == "encode" and self.has_product:
            self.cuts.append(("top-k", start))
        self.kernels.append((start, event.self_device_time_total))

    def shares(self, cuda):
        """[(stage, time)]: by kernels on CUDA, else by the clock."""
        if self.label != "code" or self.contains_code:
            # A code that contains another code is that of a router, which reads all sites.
            stage = "gather" if self.label == "code" else self.label
            kernel_time = sum(duration for _, duration in self.kernels)
            clock_time = self.end - self.start - self.inner_time
            return [(stage, kernel_time if cuda else clock_time)]
        stages = [stage for stage, _ in self.cuts]
        if len(stages) > 1 and stages[-1] == "encode":
            stages[-1] = "decode"
        starts = [start for _, start in self.cuts]
        pieces = zip(stages, starts, [*starts[1:], self.end], strict=True)
        if not cuda:
            return [(stage, end - start) for stage, start, end in pieces]
        return [(stage, self.kernel_time(start, end)) for stage, start, end in pieces]

    def kernel_time(self, start, end):
        return sum(duration for begun, duration in self.kernels if start <= begun < end)


def breakdown(profiler, seconds, tokens):
    """{stage: seconds a token}; time that is in no stage is "rest".

    On a CPU the clock is measured, on CUDA the time of kernels.
    """
    cpu = torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == cpu]
    cuda = any(event.self_device_time_total for event in events)
    spent = dict.fromkeys(STAGES, 0.0)
    for time_range in ranges_of(events):
        for stage, microseconds in time_range.shares(cuda):
            if stage in spent:
                spent[stage] += microseconds / 1e6 / tokens
    return spent | {"rest": seconds / tokens - sum(spent.values())}


def ranges_of(events):
    """The ranges among the profiler's events, each with the operations that lie directly in it."""
    ranges, open_ranges = [], []
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while open_ranges and open_ranges[-1].end <= event.time_range.start:
            open_ranges.pop()
        if event.name.startswith("bench:"):
            new = Range(event.name.removeprefix("bench:"), event)
            if open_ranges:
                open_ranges[-1].inner_time += new.end - new.start
                open_ranges[-1].contains_code |= new.label == "code"
            ranges.append(new)
            open_ranges.append(new)
        elif open_ranges:
            open_ranges[-1].note(event)
    return ranges
