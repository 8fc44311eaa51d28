"""What the benchmarks share: the command line, checks against float64, timing, peak memory, the record, the table.

A script describes a `Case`: contenders that do the same work, what they are checked against, and the targets. `compare`
checks every contender first, times those that pass in interleaved rounds, measures their memory, and reports.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from torch import Tensor

Results = dict[str, Tensor]
# One call of a contender; the argument says which copy of the inputs to take.
Run = Callable[[int], Results]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Where plain PyTorch is exact by luck, an error of a few float32 roundings is no failure.
FLOOR = 4 * torch.finfo(torch.float32).eps
# Beyond this error plain PyTorch, which sets the bar, would itself be broken.
SANE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
NOT_CHECKED = "not checked: it computes nothing, it sets the pace"
# Short calls are timed this many at once, each on its own copy of the inputs, so that no cache holds them.
COPIES = 20
# Linux: writing 5 sets the high-water mark of the resident memory back.
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Check:
    """exact: results in float64; plain: those of plain PyTorch in the run's dtype, whose error sets the bar.

    Both hold the part of the results that `part` cuts out: at full size float64 would not fit.
    """

    exact: Results
    plain: Results
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def errors(self, results: Results) -> dict[str, float]:
        """Relative root mean square error of each result."""
        return {name: relative_error(self.part(value), self.exact[name]) for name, value in results.items()}

    def bars(self, dtype: torch.dtype) -> dict[str, float]:
        """The most that each error may be: twice that of plain PyTorch."""
        plain = {name: relative_error(value, self.exact[name]) for name, value in self.plain.items()}
        return {name: min(max(2 * error, FLOOR), SANE[dtype]) for name, error in plain.items()}


@dataclass(frozen=True)
class Contender:
    """One implementation. key: for the command line; computes: what one call yields, in words.

    prepare: imports what it needs and returns the call. missing: why it cannot run here. check: None for what sets a
    pace and computes nothing.
    """

    key: str
    name: str
    computes: str
    prepare: Callable[[], Run]
    missing: str = ""
    check: Check | None = None


@dataclass(frozen=True)
class Target:
    """Something to show: `value` at most `limit`. value: None where it could not be measured."""

    name: str
    value: float | None
    limit: float

    def figures(self) -> dict[str, Any]:
        """met: None where it could not be judged."""
        met = None if self.value is None else self.value <= self.limit
        return {"name": self.name, "value": self.value, "at_most": self.limit, "met": met}


@dataclass
class Entry:
    """What was found out about a contender. ratios: its time over that of ours, round by round."""

    key: str
    name: str
    computes: str
    status: str = "ok"
    errors: dict[str, float] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ok(self) -> bool:
        return self.status in ("ok", NOT_CHECKED)


@dataclass(frozen=True)
class Case:
    """One comparison. The first contender is ours: ratios are relative to it.

    targets: from the entries by key. settings: what else the record says. short: calls of microseconds, timed many at
    a time.
    """

    shape: Mapping[str, int]
    dtype: torch.dtype
    contenders: Sequence[Contender]
    targets: Callable[[Mapping[str, Entry]], list[Target]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    short: bool = False


def parse(
    description: str, flags: Mapping[str, tuple[int, int, str]], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line. flags: of the shape, name -> (default on a CPU, default on a GPU, help)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (cpu, gpu, text) in flags.items():
        default = f"{cpu}" if cpu == gpu else f"{cpu} on a CPU, {gpu} on a GPU"
        parser.add_argument(f"--{name}", type=_positive, help=f"{text} (default {default})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--impl", default="auto", choices=("auto", "reference", "triton"), help="ours (default auto)")
    parser.add_argument("--rounds", type=_positive, help="timed rounds (default 5 on a CPU, 20 on a GPU)")
    parser.add_argument("--warmup", type=_positive, help="rounds before those (default 1 on a CPU, 3 on a GPU)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--only", nargs="+", metavar="KEY", help="these contenders, besides ours")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    parser.add_argument("--require", action="store_true", help="exit 1 where a target is missed or cannot be judged")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = args.device.type == "cuda"
    for name, (cpu, gpu, _) in flags.items():
        if getattr(args, _attribute(name)) is None:
            setattr(args, _attribute(name), gpu if on_gpu else cpu)
    args.dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    args.rounds, args.warmup = args.rounds or (20 if on_gpu else 5), args.warmup or (3 if on_gpu else 1)
    args.flags = shlex.join(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _attribute(flag: str) -> str:
    return flag.replace("-", "_")


def not_installed(module: str, package: str) -> str:
    """Why a contender cannot run that needs `module`; "" where it is there."""
    return "" if find_spec(module) else f"not installed: pip install {package}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative root mean square error; not a number where `got` holds one."""
    if got.shape != want.shape:
        raise ValueError(f"a result has shape {list(got.shape)}, the exact one {list(want.shape)}")
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


