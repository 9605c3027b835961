"""Timing: one row per layer, offsets, direction, dtype and backend, checked before it is timed.

A row's result is compared with the reference twice: on the same options with sizes cut, and at full size on some
elements of the output and of each gradient. Rounds of ours and of the peers are interleaved, so that what disturbs
the machine disturbs all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from dcn_kernels import ceiling, environment, gradcheck, layers, shapes
from dcn_kernels.op import Op, Sample, call, function
from dcn_kernels.peers import Peer, PeerError
from dcn_kernels.registry import OPS

DIRECTIONS = ("forward", "backward")
OFFSETS = ("zero", "smooth", "random")
_PRODUCTS = {"forward": 1, "backward": 2}  # matrix products of a plain convolution, each as large as the forward's
_LEAST_ROUNDS, _MOST_SAMPLES = 5, 200
_SPOTS = 32  # output positions at least, of all channels (or one RoI), whose results are compared at full size
_ELEMENTS = 256  # of the output, and of each gradient that has one value or more a position
NOISY = 0.25  # interquartile range over median above which a row is called noisy

RowDict = dict[str, Any]


class Mismatch(RuntimeError):
    """A result that is about to be timed is wrong."""


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


# ---------------------------------------------------------------- clocks


class CpuClock:
    """Times and memory of calls that are done when they return."""

    start_ms: tuple[float, ...] = ()  # a call is done when it returns: no time apart for starting it

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Of one call."""
        start = perf_counter()
        run()
        return 1e3 * (perf_counter() - start)

    first_milliseconds = milliseconds

    def cold_milliseconds(self, run: Callable[[], Any]) -> list[float]:
        """No times: caches of a CPU are left as they are."""
        return []

    def temporary_bytes(self, run: Callable[[], Any]) -> int | None:
        """What one call allocates besides its results."""
        if environment.why_not("cpu"):
            return None
        from dcn_kernels.cpu.workspace import track

        with track() as tracked:
            run()
        return tracked.peak_bytes


class CudaClock:
    """Times by CUDA events on CuPy's current stream, memory by the peak of a pool of its own.

    A GPU that waits for the next launch would have the launches timed, not the kernels. So work that takes it longer
    than the CPU takes to start the call goes ahead: a buffer twice as large as the second-level cache is overwritten,
    as often as that takes. This also empties the cache; a warm time has one call more between it and the clock.
    """

    LEAD_MS = 0.05  # of work ahead, beyond what the launches take
    MOST_AHEAD = 500  # a GPU's queue is not endless

    def __init__(self) -> None:
        self._buffer: Any = None
        self._overwrite_ms = 0.0
        self.start_ms: list[float] = []  # the CPU's share of each call: checks, and starting the kernels

    def first_milliseconds(self, run: Callable[[], Any]) -> float:
        """Of one call by the wall, until the GPU is done: with all that is compiled in it."""
        import cupy

        begin = perf_counter()
        run()
        cupy.cuda.get_current_stream().synchronize()
        return 1e3 * (perf_counter() - begin)

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Of the GPU in one call, right after another."""
        return self._timed(run, run)

    def cold_milliseconds(self, run: Callable[[], Any]) -> list[float]:
        """The same with none of the call's arrays in the second-level cache."""
        return [self._timed(run, lambda: None)]

    def _timed(self, run: Callable[[], Any], before: Callable[[], Any]) -> float:
        import cupy

        self._keep_busy(3 * self.start_ms[-1] if self.start_ms else 0.0)
        before()
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        begin = perf_counter()
        run()
        self.start_ms.append(1e3 * (perf_counter() - begin))
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end))

    def _keep_busy(self, milliseconds: float) -> None:
        import cupy

        if self._buffer is None:
            number = cupy.cuda.runtime.getDevice()
            size = 2 * cupy.cuda.runtime.getDeviceProperties(number)["l2CacheSize"]
            self._buffer = cupy.empty(max(size, 32 << 20), cupy.uint8)
            for _ in range(2):  # the first may take longer
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                self._overwrite()
                end.record()
                end.synchronize()
                self._overwrite_ms = float(cupy.cuda.get_elapsed_time(start, end))
        often = 1 + int((milliseconds + self.LEAD_MS) / max(self._overwrite_ms, 1e-3))
        for _ in range(min(often, self.MOST_AHEAD)):
            self._overwrite()

    def _overwrite(self) -> None:
        import cupy

        self._buffer.data.memset_async(0, self._buffer.nbytes, cupy.cuda.get_current_stream())

    def temporary_bytes(self, run: Callable[[], Any]) -> int | None:
        """What a pool that starts empty holds after one call, less the results: it gives nothing back meanwhile."""
        import cupy

        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            result = run()
            cupy.cuda.get_current_stream().synchronize()
            if isinstance(result, dict):
                result = tuple(result.values())
            results = result if isinstance(result, tuple) else (result,)
            return max(0, pool.total_bytes() - sum(array.nbytes for array in results))


