"""What deforming costs in whole networks (Table 4 of the paper): parameters, arithmetic, time and memory, by layer.

Four networks on ResNet-101, plain and deformable. A layer is a matrix product (a convolution or a fully connected
layer) or a call of an operator of this library; which of the two variants it belongs to is its `part`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dcn_kernels.bench import ceiling, clocks, gpu_ceiling, layers, spot_checks
from dcn_kernels.bench.inputs import make_inputs, runner

# shared: in both variants; plain: only there; deformable: in place of the plain one; offsets: what makes the offsets
PARTS = ("shared", "plain", "deformable", "offsets")
CLASSES, BINS, REGIONS = 20 + 1, 7 * 7, 300  # PASCAL VOC with background; the RoIs of an image

NOT_COMPARABLE = (
    "The paper's seconds are those of its column net forward, on an NVIDIA K40, in its own framework, for the "
    "whole network with its poolings, normalisations and proposals. Here layers are timed one by one: hold only the "
    "ratio beside the paper's. The paper tells nothing of memory.",
    "Of the paper's seconds those of DeepLab and of the class-aware RPN are unverified: they could not be held beside "
    "the table itself. DeepLab's on VOC are also told as 0.094 and 0.098, here taken for its overall runtime.",
    "Convolutions and fully connected layers are run as their matrix product. A good plain convolution takes about as "
    "long and gathers its columns by small tiles; gathering is left out, in time and in memory, so the ratios are "
    "rather too high than too low.",
    "Memory: weights and results in float32 as they are, all results kept, as for a backward; of the temporary memory, "
    "which each layer gives back, the largest. That of a product is how far a fresh process grows, that of an operator "
    "what it allocates.",
    "The paper tells parameters to 0.1 M and not what it counts: its totals are 1.0 to 1.4 M above the sum of the "
    "layers it describes, in the plain networks too. The detectors' region proposals were trained apart and are left "
    "out here.",
)


@dataclass(frozen=True)
class NetworkLayer:
    """One layer, or `count` alike."""

    name: str
    part: str
    parameters: int = 0
    count: int = 1
    product: tuple[int, int, int] | None = None  # (m, k, n) of its matrix product, or
    call: layers.Layer | None = None  # the layer of an operator

    def gflop(self) -> float:
        """Arithmetic of all `count`, a multiplication and an addition as two; a bilinear sample as eight."""
        if self.product:
            m, k, n = self.product
            return 2e-9 * self.count * m * k * n
        call = self.call or {}
        if call["op"] == "deform_conv2d":
            columns = call["C"] * call["kernel"][0] * call["kernel"][1] * call["H"] * call["W"]
            return 1e-9 * columns * (2 * call["O"] + 8)
        pooled = call["C"] * REGIONS * (1 if "ps_" in call["op"] else BINS)
        return 1e-9 * pooled * 32  # as the operators' rows count: four samples a bin


@dataclass(frozen=True)
class Network:
    """A network's layers, and what Table 4 says of it: (plain, deformable)."""

    name: str
    map_size: tuple[int, int]
    layers: tuple[NetworkLayer, ...]
    paper_parameters: tuple[float, float]  # millions
    paper_seconds: tuple[float, float]  # "net forward", not the overall runtime; for doubts see NOT_COMPARABLE
    remark: str = ""

    def parameters(self, part: str) -> int:
        """Of all layers of a part."""
        return sum(layer.parameters for layer in self.layers if layer.part == part)

    def totals(self) -> tuple[int, int]:
        """Parameters of the plain and of the deformable network."""
        shared = self.parameters("shared")
        return (
            shared + self.parameters("plain"),
            shared + self.parameters("deformable") + self.parameters("offsets"),
        )

    def beyond_rounding(self) -> float:
        """Millions of parameters by which what the offsets add lies outside of what the paper's figures admit.

        Each figure is rounded to 0.1 M, so their difference is known to 0.1 M. 0 within it.
        """
        beyond = self.parameters("offsets") / 1e6 - (self.paper_parameters[1] - self.paper_parameters[0])
        return max(beyond - 0.1, 0.0) + min(beyond + 0.1, 0.0)


