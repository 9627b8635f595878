"""ONNX Runtime on the CPU: predictions, activations, latency, and what the optimizer made of a graph.

Models go in as bytes, so that the runtime can never read anything beside them.
"""

import contextlib
import functools
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from qcore.data.dataset import Batch
from qcore.derived import latency_of
from qcore.errors import DataError, ModelError
from qcore.measured import Latency
from qcore.numerics.affine import dequantize_array, quantize_array
from qcore.numerics.integer_io import IntegerIO, read_integer_io
from qcore.runtime.piece import Piece
from qcore.runtime.saturation import only_signed, pairs_saturate

Tensors = Mapping[str, NDArray[np.generic]]
Predict = Callable[[Tensors], dict[str, NDArray[np.generic]]]

_WHOLE = "the model"  # what messages call the model that was cut in pieces
_FAILURES = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One input or output: name, numpy dtype, and shape with None for symbolic dimensions."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model in the runtime; `predict` maps named inputs to named outputs.

    `integer_io` says which of them are integers that stand for real numbers.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    predict: Predict
    integer_io: IntegerIO

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model insists on, or None where it is symbolic."""
        shape = self.inputs[0].shape if self.inputs else ()
        return shape[0] if shape else None


def load(model: bytes, *, name: str = "model", threads: int = 0) -> Loaded:
    """Return `model` ready to run with all graph optimizations.

    Args:
        model: the bytes of an ONNX file.
        name: what messages call it.
        threads: intra-op threads, 0 for one per core.

    Raises:
        ModelError: the runtime cannot load it.
    """
    return _loaded(_session(model, name, _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)), name)


def load_beside(model: bytes, *, name: str = "model") -> Loaded:
    """Return `model` as `load_unfused` does, to run in turns with other work: its threads sleep meanwhile.

    Threads that wait for the next run awake would take the cores from what trains between two runs (ResNet8: an epoch
    of 25 s instead of 18). Arguments and errors are those of `load`.
    """
    options = _options(0, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _loaded(_session(model, name, options), name)


def load_in_turns(model: bytes, *, name: str = "model", threads: int) -> Loaded:
    """Return `model` as `load` does, to be timed in turns with others: its threads stop spinning when a run ends.

    They would take the cores from the model that runs next. Arguments and errors are those of `load`.
    """
    options = _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return _loaded(_session(model, name, options), name)


def load_exact(model: bytes, *, name: str = "model", threads: int = 0) -> Loaded:
    """Return `model` ready to run with integer kernels that do not saturate, on this machine as on its target.

    Where the runtime's u8s8 kernels add pairs of products in 16 bits (`pairs_saturate`: x86 without VNNI), weights
    become uint8 for others, which take up to twice the time (`session.x64quantprecision`). Elsewhere this is `load`.
    In that mode onnxruntime 1.32 breaks files whose weights alone are integers, which have no kernels to correct, and
    QGemm of signed activations, whose kernels do not saturate anyway: those are loaded as they come.

    Arguments and errors are those of `load`.
    """
    quantized = (b"QuantizeLinear" in model or b"QLinear" in model) and b"MatMulNBits" not in model
    if not quantized or not pairs_saturate():
        return load(model, name=name, threads=threads)
    options = _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return _loaded(_session(model, name, options), name)
    except ModelError:
        if b"QGemm" not in model or not only_signed(model):
            raise
    return load(model, name=name, threads=threads)


def load_as_written(model: bytes, *, name: str = "model", threads: int = 0) -> Loaded:
    """Return `model` ready to run node by node, with no graph optimization at all.

    A QDQ file then computes exactly the numbers that it states: no fused integer kernel, whose 16-bit sums saturate on
    x86 without VNNI, takes part. Arguments and errors are those of `load`.
    """
    return _loaded(_session(model, name, _options(threads, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)), name)


def load_basic(model: bytes, *, name: str = "model", threads: int = 0) -> Loaded:
    """Return `model` ready to run with the optimizations that every provider gets: no fused integer kernel.

    Constants are folded and nodes without effect dropped. Arguments and errors are those of `load`.
    """
    return _loaded(_session(model, name, _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC)), name)


def load_unfused(model: bytes, *, name: str = "model", threads: int = 0) -> Loaded:
    """Return `model` with float optimizations, but every QuantizeLinear and DequantizeLinear where it is written.

    The numbers of `load_as_written` up to float rounding, faster. Arguments and errors are those of `load`.
    """
    options = _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return _loaded(_session(model, name, options), name)


def feeds(loaded: Loaded, batch: Batch) -> dict[str, NDArray[np.generic]]:
    """Return the samples of `batch` as the named inputs of the model, in its dtypes: integers where it takes them.

    Raises as `samples`.
    """
    return encoded(loaded, samples(loaded, batch))


def encoded(loaded: Loaded, x: Tensors) -> dict[str, NDArray[np.generic]]:
    """Return the samples `x` with the real numbers among them quantized as the model's integer inputs want."""
    coded = loaded.integer_io.inputs
    return {
        k: quantize_array(v.astype(np.float32), coded[k]) if k in coded and np.issubdtype(v.dtype, np.floating) else v
        for k, v in x.items()
    }


