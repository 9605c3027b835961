"""Timing: one row per layer, offsets, direction, dtype and backend, checked before it is timed.

A row's result is compared with the reference twice: on the same options with sizes cut, and at full size on some
elements of the output and of each gradient. Rounds of ours and of the peers are interleaved, so that what disturbs
the machine disturbs all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcn_kernels.bench import ceiling, gpu_ceiling, layers
from dcn_kernels.bench.clocks import clock, threads_set
from dcn_kernels.bench.inputs import DIRECTIONS, Inputs, make_inputs, runner
from dcn_kernels.bench.peers import Peer, PeerError
from dcn_kernels.bench.spot_checks import check_small, check_spots
from dcn_kernels.check import calls
from dcn_kernels.check import gradients as gradcheck
from dcn_kernels.dtypes import DTYPES, accumulator
from dcn_kernels.ops.registry import OPS

OFFSETS = ("zero", "smooth", "random")
_PRODUCTS = {"forward": 1, "backward": 2}  # matrix products of a plain convolution, each as large as the forward's
_LEAST_ROUNDS, _MOST_SAMPLES = 5, 200
NOISY = 0.25  # interquartile range over median above which a row is called noisy

RowDict = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What `profile` runs."""

    directions: tuple[str, ...] = DIRECTIONS
    dtypes: tuple[str, ...] = ("float32",)
    backends: tuple[str, ...] = ("cpu",)
    offsets: tuple[str, ...] = ("smooth", "random")
    threads: int | None = None
    seed: int = 0
    budget: float = 0.2  # seconds of timing a row, for us and for each peer
    reuse: bool = False  # forward into one array, backward with what a forward kept, as most peers do


# ---------------------------------------------------------------- a row


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    low, middle, high = np.percentile(np.asarray(list(samples)), [25, 50, 75])
    return float(low), float(middle), float(high)


def profile(
    chosen: dict[str, layers.Layer],
    settings: Settings,
    peers: Iterable[Peer] = (),
    progress: Callable[[str, int, int], None] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Iterator[RowDict]:
    """Check and time; rows as bench_results/README.md describes them.

    Parameters
    ----------
    chosen : dict of name -> layer
    settings : Settings
    peers : running peers
    progress : function of (what, done, total)
    warn : function of a message

    Raises
    ------
    Mismatch
        A result is wrong; nothing wrong is ever timed.
    """
    table = [
        (name, layer, offsets, dtype, backend, direction)
        for name, layer in chosen.items()
        for offsets in (settings.offsets if OPS[layer["op"]].has_offsets else ("none",))
        for dtype in settings.dtypes
        for backend in settings.backends
        for direction in settings.directions
    ]
    peers = list(peers)
    with threads_set(settings.threads) as threads:
        known: tuple[Any, ...] | None = None
        ceilings: dict[tuple[Any, ...], dict[str, Any]] = {}
        for done, (name, layer, offsets, dtype, backend, direction) in enumerate(table):
            if progress:
                progress(f"{name} {offsets} {direction} {dtype} {backend}", done, len(table))
            op = OPS[layer["op"]]
            missing = gradcheck.not_written(op, backend)
            if missing:
                warn(f"{name}: {op.name} is {missing}: left out")
                continue
            kind = "random" if offsets == "none" else offsets
            if known != (name, kind, dtype):
                inputs = make_inputs(layer, kind, dtype, settings.seed)
                known, small = (name, kind, dtype), {}
            # before any check of this direction, which would compile it
            first = clock(backend).first_milliseconds(runner(inputs, direction, backend, reuse=settings.reuse))
            if (backend, direction) not in small:
                small[backend, direction] = check_small(layer, kind, dtype, backend, settings.seed, (direction,))
            row = {"op": op.name, "layer": name, "shape": layers.shown(layer), "spread": layer["spread"]}
            row |= {"direction": direction, "backend": backend, "dtype": dtype, "offsets": offsets, "threads": threads}
            row["small_check"] = small[backend, direction]
            row |= _row(inputs, direction, backend, settings, threads, peers, warn, first)
            product = _plain_product(inputs)
            measured = (backend, dtype, (name, kind) if product else None)  # a product beside the rows of its arrays
            limits = ceilings.get(measured) or _ceiling(dtype, backend, threads, product)
            ceilings[measured] = limits
            ceilings[backend, dtype, None] = {**limits, "products_ms": []}
            row |= _rates(inputs, direction, row["median_ms"], limits)
            if row["spread_of_samples"] > NOISY:
                warn(f"{name} {offsets} {direction}: noisy: the middle half of the samples spans "
                     f"{100 * row['spread_of_samples']:.0f} % of the median")  # fmt: skip
            yield row
        if progress and table:
            progress("", len(table), len(table))


def _row(
    inputs: Inputs,
    direction: str,
    backend: str,
    settings: Settings,
    threads: int,
    peers: list[Peer],
    warn: Callable[[str], None],
    first: float,
) -> RowDict:
    op, run, ticks = inputs.op, runner(inputs, direction, backend, reuse=settings.reuse), clock(backend)
    row: RowDict = {"spot_check": None}
    if backend != "reference":
        row["spot_check"] = check_spots(inputs, backend, direction, settings.seed)
    row["temp_bytes"] = None if backend == "reference" else ticks.temporary_bytes(run)
    contestants: dict[str, Peer] = {}
    errors: dict[str, float | None] = {}
    if peers:
        result = calls.to_numpy(run())
        for peer in peers:
            try:
                errors[peer.name] = peer.load(inputs, direction, backend, result)
                contestants[peer.name] = peer
            except PeerError as error:
                warn(f"{peer.name}: {op.name} {direction}: {error}")
    samples: list[float] = []
    cold: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in contestants}
    ticks.milliseconds(run)  # warm
    budget, rounds = settings.budget, 0
    slice_ms = 1e3 * budget / _LEAST_ROUNDS
    while rounds < _LEAST_ROUNDS or (sum(samples) < 0.8e3 * budget and len(samples) < _MOST_SAMPLES):
        spent = 0.0
        while spent == 0 or (spent < slice_ms and len(samples) < _MOST_SAMPLES):
            samples.append(ticks.milliseconds(run))
            cold += ticks.cold_milliseconds(run)
            spent += samples[-1]
        for name in list(contestants):
            try:
                theirs[name] += contestants[name].run(slice_ms)
            except PeerError as error:
                warn(f"{name}: {error}")
                del contestants[name]
        rounds += 1
        spent_all = sum(samples) + sum(map(sum, theirs.values()))
        if rounds >= 3 and spent_all > 4e3 * budget * (1 + len(theirs)):  # one call takes longer than a round should
            break
    low, median, high = quartiles(samples)
    row |= {"median_ms": median, "quartiles_ms": [low, high], "samples_ms": [round(s, 5) for s in samples]}
    row |= {"compile_ms": max(0.0, first - median), "spread_of_samples": (high - low) / median}
    row |= {"cold_ms": quartiles(cold)[1] if cold else None}
    row |= {"start_ms": quartiles(ticks.start_ms)[1] if ticks.start_ms else None}
    row["against"] = {
        name: {
            "median_ms": quartiles(theirs[name])[1],
            "samples_ms": [round(s, 5) for s in theirs[name]],
            "ratio": quartiles(theirs[name])[1] / median,
            "max_error": errors[name],
            "what": peer.what,
        }
        for name, peer in contestants.items()
    }
    return row


