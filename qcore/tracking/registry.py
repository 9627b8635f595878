"""Versions and aliases in MLflow's model registry, from the lines of journals, in any order and any number of times.

A parent run has one version. An alias is carried by the version that earned it last, as tags of the versions say, and
not by the journal that was replayed last: bringing over an old run does not take `champion` from a newer one.
"""

from qcore.tracking.journal import Alias, Version, VersionTags
from qcore.tracking.sink import ModelVersion, NewVersion, Sink

SINCE = "qcore.since."
"""Prefix of the tag that says when (milliseconds since 1970) a version earned an alias."""


def send_registry_line(line: Version | VersionTags | Alias, parent: str, sink: Sink) -> None:
    """Bring one line about the version of the run `parent` to the registry; without a version only `Version` counts.

    Raises:
        TrackingError: the server failed; the line can be sent again.
    """
    mine = next(iter(sink.versions_of(parent)), None)
    match line:
        case Version():
            _make(line, parent, mine, sink)
        case VersionTags() if mine is not None:
            sink.tag_version(mine.family, mine.version, line.values)
        case Alias() if mine is not None:
            _award(line, mine, sink)
        case _:
            pass


def _make(line: Version, parent: str, mine: ModelVersion | None, sink: Sink) -> None:
    if mine is not None:
        sink.tag_version(mine.family, mine.version, {k: v for k, v in line.tags.items() if mine.tags.get(k) != v})
        return
    source = f"{sink.run_facts(parent).artifact_uri.rstrip('/')}/{line.folder}"
    new = NewVersion(
        family=line.family, run_id=parent, source=source, description=line.description, tags=dict(line.tags)
    )
    sink.create_version(new)


def _award(line: Alias, mine: ModelVersion, sink: Sink) -> None:
    """Give the alias to the version that earned it last, and `previous` to the one before that."""
    since = f"{SINCE}{line.alias}"
    if mine.tags.get(since) != str(line.time_ms):
        sink.tag_version(mine.family, mine.version, {since: str(line.time_ms)})
    carried = sink.aliases(mine.family)
    earned = {mine.version: line.time_ms}
    for name in filter(None, (line.alias, line.previous)):
        version = carried.get(name)
        if version is not None and version not in earned:
            said = sink.version(mine.family, version).tags.get(since, "")
            earned[version] = int(said) if said.isdecimal() else 0  # 0: a person set the alias, the repository did not
    ranked = sorted(earned, key=lambda v: (earned[v], int(v) if v.isdecimal() else 0), reverse=True)
    for alias, holder in zip((line.alias, line.previous), ranked, strict=False):
        if alias is not None and carried.get(alias) != holder:
            sink.set_alias(mine.family, alias, holder)
