"""The layer report on files: a quantized model, its float model and a split in, JSON and an HTML page out."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import ConfigError
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.layers.report import LayerReport

LAYER_SAMPLES = 32
ARITHMETIC = "node by node, no graph optimization: the numbers that the file states, not those of fused integer kernels"


def layer_paths(out: Path) -> tuple[Path, Path]:
    """Return where the JSON and the page go: `out` is the page if it ends in .html, else a folder for both."""
    page = out if out.suffix == ".html" else out / "layers.html"
    return page.with_suffix(".json"), page


def layers(
    *,
    model: Path,
    baseline: Path,
    data: Path,
    out: Path,
    split: str = "evaluation",
    samples: int = LAYER_SAMPLES,
    progress: Progress = silent,
) -> "LayerReport":
    """Return the error report of every layer of `model`, written to `layer_paths(out)`.

    Args:
        model: the quantized model in QDQ form.
        baseline: the float model that it was made from.
        data: the data card.
        out: an .html file, or a folder.
        split: the split that `samples` are taken from, evenly spread.
        samples: how many; memory does not depend on it.
        progress: told how far it is.

    Raises:
        ModelError: `model` is not in QDQ form, or was not made from `baseline`.
        ConfigError: `samples` is not positive.
    """
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import open_dataset, some_samples
    from qcore.files import write_atomic, write_json
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.layers.baseline import matching_baseline
    from qcore.layers.page import layer_page
    from qcore.layers.probe import probe_layers
    from qcore.layers.report import (
        LayerReport,
        Measured,
        MeasuredFile,
        MeasuredSamples,
        add_up,
        judge_layers,
    )
    from qcore.runtime.ort import runtime_identity
    from qcore.target import TARGET_KEY

    if samples < 1:
        raise ConfigError(f"samples is {samples}; allowed: 1 or more")
    json_path, page_path = layer_paths(out)
    for path in (json_path, page_path):
        refuse_overwrite(path, model, baseline, data=data)
    files = [read_model_bytes(p) for p in (model, baseline)]
    quantized, reference = (parse_model(raw, str(p)) for raw, p in zip(files, (model, baseline), strict=True))
    chosen = some_samples(open_dataset(data, split), samples)
    probed = probe_layers(matching_baseline(reference, quantized), quantized)
    sums = add_up(probed.probes, _outputs(probed.model, chosen, progress))
    report = LayerReport(
        measured=Measured(
            model=MeasuredFile(name=model.name, sha256=sha256_bytes(files[0])),
            baseline=MeasuredFile(name=baseline.name, sha256=sha256_bytes(files[1])),
            data=MeasuredSamples(name=chosen.card.name, split=split, sha256=chosen.sha256, n=sums.samples),
            target=quantized.metadata_props.get(TARGET_KEY),
            runtime={**runtime_identity(), "arithmetic": ARITHMETIC},
            qcore_version=__version__,
        ),
        layers=judge_layers(probed.probes, sums),
        skipped=probed.skipped,
    )
    page = layer_page(report).encode()
    write_json(json_path, report.to_json())
    write_atomic(page_path, page)
    return report


def _outputs(model: Any, dataset: Any, progress: Progress) -> Iterator[tuple[int, Any]]:
    """Yield the outputs of the probed graph, one sample at a time where the model allows."""
    from qcore.data.dataset import batches
    from qcore.graph.io import serialize_model
    from qcore.runtime import ort

    loaded = ort.load_as_written(serialize_model(model), name="the models side by side")
    done = 0
    for batch in batches(dataset, loaded.fixed_batch or 1):
        yield len(batch.index), loaded.predict(ort.feeds(loaded, batch))
        done += len(batch.index)
        progress("measuring layers", done, dataset.n)
