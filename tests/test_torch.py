"""dcn_kernels.torch: every row as a torch operator, the layers, and two processes."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cases, first_cases

import dcn_kernels
from dcn_kernels.dispatch.call import public
from dcn_kernels.dispatch.row import Op, Sample

torch = pytest.importorskip("torch", reason="torch is not installed")

import dcn_kernels.torch as layers  # noqa: E402
from dcn_kernels.torch import ops as torch_ops  # noqa: E402

FIRST = first_cases()


def tensors(op: Op, sample: Sample, dtype: Any = torch.float64, grad: bool = True) -> dict[str, Any]:
    return {
        name: torch.from_numpy(array.copy()).to(dtype).requires_grad_(grad and name in op.differentiable)
        for name, array in sample.arrays.items()
    }


def values_of(op: Op, arrays: dict[str, Any], params: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments of torch.ops.dcn_kernels.<op>."""
    arguments = torch_ops.arguments_of(op)
    defaults = {p.name: p.default for p in arguments.signature.parameters.values()}
    values = [{**defaults, **params}[name] for name in arguments.params]
    lists = [
        [v, v] if name in arguments.pairs and isinstance(v, int) else list(v) if name in arguments.pairs else v
        for name, v in zip(arguments.params, values, strict=True)
    ]
    return (*(arrays.get(name) for name in arguments.arrays), *lists)


def function(op: Op) -> Any:
    return getattr(layers, op.name)


# ---------------------------------------------------------------- operators


def test_every_operator_is_there_and_has_the_plain_functions_signature() -> None:
    assert set(torch_ops.FUNCTIONS) == set(dcn_kernels.OPS)
    for name in dcn_kernels.OPS:
        assert getattr(layers, name) is torch_ops.FUNCTIONS[name]
        assert getattr(layers, name).__name__ == name and name in layers.__all__
        theirs = inspect.signature(public(dcn_kernels.OPS[name])).parameters
        wanted = [p for p in theirs if p not in ("out", "backend", "return_argmax")]
        assert list(inspect.signature(getattr(layers, name)).parameters) == wanted


@pytest.mark.parametrize(("op", "sample"), cases())
def test_values_and_gradients_are_those_of_the_plain_functions(op: Op, sample: Sample) -> None:
    arrays = tensors(op, sample)
    got = function(op)(**arrays, **sample.params)
    plain = {name: array.detach() for name, array in arrays.items()}
    want = public(op)(**plain, **sample.params)
    assert torch.equal(got, want)
    grad = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).reshape(got.shape)
    got.backward(grad)
    params = {name: value for name, value in sample.params.items() if name != "return_argmax"}
    for name, value in public(op, "backward")(grad, **plain, **params).items():
        assert torch.equal(arrays[name].grad, value)
    assert all(arrays[name].grad is None for name in arrays if name not in op.differentiable)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_gradcheck(op: Op, sample: Sample) -> None:
    arrays = tensors(op, sample)

    def call(*values: Any) -> Any:
        return function(op)(**dict(zip(arrays, values, strict=True)), **sample.params)

    assert torch.autograd.gradcheck(call, tuple(arrays.values()), fast_mode=True)


def opchecked() -> list[Any]:
    """Every sample of every row; all but the fullest of each row are slow."""
    full = {case.id: case.values[1].label for case in FIRST}
    return [
        pytest.param(*case.values, id=case.id, marks=() if case.values[1].label == full[op.name] else pytest.mark.slow)
        for case in cases()
        for op in case.values[:1]
    ]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("op", "sample"), opchecked())
