"""arm.py: the model agrees with the released code to the digit, and is what its docstrings say."""

import copy
import dataclasses
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import GOLDEN, golden_images, weights
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from arm import (ARM, MODELS, OF_DIRECTIONS, ARMClassifier, BadInput, Block, Mamba, SwiGLU, causal_conv1d,
                 cluster_order, conv_backward_op, conv_op, kernels, load_weights, mamba_ssm_conv1d, mamba_ssm_scan,
                 rename_released, resize_position, scan_backward_op, scan_op, scan_orders, selective_scan,
                 sincos_position, triton, triton_conv1d, triton_scan)
from pretrain import parameter_groups


def small_arm(**changes):
    return ARM(**dict(dict(image_size=192, dim=16, depth=12, decoder_dim=64), **changes))


def small_classifier(image_size=224, **changes):
    return ARMClassifier(image_size, **dict(dict(dim=16, depth=12, num_classes=10), **changes))


def tiny_arm(**changes):
    """16 patches in 4 clusters."""
    return lively(ARM(**dict(dict(image_size=16, patch_size=4, cluster_size=2, dim=16, depth=2, decoder_dim=64,
                                  decoder_depth=2), **changes)))


def tiny_classifier(**changes):
    """The same patches, in four directions."""
    return lively(ARMClassifier(**dict(dict(image_size=16, patch_size=4, dim=16, depth=3, num_classes=5), **changes)))


def lively(model):
    """With weights as they may be after training: tokens matter to those after them, and logits are not about 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(("x_proj", "dt_bias", "head.weight")):
            nn.init.normal_(parameter)
    return model


def tiny_images(batch=2, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


# Golden values of the released code


def test_pretraining_loss_predictions_and_gradients_agree_with_the_released_code():
    expected = np.load(GOLDEN / "pretrain_expected.npz")
    model, images = small_arm(), golden_images(192)
    load_weights(model, GOLDEN / "official_pretrain.pth")
    loss = model(images)
    loss.backward()
    assert abs(loss.item() - float(expected["loss"])) < 1e-5
    assert (model.predict(images) - torch.from_numpy(expected["pred"]).float()).abs().max() < 2e-3  # stored as float16
    parameters = dict(model.named_parameters())
    names = [rename_released(name) for name in expected["grad_names"]]
    assert sorted(names) == sorted(parameters)
    for name, norm in zip(names, expected["grad_norms"]):
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("pool, key", [("mean", "logits"), ("cls", "logits_cls")])
def test_finetuned_logits_agree_with_the_released_code(size, pool, key):
    model = small_classifier(size, pool=pool).eval()
    load_weights(model, GOLDEN / f"official_finetune{size}.pth")
    expected = torch.from_numpy(np.load(GOLDEN / f"finetune{size}_expected.npz")[key])
    with torch.no_grad():
        assert (model(golden_images(size)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [224, 384])
def test_logits_of_a_pretrained_checkpoint_agree_with_the_released_code(size):
    expected = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"finetune{size}_expected.npz").items()
                if v.dtype == np.float32}
    model = small_classifier(size).eval()
    assert load_weights(model, GOLDEN / "official_pretrain.pth") == {"cls_token", "norm", "head"}
    with torch.no_grad():
        model.head.weight.copy_(expected["head_weight"])
        model.head.bias.copy_(expected["head_bias"])
        model.cls_token.copy_(expected["cls_token"])
        assert (model(golden_images(size)) - expected["from_pretrained_logits"]).abs().max() < 1e-5


def test_the_average_of_a_released_checkpoint_is_loaded_on_request():
    plain, average = small_classifier(), small_classifier()
    load_weights(plain, GOLDEN / "official_finetune224.pth")
    load_weights(average, GOLDEN / "official_finetune224.pth", ema=True)
    for a, b in zip(plain.parameters(), average.parameters()):
        torch.testing.assert_close(a + 0.01, b)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_weights(plain, GOLDEN / "official_pretrain.pth", ema=True)


def test_optimiser_groups_agree_with_the_released_code():
    expected = np.load(GOLDEN / "finetune224_expected.npz")
    groups = parameter_groups(small_classifier(), weight_decay=0.05, layer_decay=0.65)
    ours = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    names = [rename_released(str(name)) for name in expected["group_names"]]  # four of them for one of ours
    assert ours.keys() == set(names)
    for name, *theirs in zip(names, expected["group_lr_scale"], expected["group_weight_decay"]):
        assert ours[name] == pytest.approx(theirs), name


@pytest.mark.parametrize("name, classifier, pretraining", [
    ("arm_base", 85_031_656, 99_243_008), ("arm_large", 297_035_720, 303_721_696),
    ("arm_huge", 662_682_088, 659_128_064)])
def test_parameter_counts_are_the_papers(name, classifier, pretraining):
    with torch.device("meta"):
        assert sum(p.numel() for p in ARMClassifier(**MODELS[name]).parameters()) == classifier
        assert sum(p.numel() for p in ARM(**MODELS[name]).parameters()) == pretraining


# Token orders


def test_cluster_order_reads_4x4_patches_of_one_cluster_before_the_next():
    order = cluster_order(12, 4)
    assert order.tolist()[:20] == [0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27, 36, 37, 38, 39, 4, 5, 6, 7]
    assert sorted(order.tolist()) == list(range(144))


def test_scan_orders_are_rows_and_columns_both_ways_with_cls_in_the_middle():
    assert scan_orders(2).tolist() == [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 3, 2, 1, 4], [4, 1, 2, 3, 0]]
    for grid in (14, 24, 9):
        orders = scan_orders(grid)
        middle = grid * grid // 2
        assert (orders[:, middle] == middle).all()
        assert (orders.gather(1, orders.argsort(dim=-1)) == torch.arange(grid * grid + 1)).all()


def test_position_code_has_columns_before_rows_and_sine_before_cosine():
    code = sincos_position(8, 3)  # two frequencies, 1 and 0.01
    x, y = 2, 1
    expected = [math.sin(x), math.sin(0.01 * x), math.cos(x), math.cos(0.01 * x),
                math.sin(y), math.sin(0.01 * y), math.cos(y), math.cos(0.01 * y)]
    torch.testing.assert_close(code[y * 3 + x], torch.tensor(expected))


# The scan and the mixer


def scan_inputs(directions=3, batch=2, length=37, dim=5, dtype=torch.float32):
    """Arguments of a scan, of which all but the orders need a gradient; x, dt, B, C and z in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    full = torch.promote_types(dtype, torch.float32)
    B_C = normal(directions, batch, length, 32)
    x_z = normal(batch, length, 2 * dim)
    orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(directions)])
    return [normal(directions, batch, length, dim), normal(directions, batch, length, dim),
            normal(directions, dim, dtype=full),
            -normal(directions, dim, 16, dtype=full).detach().exp().requires_grad_(),
            B_C[..., :16], B_C[..., 16:], normal(directions, dim, dtype=full), x_z[..., dim:],
            orders if directions > 1 else None]


