"""`python -m qcore`, and what the commands call: an extra that is not installed is one line, not a traceback.

Standard library only. The distribution's extras keep images small, so a verb may need one that is not installed.
"""

import sys

EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "numpy": "compress",
    "onnx": "compress",
    "onnx_ir": "compress",
    "onnxruntime": "compress",
    "pydantic": "compress",
    "yaml": "compress",
    "PIL": "compress",
    "scipy": "compress",
    "jinja2": "compress",
    "matplotlib": "compress",
    "torch": "train",
    "tuf": "release",
    "securesystemslib": "release",
    "zstandard": "release",
    "kfp": "pipeline",
    "mlflow": "track",
    "boto3": "s3",
    "botocore": "s3",
    "sklearn": "demo",
}
"""Which extra of the distribution brings a package that we import."""


def main() -> None:
    """Run `qcore` and exit."""
    try:
        from qcore.cli.main import main as run
    except ModuleNotFoundError as e:
        _refuse(e)
    try:
        run()
    except ModuleNotFoundError as e:
        _refuse(e)


def device_main() -> None:
    """Run `qcore-device` and exit."""
    try:
        from qcore.device.__main__ import main as run

        sys.exit(run())
    except ModuleNotFoundError as e:
        _refuse(e, "device")


def _refuse(error: ModuleNotFoundError, extra: str | None = None) -> None:
    """Name the extra that brings the missing package, and exit with 1; a module of our own missing is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "qcore"):
        raise error
    extra = extra or EXTRAS.get(package, "all")
    sys.exit(f"error: package {package} is not installed; this command needs it; pip install 'kfp-qcore[{extra}]'")


if __name__ == "__main__":
    main()
