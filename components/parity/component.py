"""Component `parity`: will the file compute the same on the target?"""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def parity(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    split: str = "evaluation",
    samples: int = 64,
    data_sha256: str = "",
) -> None:
    """Run a model as other runtimes and CPUs would, and name the worst case; the gate judges it if its policy asks.

    Args:
        model: ONNX model that may be released.
        data: Data-set card (YAML), or a folder holding exactly one.
        report: Parity report (JSON): agreement and SQNR under every condition, digests.
        metrics: The numbers of the worst condition.
        split: Name of the split of the card that samples are taken from; the one that is evaluated.
        samples: How many, evenly spread over the split.
        data_sha256: Digest of the data; part of the cache key, so give another one when card or samples change.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts, worst_parity
    from qcore.tracking.tracker import Tracker

    with Tracker("parity") as t:
        t.params({"split": split, "samples": samples, "data_digest": data_sha256})
        source, card, out = (Path(a.path) for a in (model, data, report))
        result = steps.parity(model=source, data=card, out=out, split=split, samples=samples, progress=t.progress)
        report.metadata.update({**file_facts(out, "qcore-parity"), "advice": result.advice()})
        t.metrics(worst_parity(result), kfp=metrics)
        t.artifact(out, name="parity.json")