def recurrence(x, dt, dt_bias, A, B, C, D):
    """The scan as the paper states it, in float64, one token after another, left to autograd: (G, B, L, D)."""
    x, dt, dt_bias, A, B, C, D = (t.double() for t in (x, dt, dt_bias, A, B, C, D))
    h, ys = 0, []
    for t in range(x.shape[2]):
        delta = F.softplus(dt[:, :, t] + dt_bias[:, None])[..., None]  # (G, B, D, 1)
        h = (delta * A[:, None]).exp() * h + delta * x[:, :, t, :, None] * B[:, :, t, None]
        ys.append((h * C[:, :, t, None]).sum(-1) + D[:, None] * x[:, :, t])
    return torch.stack(ys, dim=2)


def reference(*inputs):
    """What a scan returns, in float64: (B, L, D)."""
    *inputs, z, orders = inputs
    y = 0
    for i, y_i in enumerate(recurrence(*inputs)):
        y = y + (y_i if orders is None else y_i[:, orders[i].argsort()]) / len(inputs[0])
    return y * F.silu(z.double())


def assert_agree(function, expected, inputs, tolerance):
    """The function's value and gradients agree with the expected one's, relative to the norm of each."""
    weight, results = None, []
    for f in (function, expected):
        y = f(*inputs)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if weight is None else weight
        needed = [t for t in inputs if t is not None and t.is_floating_point()]
        results.append((y, *torch.autograd.grad((y * weight.to(y.dtype)).sum(), needed)))
    for ours, exact in zip(*results):
        assert (ours.double() - exact.double()).norm() <= tolerance * exact.norm()


TRITON = pytest.mark.skipif(isinstance(triton, types.SimpleNamespace), reason="this machine's PyTorch has no Triton")


@pytest.fixture(scope="module", autouse=not TRITON.args[0])
def quick_interpreter():
    """Triton's interpreter in a quarter of the time: NumPy computes xor_sum, which it else does number by number; what
    it does again at each call of a function or look at a type it does once; it does not look for overflow of integers.
    """
    from triton.runtime import interpreter
    Function, Reduce, builder = interpreter.InterpretedFunction, interpreter.ReduceOps, interpreter.interpreter_builder
    call, reduce, get_dtype = Function.__call__, Reduce.generic_reduce, interpreter._get_np_dtype
    called, dtypes = set(), {}

    def quick_call(self, *args, **kwargs):
        if self.fn in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return call(self, *args, **kwargs)

    def quick_reduce(self, inputs):
        if self.combine_fn is not triton.language.standard._xor_combine:
            return reduce(self, inputs)
        data = np.bitwise_xor.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, inputs[0].dtype)]

    def quick_dtype(dtype):
        if dtype.scalar.name not in dtypes:
            dtypes[dtype.scalar.name] = get_dtype(dtype)
        return dtypes[dtype.scalar.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Function, "__call__", quick_call)
        patch.setattr(Reduce, "generic_reduce", quick_reduce)
        patch.setattr(interpreter, "_get_np_dtype", quick_dtype)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.mark.parametrize("scan", [selective_scan, pytest.param(triton_scan, marks=TRITON)])
@pytest.mark.parametrize("directions, length, dim", [(1, 1, 5), (4, 8, 5), (1, 15, 37), (3, 16, 16), (2, 37, 5),
                                                     (1, 64, 5), (1, 12, 5), (3, 10, 5)])
def test_the_scans_and_their_gradients_agree_with_a_float64_recurrence(scan, directions, length, dim):
    assert_agree(scan, reference, scan_inputs(directions, length=length, dim=dim), tolerance=1e-5)