def _ceiling(dtype: str, backend: str, threads: int, product: tuple[ceiling.Shape, ...]) -> dict[str, Any]:
    """This machine's rates now, and the time of a layer's plain product."""
    if backend == "cuda":
        return gpu_ceiling.measure(dtype, product)
    return ceiling.measure(threads, str(accumulator(DTYPES[dtype])), product)


def _rates(inputs: Inputs, direction: str, median: float, limits: dict[str, Any]) -> RowDict:
    """Work per second, its share of the ceiling, and the time of a plain convolution's matrix product."""
    op = inputs.op
    itemsize = next(iter(inputs.sample.arrays.values())).dtype.itemsize
    rates: RowDict = {
        "gflops": op.flops(inputs.sizes, direction) / median / 1e6,
        "gbytes_s": op.bytes(inputs.sizes, direction, itemsize) / median / 1e6,
        "plain_ms": None,
        "plain_ratio": None,
    }
    if limits["products_ms"]:
        rates["plain_ms"] = limits["products_ms"][0] * _PRODUCTS[direction]
        rates["plain_ratio"] = median / rates["plain_ms"]
    rates["ceiling"] = {"gflops": limits["gflops"], "gbytes_s": limits["gbytes_s"]}
    return rates | shares(rates, rates["ceiling"])


def shares(row: RowDict, limits: dict[str, float]) -> RowDict:
    """How near a row comes to the machine's rates, and to which of them."""
    arithmetic, memory = row["gflops"] / limits["gflops"], row["gbytes_s"] / limits["gbytes_s"]
    share = max(arithmetic, memory)
    bound = ("arithmetic" if arithmetic >= memory else "memory") if share >= 0.1 else "neither"
    return {"ceiling": limits, "ceiling_share": share, "bound": bound}


def best_ceilings(rows: list[RowDict]) -> None:
    """Give the rows of a run the best rates and times of products seen in it: they were measured several times, the
    machine busy or not."""
    groups: dict[Any, list[RowDict]] = {}
    products: dict[Any, list[RowDict]] = {}
    for row in rows:
        where = (row["backend"], row["dtype"], row["threads"])
        groups.setdefault(where, []).append(row)
        if row["plain_ms"] is not None:
            products.setdefault((*where, row["op"], row["shape"]), []).append(row)
    for group in groups.values():
        limits = {name: max(row["ceiling"][name] for row in group) for name in ("gflops", "gbytes_s")}
        for row in group:
            row |= shares(row, limits)
    for group in products.values():
        least = min(row["plain_ms"] / _PRODUCTS[row["direction"]] for row in group)
        for row in group:
            row["plain_ms"] = least * _PRODUCTS[row["direction"]]
            row["plain_ratio"] = row["median_ms"] / row["plain_ms"]


def _plain_product(inputs: Inputs) -> tuple[ceiling.Shape, ...]:
    """The matrix product of a plain operator of the same shape; nothing where there is none."""
    return () if inputs.op.product is None else (inputs.op.product(inputs.sizes),)
