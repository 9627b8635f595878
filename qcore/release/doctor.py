"""Proof of a store's promises before anyone trusts it: conditional writes, read-back, races, listing.

The whole safety of publishing lies in create-only writes and one compare-and-swap. There are servers that accept the
conditions and ignore them, refuse all of them, or keep them only while nobody races; none of this is seen in a publish
that goes well. Each probe says what was expected and what was observed. Probes lie under a name of their own beside
the repository, which is neither read nor changed, and are removed again.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from qcore.canonical import Json
from qcore.errors import ReleaseError
from qcore.release.store import ErasableStore

RACES = 10
WRITERS = 2
"""Rounds of each race, and who races: where check and write are two steps, some rounds have several winners."""
OVERWRITES = 20
LISTED = 25
_ALL_BYTES = bytes(range(256)) * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One question to the store: what a repository needs, and what the store did."""

    name: str
    expected: str
    observed: str
    ok: bool

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return asdict(self)


def examine(store: ErasableStore) -> tuple[Probe, ...]:
    """Return the probes of `store`, the last of which says whether it is left as it was.

    Raises:
        ReleaseError: the store cannot be reached or read at all, so that nothing was asked.
    """
    place = f"doctor-{secrets.token_hex(8)}"
    store.get(f"{place}/absent")  # an address or credentials that are wrong are no finding about the store
    questions: Sequence[tuple[str, str, Callable[[ErasableStore, str], str]]] = (
        ("bytes", "comes back as it was written", _keeps_bytes),
        ("create", "a second create is refused, nothing changed", _creates_once),
        ("swap, old tag", "refused, nothing changed", _refuses_old_tag),
        ("swap, no object", "refused, nothing made", _refuses_swap_of_nothing),
        ("swap, right tag", f"{OVERWRITES} of {OVERWRITES} done, each seen by the next read", _swaps),
        ("race to create", f"one winner in {RACES} of {RACES} rounds, whose bytes are there", _create_race),
        ("race to swap", f"one winner in {RACES} of {RACES} rounds, whose bytes are there", _swap_race),
        ("list", f"the {LISTED} objects of one prefix, no other", _lists),
    )
    probes = []
    try:
        for number, (name, expected, ask) in enumerate(questions):
            probes.append(_answered(name, expected, ask, store, f"{place}/{number}"))
    finally:
        cleaned = _clean_up(store, place)
    return (*probes, cleaned)


def refuse_unproven(probes: Sequence[Probe]) -> None:
    """Return if every probe was answered as expected.

    Raises:
        ReleaseError: the first that was not, and how many more.
    """
    failed = [p for p in probes if not p.ok]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ReleaseError(
            f"this store cannot hold a repository: {failed[0].name}: {failed[0].observed}, expected: "
            f"{failed[0].expected}{more}; choose a store with conditional writes, see docs/stores.md"
        )


def _answered(
    name: str, expected: str, ask: Callable[[ErasableStore, str], str], store: ErasableStore, key: str
) -> Probe:
    """Ask one question; `ask` returns an empty text if the store did as expected, else what it did."""
    try:
        observed = ask(store, key)
    except ReleaseError as e:
        observed = str(e)
    return Probe(name=name, expected=expected, observed=observed or "as expected", ok=not observed)


def _keeps_bytes(store: ErasableStore, key: str) -> str:
    for name, data in (("empty", b""), ("all", _ALL_BYTES)):
        store.put_if_absent(f"{key}/{name}", data)
        if observed := _differs(store, f"{key}/{name}", data):
            return observed
    return ""


def _creates_once(store: ErasableStore, key: str) -> str:
    if not store.put_if_absent(key, b"first"):
        return "the first create was refused"
    if store.put_if_absent(key, b"second"):
        return "the second create was accepted: the condition is ignored"
    return _differs(store, key, b"first")


def _refuses_old_tag(store: ErasableStore, key: str) -> str:
    store.put_if_absent(key, b"1")
    old = _tag(store, key)
    if not store.put_if_match(key, b"2", old):
        return "the swap with the right tag was refused"
    if _tag(store, key) == old:
        return "other bytes have the same tag"
    if store.put_if_match(key, b"3", old):
        return "accepted: the condition is ignored"
    return _differs(store, key, b"2")