def _convolution(
    name: str, part: str, C: int, O: int, kernel: int, pixels: int, *, count: int = 1, bias: bool = True
) -> NetworkLayer:
    """With a bias, or with a normalisation's scale and shift; fully connected: kernel 1, a pixel for each RoI."""
    parameters = O * C * kernel**2 + (O if bias else 2 * O)
    return NetworkLayer(name, part, count * parameters, count, (O, C * kernel**2, pixels))


def resnet101(height: int, width: int) -> list[NetworkLayer]:
    """The convolutions of ResNet-101 for an image, conv5 at stride 16 with dilation 2; its three 3x3 are "plain".

    Examples
    --------
    >>> from dcn_kernels.bench.network_cost import resnet101
    >>> sum(layer.parameters for layer in resnet101(600, 1000))  # without the classifier
    42500160
    """

    def pixels(stride: int) -> int:
        return -(-height // stride) * -(-width // stride)

    found = [_convolution("conv1", "shared", 3, 64, 7, pixels(2), bias=False)]
    before = 64
    for stage, (blocks, inner, stride) in enumerate(((3, 64, 4), (4, 128, 8), (23, 256, 16), (3, 512, 16)), 2):
        at, outer = pixels(stride), 4 * inner
        each: dict[str, Any] = {"pixels": at, "bias": False}
        found += [
            _convolution(f"res{stage}a 1x1 beside", "shared", before, outer, 1, **each),
            _convolution(f"res{stage}a 1x1 in", "shared", before, inner, 1, **each),
            _convolution(f"res{stage} 1x1 in", "shared", outer, inner, 1, count=blocks - 1, **each),
            _convolution(f"res{stage} 1x1 out", "shared", inner, outer, 1, count=blocks, **each),
        ]
        if stage < 5:
            found.append(_convolution(f"res{stage} 3x3", "shared", inner, inner, 3, count=blocks, **each))
        else:
            found += [_convolution(f"res5{letter} 3x3", "plain", inner, inner, 3, **each) for letter in "abc"]
        before = outer
    return found


def _deformed(map_size: tuple[int, int], offset_groups: int) -> list[NetworkLayer]:
    """conv5's 3x3 filters, deformable, and the convolutions that make their offsets."""
    (H, W), found = map_size, []
    for letter in "abc":
        name = f"res5{letter} 3x3"
        call = layers.layer(
            "deform_conv2d", N=1, C=512, H=H, W=W, O=512, kernel=3, padding=2, dilation=2,
            offset_groups=offset_groups, spread=layers.spread(layers.TABLE_2[f"res5{letter}"]),
        )  # fmt: skip
        plain = _convolution(name, "deformable", 512, 512, 3, H * W, bias=False)
        found.append(NetworkLayer(name, "deformable", plain.parameters, call=call))
        found.append(_convolution(f"{name} offsets", "offsets", 512, 18 * offset_groups, 3, H * W))
    return found


def _pool(name: str, part: str, op: str, C: int, map_size: tuple[int, int], classes: int = 1) -> NetworkLayer:
    (H, W), more = map_size, {"classes": classes} if classes > 1 else {}
    call = layers.layer(op, N=1, C=C, H=H, W=W, R=REGIONS, **more)
    return NetworkLayer(name, part, call=call)


_PROPOSALS_REMARK = (
    "The paper does not tell the layers of its class-aware RPN after the 1x1 one. Counted are scores and boxes of 9 "
    "anchors. The 3x3 layer of 512 channels before them, which the RPN it is derived from has, is not: its 4.7 M "
    "would take the plain network beyond the paper's 46.0 M."
)


def networks(offset_groups: int = 1) -> dict[str, Network]:
    """The networks of Table 4: DeepLab, the class-aware RPN, Faster R-CNN and R-FCN, on PASCAL VOC.

    Parameters
    ----------
    offset_groups : int
        Of the deformable convolutions: 1 in the paper's text, 4 in the detectors that its authors released.

    Notes
    -----
    From the paper's text: three deformable 3x3 layers in conv5, a 1x1 layer to 1024 channels, DeepLab's 1x1 scores,
    the scores of C+1 classes of the class-aware RPN, two fully connected layers of 1024 in Faster R-CNN, 7x7 bins,
    ``2 k^2 (C+1)`` offset maps in R-FCN and an offset layer after the pooled features in Faster R-CNN. From the
    released code, where the text is silent: Faster R-CNN pools 256 channels, R-FCN regresses boxes of object or
    background (8 numbers, and one offset field for them).

    Examples
    --------
    >>> from dcn_kernels.bench.network_cost import networks
    >>> networks()["R-FCN"].parameters("offsets")
    2458786
    """
    anchors = 9
    detected, segmented = (38, 63), (23, 30)  # 600x1000 and 360x480 pixels at stride 16
    pixels = detected[0] * detected[1]
    deeplab = (
        *resnet101(360, 480),
        _convolution("1x1 to 1024", "shared", 2048, 1024, 1, segmented[0] * segmented[1]),
        _convolution("scores", "shared", 1024, CLASSES, 1, segmented[0] * segmented[1]),
        *_deformed(segmented, offset_groups),
    )
    proposals = (
        *resnet101(600, 1000),
        _convolution("1x1 to 1024", "shared", 2048, 1024, 1, pixels),
        _convolution("scores", "shared", 1024, anchors * CLASSES, 1, pixels),
        _convolution("boxes", "shared", 1024, anchors * 4, 1, pixels),
        *_deformed(detected, offset_groups),
    )
    faster = (
        *resnet101(600, 1000),
        _convolution("1x1 to 256", "shared", 2048, 256, 1, pixels),
        _convolution("fully connected 1", "shared", 256 * BINS, 1024, 1, REGIONS),
        _convolution("fully connected 2", "shared", 1024, 1024, 1, REGIONS),
        _convolution("scores", "shared", 1024, CLASSES, 1, REGIONS),
        _convolution("boxes", "shared", 1024, 4 * CLASSES, 1, REGIONS),
        _pool("RoI pooling", "plain", "roi_pool", 256, detected),
        *_deformed(detected, offset_groups),
        _pool("RoI pooling", "deformable", "deform_roi_pool", 256, detected),
        _pool("RoI pooling for the offsets", "offsets", "roi_pool", 256, detected),
        _convolution("RoI offsets, fully connected", "offsets", 256 * BINS, 2 * BINS, 1, REGIONS),
    )
    score_maps, box_maps = BINS * CLASSES, BINS * 8
    rfcn = (
        *resnet101(600, 1000),
        _convolution("1x1 to 1024", "shared", 2048, 1024, 1, pixels),
        _convolution("score maps", "shared", 1024, score_maps, 1, pixels),
        _convolution("box maps", "shared", 1024, box_maps, 1, pixels),
        _pool("RoI pooling, scores", "plain", "ps_roi_pool", score_maps, detected),
        _pool("RoI pooling, boxes", "plain", "ps_roi_pool", box_maps, detected),
        *_deformed(detected, offset_groups),
        _pool("RoI pooling, scores", "deformable", "deform_ps_roi_pool", score_maps, detected, CLASSES),
        _pool("RoI pooling, boxes", "deformable", "deform_ps_roi_pool", box_maps, detected),
        _convolution("offset maps, scores", "offsets", 1024, 2 * score_maps, 1, pixels),
        _convolution("offset maps, boxes", "offsets", 1024, 2 * BINS, 1, pixels),
        _pool("RoI pooling of the offset maps, scores", "offsets", "ps_roi_pool", 2 * score_maps, detected),
        _pool("RoI pooling of the offset maps, boxes", "offsets", "ps_roi_pool", 2 * BINS, detected),
    )
    return {
        "DeepLab": Network("DeepLab", segmented, deeplab, (46.0, 46.1), (0.084, 0.088)),
        "class-aware RPN": Network(
            "class-aware RPN", detected, proposals, (46.0, 46.1), (0.142, 0.152), _PROPOSALS_REMARK
        ),
        "Faster R-CNN": Network("Faster R-CNN", detected, faster, (58.3, 59.9), (0.147, 0.192)),
        "R-FCN": Network("R-FCN", detected, rfcn, (47.1, 49.5), (0.143, 0.169)),
    }


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """Of all `count` of a layer: time (the fastest of some runs), how it was found, and the bytes of its results; of
    one of them the temporary memory besides weights and results, None where it could not be measured."""

    milliseconds: float
    how: str  # "matrix product" or the operator's name
    result_bytes: int
    temporary_bytes: int | None


def measure(
    chosen: Iterable[NetworkLayer],
    *,
    backend: str = "cpu",
    threads: int | None = None,
    budget: float = 0.3,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Measured]:
    """Time the forwards of layers in float32; equal ones once.

    Parameters
    ----------
    chosen : layers
    backend : {"cpu", "cuda"}
    threads : int, optional
        Of the CPU.
    budget : float
        Seconds for each call of an operator.
    progress : function of (what, done, total)

    Returns
    -------
    list of Measured, in the order of the layers
    """
    todo = list(chosen)
    products = sorted({layer.product for layer in todo if layer.product})
    calls = {repr(layer.call): layer.call for layer in todo if layer.call is not None}
    steps, done = 2 + len(products) + len(calls), 0

    def step(what: str) -> None:
        nonlocal done
        progress(what, done, steps)
        done += 1

    called, temporary = {}, {}
    with clocks.threads_set(threads) as used:
        step("matrix products")
        times = _products(products, backend, used)
        for product in products:
            step("memory of a matrix product")
            temporary[product] = ceiling.product_memory(used, "float32", product) if backend == "cpu" else None
        for key, call in calls.items():
            step(call["op"])
            called[key] = _call(call, backend, budget)
        step("matrix products once more")  # what else the machine did then counts for neither
        times = [min(pair) for pair in zip(times, _products(products, backend, used), strict=True)]
    progress("", steps, steps)
    known = dict(zip(products, times, strict=True))
    return [
        Measured(
            layer.count * known[layer.product],
            "matrix product",
            4 * layer.count * layer.product[0] * layer.product[2],
            temporary[layer.product],
        )
        if layer.product
        else called[repr(layer.call)]
        for layer in todo
    ]


def _products(shapes: list[tuple[int, int, int]], backend: str, threads: int) -> list[float]:
    """Milliseconds of matrix products (m, k) x (k, n)."""
    once = tuple((1, *shape) for shape in shapes)
    if backend == "cuda":
        return gpu_ceiling.products_ms("float32", once)
    return list(ceiling.measure(threads, "float32", once)["products_ms"])


def _call(layer: layers.Layer, backend: str, budget: float) -> Measured:
    """The fastest of some calls, as of the products; checked against the reference on a small case first."""
    spot_checks.check_small(layer, "smooth", "float32", backend, 0, ("forward",))
    inputs = make_inputs(layer, "smooth", "float32", 0)
    run, ticks = runner(inputs, "forward", backend), clocks.clock(backend)
    temporary = ticks.temporary_bytes(run)
    ticks.milliseconds(run)
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < 1e3 * budget and len(samples) < 200):
        samples.append(ticks.milliseconds(run))
    return Measured(min(samples), layer["op"], run().nbytes, temporary)
