"""Runs one peer library: a script for that library's interpreter, which needs only NumPy and the peer.

    python peer_worker.py NAME THREADS

Reads JSON requests from stdin, one a line, and answers each on stdout. Syntax is kept to Python 3.8.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

THREADS = int(sys.argv[2]) if len(sys.argv) > 2 else 1
DEVICE = "cpu"  # or "cuda": where the row at hand is timed


class NotThere(Exception):
    """The peer does not have what is asked for."""


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


# A preparation takes (op, direction, arrays, params, dtype) and returns
# (prepare, run, results, what): `prepare` runs before each timed `run`, `results` gives arrays by name.


# ---------------------------------------------------------------- torch, torchvision, tvdcn, mmcv


def torch_ready(params):
    """Threads, device and precision as ours."""
    import torch

    torch.set_num_threads(THREADS)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise NotThere("torch in this interpreter finds no GPU")
    # its defaults differ between its libraries
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = params.get("precision") == "tf32"


def torch_tensors(arrays, dtype, names):
    import torch

    kind = getattr(torch, dtype)
    return {name: torch.from_numpy(arrays[name]).to(DEVICE, kind) for name in names if name in arrays}


def torch_array(tensor):
    """A result as NumPy, which has no bfloat16."""
    import torch

    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def torch_call(forward, tensors, grad_output, direction, what):
    """Time a differentiable function of a dict of tensors; the backward alone, the forward outside the clock."""
    import torch

    if direction == "forward":
        out = {}

        def run():
            with torch.no_grad():
                out["output"] = forward(tensors)

        # a GPU's cache is as a call before leaves it, as for ours
        before = run if DEVICE == "cuda" else (lambda: None)
        return before, run, (lambda: {"output": torch_array(out["output"])}), what
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in tensors.items() if name != "rois"}
    graph = {}

    def prepare():
        graph["output"] = forward({**tensors, **leaves})

    def backward():
        graph["grads"] = torch.autograd.grad(graph["output"], list(leaves.values()), grad_output)

    def results():
        return {name: torch_array(grad) for name, grad in zip(leaves, graph["grads"])}  # noqa: B905

    return prepare, backward, results, what


def torch_peer(op, direction, arrays, params, dtype):
    import torch.nn.functional as F

    torch_ready(params)
    if op != "deform_conv2d":
        raise NotThere("torch has a plain convolution to compare with for deform_conv2d only")
    tensors = torch_tensors(arrays, dtype, ("input", "weight", "bias"))
    groups = arrays["input"].shape[1] // arrays["weight"].shape[1]
    grad_output = torch_tensors(arrays, dtype, ("grad_output",))["grad_output"]

    def forward(t):
        return F.conv2d(
            t["input"], t["weight"], t.get("bias"), params["stride"], params["padding"], params["dilation"], groups
        )

    return torch_call(forward, tensors, grad_output, direction, "plain conv2d of the same shape")


torch_peer.comparable = False  # type: ignore[attr-defined]


def torchvision_forward(op, params):
    from torchvision import ops

    if op == "deform_conv2d":
        if params["border"] != "zeros":
            raise NotThere("torchvision has only border zeros")
        return ops.deform_conv2d, lambda f, t: f(
            t["input"], t["offset"], t["weight"], t.get("bias"), pair(params["stride"]), pair(params["padding"]),
            pair(params["dilation"]), t.get("mask"),
        )  # fmt: skip
    scale, size = params.get("spatial_scale"), params.get("output_size")
    if op == "roi_pool" and params["mode"] == "max":
        return ops.roi_pool, lambda f, t: f(t["input"], t["rois"], tuple(size), scale)
    if op == "roi_align":
        ratio, aligned = params["sampling_ratio"], params["aligned"]
        return ops.roi_align, lambda f, t: f(t["input"], t["rois"], tuple(size), scale, ratio, aligned)
    if op == "ps_roi_align":
        return ops.ps_roi_align, lambda f, t: f(t["input"], t["rois"], tuple(size), scale, params["sampling_ratio"])
    if op == "ps_roi_pool":
        return ops.ps_roi_pool, lambda f, t: f(t["input"], t["rois"], tuple(size), scale)
    raise NotThere("torchvision has no " + op)


def torchvision_peer(op, direction, arrays, params, dtype):
    torch_ready(params)
    function, use = torchvision_forward(op, params)
    names = ("input", "offset", "weight", "bias", "mask", "rois")
    tensors = torch_tensors(arrays, dtype, names)
    grad_output = torch_tensors(arrays, dtype, ("grad_output",))["grad_output"]
    what = "torchvision.ops." + op
    if op == "ps_roi_pool" and params["convention"] != "torchvision":
        what += ", its own convention"
    return torch_call(lambda t: use(function, t), tensors, grad_output, direction, what)


def tvdcn_peer(op, direction, arrays, params, dtype):
    import tvdcn.ops

    torch_ready(params)
    if op != "deform_conv2d":
        raise NotThere("tvdcn has no " + op)
    tensors = torch_tensors(arrays, dtype, ("input", "offset", "weight", "bias", "mask"))
    groups = arrays["input"].shape[1] // arrays["weight"].shape[1]
    grad_output = torch_tensors(arrays, dtype, ("grad_output",))["grad_output"]

    def forward(t):
        return tvdcn.ops.deform_conv2d(
            t["input"], t["weight"], t["offset"], t.get("mask"), t.get("bias"), pair(params["stride"]),
            pair(params["padding"]), pair(params["dilation"]), groups,
        )  # fmt: skip

    return torch_call(forward, tensors, grad_output, direction, "tvdcn.ops.deform_conv2d")


def mmcv_peer(op, direction, arrays, params, dtype):
    from mmcv.ops import modulated_deform_conv2d

    torch_ready(params)
    if op != "deform_conv2d" or "mask" not in arrays:
        raise NotThere("mmcv is timed on deform_conv2d with a mask only")
    tensors = torch_tensors(arrays, dtype, ("input", "offset", "weight", "bias", "mask"))
    _, channels, KH, KW = arrays["weight"].shape
    groups = arrays["input"].shape[1] // channels
    offset_groups = arrays["offset"].shape[1] // (2 * KH * KW)
    grad_output = torch_tensors(arrays, dtype, ("grad_output",))["grad_output"]

    def forward(t):
        return modulated_deform_conv2d(
            t["input"], t["offset"], t["mask"], t["weight"], t.get("bias"), pair(params["stride"]),
            pair(params["padding"]), pair(params["dilation"]), groups, offset_groups,
        )  # fmt: skip

    return torch_call(forward, tensors, grad_output, direction, "mmcv.ops.modulated_deform_conv2d")


# ---------------------------------------------------------------- onnxruntime, openvino


def onnx_model(op, arrays, params):
    """A model of one operator: (bytes, names of its inputs, what it is)."""
    from onnx import TensorProto, helper

    def stated(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(arrays[name].shape))

    extra = []
    if op == "deform_conv2d":
        if params["border"] != "zeros":
            raise NotThere("ONNX DeformConv has only border zeros")
        KH, KW = arrays["weight"].shape[2:]
        inputs = ["input", "weight", "offset"]
        inputs += ["bias"] if "bias" in arrays else ([""] if "mask" in arrays else [])
        inputs += ["mask"] if "mask" in arrays else []
        padding = list(pair(params["padding"]))
        node = helper.make_node(
            "DeformConv", inputs, ["output"], kernel_shape=[KH, KW], strides=list(pair(params["stride"])),
            pads=padding + padding, dilations=list(pair(params["dilation"])),
            group=arrays["input"].shape[1] // arrays["weight"].shape[1],
            offset_group=arrays["offset"].shape[1] // (2 * KH * KW),
        )  # fmt: skip
    elif op == "roi_pool" and params["mode"] == "max":
        inputs = ["input", "rois"]
        node = helper.make_node(
            "MaxRoiPool", inputs, ["output"], pooled_shape=list(pair(params["output_size"])),
            spatial_scale=float(params["spatial_scale"]),
        )  # fmt: skip
    elif op == "roi_align":
        arrays["boxes"] = np.ascontiguousarray(arrays["rois"][:, 1:])
        inputs = ["input", "boxes", "images"]
        height, width = pair(params["output_size"])
        node = helper.make_node(
            "RoiAlign", inputs, ["output"], output_height=height, output_width=width,
            sampling_ratio=max(0, int(params["sampling_ratio"])), spatial_scale=float(params["spatial_scale"]),
            coordinate_transformation_mode="half_pixel" if params["aligned"] else "output_half_pixel", mode="avg",
        )  # fmt: skip
        extra = [helper.make_tensor_value_info("images", TensorProto.INT64, [len(arrays["rois"])])]
        arrays["images"] = arrays["rois"][:, 0].astype(np.int64)
    else:
        raise NotThere("ONNX has no " + op)
    names = [name for name in inputs if name]
    graph = helper.make_graph(
        [node], "one", [stated(name) for name in names if name != "images"] + extra,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    return model.SerializeToString(), names, node.op_type


def only_cpu(peer):
    if DEVICE != "cpu":
        raise NotThere(peer + " is timed on the CPU only")


def only_forward_float32(peer, direction, dtype):
    only_cpu(peer)
    if direction != "forward":
        raise NotThere(peer + " has no backward")
    if dtype != "float32":
        raise NotThere(peer + " is timed in float32 only")


def onnxruntime_peer(op, direction, arrays, params, dtype):
    import onnxruntime

    only_forward_float32("onnxruntime", direction, dtype)
    model, names, what = onnx_model(op, arrays, params)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # no idle thread in our rounds
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {name: arrays[name] for name in names}
    out = {}

    def run():
        out["output"] = session.run(None, feed)[0]

    return (lambda: None), run, (lambda: out), "onnxruntime " + what


def openvino_node(op, arrays, params, parameters):
    """The operator as OpenVINO's own node."""
    from openvino import opset13 as ov

    scale, size = params.get("spatial_scale"), params.get("output_size")
    if op == "deform_conv2d":
        if params["border"] not in ("zeros", "msra"):
            raise NotThere("OpenVINO has only borders zeros and msra")
        KH, KW = arrays["weight"].shape[2:]
        stride, padding, dilation = (list(pair(params[name])) for name in ("stride", "padding", "dilation"))
        given = [parameters[name] for name in ("input", "offset", "weight", "mask") if name in parameters]
        attributes = {
            "strides": stride, "pads_begin": padding, "pads_end": padding, "dilations": dilation,
            "group": arrays["input"].shape[1] // arrays["weight"].shape[1],
            "deformable_group": arrays["offset"].shape[1] // (2 * KH * KW),
            "bilinear_interpolation_pad": params["border"] == "zeros", "auto_pad": "explicit",
        }  # fmt: skip
        from openvino.utils.node_factory import NodeFactory

        node = NodeFactory("opset8").create("DeformableConvolution", [p.output(0) for p in given], attributes)
        if "bias" in arrays:
            node = ov.add(node, ov.constant(arrays["bias"].reshape(1, -1, 1, 1)))
        return node
    if op == "roi_pool" and params["mode"] == "max":
        return ov.roi_pooling(parameters["input"], parameters["rois"], list(size), float(scale), "max")
    if op == "ps_roi_pool" and params["convention"] == "rfcn":
        group = pair(params["group_size"])[0]
        channels = arrays["input"].shape[1] // group**2
        return ov.psroi_pooling(parameters["input"], parameters["rois"], channels, group, float(scale), 1, 1, "average")
    if op == "deform_ps_roi_pool":
        group, samples = pair(params["group_size"])[0], params["sample_per_part"]
        return ov.deformable_psroi_pooling(
            parameters["input"], parameters["rois"], arrays["input"].shape[1] // group**2, float(scale), group,
            "bilinear_deformable", samples, samples, float(params["trans_std"]), pair(params["part_size"])[0],
            parameters.get("trans"),
        )  # fmt: skip
    if op == "roi_align":
        height, width = size
        return ov.roi_align(
            parameters["input"], parameters["boxes"], parameters["images"], height, width,
            max(0, int(params["sampling_ratio"])), float(scale), "avg",
            "half_pixel" if params["aligned"] else "asymmetric",
        )  # fmt: skip
    raise NotThere("OpenVINO is not timed on " + op)