def clock(backend: str) -> CpuClock | CudaClock:
    """The clock of a backend."""
    return CudaClock() if backend == "cuda" else CpuClock()


@contextmanager
def threads_set(threads: int | None) -> Iterator[int]:
    """Within, the CPU backend uses so many threads; yields how many that is."""
    if environment.why_not("cpu"):
        yield threads or environment.cores()
        return
    from dcn_kernels.cpu.threads import get_num_threads, set_num_threads

    if threads is None:
        yield get_num_threads()
        return
    set_num_threads(threads)
    try:
        yield threads
    finally:
        set_num_threads(None)


# ---------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """A layer's arrays in a dtype."""

    op: Op
    sample: Sample
    grad_output: np.ndarray
    sizes: dict[str, int]
    shape: tuple[int, ...]


def make_inputs(layer: layers.Layer, offsets: str, dtype: str, seed: int) -> Inputs:
    """The arrays of a layer; ValueError where its sizes do not fit each other."""
    op = OPS[layer["op"]]
    try:
        sample = op.layer_sample(layer, offsets=offsets, spread=layer["spread"], seed=seed)
    except KeyError as missing:
        raise ValueError(f"{op.name}: the layer needs the size {missing}") from None
    storage = shapes.DTYPES[dtype]
    sample = dataclasses.replace(sample, arrays={name: a.astype(storage) for name, a in sample.arrays.items()})
    sizes, shape = gradcheck.output_shape(op, sample)
    grad_output = np.random.default_rng([seed, 1]).standard_normal(shape, np.float32).astype(storage)
    return Inputs(op, sample, grad_output, sizes, shape)


def runner(inputs: Inputs, direction: str, backend: str, *, reuse: bool = False) -> Callable[[], Any]:
    """A function of no arguments that runs one call; the arrays are on the backend's device already.

    With `reuse` the forward always writes into the same array, and the backward is given what a forward can keep.
    """
    op, params = inputs.op, inputs.sample.params
    arrays = {**dict.fromkeys(op.arrays), **gradcheck.to_backend(backend, inputs.sample.arrays)}
    if direction == "forward":
        out = gradcheck.to_backend(backend, {"out": np.empty_like(inputs.grad_output)})["out"] if reuse else None
        return lambda: call(op, direction, arrays, params, backend=backend, out=out)
    if reuse and op.saved:
        asked = {**params, **{f"return_{name}": True for name in op.saved}}
        _, *kept = call(op, "forward", arrays, asked, backend=backend)
        arrays |= dict(zip(op.saved, kept, strict=True))
    arrays = {"grad_output": gradcheck.to_backend(backend, {"g": inputs.grad_output})["g"], **arrays}
    return lambda: call(op, direction, arrays, params, backend=backend)


# ---------------------------------------------------------------- checks before timing


def check_small(
    layer: layers.Layer,
    offsets: str,
    dtype: str,
    backend: str,
    seed: int,
    directions: tuple[str, ...] = DIRECTIONS,
) -> float:
    """The same options with sizes cut, against the reference: the largest error over its tolerance."""
    try:
        inputs = make_inputs(layers.cut(layer), offsets, dtype, seed)
    except ValueError:  # an operator whose channels are a product of other sizes
        inputs = make_inputs(layers.cut(layer, channels=False), offsets, dtype, seed)
    return _compare(inputs, inputs.sample, {}, backend, directions)