def test_opcheck(op: Op, sample: Sample, direction: str) -> None:
    """torch's own checks of an operator: its schema, fake tensors, autograd, and tracing with dynamic shapes."""
    values = values_of(op, tensors(op, sample, grad=direction == "forward"), sample.params)
    operator = getattr(torch.ops.dcn_kernels, op.name).default
    if direction == "backward":
        values = (torch.rand_like(operator(*values)), *values, [name in sample.arrays for name in op.differentiable])
        operator = getattr(torch.ops.dcn_kernels, f"{op.name}_backward").default
    assert set(torch.library.opcheck(operator, values).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_compile_in_one_graph(op: Op, sample: Sample, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function(op), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for each in (function(op), compiled):
        arrays = tensors(op, sample)
        got = each(**arrays, **sample.params)
        got.sum().backward()
        results.append([got, *(arrays[name].grad for name in op.differentiable if name in arrays)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    call = torch_ops.call

    def spy(op: Op, direction: str, *args: Any, **kwargs: Any) -> Any:
        if direction == "backward":
            asked.append(kwargs["wrt"])
        return call(op, direction, *args, **kwargs)

    monkeypatch.setattr(torch_ops, "call", spy)
    op, sample = FIRST[0].values
    for name in op.differentiable:
        arrays = tensors(op, sample, grad=False)
        arrays[name].requires_grad_()
        function(op)(**arrays, **sample.params).sum().backward()
        assert asked.pop() == [name] and not asked


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_autocast_takes_input_and_weights_in_half_and_leaves_coordinates(op: Op, sample: Sample) -> None:
    arrays = tensors(op, sample, torch.float32, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(op)(**arrays, **sample.params)
    cast = {name: a if name in op.coordinates else a.bfloat16() for name, a in arrays.items()}
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, function(op)(**cast, **sample.params))
    double = tensors(op, sample, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(op)(**double, **sample.params).dtype == torch.float64


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_vmap_gives_what_a_loop_gives_over_any_argument(op: Op, sample: Sample) -> None:
    arrays = tensors(op, sample, grad=False)
    for name in op.differentiable:
        stacked = torch.stack([arrays[name], arrays[name] / 2], dim=-1)

        def one(array: Any, name: str = name) -> Any:
            return function(op)(**{**arrays, name: array}, **sample.params)

        want = torch.stack([one(part.contiguous()) for part in stacked.unbind(-1)])
        assert torch.equal(torch.vmap(one, in_dims=-1)(stacked), want)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_torch_func_gives_the_gradients_of_autograd_also_one_for_each_element(op: Op, sample: Sample) -> None:
    arrays = tensors(op, sample, grad=False)
    for name in op.differentiable:

        def loss(array: Any, name: str = name) -> Any:
            return (function(op)(**{**arrays, name: array}, **sample.params) ** 2).sum()

        stacked = torch.stack([arrays[name], arrays[name] / 2])
        wants = []
        for part in stacked:
            part = part.clone().requires_grad_()
            loss(part).backward()
            wants.append(part.grad)
        torch.testing.assert_close(torch.func.grad(loss)(stacked[0]), wants[0])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(stacked), torch.stack(wants))


def test_torch_func_jacrev_is_the_derivative() -> None:
    image, offset = torch.rand(1, 1, 2, 3), torch.full((1, 2, 2, 3), 0.25)
    jacobian = torch.func.jacrev(lambda image: layers.offset_sample2d(image, offset))(image)
    torch.testing.assert_close((jacobian * image).sum((4, 5, 6, 7)), layers.offset_sample2d(image, offset))  # linear


def test_forward_mode_is_an_error_and_no_wrong_number() -> None:
    image, offset = torch.rand(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    with pytest.raises(RuntimeError, match="offset_sample2d: input: expected a tensor without a tangent"):
        torch.func.jvp(lambda image: layers.offset_sample2d(image, offset), (image,), (image,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, image)
        for module, error in ((layers, RuntimeError), (dcn_kernels, TypeError)):
            with pytest.raises(error, match="offset_sample2d: input: expected a tensor without a tangent"):
                module.offset_sample2d(dual, offset)
            assert torch.equal(module.offset_sample2d(image, offset), image)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_the_operator_itself_gives_what_the_function_gives(op: Op, sample: Sample) -> None:
    """The function calls it only where something watches torch's operators."""
    operator = getattr(torch.ops.dcn_kernels, op.name)
    grads, results = [], []
    for each in (False, True):
        arrays = tensors(op, sample)
        values = values_of(op, arrays, sample.params)
        results.append(operator(*values) if each else function(op)(**arrays, **sample.params))
        results[-1].sum().backward()
        grads.append([arrays[name].grad for name in op.differentiable if name in arrays])
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in values]
    stacked = torch.stack([plain[0], plain[0] / 2])
    want = torch.stack([operator(part, *plain[1:]) for part in stacked])
    assert torch.equal(torch.vmap(lambda part: operator(part, *plain[1:]))(stacked), want)


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_watches_operators_sees_ours() -> None:
    layer = layers.DeformConv2dPack(2, 3, 3, padding=1)
    image = torch.rand(1, 2, 4, 4)
    want = layer(image)
    with torch.profiler.profile() as profile:
        layer(image)
    assert "dcn_kernels::deform_conv2d" in [event.key for event in profile.key_averages()]
    with Seen() as seen:
        layer(image)
    assert "dcn_kernels.deform_conv2d.default" in seen.names
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(image)
    assert "dcn_kernels.deform_conv2d" in graph.code
    program = torch.export.export(layer, (torch.rand(3, 2, 4, 4),), dynamic_shapes=({0: torch.export.Dim("N")},))
    for other in (graph, torch.jit.trace(layer, image), program.module()):
        assert torch.equal(other(image), want)


def test_checkpoint_gives_the_same_gradients() -> None:
    op, sample = FIRST[0].values
    grads = []
    for again in (False, True):
        arrays = tensors(op, sample)
        call = lambda *values: function(op)(**dict(zip(arrays, values, strict=True)), **sample.params)  # noqa: B023, E731
        values = tuple(arrays.values())
        got = torch.utils.checkpoint.checkpoint(call, *values, use_reentrant=False) if again else call(*values)
        got.sum().backward()
        grads.append([array.grad for array in values])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_use_deterministic_algorithms_reaches_forward_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    call = torch_ops.call

    def spy(op: Op, direction: str, arrays: Any, params: Any, **kwargs: Any) -> Any:
        seen.append((direction, params["deterministic"]))
        return call(op, direction, arrays, params, **kwargs)

    monkeypatch.setattr(torch_ops, "call", spy)
    op, sample = FIRST[0].values
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for flag in (False, True):
            torch.use_deterministic_algorithms(flag)
            function(op)(**tensors(op, sample), **sample.params).sum().backward()
            assert seen == [("forward", flag), ("backward", flag)]
            seen.clear()
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_second_derivative_is_an_error() -> None:
    image, offset = torch.rand(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, 2)
    (grad,) = torch.autograd.grad((layers.offset_sample2d(image, offset) ** 2).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="offset_sample2d: expected a first derivative, got a second one"):
        grad.sum().backward()
    square = lambda image: (layers.offset_sample2d(image, offset) ** 2).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="offset_sample2d: expected a first derivative, got a second one"):
        torch.func.grad(lambda image: torch.func.grad(square)(image).sum())(image.detach())
    (grad,) = torch.autograd.grad(torch.ops.dcn_kernels.offset_sample2d(image, offset, "edge", False).sum(), image,
                                  create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


def test_wrong_arguments_are_errors_that_name_them() -> None:
    image, offset = torch.rand(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    sample2d = layers.offset_sample2d
    for call, error, what in (
        (lambda: sample2d(image, np.zeros((1, 2, 2, 2))), TypeError, "offset: expected a torch.Tensor, got ndarray"),
        (lambda: sample2d(image), TypeError, ".*missing 1 required positional argument: 'offset'"),
        (lambda: sample2d(image, offset, "edge"), TypeError, ".*takes 2 positional arguments"),
        (lambda: sample2d(image, offset, out=image), TypeError, ".*unexpected keyword argument 'out'"),
        (lambda: sample2d(image, offset, input=image), TypeError, ".*multiple values for argument 'input'"),
        (lambda: sample2d(image, offset, border="far"), ValueError, "border: expected one of"),
        (lambda: sample2d(image, offset.double()), TypeError, "offset: expected dtype float32"),
        (lambda: sample2d(image, offset[:, :1]), ValueError, "offset: expected shape"),
        (lambda: sample2d(image, offset.to("meta")), TypeError, "offset: expected a tensor on cpu as input is"),
        (lambda: layers.roi_pool(image, torch.zeros(0, 5)), TypeError, ".*argument: 'output_size'"),
    ):
        with pytest.raises(error, match=rf"(offset_sample2d|roi_pool)(: |\(\)){what}"):
            call()


def test_rois_may_be_a_list_of_boxes_for_each_image() -> None:
    image, boxes = torch.rand(3, 4, 8, 8), [torch.tensor([[0.0, 0, 6, 5]]), torch.zeros(0, 4), torch.rand(2, 4) * 7]
    rois = torch.cat((torch.tensor([[0.0], [2], [2]]), torch.cat(boxes)), dim=1)
    for name in ("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align"):
        call = function(dcn_kernels.OPS[name])
        more = {"convention": "rfcn"} if name == "ps_roi_pool" else {}
        assert torch.equal(call(image, boxes, 2, **more), call(image, rois, 2, **more))


def test_numpy_integers_are_taken_also_where_operators_are_watched() -> None:
    image, offset, weight = torch.rand(1, 2, 5, 5), torch.rand(1, 18, 5, 5), torch.rand(2, 2, 3, 3)
    with Seen() as seen:
        got = layers.deform_conv2d(image, offset, weight, padding=np.int64(1))
    assert "dcn_kernels.deform_conv2d.default" in seen.names
    assert torch.equal(got, layers.deform_conv2d(image, offset, weight, padding=1))


def test_fake_tensors_have_the_shape_of_the_result() -> None:
    with torch.device("meta"):
        layer = layers.ModulatedDeformConv2dPack(4, 6, 3, stride=2, padding=1, offset_groups=2)
        assert layer(torch.rand(2, 4, 9, 8)).shape == (2, 6, 5, 4)


# ---------------------------------------------------------------- layers

FIXTURE = Path(__file__).parent / "recorded" / "torchvision_layer.npz"
OPTIONS = {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 2), "groups": 2}


def test_deform_conv2d_layer_gives_what_torchvision_recorded_from_its_state_dict() -> None:
    with np.load(FIXTURE) as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files if name != "versions"}
    layer = layers.DeformConv2d(4, 6, (3, 2), **OPTIONS)
    state = {name.removeprefix("state."): v for name, v in recorded.items() if name.startswith("state.")}
    layer.load_state_dict(state, strict=True)
    got = layer(recorded["input"], recorded["offset"], recorded["mask"])
    torch.testing.assert_close(got, recorded["output"], rtol=1e-5, atol=1e-5)


def test_packs_start_as_the_plain_layers() -> None:
    image = torch.rand(2, 4, 7, 8)
    options = {"stride": 2, "padding": 2, "dilation": 2}
    for kind, factor in ((layers.DeformConv2dPack, 1.0), (layers.ModulatedDeformConv2dPack, 0.5)):
        layer = kind(4, 6, 3, **options, groups=2, offset_groups=2, bias=False)
        want = factor * torch.nn.functional.conv2d(image, layer.weight, None, **options, groups=2)
        torch.testing.assert_close(layer(image), want)
    rois = torch.tensor([[0, 1, 2, 6, 5], [1, 0, 0, 7, 6]], dtype=torch.float32)
    got = layers.DeformRoIPoolPack((2, 3), 4)(image, rois)
    torch.testing.assert_close(got, dcn_kernels.roi_pool(image, rois, (2, 3), mode="avg"))
    got = layers.DeformPSRoIPoolPack(2, 4)(image, image, rois)
    assert torch.equal(got, dcn_kernels.deform_ps_roi_pool(image, rois, output_size=2))


def packs(beta: float) -> list[tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    image, rois = torch.rand(1, 4, 7, 8), torch.tensor([[0, 1, 2, 6, 5]], dtype=torch.float32)
    return [
        (layers.DeformConv2dPack(4, 6, 3, padding=1, beta=beta), (image,)),
        (layers.ModulatedDeformConv2dPack(4, 6, 3, padding=1, beta=beta), (image,)),
        (layers.DeformRoIPoolPack(2, 4, beta=beta), (image, rois)),
        (layers.DeformPSRoIPoolPack(2, 4, beta=beta), (image, image, rois)),
    ]


def test_beta_multiplies_the_step_of_the_offsets_also_in_a_copied_model_and_of_nothing_else() -> None:
    for (fast, args), (slow, _) in zip(packs(1.0), packs(0.25), strict=True):
        slow = copy.deepcopy(slow)
        steps = []
        for layer in (fast, slow):
            for parameter in layer.parameters():  # off the kinks of a zero offset
                torch.nn.init.uniform_(parameter, 0.05, 0.06, generator=torch.Generator().manual_seed(1))
            before = [parameter.detach().clone() for parameter in layer.parameters()]
            optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
            (layer(*args) ** 2).sum().backward()
            optimizer.step()
            steps.append([after.detach() - b for after, b in zip(layer.parameters(), before, strict=True)])
        for (name, _), quick, slower in zip(fast.named_parameters(), *steps, strict=True):
            assert quick.abs().max() > 0, f"{type(fast).__name__}: {name} gets no gradient"
            torch.testing.assert_close(slower, quick * (0.25 if "offset" in name else 1), rtol=1e-3, atol=1e-6)


def test_packs_in_torch_func_give_the_gradients_of_autograd() -> None:
    for layer, args in packs(0.25):
        (layer(*args) ** 2).sum().backward()

        def loss(parameters: Any, layer: Any = layer, args: Any = args) -> Any:
            return (torch.func.functional_call(layer, parameters, args) ** 2).sum()

        parameters = dict(layer.named_parameters())
        stacked = {name: torch.stack([value.detach()] * 2) for name, value in parameters.items()}
        once, each = torch.func.grad(loss)(parameters), torch.vmap(torch.func.grad(loss))(stacked)
        for name, parameter in parameters.items():
            torch.testing.assert_close(once[name], parameter.grad)
            torch.testing.assert_close(each[name], torch.stack([parameter.grad] * 2))


def test_conv_offset2d_starts_near_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    layer, image = layers.ConvOffset2D(8), torch.rand(2, 8, 6, 6)
    assert 0.005 < layer.weight.std() < 0.02
    got = layer(image)
    want = dcn_kernels.offset_sample2d(image, torch.nn.functional.conv2d(image, layer.weight, padding=1).detach())
    assert torch.equal(got, want)
    got.sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_layers_compile_in_one_graph_and_are_copied_and_saved(tmp_path: Path) -> None:
    for layer, args in packs(0.5):
        torch._dynamo.reset()
        want = layer(*args)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*args), want)
        torch.save(layer, tmp_path / "layer.pt")
        assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(*args), want)
        assert type(layer).__name__ in repr(layer)


# ---------------------------------------------------------------- two processes

TRAIN = """
import os, sys, torch, torch.distributed as dist
from dcn_kernels.torch import DeformConv2dPack, ModulatedDeformConv2dPack
rank, world, file, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(DeformConv2dPack(2, 4, 3, padding=1), torch.nn.Tanh(),
                            ModulatedDeformConv2dPack(4, 3, 3, padding=1, beta=0.5)).double()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, 0, 0.1)
images, targets = torch.rand(4, 4, 2, 6, 6).double(), torch.rand(4, 4, 3, 6, 6).double()
before = {name: value.clone() for name, value in model.state_dict().items()}
trained = model
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)
    trained = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
part = slice(rank * 4 // world, (rank + 1) * 4 // world)
for image, target in zip(images, targets):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(trained(image[part]), target[part]).backward()
    optimizer.step()
assert all((value != before[name]).any() for name, value in model.state_dict().items())
if rank == 0:
    torch.save(model.state_dict(), out)
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "DCN_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = []
    for world in (1, 2):  # all three at once
        files = [str(tmp_path / f"meet{world}"), str(tmp_path / f"{world}.pt")]
        for rank in range(world):
            command = [sys.executable, "-c", TRAIN, str(rank), str(world), *files]
            running.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12, msg=name)


# ---------------------------------------------------------------- calls written for other libraries


def test_calls_of_torchvision_port_as_they_are() -> None:
    image, boxes = torch.rand(1, 12, 8, 8), torch.tensor([[0.0, 1, 1, 6, 7]])
    want = dcn_kernels.roi_align(image, boxes, 2, 1.0, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(layers.roi_align(image, boxes, 2, 1.0, 2, True), want, rtol=0, atol=0)
    torch.testing.assert_close(
        layers.roi_align(image, boxes=boxes, output_size=2, sampling_ratio=2, aligned=True), want, rtol=0, atol=0
    )
    torch.testing.assert_close(layers.roi_align(image, [boxes[:, 1:]], 2, 1.0, 2, True), want, rtol=0, atol=0)
    want = dcn_kernels.ps_roi_align(image, boxes, 2, 1.0, sampling_ratio=2)
    torch.testing.assert_close(layers.ps_roi_align(image, boxes, 2, 1.0, 2), want, rtol=0, atol=0)
    with pytest.raises(TypeError, match="roi_pool: boxes: expected rois or boxes, got both"):
        layers.roi_pool(image, rois=boxes, boxes=boxes, output_size=2)


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        ("deform_conv2d", "groups", "follows from the shapes of input and weight"),
        ("deform_conv2d", "deform_groups", "follows from the shape of offset"),
        ("deform_conv2d", "im2col_step", "leave it out"),
        ("roi_align", "pooled_size", "write output_size="),
        ("deform_roi_pool", "sample_num", "write sampling_ratio="),
    ],
)
def test_an_argument_of_another_library_says_what_to_write(name: str, option: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: {option}: no such argument here: .*{hint}"):
        getattr(layers, name)(torch.rand(1, 2, 4, 4), torch.rand(1, 5), **{option: 1})


def test_a_layer_that_two_libraries_compute_differently_does_not_guess() -> None:
    with pytest.raises(TypeError, match=r"PSRoIPool: convention: expected \"torchvision\" .* or \"rfcn\""):
        layers.PSRoIPool(2, 0.5)
    image, boxes = torch.rand(1, 12, 8, 8), torch.tensor([[0.0, 1, 1, 12, 14]])
    for call in (
        lambda: layers.ps_roi_pool(image, boxes, 2, 0.5),
        lambda: layers.ps_roi_pool(image, boxes=boxes, output_size=2),
    ):
        with pytest.raises(TypeError, match=r"ps_roi_pool: convention: expected \"torchvision\" .* or \"rfcn\""):
            call()
    assert layers.ps_roi_pool(image, boxes, 2, 0.5, group_size=2).shape == (1, 3, 2, 2)  # torchvision's has none
    for convention in ("torchvision", "rfcn"):
        want = dcn_kernels.ps_roi_pool(image, boxes, 2, 0.5, convention=convention)
        torch.testing.assert_close(layers.PSRoIPool(2, 0.5, convention=convention)(image, boxes), want)


def test_same_and_valid_padding_are_those_of_a_plain_convolution() -> None:
    image = torch.rand(1, 2, 7, 8)
    for padding in ("same", "valid"):
        plain = torch.nn.Conv2d(2, 3, (3, 5), padding=padding, dilation=(2, 1))
        layer = layers.DeformConv2d(2, 3, (3, 5), padding=padding, dilation=(2, 1))
        layer.load_state_dict(plain.state_dict())
        want = plain(image)
        torch.testing.assert_close(layer(image, torch.zeros(1, 30, *want.shape[2:])), want, rtol=1e-5, atol=1e-5)
    for options in ({"kernel_size": 3, "stride": 2}, {"kernel_size": 2}):
        with pytest.raises(ValueError, match='DeformConv2d: padding: expected an int, a pair, "valid", or "same"'):
            layers.DeformConv2d(2, 3, **options, padding="same")
    with pytest.raises(ValueError, match="padding"):
        layers.DeformConv2d(2, 3, 3, padding="some")


def test_layers_and_functions_are_leaves_of_a_traced_graph() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layers.ModulatedDeformConv2dPack(3, 4, 3, padding=1)
            self.pool = layers.RoIAlign(2, 1.0, 2)

        def forward(self, image: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            features = self.layer(image).relu()
            return self.pool(features, rois) + layers.roi_align(features, boxes=rois, output_size=2)

    model, image, rois = Model(), torch.rand(1, 3, 6, 7), torch.tensor([[0.0, 0, 1, 5, 4]])
    traced = torch.fx.symbolic_trace(model)
    called = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count("roi_align") == 2 and called.count("deform_conv2d") == 1
    got, want = traced(image, rois), model(image, rois)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    assert traced.layer.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_an_error_that_says_what_to_use() -> None:
    class Inside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.ReLU(), layers.DeformConv2dPack(2, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    class Calls(torch.nn.Module):
        def forward(self, x: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            return layers.roi_align(x, rois, 2)

    for what, name in (
        *((function(op), op.name) for op in dcn_kernels.OPS.values()),
        (layers.ConvOffset2D(2), "ConvOffset2D"),
        (layers.RoIAlign(2), "RoIAlign"),
        (Inside(), "DeformConv2dPack"),
        (Calls(), "roi_align"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: torch.jit.script cannot read it: use torch.export, torch.com"):
            torch.jit.script(what)
