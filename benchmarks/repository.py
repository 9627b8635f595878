"""What the repository costs: bytes of a device's check, and time and store calls of one publish into fifty releases.

`python benchmarks/repository.py`. Calls are counted through a store that writes down when each begins and ends; a
round trip is a call that begins when no other is under way, so calls that are made together are one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulators import World, make_world, now

from qcore.device.source import FolderFetcher
from qcore.device.updater import check
from qcore.release.repository import publish_release, refresh
from qcore.release.store import ObjectStore

RELEASES = 50
FAR_S = 0.03
"""What a call waits in the second measurement: an object store in the same region."""


@dataclass
class CountingStore:
    """A store that counts its calls, each of which takes `wait_s` longer."""

    store: ObjectStore
    wait_s: float = 0.0
    calls: list[str] = field(default_factory=list)
    rounds: int = 0
    running: int = 0
    lock: Any = field(default_factory=Lock)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.store, name)

        def counted(key: str, *args: Any) -> Any:
            with self.lock:
                self.rounds += self.running == 0
                self.running += 1
                self.calls.append(name)
            time.sleep(self.wait_s)
            try:
                return call(key, *args)
            finally:
                with self.lock:
                    self.running -= 1

        return counted


def read_bytes(world: World, name: str) -> dict[str, int]:
    """Return the bytes that one check of the device `name` reads, by file."""
    read: dict[str, int] = {}
    original = FolderFetcher._fetch

    def fetch(self: FolderFetcher, url: str) -> Any:
        read[url.split("/")[-1]] = 0
        blocks = list(original(self, url))
        read[url.split("/")[-1]] = sum(map(len, blocks))
        return iter(blocks)

    FolderFetcher._fetch = fetch  # type: ignore[method-assign]  # only here
    try:
        check(world.device(name))
    finally:
        FolderFetcher._fetch = original  # type: ignore[method-assign]
    return read


def publish_one(world: World, version: str, wait_s: float) -> tuple[float, CountingStore]:
    """Return the seconds of one publish and the store that counted it."""
    submission = world.submission(world.package(version, seed=99))
    store = CountingStore(world.store, wait_s)
    started = time.perf_counter()
    publish_release(store, submission, world.keys, now=now())  # type: ignore[arg-type]  # a store by its calls
    return time.perf_counter() - started, store


def main() -> None:
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        world.publish("1.0.0")
        print("cold check:", (cold := read_bytes(world, "cold")), sum(cold.values()))
        print("no change:", (same := read_bytes(world, "cold")), sum(same.values()))
        refresh(world.store, world.keys, now=now() + timedelta(hours=7))
        print("after a refresh:", (fresh := read_bytes(world, "cold")), sum(fresh.values()))
        for k in range(1, RELEASES):
            world.publish(f"1.{k}.0", seed=k)
        print(f"cold check of {RELEASES} releases:", sum(read_bytes(world, "many").values()))
        for label, wait_s in (("directory", 0.0), (f"directory, {FAR_S * 1000:.0f} ms a call", FAR_S)):
            took, store = publish_one(world, f"2.{int(wait_s * 1000)}.0", wait_s)
            print(
                f"publish into {RELEASES}, {label}: {took:.2f} s, {len(store.calls)} calls, {store.rounds} round trips"
            )


if __name__ == "__main__":
    main()
