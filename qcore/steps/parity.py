"""Parity on files: a model and a split in, a report in JSON out."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import ConfigError
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport

PARITY_SAMPLES = 64
PARITY_BATCH = 1
"""More is a tenth faster and takes twice the memory (MobileNetV2: 231 MiB with 1, 542 with 8)."""


def parity(
    *,
    model: Path,
    data: Path,
    out: Path,
    split: str = "evaluation",
    samples: int = PARITY_SAMPLES,
    progress: Progress = silent,
) -> "ParityReport":
    """Return how `model` computes under other conditions than those it is evaluated under, written to `out` as JSON.

    Args:
        model: an ONNX file, quantized or not; only read.
        data: the data card.
        out: the report.
        split: the split that `samples` are taken from, evenly spread.
        samples: how many; the reference executor takes about a quarter of a second for one of MobileNetV2.
        progress: told how far it is.

    Raises:
        ModelError: `model` cannot run under a condition.
        DataError: the samples do not fit it.
        ConfigError: `samples` is not positive.
    """
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import batches, open_dataset, some_samples
    from qcore.files import write_json
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.parity import measure_parity
    from qcore.parity_report import ParityOf, ParityReport
    from qcore.runtime import ort
    from qcore.target import TARGET_KEY

    if samples < 1:
        raise ConfigError(f"samples is {samples}; allowed: 1 or more")
    refuse_overwrite(out, model, data=data)
    raw = read_model_bytes(model)
    target = parse_model(raw, str(model)).metadata_props.get(TARGET_KEY)
    whole = open_dataset(data, split)
    chosen = some_samples(whole, samples)
    ports = ort.load_as_written(raw, name=str(model))

    def fed(condition: str) -> Iterator[tuple[Any, Any, Any]]:
        done = 0
        for batch in batches(chosen, ports.fixed_batch or PARITY_BATCH):
            yield batch.index, ort.samples(ports, batch), batch.y
            done += len(batch.index)
            progress(condition, done, chosen.n)

    named = chosen.card.task in ("classification", "none")
    top1, conditions = measure_parity(raw, str(model), fed, named=named)
    report = ParityReport(
        measured=ParityOf(
            model=model.name,
            model_sha256=sha256_bytes(raw),
            target=target,
            data=chosen.card.name,
            split=split,
            data_sha256=chosen.sha256,
            split_sha256=whole.sha256,
            n=chosen.n,
            runtime=ort.runtime_identity(),
            qcore_version=__version__,
        ),
        top1=top1,
        conditions=conditions,
    )
    write_json(out, report.to_json())
    return report