def outputs(loaded: Loaded, values: Tensors) -> dict[str, NDArray[np.generic]]:
    """Return what the model gave as real numbers: its integer outputs dequantized, all others as they are."""
    coded = loaded.integer_io.outputs
    return {k: dequantize_array(v.astype(np.int64), coded[k]) if k in coded else v for k, v in values.items()}


def on_samples(loaded: Loaded) -> Predict:
    """Return `loaded.predict` between real numbers, whatever integers the model itself takes and gives."""

    def predict(x: Tensors) -> dict[str, NDArray[np.generic]]:
        return outputs(loaded, loaded.predict(encoded(loaded, x)))

    return predict


def samples(loaded: Loaded, batch: Batch) -> dict[str, NDArray[np.generic]]:
    """Return the samples of `batch` as the named inputs of the model, real numbers where it takes integers for them.

    A model with a fixed batch size gets a smaller batch filled up with copies of its last sample.

    Raises:
        DataError: shapes, names or dtypes do not fit; the message holds both.
    """
    real = {k: np.dtype(np.float32) for k in loaded.integer_io.inputs}
    ports = [replace(port, dtype=real.get(port.name, port.dtype)) for port in loaded.inputs]
    return _fed(ports, batch, loaded.name)


def _fed(ports: Sequence[Port], batch: Batch, model: str) -> dict[str, NDArray[np.generic]]:
    names = [p.name for p in ports]
    x = dict(batch.x)
    if set(x) == {""}:
        if len(names) != 1:
            raise DataError(f"{model} has inputs {', '.join(names)}; name an array for each in the card's `inputs`")
        x = {names[0]: x[""]}
    if set(x) != set(names):
        raise DataError(f"the card feeds inputs {sorted(x)}; {model} wants {sorted(names)}; correct `inputs`")
    return {port.name: _fitted(x[port.name], port, model) for port in ports}