def openvino_peer(op, direction, arrays, params, dtype):
    import openvino
    from openvino import opset13 as ov

    only_forward_float32("openvino", direction, dtype)
    names = [name for name in ("input", "offset", "weight", "mask", "rois", "trans") if name in arrays]
    if op == "roi_align":
        names = ["input", "boxes", "images"]
        arrays["boxes"] = np.ascontiguousarray(arrays["rois"][:, 1:])
        arrays["images"] = arrays["rois"][:, 0].astype(np.int64)
    parameters = {name: ov.parameter(list(arrays[name].shape), arrays[name].dtype, name=name) for name in names}
    node = openvino_node(op, arrays, params, parameters)
    config = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Model([node.output(0)], [parameters[name] for name in names], "one")
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    for number, name in enumerate(names):
        request.set_input_tensor(number, openvino.Tensor(arrays[name], shared_memory=True))

    def results():
        return {"output": np.array(request.get_output_tensor(0).data)}

    return (lambda: None), request.infer, results, "openvino"


# ---------------------------------------------------------------- paddle, mxnet


def paddle_forward(op, arrays, params):
    """(function of a dict of tensors, the names of those with a gradient, what it is)."""
    from paddle.vision import ops

    if op == "deform_conv2d":
        KH, KW = arrays["weight"].shape[2:]
        stride, padding, dilation = (list(pair(params[name])) for name in ("stride", "padding", "dilation"))
        OG, groups = arrays["offset"].shape[1] // (2 * KH * KW), arrays["input"].shape[1] // arrays["weight"].shape[1]
        return lambda t: ops.deform_conv2d(
            t["input"], t["offset"], t["weight"], t.get("bias"), stride, padding, dilation, OG, groups, t.get("mask"),
        ), ("input", "offset", "weight", "bias", "mask"), "paddle.vision.ops.deform_conv2d"  # fmt: skip
    scale, size = params.get("spatial_scale"), params.get("output_size")
    calls = {}
    if op == "roi_pool" and params["mode"] == "max":
        calls["roi_pool"] = lambda t: ops.roi_pool(t["input"], t["boxes"], t["numbers"], tuple(size), scale)
    if op == "ps_roi_pool" and params["convention"] == "rfcn" and pair(params["group_size"]) == tuple(size):
        calls["psroi_pool"] = lambda t: ops.psroi_pool(t["input"], t["boxes"], t["numbers"], tuple(size), scale)
    if op == "roi_align":
        ratio, aligned = params["sampling_ratio"], params["aligned"]
        calls["roi_align"] = lambda t: ops.roi_align(
            t["input"], t["boxes"], t["numbers"], tuple(size), scale, ratio, aligned
        )
    for name, forward in calls.items():
        return forward, ("input",), "paddle.vision.ops." + name
    raise NotThere("paddle is not timed on " + op)