@pytest.mark.parametrize("scan", [selective_scan, pytest.param(triton_scan, marks=TRITON)])
def test_the_scans_take_one_direction_in_an_order_of_its_own(scan):
    *inputs, _ = scan_inputs(1, length=11)
    assert_agree(scan, reference, [*inputs, torch.randperm(11)[None]], tolerance=1e-5)


@pytest.mark.parametrize("scan", [selective_scan, pytest.param(triton_scan, marks=TRITON)])
def test_the_scans_are_right_where_exponentials_overflow(scan):
    x, dt, *others, z, orders = scan_inputs(1, length=9)
    dt, z = ((t.detach() * 150).requires_grad_() for t in (dt, z))
    assert dt.abs().max() > 200 and z.min() < -200
    assert_agree(scan, reference, [x, dt, *others, z, orders], tolerance=1e-5)


@pytest.mark.parametrize("scan", [selective_scan, pytest.param(triton_scan, marks=TRITON)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_the_scans_round_half_precision_only_at_their_ends(scan, dtype, tolerance):
    assert_agree(scan, reference, scan_inputs(2, length=9, dtype=dtype), tolerance)
    assert_agree(scan, reference, scan_inputs(1, length=9, dtype=dtype), tolerance)


def test_selective_scan_passes_gradcheck():
    inputs = scan_inputs(directions=2, batch=1, length=9, dim=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(selective_scan, inputs)


def test_the_gradient_of_a_gradient_through_selective_scan_is_right():
    inputs = scan_inputs(directions=2, batch=1, length=3, dim=2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(selective_scan, inputs)


def test_the_scan_stays_float32_inside_under_autocast():
    inputs = [t if t is None else t.detach() for t in scan_inputs(1)]
    half = [inputs[0].bfloat16(), *inputs[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*half)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference(*half).bfloat16(), rtol=0.01, atol=0.01)


def depthwise(x, weight, bias, orders):
    """The convolution by PyTorch's, for each direction."""
    y = [F.conv1d(x[:, order].mT, w[:, None], b, padding=3, groups=x.shape[2])[..., : x.shape[1]].mT
         for w, b, order in zip(weight, bias, [slice(None)] if orders is None else orders)]
    return F.silu(torch.stack(y))


@pytest.mark.parametrize("conv", [causal_conv1d, pytest.param(triton_conv1d, marks=TRITON)])
@pytest.mark.parametrize("directions, length, dim", [(1, 1, 5), (1, 9, 70), (4, 3, 5), (3, 17, 5)])
def test_the_convolutions_are_causal_depthwise_conv1d_with_silu(conv, directions, length, dim):
    x_z = torch.randn(2, length, 2 * dim, requires_grad=True)
    weight, bias = (torch.randn(directions, dim, *width, requires_grad=True) for width in ((4,), ()))
    orders = torch.stack([torch.randperm(length) for _ in range(directions)]) if directions > 1 else None
    assert_agree(conv, depthwise, [x_z[..., :dim], weight, bias, orders], tolerance=1e-5)


@TRITON
@pytest.mark.parametrize("directions", [1, 2])
def test_the_triton_operators_are_what_they_are_registered_as(directions):
    inputs = scan_inputs(directions, batch=1, length=9)
    inputs[4:6] = (t.contiguous() for t in inputs[4:6])  # B and C
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(scan_op, (*inputs, True), test_utils=checks)
    with torch.no_grad():
        torch.library.opcheck(scan_op, (*inputs, False), test_utils=checks[:2])
        out, *saved = scan_op(*inputs, True)
        assert torch.equal(scan_op(*inputs, False)[0], out)
        torch.library.opcheck(scan_backward_op, (out[0], *inputs, *saved), test_utils=checks[:2])
    weight, bias, orders = torch.randn(directions, 5, 4), torch.randn(directions, 5), inputs[-1]
    torch.library.opcheck(conv_op, (inputs[-2], weight, bias, orders), test_utils=checks)
    with torch.no_grad():
        dout = conv_op(inputs[-2], weight, bias, orders)
        torch.library.opcheck(conv_backward_op, (dout, inputs[-2], weight, bias, orders), test_utils=checks[:2])


@TRITON
def test_the_triton_kernels_read_what_is_not_contiguous():
    x, weight, bias = torch.randn(3, 6, 1).mT, torch.randn(1, 6, 4), torch.randn(1, 6)  # one token, strides of no use
    torch.testing.assert_close(triton_conv1d(x, weight, bias), causal_conv1d(x, weight, bias))
    *inputs, orders = scan_inputs(3, length=9)
    orders = torch.stack(list(orders), dim=1).T  # the same, not contiguous
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(triton_scan(*inputs, orders), selective_scan(*inputs, orders))


@TRITON
def test_the_models_compute_the_same_with_the_triton_kernels_compiled_without_a_graph_break(monkeypatch):
    for model in (ARM(16, 8, 1, dim=16, depth=2, decoder_dim=64, decoder_depth=2),
                  ARMClassifier(16, 8, dim=16, depth=1, num_classes=5)):
        nn.init.normal_(getattr(model, "head", nn.Linear(1, 1)).weight)
        images, results = torch.randn(2, 3, 16, 16), []
        for scan, compiled in (("torch", "nothing"), ("triton", "layers"), ("triton", "whole")):
            monkeypatch.setenv("ARM_SCAN", scan)
            model = copy.deepcopy(model)  # which leaves behind how it was compiled
            for module in dict(nothing=[], layers=model.layers, whole=[model])[compiled]:
                module.compile(fullgraph=True, dynamic=False, backend="aot_eager")
            model.zero_grad()
            model(images).square().sum().backward()
            results.append([p.grad for p in model.parameters()])
            for layer in model.layers:
                layer.recompute = True  # from the second time on: it changes nothing
        for plain, *fast in zip(*results):
            for gradient in fast:
                torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-5)


def test_hidden_units_added_for_the_sake_of_gpus_change_nothing():
    mlp = SwiGLU(10)  # 26 hidden units
    x = torch.randn(2, 3, 10)
    torch.testing.assert_close(mlp.padded(x, 6), mlp(x))


def test_each_direction_of_the_mixer_is_the_one_direction_mixer_on_the_permuted_sequence():
    torch.manual_seed(0)
    orders = scan_orders(4)
    four = Mamba(32, 12, directions=4).double()
    u = torch.randn(2, 17, 32, dtype=torch.float64)
    one_by_one = 0
    for i, order in enumerate(orders):
        one = Mamba(32, 12).double()
        one.load_state_dict({name: t[i : i + 1] if f".{name}" in OF_DIRECTIONS else t
                             for name, t in four.state_dict().items()})
        one_by_one = one_by_one + one(u[:, order])[:, order.argsort()] / 4
    torch.testing.assert_close(four(u, orders), one_by_one)


def test_mamba_ssm_is_called_once_for_all_directions_in_its_own_layout(monkeypatch):
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        """As mamba-ssm documents it: u, delta (B, G D, L), A (G D, N), B, C (B, G, N, L), D, delta_bias (G D)."""
        calls.append(u.shape)
        groups = B.shape[1]
        assert delta_softplus and z is None and u.dtype == delta.dtype == B.dtype == C.dtype
        def split(t):
            return t.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
        y = recurrence(split(u), split(delta), delta_bias.view(groups, -1), A.unflatten(0, (groups, -1)),
                       B.permute(1, 0, 3, 2), C.permute(1, 0, 3, 2), D.view(groups, -1))
        return y.permute(1, 0, 3, 2).flatten(1, 2).to(u.dtype)

    def causal_conv1d_fn(x, weight, bias, activation):
        assert activation == "silu"
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=x.shape[1])[..., : x.shape[2]])

    interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    inputs = scan_inputs()
    torch.testing.assert_close(mamba_ssm_scan(*inputs), selective_scan(*inputs))
    assert calls == [(2, 15, 37)]
    x, weight, bias = torch.randn(2, 37, 5), torch.randn(3, 5, 4), torch.randn(3, 5)
    orders = inputs[-1]
    torch.testing.assert_close(mamba_ssm_conv1d(x, weight, bias, orders), causal_conv1d(x, weight, bias, orders))

    assert kernels(torch.device("cpu")) == (causal_conv1d, selective_scan)
    monkeypatch.setenv("ARM_SCAN", "torch")
    assert kernels(torch.device("cuda")) == (causal_conv1d, selective_scan)
    monkeypatch.setenv("ARM_SCAN", "mamba_ssm")
    assert kernels(torch.device("cuda")) == (mamba_ssm_conv1d, mamba_ssm_scan)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        kernels(torch.device("cpu"))
    monkeypatch.setenv("ARM_SCAN", "fast")
    with pytest.raises(ValueError, match="not a scan"):
        kernels(torch.device("cpu"))


def test_all_four_directions_start_as_the_paper_says():
    mixer = Mamba(64, 12, directions=4)
    for i in range(4):
        torch.testing.assert_close(mixer.A_log[i].exp(), torch.arange(1.0, 17).repeat(64, 1))
        delta = F.softplus(mixer.dt_bias[i])
        assert 0.99e-3 < delta.min() < 5e-3 and 0.02 < delta.max() < 0.101
        assert mixer.dt_proj[i].abs().max() <= 0.5  # R = 4
        assert (mixer.D[i] == 1).all()
    assert mixer.out_proj.weight.abs().max() <= 1 / 8 / math.sqrt(12)


# The pretraining model


def test_nothing_of_a_cluster_reaches_its_own_prediction_or_an_earlier_one():
    torch.manual_seed(0)
    model = small_arm(image_size=48, patch_size=4, dim=32).eval()
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = model.predict(images).unflatten(1, (8, 16))  # clusters 2 to 9
        for k in range(9):  # cluster k + 1
            row, column = 16 * (k // 3), 16 * (k % 3)
            for dy, dx in ((0, 0), (7, 9), (15, 15)):
                changed = images.clone()
                changed[0, dy % 3, row + dy, column + dx] += 1.0
                after = model.predict(changed).unflatten(1, (8, 16))
                assert torch.equal(after[:, :k], before[:, :k])  # clusters 2..k + 1, bit for bit
                assert all((after[:, j] != before[:, j]).any() for j in range(k, 8))


@pytest.mark.parametrize("depth, decoder_depth, taps", [
    (12, 4, [6, 8, 10, 12]), (24, 4, [12, 16, 20, 24]), (6, 4, [3, 4, 5, 6]), (12, 2, [6, 12]), (12, 1, [12])])
def test_taps_run_evenly_from_the_middle_of_the_encoder_to_its_end(depth, decoder_depth, taps):
    assert small_arm(depth=depth, decoder_depth=decoder_depth).taps == taps


def test_targets_are_normalised_by_unbiased_variance_and_a_picture_undoes_it():
    model = small_arm(image_size=48, patch_size=8, cluster_size=2)
    images = torch.randn(2, 3, 48, 48)
    targets, mean, spread = model.targets(images)
    patch = images[1, :, 8:16, 24:32].permute(1, 2, 0).flatten()  # row 1, column 3: the 4th target in cluster order
    torch.testing.assert_close(targets[1, 3], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt())
    torch.testing.assert_close(model.reconstruct(images, targets), images)
    flat = model.reconstruct(images, torch.zeros_like(targets))
    assert torch.equal(flat[:, :, :16, :16], images[:, :, :16, :16])  # the first cluster is never predicted
    torch.testing.assert_close(flat[1, :, 8:16, 24:32], patch.mean().expand(3, 8, 8))


def test_features_of_the_pretraining_model_are_a_map_in_which_a_patch_has_seen_those_before_it_in_cluster_order():
    torch.manual_seed(0)
    model, images = tiny_arm(image_size=24).double().eval(), tiny_images(2, 24).double()
    with torch.no_grad():
        before = model.features(images)
        assert before.shape == (2, 6, 6, 16)
        for place, patch in enumerate(model.order.tolist()):
            changed, row, column = images.clone(), patch // 6, patch % 6
            changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
            differs = (model.features(changed) != before).any(-1).flatten(1)[:, model.order]
            assert not differs[:, :place].any() and differs[:, place:].all()


@pytest.mark.parametrize("changes, sentence", [
    (dict(image_size=190), "do not tile an image"), (dict(cluster_size=5), "do not tile 12x12 patches"),
    (dict(cluster_size=12), "one cluster"), (dict(decoder_dim=100), "multiple of 64"), (dict(dim=18), "4 divides"),
    (dict(decoder_depth=9), "cannot tap")])
def test_sizes_that_do_not_fit_together_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_arm(**changes)


# The finetuning model


def test_features_are_the_patch_tokens_as_a_map_and_pooling_is_of_them():
    torch.manual_seed(0)
    model, images = small_classifier(48, patch_size=4).eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, 12, 12, 16)
        torch.testing.assert_close(model(images), model.head(features.flatten(1, 2).mean(1)))
    for wrong in (torch.randn(2, 3, 32, 32), images[0], images.byte()):
        with pytest.raises(BadInput, match=r"reads normalised images of shape \(batch, 3, 48, 48\)"):
            model(wrong)


def test_stochastic_depth_follows_the_released_rates_and_keeps_the_mean():
    torch.manual_seed(0)
    model = small_classifier(drop_path=0.11)
    rates = [layer.drop_path for layer in model.layers]
    assert rates == pytest.approx([0, *(0.01 * i for i in range(11))])
    ones = torch.ones(20_000, 2, 3)
    scale = torch.stack([torch.stack([layer.drop(ones) for _ in range(2)], dim=1) for layer in model.layers], dim=1)
    assert (scale == scale[..., :1, :1]).all()  # (images, blocks, branches, tokens, channels): an image's, all alike
    scale = scale[..., 0, 0]
    assert (scale[:, :2] == 1).all()
    assert (scale[:, 2:, 0] != scale[:, 2:, 1]).any(0).all()  # each branch draws its own
    dropped = (scale == 0).float().mean(0)[:, 0]
    torch.testing.assert_close(dropped, torch.tensor(rates), atol=0.01, rtol=0)
    torch.testing.assert_close(scale.mean((0, 2)), torch.ones(12), atol=0.01, rtol=0)


def test_stochastic_depth_acts_in_training_only():
    torch.manual_seed(0)
    model, images = small_classifier(32, patch_size=8, drop_path=0.5), torch.randn(4, 3, 32, 32)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_recomputed_activations_drop_the_same_branches():
    model, gradients = tiny_classifier(drop_path=0.9), []
    for recompute in (False, True):
        for layer in model.layers:
            layer.recompute = recompute
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(tiny_images(8)).square().sum(), list(model.parameters())))
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients))