def compare(benchmark: str, case: Case, args: argparse.Namespace) -> int:
    """Check, time and weigh the contenders of a case; print the table and write the record. Returns the exit status."""
    keys = [contender.key for contender in case.contenders]
    unknown = set(args.only or ()) - set(keys)
    if unknown:
        raise SystemExit(f"--only: there is no {', '.join(sorted(unknown))}; the contenders are {', '.join(keys)}")
    chosen = [c for c in case.contenders if args.only is None or c.key in (keys[0], *args.only)]
    entries = {contender.key: Entry(contender.key, contender.name, contender.computes) for contender in chosen}
    prepared = {contender.key: _check(contender, entries[contender.key], case.dtype) for contender in chosen}
    runs = {key: run for key, run in prepared.items() if run is not None and entries[key].ok}
    ours = entries[keys[0]]
    if ours.ok:
        _time(entries, runs, case, args)
        for contender in chosen:
            if contender.key in runs and contender.check is not None:
                entries[contender.key].peak_bytes = peak_bytes(runs[contender.key], args.device)
    targets = case.targets(entries) if ours.ok else []
    complaints = _complaints(entries, ours, targets, required=args.require)
    record = {
        "benchmark": benchmark,
        **report.about_this_run(f"python kernels/benchmarks/{benchmark}.py {args.flags}", args.device),
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "settings": {"rounds": args.rounds, "warmup": args.warmup, **case.settings},
        "entries": [_figures(entry) for entry in entries.values()],
        "targets": [target.figures() for target in targets],
        "complaints": complaints,
    }
    print(report.table(record))
    for line in complaints:
        print(line, file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 1 if complaints else 0


def _check(contender: Contender, entry: Entry, dtype: torch.dtype) -> Run | None:
    """Prepare a contender and judge its results; the entry says what came of it."""
    if contender.missing:
        entry.status = contender.missing
        return None
    try:
        run = contender.prepare()
        results = run(0)
    except torch.OutOfMemoryError:
        entry.status = "out of memory"
        return None
    if contender.check is None:
        entry.status = NOT_CHECKED
        return run
    entry.errors, bars = contender.check.errors(results), contender.check.bars(dtype)
    entry.bars = {name: bars[name] for name in entry.errors}
    # Written so that an error that is no number fails too.
    wrong = [name for name, error in entry.errors.items() if not error <= entry.bars[name]]
    if wrong:
        detail = ", ".join(
            f"{name} is off by {entry.errors[name]:.1e}, allowed {entry.bars[name]:.1e}" for name in wrong
        )
        entry.status = f"check failed: {detail}"
    return run


def _time(entries: Mapping[str, Entry], runs: Mapping[str, Run], case: Case, args: argparse.Namespace) -> None:
    """Every round runs every contender once, so that drift of the machine hits all alike."""
    calls = dict.fromkeys(runs, 1)
    for key, run in runs.items():
        for _ in range(args.warmup):
            seconds = time_calls(run, args.device, 1)
        if case.short:
            calls[key] = max(1, min(COPIES, int(0.02 / max(seconds, 1e-9))))
            time_calls(run, args.device, calls[key])
    order = list(runs)
    ours = entries[order[0]].seconds
    for round_ in range(args.rounds):
        # Between rounds, lest the collector runs inside one.
        gc.collect()
        gc.disable()
        # A call pays for the caches that the one before it leaves: there and back, each has both its neighbours.
        for key in order if round_ % 2 == 0 else reversed(order):
            entries[key].seconds.append(time_calls(runs[key], args.device, calls[key]))
        gc.enable()
    for key in runs:
        entries[key].ratios = [theirs / own for theirs, own in zip(entries[key].seconds, ours, strict=True)]


def time_calls(run: Run, device: torch.device, calls: int) -> float:
    """Seconds a call takes, of `calls` in a row. Results are kept until the end: each call writes to its own memory."""
    if device.type == "cpu":
        # Of a single thread its own time: what other programs take meanwhile does not count.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        kept = [run(i) for i in range(calls)]
        seconds = clock() - start
        del kept
        return seconds / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if calls > 1:
        # The device sleeps while the calls queue up, so that what is timed is its work and not the host's.
        torch.cuda._sleep(50_000_000)
    begin.record()
    kept = [run(i) for i in range(calls)]
    end.record()
    end.synchronize()
    del kept
    return begin.elapsed_time(end) / 1000 / calls


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory in use during a call, over what was in use before and over its results.

    On a GPU, what torch's allocator gave out. On a CPU, the median of three calls; None where it cannot be told.
    """
    gc.collect()
    if device.type == "cuda":
        return _peak_on_gpu(run, device)
    return int(median(_peak_of_process(run) for _ in range(3))) if CLEAR_REFS.exists() else None


def _peak_on_gpu(run: Run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = run(0)
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before - _bytes_of(results))


def _peak_of_process(run: Run) -> int:
    """By the kernel's high-water mark of this process, set back before the call (Linux).

    What malloc keeps is returned first, or the call could use it unseen.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _memory("VmRSS")
    CLEAR_REFS.write_text("5")
    results = run(0)
    return max(0, _memory("VmHWM") - before - _bytes_of(results))


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _bytes_of(results: Results) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results.values()}.values())