def check_spots(inputs: Inputs, backend: str, direction: str, seed: int) -> float:
    """Some elements of the full-size result against the reference: the largest error over its tolerance."""
    arrays = inputs.sample.arrays
    channels = [inputs.shape[1], *(arrays[name].shape[1] for name in inputs.op.coordinates if name in arrays)]
    count = max(_SPOTS, -(-_ELEMENTS // min(channels)))
    part, index = (inputs.op.part or _leading_part(inputs.op))(inputs.sample, count, seed)
    return _compare(inputs, part, index, backend, (direction,))


def _leading_part(op: Op) -> Callable[[Sample, int, int], tuple[Sample, dict[str, Any]]]:
    """One slice of the output's first axis (an image or a RoI): they do not depend on each other."""
    letter = op.output.split()[0]

    def part(sample: Sample, count: int, seed: int) -> tuple[Sample, dict[str, Any]]:
        sizes, _ = gradcheck.output_shape(op, sample)
        picked = np.random.default_rng(seed).integers(sizes[letter], size=1)
        sliced = [name for name in sample.arrays if op.arrays[name].split()[0] == letter]
        arrays = {**sample.arrays, **{name: sample.arrays[name][picked] for name in sliced}}
        return dataclasses.replace(sample, arrays=arrays), dict.fromkeys(["output", *sliced], (picked,))

    return part


def _compare(inputs: Inputs, part: Sample, index: dict[str, Any], backend: str, directions: Iterable[str]) -> float:
    """`part` on the reference against the whole on a backend, where the part's results belong."""
    op = inputs.op
    first = next(iter(inputs.sample.arrays.values()))
    wide = shapes.accumulator(first.dtype)
    exact = {**dict.fromkeys(op.arrays), **{name: array.astype(wide) for name, array in part.arrays.items()}}
    params = op.parameters(inputs.sample.params)
    worst = 0.0
    # a coordinate is rounded to the type of sums, which moves the weights of a sample as much
    rounding = float(np.finfo(wide).eps) * max(inputs.sizes.get(letter, 1) for letter in ("H", "W"))
    here = index.get("output", (...,))
    # the function itself: a part is no call that the shape checks know
    want = gradcheck.to_numpy(function(op, "forward", "reference")(**exact, **params, out=None))
    if "forward" in directions:
        got = gradcheck.forward(op, inputs.sample, backend)[here]
        length = gradcheck.reduction_length(op, inputs.sizes, "forward", int(np.prod(inputs.shape)))
        worst = _ratio(op, "output", got, want, gradcheck.tolerance(first.dtype, length) + rounding)
    if "backward" in directions:
        names = tuple(name for name in op.differentiable if name in part.arrays)
        sparse = np.zeros_like(inputs.grad_output)
        sparse[here] = inputs.grad_output[here]
        got_all = gradcheck.backward(op, inputs.sample, backend, sparse)
        grad_output = inputs.grad_output[here].astype(wide).reshape(want.shape)
        want_all = function(op, "backward", "reference")(grad_output=grad_output, **exact, **params, wrt=names)
        for name in names:
            got, want = got_all[name], want_all[name]
            if name in index:
                rest = got.copy()
                rest[index[name]] = 0
                if rest.any():
                    raise Mismatch(f"{op.name}: the gradient of {name} is not 0 where grad_output is 0")
                got = got[index[name]]
            length = gradcheck.reduction_length(op, inputs.sizes, "backward", inputs.sample.arrays[name].size)
            bound = gradcheck.tolerance(first.dtype, length) + rounding
            worst = max(worst, _ratio(op, f"the gradient of {name}", got, want, bound))
    return worst


def _ratio(op: Op, what: str, got: np.ndarray, want: np.ndarray, bound: float) -> float:
    error, at = gradcheck.relative_error(got.reshape(want.shape), want)
    if not error <= bound:
        raise Mismatch(f"{op.name}: {what} differs from the reference by {error:.2g} (tolerance {bound:.2g}) at {at}")
    return error / bound


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
        for offsets in (settings.offsets if has_offsets(OPS[layer["op"]]) else ("none",))
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


def has_offsets(op: Op) -> bool:
    """Some differentiable argument is a coordinate that may stay in float32: how it wanders matters."""
    return any(name in op.coordinates for name in op.differentiable)


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
        result = gradcheck.to_numpy(run())
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
        return _cuda_ceiling(dtype, product)
    return ceiling.measure(threads, str(shapes.accumulator(shapes.DTYPES[dtype])), product)


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
    """The matrix product of a plain convolution of the same shape; nothing where there is no weight."""
    weight = inputs.sample.arrays.get("weight")
    if weight is None:
        return ()
    O, channels, KH, KW = weight.shape
    groups = inputs.sizes["C"] // channels
    pixels = inputs.shape[2] * inputs.shape[3]
    return ((inputs.sizes["N"] * groups, O // groups, channels * KH * KW, pixels),)


def _cuda_ceiling(dtype: str, product: tuple[ceiling.Shape, ...]) -> dict[str, Any]:
    """As `ceiling.measure`, on the GPU through CuPy."""
    import cupy

    ticks = CudaClock()

    def best(run: Callable[[], Any]) -> float:
        ticks.milliseconds(run)
        return min(ticks.milliseconds(run) for _ in range(10))

    def multiply(m: int, k: int, n: int) -> float:
        kind = "float16" if dtype == "bfloat16" else dtype  # CuPy's matmul has no bfloat16; GPUs do both at one rate
        a, b = cupy.ones((m, k), kind), cupy.ones((k, n), kind)
        return best(lambda: cupy.matmul(a, b))

    size = 4096
    source = cupy.ones(1 << 28, cupy.uint8)
    return {
        "gflops": 2 * size**3 / multiply(size, size, size) / 1e6,
        "gbytes_s": 2 * source.nbytes / best(source.copy) / 1e6,
        "products_ms": [many * multiply(m, k, n) for many, m, k, n in product],
    }
