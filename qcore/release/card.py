"""The model card in a package: what the model is, from what it was made, on which data, its limits, how to use it.

Written from facts that the file and the manifest hold, so that nobody has to keep it true, and without a date: the same
facts give the same bytes. Numbers of accuracy are not here: they stand in the signed evidence, which names the package,
and a card inside the package could not be about that. Source of the headings: Mitchell et al., Model Cards for Model
Reporting (2019), https://arxiv.org/abs/1810.03993.
"""

from collections.abc import Iterator, Sequence

from qcore.graph.history import Making
from qcore.release.facts import PackageFacts
from qcore.release.manifest import TensorInfo


def render_card(facts: PackageFacts) -> str:
    """Return the model card as Markdown."""
    sections = {
        f"{facts.family} {facts.version}": _about(facts),
        "Made": _made(facts),
        "Evaluated": _evaluated(facts),
        "Runs on": _runs_on(facts),
        "Limits": _limits(facts),
        "Use": _use(facts),
    }
    blocks = []
    for position, (title, lines) in enumerate(sections.items()):
        blocks.append("\n".join([f"{'#' if position == 0 else '##'} {title}", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def _about(facts: PackageFacts) -> Iterator[str]:
    yield f"* model: `model.onnx`, {facts.model_bytes} bytes, sha256 `{facts.model_sha256}`"
    yield f"* task: {facts.task}"
    yield f"* inputs: {_tensors(facts.inputs)}"
    yield f"* outputs: {_tensors(facts.outputs)}"


def _made(facts: PackageFacts) -> Iterator[str]:
    if not facts.history:
        yield "The file does not say how it was made; it was not compressed by qcore."
        return
    yield f"From the float model with sha256 `{facts.baseline_sha256}`:"
    yield ""
    for number, making in enumerate(facts.history, 1):
        yield f"{number}. {_run(making)}"


def _run(making: Making) -> str:
    target = "" if making.target is None else f" for {making.target}"
    read = "".join(f"; {use} data sha256 `{digest}`" for use, digest in sorted(making.data.items()))
    steps = ", ".join(making.steps) or "nothing kept"
    return f"recipe `{making.recipe}`{target} (qcore {making.qcore_version}): {steps}{read}"


def _evaluated(facts: PackageFacts) -> Iterator[str]:
    yield f"On data with sha256 `{facts.data_sha256}`; the first {facts.golden.n} samples are in `golden.npz`."
    yield "What was found, and by which policy it was allowed, stands in the evidence that is published beside the"
    yield "package and names its digest (`qcore gate verify`)."


def _runs_on(facts: PackageFacts) -> Iterator[str]:
    c = facts.compat
    yield f"* hardware: {', '.join(c.hardware)}"
    features = ", ".join(" or ".join(g) for g in c.cpu_features)
    yield f"* CPU features: {features or 'any'}"
    r = c.onnxruntime
    yield f"* onnxruntime: {r.minimum} or newer, below {r.below}; tested with {r.tested}; opset {c.opset}"
    yield f"* memory: {'not measured' if c.memory_bytes is None else f'{c.memory_bytes} bytes'}"
    yield ""
    yield "| provider, best first | largest error of golden samples | least arg-max agreement |"
    yield "|---|---:|---:|"
    for t in facts.golden.tolerances:
        yield f"| {t.provider} | {t.max_abs_error:.6g} | {t.argmax_agreement:.6g} |"


def _limits(facts: PackageFacts) -> Iterator[str]:
    yield "* Known to be good only for inputs like the evaluated data, prepared in the same way."
    yield "* The self-test tells a model that works here from one that does not; it does not measure accuracy."
    if facts.compat.memory_bytes is None:
        yield "* Its need of memory was not measured."
    if facts.compat.control_flow:
        yield "* It holds control flow: how long it runs may depend on its input."
    if not facts.history:
        yield "* Its origin is not recorded."


def _use(facts: PackageFacts) -> Iterator[str]:
    yield "`qcore-device install` verifies, tests and activates it. By hand, with the bytes of `model.onnx`:"
    yield ""
    yield "```python"
    yield f"session = onnxruntime.InferenceSession(model, providers={list(facts.compat.providers)!r})"
    feeds = ", ".join(f"{t.name!r}: x{k}" for k, t in enumerate(facts.inputs))
    yield f"answers = session.run({[t.name for t in facts.outputs]!r}, {{{feeds}}})"
    yield "```"
    yield ""
    shapes = ", ".join(f"`x{k}` {_shape(t)}" for k, t in enumerate(facts.inputs))
    yield f"with {shapes}, prepared like the evaluated data."


def _tensors(tensors: Sequence[TensorInfo]) -> str:
    return ", ".join(f"`{t.name}` {_shape(t)}" for t in tensors)


def _shape(tensor: TensorInfo) -> str:
    return f"{tensor.dtype}[{', '.join('?' if s is None else str(s) for s in tensor.shape)}]"