def paddle_peer(op, direction, arrays, params, dtype):
    import paddle

    only_cpu("paddle")
    forward, names, what = paddle_forward(op, arrays, params)
    leaves = {
        name: paddle.to_tensor(arrays[name].astype(dtype), stop_gradient=direction == "forward")
        for name in names
        if name in arrays
    }
    tensors = dict(leaves)
    if "rois" in arrays:  # RoIs ordered by image, and how many each image has
        images = arrays["rois"][:, 0].astype(np.int64)
        if (np.diff(images) < 0).any():
            raise NotThere("paddle takes RoIs ordered by image only")
        tensors["boxes"] = paddle.to_tensor(np.ascontiguousarray(arrays["rois"][:, 1:]).astype(dtype))
        tensors["numbers"] = paddle.to_tensor(np.bincount(images, minlength=len(arrays["input"])).astype(np.int32))
    grad_output = paddle.to_tensor(arrays["grad_output"].astype(dtype))
    state = {}

    def run():
        state["output"] = forward(tensors)

    if direction == "forward":
        return (lambda: None), run, (lambda: {"output": state["output"].numpy()}), what

    def backward():
        state["grads"] = paddle.grad(state["output"], list(leaves.values()), grad_output)

    def results():
        return {name: grad.numpy() for name, grad in zip(leaves, state["grads"])}  # noqa: B905

    return run, backward, results, what