def activations(
    model: bytes, names: Sequence[str], batches: Iterable[Batch], *, name: str = "model", threads: int = 0
) -> Iterator[tuple[int, Tensors]]:
    """Yield the number of samples of each batch with the float tensors among `names` (graph inputs included).

    If those of a batch are more than `pieces.PIECE_BYTES`, the model runs in pieces, and further tensors of the batch
    follow with the number 0. The next batch is read while this one is worked on. Let go of the tensors before asking
    for more: they are not copied, and two of them need twice the memory.

    Raises:
        ModelError: the runtime cannot load the model with these outputs.
        DataError: the samples do not fit the model.
    """
    from qcore.runtime.pieces import cut

    source = iter(batches)
    first = next(source, None)
    if first is None:
        return
    pieces = cut(model, names, {k: v.shape[1:] for k, v in first.x.items()})
    del model
    loaded = load_pieces(pieces, threads=threads)
    yield from piece_activations(loaded, names, chain([first], source))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPiece:
    """A piece in the runtime; several threads may run it at once."""

    piece: Piece
    session: ort.InferenceSession

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What it reads."""
        return tuple(_port(i) for i in self.session.get_inputs())


def load_pieces(pieces: Iterable[Piece], *, threads: int = 0) -> tuple[LoadedPiece, ...]:
    """Return the `pieces` of a model ready to run, each call with `threads` threads (0: one per core).

    Raises:
        ModelError: the runtime cannot load one.
    """
    options = _options(threads, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    # Between two runs the cores count and read images; spinning threads would take them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Pieces take turns with one arena; an arena each would keep what the others could use. A plan for the tensors of a
    # run is one block of memory, which fits no other piece.
    options.enable_mem_pattern = False
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return tuple(LoadedPiece(piece=p, session=_session(p.model, _WHOLE, options)) for p in pieces)


def piece_activations(
    pieces: Sequence[LoadedPiece], names: Sequence[str], batches: Iterable[Batch]
) -> Iterator[tuple[int, Tensors]]:
    """Yield what `activations` does for a model that was cut into `pieces`."""
    wanted = set(names)
    runs = [_runner(piece) for piece in pieces]
    later = [{p.name for piece in pieces[k + 1 :] for p in piece.inputs} for k in range(len(pieces))]
    with ThreadPoolExecutor(1) as reader:
        for n, live in _fed_ahead(reader, batches, pieces[0].inputs):
            for k, run in enumerate(runs):
                made = run(live)
                values = {t: v for t, v in (made if k else live | made).items() if t in wanted}
                live = {t: v for t, v in (live | made).items() if t in later[k]}
                yield (0 if k else n), {t: _unpadded(v, n) for t, v in values.items() if v.dtype == np.float32}
                del values, made


def _fed_ahead(
    reader: ThreadPoolExecutor, batches: Iterable[Batch], ports: Sequence[Port]
) -> Iterator[tuple[int, dict[str, NDArray[np.generic]]]]:
    """Yield number of samples and inputs of each batch; `reader` prepares the next one meanwhile."""
    source = iter(batches)

    def prepared() -> tuple[int, dict[str, NDArray[np.generic]]] | None:
        batch = next(source, None)
        return None if batch is None else (len(batch.index), _fed(ports, batch, _WHOLE))

    following = reader.submit(prepared)
    while (ready := following.result()) is not None:
        following = reader.submit(prepared)
        yield ready


def _runner(loaded: LoadedPiece) -> Predict:
    """Return the function that runs a piece: from all tensors at hand to what the piece gives."""
    session, piece = loaded.session, loaded.piece
    # Sequences and optionals have no array; a graph that has any is one piece, so no later piece reads them.
    given = [o.name for o in session.get_outputs() if o.name in piece.gives and o.type.startswith("tensor")]

    def run(live: Tensors) -> dict[str, NDArray[np.generic]]:
        if not given:  # asked for nothing, the runtime would give all outputs
            return {}
        return dict(zip(given, _run(session, given, {k: live[k] for k in piece.reads}, _WHOLE), strict=True))

    return run


@functools.cache
def _share_arena() -> None:
    """Register one arena for all sessions of the process that ask for it, unless somebody has."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    exactly = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    with contextlib.suppress(*_FAILURES, RuntimeError):
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(exactly))


def _unpadded(x: NDArray[np.generic], n: int) -> NDArray[np.generic]:
    """Return `x` without the rows that come from the copies of the last sample, if it has such rows."""
    if x.ndim and 0 < n < len(x) and all(np.array_equal(x[n - 1], row) for row in x[n:]):
        return x[:n]
    return x