def _refuses_swap_of_nothing(store: ErasableStore, key: str) -> str:
    store.put_if_absent(f"{key}/other", b"1")
    if store.put_if_match(f"{key}/none", b"2", _tag(store, f"{key}/other")):
        return "accepted: the condition is ignored"
    return "" if store.get(f"{key}/none") is None else "refused, and the object is there"


def _swaps(store: ErasableStore, key: str) -> str:
    store.put_if_absent(key, b"0")
    for i in range(1, OVERWRITES + 1):
        data = str(i).encode()
        if not store.put_if_match(key, data, _tag(store, key)):
            return f"overwrite {i} with the tag just read was refused"
        if observed := _differs(store, key, data):
            return f"after overwrite {i}: {observed}"
    return ""


def _create_race(store: ErasableStore, key: str) -> str:
    return _race(store, key, lambda i, data: store.put_if_absent(f"{key}/{i}", data))


def _swap_race(store: ErasableStore, key: str) -> str:
    tags = []
    for i in range(RACES):
        store.put_if_absent(f"{key}/{i}", b"before")
        tags.append(_tag(store, f"{key}/{i}"))
    return _race(store, key, lambda i, data: store.put_if_match(f"{key}/{i}", data, tags[i]))


def _race(store: ErasableStore, key: str, write: Callable[[int, bytes], bool]) -> str:
    """Let the writers write different bytes to the same key at the same moment, once per round."""
    start = threading.Barrier(WRITERS)

    def run(writer: int) -> list[bool]:
        won = []
        for i in range(RACES):
            start.wait(timeout=120)
            won.append(write(i, f"{writer} in round {i}".encode()))
        return won

    with ThreadPoolExecutor(WRITERS) as threads:
        runs = [threads.submit(_or_abort, start, run, writer) for writer in range(WRITERS)]
        results = [r.result() for r in runs]
    for i in range(RACES):
        winners = [writer for writer in range(WRITERS) if results[writer][i]]
        if len(winners) != 1:
            return f"{len(winners)} winners in round {i + 1}"
        if observed := _differs(store, f"{key}/{i}", f"{winners[0]} in round {i}".encode()):
            return f"round {i + 1}: {observed}"
    return ""


def _or_abort(start: threading.Barrier, run: Callable[[int], list[bool]], writer: int) -> list[bool]:
    """Run one writer; if it fails the others must not wait for it."""
    try:
        return run(writer)
    except ReleaseError:
        start.abort()
        raise
    except threading.BrokenBarrierError as e:
        raise ReleaseError("another writer failed or took too long") from e


def _lists(store: ErasableStore, key: str) -> str:
    expected = sorted(f"{key}/in/{i}.json" for i in range(LISTED))
    for listed in (*expected, f"{key}/inside"):
        store.put_if_absent(listed, b"")
    found = store.list(f"{key}/in/")
    if found == expected:
        return ""
    return f"{len(set(expected) - set(found))} missing, {len(set(found) - set(expected))} others"


def _clean_up(store: ErasableStore, place: str) -> Probe:
    """Remove what the probes wrote; what cannot be removed is no reason to refuse a store, and is said."""
    try:
        for key in store.list(f"{place}/"):
            store.remove(key)
        left = len(store.list(f"{place}/"))
        observed = f"{left} objects are left under {place}/" if left else "as expected"
    except ReleaseError as e:
        observed = f"left under {place}/, remove them with other credentials: {e}"
    return Probe(
        name="clean-up", expected="the probes are gone (needs the right to delete)", observed=observed, ok=True
    )


def _tag(store: ErasableStore, key: str) -> str:
    found = store.get(key)
    if found is None:
        raise ReleaseError("what was just written cannot be read")
    return found.etag


def _differs(store: ErasableStore, key: str, data: bytes) -> str:
    found = store.get(key)
    if found is None:
        return "what was just written cannot be read"
    return (
        "" if found.data == data else f"{len(found.data)} other bytes are there than the {len(data)} that were written"
    )