def mxnet_forward(op, arrays, params):
    """(function of a dict of arrays, the names of those with a gradient, what it is)."""
    import mxnet as mx

    if op == "deform_conv2d":
        if "mask" not in arrays:
            raise NotThere("mxnet is timed on deform_conv2d with a mask only")
        O, channels, KH, KW = arrays["weight"].shape
        options = {
            "kernel": (KH, KW), "stride": pair(params["stride"]), "pad": pair(params["padding"]),
            "dilate": pair(params["dilation"]), "num_filter": O, "no_bias": "bias" not in arrays,
            "num_group": arrays["input"].shape[1] // channels,
            "num_deformable_group": arrays["offset"].shape[1] // (2 * KH * KW),
        }  # fmt: skip
        return lambda t: mx.nd.contrib.ModulatedDeformableConvolution(
            t["input"], t["offset"], t["mask"], t["weight"], t.get("bias"), **options
        ), ("input", "offset", "weight", "bias", "mask"), "mxnet ModulatedDeformableConvolution"  # fmt: skip
    scale, size, C = params.get("spatial_scale"), pair(params.get("output_size", 1)), arrays["input"].shape[1]
    if op == "roi_pool" and params["mode"] == "max":
        return (lambda t: mx.nd.ROIPooling(t["input"], t["rois"], size, scale)), ("input",), "mxnet ROIPooling"
    if op == "roi_align":
        options = {"sample_ratio": params["sampling_ratio"], "aligned": params["aligned"]}
        return (
            lambda t: mx.nd.contrib.ROIAlign(t["input"], t["rois"], size, scale, **options),
            ("input",),
            ("mxnet ROIAlign"),
        )
    if op == "ps_roi_pool" and params["convention"] == "rfcn":
        group = pair(params["group_size"])[0]
        return lambda t: mx.nd.contrib.PSROIPooling(
            t["input"], t["rois"], spatial_scale=scale, output_dim=C // group**2, pooled_size=size[0], group_size=group
        ), ("input",), "mxnet PSROIPooling"  # fmt: skip
    plain = op == "deform_roi_pool" and params["convention"] == "rfcn" and "mask" not in arrays
    if plain or op == "deform_ps_roi_pool":
        group = 1 if plain else pair(params["group_size"])[0]
        offset = "offset" if plain else "trans"
        options = {
            "spatial_scale": scale, "output_dim": C // group**2, "pooled_size": size[0], "group_size": group,
            "part_size": size[0] if plain else pair(params["part_size"])[0],
            "sample_per_part": (params["sampling_ratio"] or 4) if plain else params["sample_per_part"],
            "trans_std": params["gamma"] if plain else params["trans_std"], "no_trans": offset not in arrays,
        }  # fmt: skip
        return lambda t: mx.nd.contrib.DeformablePSROIPooling(
            t["input"], t["rois"], *([t[offset]] if offset in t else []), **options
        ), ("input", offset), "mxnet DeformablePSROIPooling"  # fmt: skip
    raise NotThere("mxnet is not timed on " + op)