def optimized_ops(model: bytes, *, name: str = "model") -> Counter[str]:
    """Return how often each op type occurs in the graph that the runtime really executes.

    A convolution that runs on integers is a `QLinearConv` there, one that does not is a `Conv` or `FusedConv`.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = _options(1, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
        options.optimized_model_filepath = str(path)
        _session(model, name, options)
        return Counter(node.op_type for node in onnx.load(path).graph.node)


def measure_latency(models: Sequence[Loaded], fed: Tensors, **timing: float) -> list[Latency]:
    """Return the latency of each model; arguments are those of `timed_rounds`."""
    return [latency_of(column) for column in timed_rounds(models, fed, **timing)]


def timed_rounds(
    models: Sequence[Loaded], fed: Tensors, *, budget_s: float = 2.0, warmup: float = 5, max_runs: float = 200
) -> list[tuple[float, ...]]:
    """Return milliseconds of wall time of one call, per model and round.

    In every round each model runs once, so that what slows the machine down for a while hits all of them; who begins
    changes from round to round.

    Args:
        models: loaded with `threads=1`, or by `load_in_turns`.
        fed: one sample, real numbers as inputs of every model; quantized before the clock starts.
        budget_s: stop after about this many seconds in all, but not before 20 rounds.
        warmup: untimed calls of each.
        max_runs: most timed rounds, at least 1.
    """
    times: list[list[float]] = [[] for _ in models]
    feds = [encoded(model, fed) for model in models]
    for model, inputs in zip(models, feds, strict=True):
        for _ in range(int(warmup)):
            model.predict(inputs)
    end = time.perf_counter() + budget_s
    while (done := len(times[0])) < min(20, max_runs) or (done < max_runs and time.perf_counter() < end):
        for turn in range(len(models)):
            k = (turn + done) % len(models)
            start = time.perf_counter_ns()
            models[k].predict(feds[k])
            times[k].append((time.perf_counter_ns() - start) / 1e6)
    return [tuple(column) for column in times]


def runtime_version() -> str:
    """Return the version of the runtime, e.g. `1.32.0`."""
    return str(ort.__version__)


def runtime_identity() -> dict[str, str]:
    """Return what ran: runtime version, provider, machine architecture."""
    return {
        "runtime": f"onnxruntime {ort.__version__}",
        "provider": "CPUExecutionProvider",
        "machine": platform.machine(),
    }


def _options(threads: int, level: ort.GraphOptimizationLevel) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = 4  # its refusals come back as exceptions, which carry the same text
    return options


def _session(model: bytes | Path, name: str, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except _FAILURES as e:
        raise ModelError(f"{name} cannot be loaded by onnxruntime {ort.__version__}: {_first_line(e)}") from e


def _loaded(session: ort.InferenceSession, name: str) -> Loaded:
    names = [o.name for o in session.get_outputs()]

    def predict(fed: Tensors) -> dict[str, NDArray[np.generic]]:
        return dict(zip(names, _run(session, names, fed, name), strict=True))

    try:
        integer_io = read_integer_io(session.get_modelmeta().custom_metadata_map)
    except ValueError as e:
        raise ModelError(f"{name}: {e}; quantize the model again") from e

    return Loaded(
        name=name,
        inputs=tuple(_port(i) for i in session.get_inputs()),
        outputs=tuple(_port(o) for o in session.get_outputs()),
        predict=predict,
        integer_io=integer_io,
    )


def _port(arg: ort.NodeArg) -> Port:
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in arg.shape)
    return Port(name=arg.name, dtype=np.dtype(_DTYPES.get(arg.type, np.object_)), shape=shape)


def _run(session: ort.InferenceSession, outputs: Sequence[str], fed: Tensors, name: str) -> list[NDArray[np.generic]]:
    try:
        result: list[NDArray[np.generic]] = session.run(list(outputs), dict(fed))
    except _FAILURES as e:
        raise ModelError(f"{name} fails in onnxruntime: {_first_line(e)}") from e
    return result


def _fitted(x: NDArray[np.generic], port: Port, model: str) -> NDArray[np.generic]:
    wanted = port.shape
    fits = len(wanted) == x.ndim and all(w is None or w == h for w, h in zip(wanted[1:], x.shape[1:], strict=False))
    if not fits:
        shape = ", ".join("any" if w is None else str(w) for w in wanted[1:])
        raise DataError(
            f"samples have shape {x.shape[1:]}; input {port.name!r} of {model} wants ({shape}); correct `layout`, "
            "`model_layout` or `preprocess` in the data card"
        )
    if not np.can_cast(x.dtype, port.dtype, "same_kind") and not np.issubdtype(port.dtype, np.floating):
        raise DataError(f"samples are {x.dtype}; input {port.name!r} of {model} wants {port.dtype}; correct the data")
    missing = (wanted[0] or 0) - len(x) if wanted else 0
    if missing > 0:
        x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    return np.ascontiguousarray(x, port.dtype)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