# What PyTorch offers for models


def test_pruning_and_weight_norm_reach_the_parameters_of_the_mixer():
    model, images = tiny_classifier().eval(), tiny_images()
    before = model(images)
    dense, pruned, normed, doubled = (copy.deepcopy(model) for _ in range(4))
    for plain, layer in zip(dense.layers, pruned.layers):
        prune.l1_unstructured(layer.mixer, "x_proj", amount=0.5)
        kept = plain.mixer.x_proj.abs() > plain.mixer.x_proj.abs().quantile(0.5)
        plain.mixer.x_proj.data *= kept
    assert (dense(images) - before).abs().max() > 1e-3
    torch.testing.assert_close(pruned(images), dense(images))

    for layer in normed.layers:
        parametrizations.weight_norm(layer.mixer, "dt_proj", dim=1)
    torch.testing.assert_close(normed(images), before)
    for plain, layer in zip(doubled.layers, normed.layers):
        layer.mixer.parametrizations.dt_proj.original0.data *= 2  # the norms
        plain.mixer.dt_proj.data *= 2
    assert (doubled(images) - before).abs().max() > 1e-3
    torch.testing.assert_close(normed(images), doubled(images))


def test_functional_call_computes_with_the_parameters_that_it_is_given():
    model, other, images = tiny_classifier().eval(), tiny_classifier().eval(), tiny_images()
    assert (model(images) - other(images)).abs().max() > 0.1
    torch.testing.assert_close(torch.func.functional_call(model, dict(other.named_parameters()), images), other(images))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore:.*FSDP", "ignore:.*FullyShardedDataParallel")