def mxnet_peer(op, direction, arrays, params, dtype):
    import mxnet as mx

    only_cpu("mxnet")
    forward, names, what = mxnet_forward(op, arrays, params)
    leaves = {name: mx.nd.array(arrays[name], dtype=dtype) for name in names if name in arrays}
    tensors = dict(leaves)
    if "rois" in arrays:
        tensors["rois"] = mx.nd.array(arrays["rois"], dtype=dtype)
    for leaf in leaves.values():
        leaf.attach_grad()
    grad_output = mx.nd.array(arrays["grad_output"], dtype=dtype)
    state = {}

    def run():
        with mx.autograd.record(direction == "backward"):
            state["output"] = forward(tensors)
        mx.nd.waitall()

    if direction == "forward":
        return (lambda: None), run, (lambda: {"output": state["output"].asnumpy()}), what

    def backward():
        state["output"].backward(grad_output)
        mx.nd.waitall()

    return run, backward, (lambda: {name: leaf.grad.asnumpy() for name, leaf in leaves.items()}), what


# ---------------------------------------------------------------- requests


def milliseconds(prepare, run):
    """Of `run`, after `prepare`. On a GPU as clocks.CudaClock times ours: its own time between two events, with
    work ahead of them that takes longer than the launches, so that it waits for none."""
    if DEVICE == "cuda":
        import torch

        if AHEAD["buffer"] is None:
            AHEAD["buffer"] = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        for _ in range(2 + int(AHEAD["launch_ms"] / 0.02)):  # 0.02 ms: less than any GPU takes for that buffer
            AHEAD["buffer"].zero_()
        began = time.perf_counter()
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        AHEAD["launch_ms"] = min(10.0, 1e3 * (time.perf_counter() - began))
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    prepare()
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


