"""A client that others wrote reads our repository: `tuf-js`, the one of npm. Opt-in: QCORE_TUF_JS=1 (needs npm)."""

import hashlib
import json
import os
import shutil
import subprocess
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from simulators import FAMILY, make_world

from qcore.release.keys import load_keys
from qcore.steps import repository as life

VERSION = "6.0.2"
SCRIPT = """
const { Updater } = require('tuf-js');
const [folder, address, pointer] = process.argv.slice(2);
(async () => {
  const client = new Updater({
    metadataDir: folder, targetDir: folder,
    metadataBaseUrl: `${address}/metadata`, targetBaseUrl: `${address}/targets`,
  });
  await client.refresh();
  const custom = (await client.getTargetInfo(pointer)).custom;
  const file = await client.downloadTarget(await client.getTargetInfo(custom.release), `${folder}/package`);
  console.log(JSON.stringify({ custom, file }));
})().catch((e) => { console.error(String(e)); process.exit(1); });
"""


@pytest.mark.slow
def test_a_foreign_client_finds_the_release_and_follows_new_keys(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if os.environ.get("QCORE_TUF_JS") != "1" or shutil.which("npm") is None:
        pytest.skip("set QCORE_TUF_JS=1 where npm is installed: the client comes from its registry")
    assert request.config.cache is not None
    place = Path(request.config.cache.mkdir("tuf-js"))
    if not (place / "node_modules" / "tuf-js").exists():
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", f"tuf-js@{VERSION}"]
        subprocess.run(command, cwd=place, check=True, timeout=120)
    (place / "fetch.js").write_text(SCRIPT)
    world = make_world(tmp_path)
    release = world.publish("1.0.0")
    keys = {"repository": world.store.folder, "keys": world.keys.folder}
    pinned = world.keys.pinned_root.read_bytes()
    for name in ("root", "gate", "channel-stable"):
        life.rotate(**keys, name=name)
    life.rotate(**keys, name="timestamp", compromised=True)
    assert len(load_keys(world.keys.folder).signers) == len(world.keys.signers)

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(world.store.folder))  # type: ignore[arg-type]  # as the server calls it

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    cache = tmp_path / "client"
    cache.mkdir()
    (cache / "root.json").write_bytes(pinned)
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        words = [str(cache), f"http://127.0.0.1:{server.server_address[1]}", f"channels/stable/{FAMILY}/release.json"]
        done = subprocess.run(
            ["node", "fetch.js", *words], cwd=place, capture_output=True, text=True, check=False, timeout=60
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["custom"]["release"] == release.target
    assert hashlib.sha256(Path(said["file"]).read_bytes()).hexdigest() == release.sha256
