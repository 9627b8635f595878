"""`qcore-device <verb> --config FILE [--json]`: parse, call one function, write one answer; exit 0, 1 or 2.

The only module of the device that writes to the terminal, and the one boundary where any failure becomes one line.
tuf is imported late, when the arguments are known to be good, and without the SDKs of key services: securesystemslib
imports each one that is installed, for signers that a device never uses.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NoReturn, cast

from qcore.canonical import Json
from qcore.device.config import DeviceConfig, bundle_address, load_config
from qcore.errors import ConfigError, QcoreError
from qcore.files import write_json

OK, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 130
VERBS = {
    "check": "ask the channel what it offers; install nothing",
    "install": "fetch, verify, self-test and activate the offered release",
    "status": "show what is active and how the last attempt ended",
    "rollback": "go back to the previous release and quarantine this one",
    "report": "write the state as JSON, for the fleet",
}
OPTIONS = ("--config", "--json", "--retry", "--bundle", "--out", "--help")
KEY_SERVICE_SDKS = ("boto3", "azure.identity", "google.cloud.kms", "pkcs11")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of one command line."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    with _without(KEY_SERVICE_SDKS):
        from qcore.device.refusals import code_of, explained
    try:
        with explained(args.verb):
            config = load_config(args.config)
            if args.bundle is not None:
                config = replace(config, repository=bundle_address(args.bundle))
            answer = _answer(config, args)
            if args.out is not None:
                write_json(args.out, answer)
    except QcoreError as e:
        return _fail(args.json, "E_CONFIG" if isinstance(e, ConfigError) else code_of(e), str(e))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as e:  # noqa: BLE001 - the one boundary: never a traceback on a device
        return _fail(
            args.json, "E_INTERNAL", f"E_INTERNAL: {type(e).__name__}: {' '.join(str(e).split())}; report this"
        )
    sys.stdout.write((json.dumps(answer) if args.json or args.verb == "report" else _readable(answer)) + "\n")
    return OK


def _answer(config: DeviceConfig, args: argparse.Namespace) -> Json:
    with _without(KEY_SERVICE_SDKS):
        from qcore.device.updater import check, install, rollback, status
    match args.verb:
        case "check":
            return check(config).to_json()
        case "install":
            return install(config, retry=args.retry).to_json()
        case "rollback":
            return rollback(config).to_json()
        case _:
            return status(config)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Let importing `names` fail inside the block, as if they were not installed."""
    absent = [n for n in names if n not in sys.modules]
    sys.modules.update(cast("dict[str, ModuleType]", dict.fromkeys(absent)))
    try:
        yield
    finally:
        for n in absent:
            del sys.modules[n]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = _Parser(add_help=False)
    options.add_argument("--config", type=Path, required=True, metavar="FILE", help="the device's TOML file")
    options.add_argument("--json", action="store_true", help="write one JSON object")
    options.set_defaults(retry=False, bundle=None, out=None)
    parser = _Parser(prog="qcore-device", description="Keep this device on the release that its channel offers.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text, parents=[options], allow_abbrev=False)
        if verb == "install":
            sub.add_argument("--retry", action="store_true", help="try a quarantined release once more")
        if verb in ("check", "install"):
            sub.add_argument("--bundle", type=Path, metavar="FILE", help="read this bundle instead of the repository")
        if verb == "report":
            sub.add_argument("--out", type=Path, metavar="FILE", help="write the report here too")
    unknown = [w for w in argv if w.startswith("--") and w.split("=")[0] not in OPTIONS]
    if unknown:  # before argparse complains of the option that the misspelt one should have been
        parser.error(f"unknown option {unknown[0]}")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """Usage errors on one line, with the nearest word that exists."""

    def error(self, message: str) -> NoReturn:
        words = message.replace("'", " ").replace(",", " ").split()
        known = [*VERBS, *OPTIONS]
        near = (difflib.get_close_matches(w.split("=")[0], known, n=1) for w in words if w not in known)
        hint = next((f"; did you mean {found[0]}?" for found in near if found), "")
        self.exit(USAGE, f"qcore-device: {' '.join(message.split())}{hint}; see qcore-device --help\n")


def _fail(as_json: bool, code: str, message: str) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"error": code, "message": message}) + "\n")
    sys.stderr.write(f"qcore-device: {message}\n")
    return ERROR


def _readable(answer: Json) -> str:
    rows = [(k, json.dumps(v) if isinstance(v, dict | list) else v) for k, v in answer.items() if v not in ({}, None)]
    return "\n".join(f"{k:<14}{v}" for k, v in rows)


if __name__ == "__main__":
    sys.exit(main())