AHEAD: Any = {"buffer": None, "launch_ms": 0.0}

PEERS = {
    "torch": (torch_peer, "torch"),
    "torchvision": (torchvision_peer, "torchvision"),
    "tvdcn": (tvdcn_peer, "tvdcn"),
    "mmcv": (mmcv_peer, "mmcv"),
    "onnxruntime": (onnxruntime_peer, "onnxruntime"),
    "openvino": (openvino_peer, "openvino"),
    "paddle": (paddle_peer, "paddle"),
    "mxnet": (mxnet_peer, "mxnet"),
}


def main():
    global DEVICE
    # a library that prints must not disturb the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    build, module = PEERS[sys.argv[1]]
    try:
        answer(version=str(getattr(importlib.import_module(module), "__version__", "unknown")))
    except Exception as error:  # whatever a broken installation raises
        answer(error=f"cannot import {module}: {type(error).__name__}: {error}")
        return
    prepare: Any = None
    run: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                DEVICE = request["device"]
                with np.load(request["path"]) as stored:
                    arrays = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
                prepare, run, results, what = build(
                    request["op"], request["direction"], arrays, request["params"], request["dtype"]
                )
                prepare()
                run()
                path = os.path.join(os.path.dirname(request["path"]), "results.npz")
                comparable = getattr(build, "comparable", True) and "own convention" not in what
                if comparable:
                    np.savez(path, **results())
                answer(what=what, path=path, comparable=comparable)
            else:
                samples: list[float] = []
                spent = 0.0
                while not samples or (spent < request["milliseconds"] and len(samples) < 200):
                    samples.append(milliseconds(prepare, run))
                    spent += samples[-1]
                answer(samples_ms=samples)
        except NotThere as error:
            answer(error=str(error))
        except Exception as error:  # the peer's own failure: reported, and the worker goes on
            answer(error="{}: {}".format(type(error).__name__, " ".join(str(error).split())[:300]))


if __name__ == "__main__":
    main()
