"""Quantization-aware training: what is trained is what the written file computes."""

import numpy as np
import onnx
import pytest
from models import conv_net
from quantizing import TARGETS, quantized, samples

torch = pytest.importorskip("torch")

from qcore.graph.fake_quant import fake_quantized, with_trained  # noqa: E402
from qcore.graph.fold import fold_batchnorm  # noqa: E402
from qcore.graph.grid import LAYERS  # noqa: E402
from qcore.graph.io import parse_model, serialize_model  # noqa: E402
from qcore.graph.traverse import constant_array, int_attribute, node_name  # noqa: E402
from qcore.lint import lint  # noqa: E402
from qcore.runtime.nodewise import expose  # noqa: E402
from qcore.runtime.ort import load_as_written, on_samples  # noqa: E402
from qcore.target import load_target  # noqa: E402
from qcore.training.executor import ExecutorOptions, build_executor  # noqa: E402
from qcore.training.fake_quant import RoundedThrough, quantizers_of  # noqa: E402
from qcore.training.weights import trainable_names  # noqa: E402


def opened(target, learn=True):
    """A quantized net, and the module that is trained in its place."""
    proto, profile = conv_net(), load_target(target)
    model = quantized(proto, target).model
    folded = fold_batchnorm(parse_model(proto.SerializeToString(), "m")).model
    floats = {node_name(n): constant_array(n.inputs[1]) for n in folded.graph if n.op_type in LAYERS}

    def scheme(node):
        depthwise = node.op_type == "Conv" and int_attribute(node, "group", 1) > 1
        return profile.weight_scheme(0, depthwise=depthwise)

    fake = fake_quantized(model, floats, scheme, (*profile.same_scale, *profile.one_scale))
    scales, weights, others = quantizers_of(fake, learn=learn, power_of_two=profile.power_of_two_scales)
    names = [n for n in trainable_names(fake.model) if not n.endswith("_scale")]
    options = ExecutorOptions(
        trainable=names, transforms={**others, **weights}, intermediates=tuple(a.value for a in fake.activations)
    )
    return model, fake, (scales, weights, names), build_executor(fake.model, options)


def closed(model, fake, parts, student):
    scales, weights, names = parts
    with torch.no_grad():
        values = {n: weights[n].moved(student.values[n]) if n in weights else student.values[n] for n in names}
    return with_trained(model, fake, {**{k: v.detach().numpy() for k, v in values.items()}, **scales.arrays})


def trained(student, x, steps=20):
    """Move everything that can move, towards some other outputs."""
    rng = torch.Generator().manual_seed(0)
    moving = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=5e-3)
    wanted = torch.randn((len(x), 4), generator=rng)
    for _ in range(steps):
        optimizer.zero_grad()
        made = student({"x": x})
        next(iter(made.values())).sub(wanted).square().mean().backward()
        optimizer.step()
    return student.eval()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [0, 20])
def test_the_written_file_computes_what_was_trained(target, steps):
    model, fake, parts, student = opened(target)
    x = samples(conv_net(), n=256, seed=3)
    trained(student, torch.from_numpy(x[:64]), steps)
    made = {k: v.detach().numpy() for k, v in student({"x": torch.from_numpy(x)}).items()}
    written = closed(model, fake, parts, student)
    raw = serialize_model(written)
    onnx.checker.check_model(onnx.ModelProto.FromString(raw), full_check=True)
    theirs = next(iter(on_samples(load_as_written(raw))({"x": x}).values()))
    ours = next(iter(made.values()))
    assert np.mean(np.argmax(ours, 1) == np.argmax(theirs, 1)) >= 0.999
    present = {o.name for node in written.graph for o in node.outputs} & {a.value for a in fake.activations}
    scales = {**fake.scales, **parts[0].arrays}
    if not load_target(target).integer_io:
        seen = expose(written, sorted(present))({"x": x})
        for a in fake.activations:
            if a.value in seen:
                far = np.abs(made[a.value] - seen[a.value]) / float(scales[a.scale])
                assert far.max() <= 1.001, a.value
                assert (far > 0.5).mean() < 0.001, a.value


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_trained_is_still_what_the_target_wants(target):
    model, fake, parts, student = opened(target)
    trained(student, torch.from_numpy(samples(conv_net(), seed=3)))
    before, after = (lint(m, load_target(target)) for m in (model, closed(model, fake, parts, student)))
    assert [f.rule for f in after] == [f.rule for f in before]


def test_scales_stand_still_unless_they_are_learnt():
    model, fake, parts, student = opened("arm-dotprod", learn=False)
    trained(student, torch.from_numpy(samples(conv_net(), seed=3)))
    written = closed(model, fake, parts, student)
    for copies in fake.copies.values():
        for name in copies:
            before, after = (constant_array(m.graph.initializers[name]) for m in (model, written))
            assert np.array_equal(before, after)
    changed = [
        la.stored
        for la in fake.layers
        if not np.array_equal(*(constant_array(m.graph.initializers[la.stored]) for m in (model, written)))
    ]
    assert changed


@pytest.mark.parametrize("layout", ["last", "first", "flat"])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-128, 127, -128), (0, 255, 3), (-8, 7, 0)])
def test_rounding_has_the_gradient_of_learned_step_sizes(layout: str, qmin: int, qmax: int, zero: int) -> None:
    """Against Esser et al. 2020, equations 1 to 3, in float64."""
    shape = (40, 12) if layout == "flat" else (8, 4, 5, 3)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout == "last":
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    step = 4.0 / (qmax - qmin)
    x, scale = x.requires_grad_(), torch.nn.Parameter(torch.tensor([step]))
    y = RoundedThrough.apply(x, scale, (qmin - zero, qmax - zero), 0.25)
    y.backward(g)
    v = x.detach().double() / float(scale.detach())
    rounded = v.round().clamp(qmin - zero, qmax - zero)
    inside = (v.round() >= qmin - zero) & (v.round() <= qmax - zero)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(y.detach().double(), rounded * float(scale.detach()), rtol=1e-6, atol=0)
    assert torch.equal(x.grad, g * inside)
    wanted = (g.double() * torch.where(inside, rounded - v, rounded)).sum() * 0.25
    torch.testing.assert_close(scale.grad.double()[0], wanted, rtol=1e-4, atol=1e-4)
