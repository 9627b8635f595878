"""qcore itself, through its command line, in the environment that runs the benchmark.

It reads the data card rather than the prepared samples: preparing them is part of what `qcore compress` does.
"""

import json
import sys
from pathlib import Path

from protocol import Job, NotOffered, serve

import qcore

TARGETS = {
    ("per-tensor", "int8", True): "npu-int8-symmetric",
    ("per-channel", "int8", False): "arm-dotprod",
    ("per-channel", "uint8", False): "x86-vnni",
}


def quantize(job: Job) -> None:
    """Run `qcore compress`; a refusal of the command line is the reason in the table."""
    from qcore.cli.main import main

    key = tuple(job.options[k] for k in ("weights", "activations", "symmetric"))
    if key not in TARGETS:
        raise NotOffered(f"no shipped target has {key}")
    recipe = "auto" if "auto" in job.options["recovery"] else "int8"
    if job.options["weight_bits"] == 4:
        if recipe == "auto":
            raise NotOffered("recipe auto chooses its own bits")
        recipe = "int4-rounded"
    data = json.loads(Path(sys.argv[1]).read_text())["data"]
    options = {"--model": job.model, "--data": data, "--out": job.output, "--recipe": recipe, "--target": TARGETS[key]}
    sys.argv = ["qcore", "compress", *(str(part) for pair in options.items() for part in pair)]
    try:
        main()
    except SystemExit as e:
        if e.code not in (0, None):
            raise


if __name__ == "__main__":
    serve(quantize, f"kfp-qcore {qcore.__version__}")