def test_fsdp_computes_and_trains_the_same(use_orig_params):
    model, images = tiny_classifier(), tiny_images()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"),
                                           use_orig_params=use_orig_params, auto_wrap_policy=ModuleWrapPolicy({Block}))
        for _ in range(2):  # the second time after a step
            torch.testing.assert_close(wrapped(images), model(images))
            for m in (wrapped, model):
                m(images).square().mean().backward()
                torch.optim.SGD(m.parameters(), lr=0.01).step()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("make, changes", [
    (tiny_arm, dict(cluster_size=1, depth=1, decoder_depth=1)), (tiny_classifier, dict(depth=1))])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_traced_and_exported_models_take_another_number_of_images(make, changes):
    model, two, five = make(image_size=8, **changes).eval(), tiny_images(2, 8), tiny_images(5, 8)
    traced = torch.jit.trace(model, two)
    exported = torch.export.export(model, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for made in (traced, exported):
        assert (made(five) - model(five)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 0)])
def test_models_in_other_precisions_train_with_stochastic_depth(dtype, tolerance):
    torch.manual_seed(0)
    for exact in (tiny_classifier(drop_path=0.2).double(), tiny_arm().double()):
        model, results = copy.deepcopy(exact).to(dtype), []
        for m in (model, exact):
            torch.manual_seed(1)  # the same branches are dropped
            results.append(m(tiny_images(8).to(m.patch_embed.weight.dtype)))
        assert results[0].dtype == dtype
        assert (results[0] - results[1]).norm() <= tolerance * results[1].norm()
        results[0].square().mean().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_a_gradient_penalty_through_the_whole_model_has_the_right_gradient():
    torch.manual_seed(0)
    model, images = tiny_classifier().double(), tiny_images().double().requires_grad_()

    def penalty():
        return torch.autograd.grad(model(images).square().sum(), images, create_graph=True)[0].square().sum()

    slopes = torch.autograd.grad(penalty(), list(model.parameters()), materialize_grads=True)
    steepest = math.sqrt(sum(g.square().sum().item() for g in slopes))  # the slope along itself
    assert 0 < steepest < math.inf
    ends = []
    for step in (1e-5, -2e-5):
        for p, g in zip(model.parameters(), slopes):
            p.data += g * step / steepest
        ends.append(penalty().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(steepest, rel=1e-5)


# Weights


def assert_refused(model, path, sentence):
    """load_weights refuses with the sentence, and nothing is loaded."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match=sentence):
        load_weights(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(dict(model=Malicious()), tmp_path / "new.pth")
    with open(tmp_path / "old.pth", "wb") as file:
        pickle.dump(dict(model=Malicious()), file, protocol=2)
    for name in ("new.pth", "old.pth"):
        sentence = f"refused .*{name}: to read it, Python would have to call .*open, and no file may have code run"
        with pytest.raises(BadInput, match=sentence):
            load_weights(tiny_classifier(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_numpy_number_beside_the_weights_is_refused_by_its_name_and_without_blame(tmp_path):
    torch.save(dict(model=tiny_classifier().state_dict(), accuracy=np.float64(81.5)), tmp_path / "numpy.pth")
    with pytest.raises(BadInput, match=r"would have to call numpy\.\S*scalar,") as refusal:
        load_weights(tiny_classifier(), tmp_path / "numpy.pth")
    assert not any(word in str(refusal.value) for word in ("malicious", "would run code", "damaged"))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        load_weights(small_arm(), tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    data = (GOLDEN / "official_pretrain.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    for name in ("text.pth", "half.pth"):
        with pytest.raises(ValueError, match="not a checkpoint, or is damaged"):
            load_weights(small_arm(), tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_weights(small_arm(), tmp_path / "list.pth")
    torch.save(dict(model=dict(a=torch.zeros(1))), tmp_path / "other.pth")
    torch.save(dict(model=[torch.zeros(1)]), tmp_path / "tensors.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    for name in ("other.pth", "tensors.pth", "numbers.pth"):
        with pytest.raises(ValueError, match="no weights of an ARM"):
            load_weights(small_arm(), tmp_path / name)
    torch.save(dict(weights_of("official_finetune224.pth"), pos_embed=torch.zeros(1, 11, 16)), tmp_path / "places.pth")
    with pytest.raises(ValueError, match="no square image"):
        load_weights(small_classifier(), tmp_path / "places.pth")


@pytest.mark.parametrize("changes, sentence", [
    (dict(dim=32), r"16\) there and .*32\) here"), (dict(depth=24), "has no layers.12"),
    (dict(depth=6), "it has layers.10"), (dict(patch_size=8), r"16, 16\) there and \(16, 3, 8, 8\) here")])
def test_weights_of_another_encoder_are_refused_with_both_shapes_and_nothing_is_loaded(changes, sentence):
    assert_refused(small_classifier(**changes), GOLDEN / "official_pretrain.pth", sentence)


def test_a_head_of_other_classes_stays_fresh_and_one_line_says_so(capsys):
    model = small_classifier(num_classes=7)
    head = model.head.weight.clone()
    assert load_weights(model, GOLDEN / "official_finetune224.pth") == {"head"}
    assert torch.equal(model.head.weight, head)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "fresh: head; ignored: none." in line


@pytest.mark.parametrize("file, missing, sentence", [
    ("official_finetune224.pth", "layers.2.mixer.x_proj_c_b.weight", r"x_proj has shape \(3,.* and \(4,.* here"),
    ("official_finetune224.pth", "layers.2.mixer.in_proj.weight", "it has no layers.2.mixer.in_proj.weight"),
    ("official_pretrain.pth", "layers.2.mixer.x_proj.weight", "it has no layers.2.mixer.x_proj"),
    ("official_pretrain.pth", "enc2dec.weight", "it has no tap_proj.weight"),
    ("official_pretrain.pth", "dec_block.3.mlp.fc1.weight", "it has no decoder.3.mlp.0.weight")])
def test_weights_of_which_a_part_is_missing_are_refused_and_nothing_is_loaded(tmp_path, file, missing, sentence):
    found = weights_of(file)
    del found[missing]
    torch.save(dict(model=found), tmp_path / "part.pth")
    assert_refused(small_classifier() if "finetune" in file else small_arm(), tmp_path / "part.pth", sentence)


def test_pretrained_weights_are_copied_to_all_four_directions():
    model = small_classifier()
    load_weights(model, GOLDEN / "official_pretrain.pth")
    pretrained = weights_of("official_pretrain.pth")
    for i in range(4):
        assert torch.equal(model.layers[3].mixer.x_proj[i], pretrained["layers.3.mixer.x_proj.weight"])
        assert torch.equal(model.layers[3].mixer.A_log[i], pretrained["layers.3.mixer.A_log"])


def weights_of(name):
    import argparse
    with torch.serialization.safe_globals([argparse.Namespace]):
        return weights(GOLDEN / name)


def test_finetuned_weights_load_into_the_pretraining_model():
    model = small_arm()
    fresh = load_weights(model, GOLDEN / "official_finetune224.pth")
    assert fresh == {"tap_norms", "tap_proj", "mask_token", "decoder", "decoder_norm", "pixel_proj"}
    expected = weights_of("official_finetune224.pth")
    assert torch.equal(model.layers[5].mixer.conv_weight[0], expected["layers.5.mixer.conv1d.weight"][:, 0])


def test_our_own_checkpoints_load_into_either_model(tmp_path):
    source = small_arm(image_size=64, patch_size=16, cluster_size=2)
    torch.save(dict(model=source.state_dict()), tmp_path / "own.pth")
    again = small_arm(image_size=64, patch_size=16, cluster_size=2)
    assert load_weights(again, tmp_path / "own.pth") == set()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(source(images), again(images))
    classifier = small_classifier(96)
    load_weights(classifier, tmp_path / "own.pth")
    assert torch.equal(classifier.pos_embed[:, 18], torch.zeros(1, 16))  # CLS
    expected = F.interpolate(sincos_position(16, 4).T.view(1, 16, 4, 4), size=(6, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(classifier.pos_embed[:, :18], expected[:, :18])


def test_resizing_a_position_code_keeps_cls_in_the_middle():
    code = torch.randn(1, 17, 4)
    assert torch.equal(resize_position(code, 4, cls=True), code)
    assert torch.equal(resize_position(code, 6, cls=True)[:, 18], code[:, 8])


def compiled_blocks(model):
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer)
    return model


SAVED = dict(
    bare=lambda model: model.state_dict(),
    data_parallel=lambda model: nn.DataParallel(model).state_dict(),
    compiled=lambda model: torch.compile(model).state_dict(),
    compiled_and_parallel=lambda model: dict(model=nn.DataParallel(torch.compile(model)).state_dict(), epoch=3),
    parallel_and_compiled=lambda model: dict(model=torch.compile(nn.DataParallel(model)).state_dict(), epoch=3),
    compiled_blocks=lambda model: dict(model=compiled_blocks(model).state_dict()),
    average=lambda model: dict(model=AveragedModel(model).state_dict()),
    state_dict=lambda model: dict(state_dict=model.state_dict(), epoch=3),
    lightning=lambda model: dict(state_dict=nn.ModuleDict(dict(model=model)).state_dict(), global_step=3),
    lightning_compiled=lambda model: dict(state_dict=nn.ModuleDict(dict(model=torch.compile(model))).state_dict()))


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_weights_load_however_the_model_was_wrapped_when_they_were_saved(saved, tmp_path):
    source, model = tiny_classifier().eval(), tiny_classifier().eval()
    expected = source(tiny_images())
    torch.save(saved(source), tmp_path / "saved.pth")
    assert load_weights(model, tmp_path / "saved.pth") == set()
    assert torch.equal(model(tiny_images()), expected)


def test_weights_in_half_precision_load_into_a_model_in_full(tmp_path):
    source, model = tiny_classifier().eval(), tiny_classifier().eval()
    for half in ({k: v.half() for k, v in source.state_dict().items()}, copy.deepcopy(source).half().state_dict()):
        torch.save(half, tmp_path / "half.pth")
        assert load_weights(model, tmp_path / "half.pth") == set()
        assert model.head.weight.dtype == torch.float32 and torch.equal(model.orders, source.orders)
        assert (model(tiny_images()) - source(tiny_images())).abs().max() < 0.01


def test_safetensors_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = tiny_classifier().eval(), tiny_classifier().eval()
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert load_weights(model, tmp_path / "model.safetensors") == set()
    assert torch.equal(model(tiny_images()), source(tiny_images()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("file, make", [("official_finetune224.pth", small_classifier),
                                        ("official_pretrain.pth", small_arm)])
def test_released_weights_load_in_any_order_of_their_names(reverse, file, make, tmp_path):
    torch.save(dict(model=dict(sorted(weights_of(file).items(), reverse=reverse))), tmp_path / "sorted.pth")
    states = []
    for path in (GOLDEN / file, tmp_path / "sorted.pth"):
        model = make()
        assert load_weights(model, path) == set()
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# Checkpoints hold the order of the tokens


@pytest.mark.parametrize("make, name", [(tiny_arm, "order"), (tiny_classifier, "orders")])
def test_weights_trained_on_another_order_of_the_tokens_are_refused(make, name, tmp_path):
    model = make()
    torch.save(dict(model={**make().state_dict(), name: getattr(model, name).flip(-1)}), tmp_path / "other.pth")
    assert_refused(model, tmp_path / "other.pth", "trained with another order of the tokens")


def test_weights_trained_on_clusters_of_another_size_are_refused(tmp_path):
    torch.save(dict(model=tiny_arm(cluster_size=1).state_dict()), tmp_path / "other.pth")
    assert_refused(tiny_arm(), tmp_path / "other.pth", "trained with another order of the tokens")


@pytest.mark.parametrize("make, name", [(tiny_arm, "order"), (tiny_classifier, "orders")])
def test_weights_of_another_image_size_load_and_the_order_stays_the_models(make, name, tmp_path):
    source, model = make(image_size=32), make()
    torch.save(dict(model=source.state_dict()), tmp_path / "other.pth")
    assert load_weights(model, tmp_path / "other.pth") == set()
    assert torch.equal(getattr(model, name), getattr(make(), name))
    assert torch.equal(model.layers[1].mixer.x_proj, source.layers[1].mixer.x_proj)


def test_a_pretrained_direction_of_any_order_goes_to_all_of_the_classifiers(tmp_path):
    source, model = tiny_arm(depth=3), tiny_classifier()
    source.order.copy_(torch.randperm(16))
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    torch.save(dict(model=source.state_dict()), tmp_path / "pretrained.pth")
    assert load_weights(model, tmp_path / "pretrained.pth") == {"cls_token", "norm", "head"}
    assert torch.equal(model.orders, scan_orders(4))
    for name, tensor in source.layers.state_dict().items():
        directions = 4 if name.endswith(OF_DIRECTIONS) else 1
        loaded = model.layers.state_dict()[name]
        assert torch.equal(loaded, torch.cat([tensor] * directions)), name


def test_finetuned_weights_of_one_direction_are_refused_by_a_model_with_four(tmp_path):
    torch.save(dict(model=tiny_classifier(directions=1).state_dict()), tmp_path / "one.pth")
    assert_refused(tiny_classifier(), tmp_path / "one.pth", r"has shape \(1, .* there and \(4, .* here")


def made_on_meta(make):
    """A model made on the meta device, of which nothing has been computed."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model.eval()


@pytest.mark.parametrize("make", [tiny_arm, tiny_classifier])
def test_a_model_made_on_the_meta_device_gets_all_it_needs_from_our_checkpoints(make, tmp_path):
    source = make().eval()
    torch.save(dict(model=source.state_dict()), tmp_path / "own.pth")
    loaded, restored = made_on_meta(make), made_on_meta(make)
    assert load_weights(loaded, tmp_path / "own.pth") == set()
    restored.load_state_dict(weights(tmp_path / "own.pth"))
    for model in (loaded, restored):
        assert torch.equal(model(tiny_images()), source(tiny_images()))


@pytest.mark.parametrize("file, make", [
    ("official_pretrain.pth", small_arm), ("official_pretrain.pth", small_classifier),
    ("official_finetune224.pth", small_classifier)])
def test_a_model_made_on_the_meta_device_refuses_released_weights_which_have_no_order(file, make):
    assert_refused(made_on_meta(make), GOLDEN / file, "made on the meta device, and .* does not hold its order")


def test_orders_stay_exact_where_a_checkpoint_was_made_bfloat16_tensor_by_tensor(tmp_path):
    model = tiny_classifier(image_size=96, depth=1)  # 577 tokens, more than bfloat16 can count
    torch.save({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, tmp_path / "bfloat16.pth")
    assert load_weights(model, tmp_path / "bfloat16.pth") == set()
    assert torch.equal(model.orders, scan_orders(24))


def test_a_model_still_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = small_arm()
    with pytest.raises(BadInput, match="on the meta device: call"):
        load_weights(model, GOLDEN / "official_pretrain.pth")


def test_finetuned_weights_without_their_forward_direction_are_refused_by_the_pretraining_model(tmp_path):
    found = weights_of("official_finetune224.pth")
    del found["layers.2.mixer.x_proj.weight"]
    torch.save(dict(model=found), tmp_path / "part.pth")
    assert_refused(small_arm(), tmp_path / "part.pth", "it has no layers.2.mixer.x_proj")