def _complaints(entries: Mapping[str, Entry], ours: Entry, targets: Sequence[Target], *, required: bool) -> list[str]:
    """Why the exit status is 1."""
    lines = [f"{e.name}: {e.status}" for e in entries.values() if e.status.startswith("check failed")]
    if not ours.ok:
        lines.append(f"{ours.name}: {ours.status}. No speed-up is reported")
    if required:
        lines += [report.target_line(figures) for figures in (t.figures() for t in targets) if not figures["met"]]
        if not targets:
            lines.append("--require: there is no target that this run could judge")
    return lines


def _figures(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "name": entry.name,
        "computes": entry.computes,
        "status": entry.status,
        # JSON has no word for what is not a number.
        "errors": {name: error if math.isfinite(error) else None for name, error in entry.errors.items()},
        "allowed_errors": entry.bars,
        "milliseconds": report.spread([1000 * s for s in entry.seconds]),
        "time_over_ours": report.spread(entry.ratios),
        "peak_bytes_over_inputs_and_outputs": entry.peak_bytes,
    }


def time_ratio(entries: Mapping[str, Entry], key: str, to: str) -> float | None:
    """Time of one contender over that of another, the median over rounds; None where one was not timed."""
    pair = [entries[k].seconds if k in entries else [] for k in (key, to)]
    return median(a / b for a, b in zip(*pair, strict=True)) if all(pair) else None


def memory_ratio(entries: Mapping[str, Entry], key: str, to: str) -> float | None:
    """Peak memory of one contender over that of another; None where one was not measured."""
    one, other = (entries[k].peak_bytes if k in entries else None for k in (key, to))
    return None if one is None or not other else one / other
