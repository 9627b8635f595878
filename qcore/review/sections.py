"""The sections of a review in the order in which a reviewer asks."""

from qcore.review import decided, measured
from qcore.review.facts import Review
from qcore.review.tables import Section


def sections(review: Review) -> tuple[Section, ...]:
    """Return all sections of `review` that have something to say, in their order."""
    asked = (
        decided.models(review),
        decided.gate(review),
        decided.changed(review),
        decided.trade(review),
        decided.trials(review),
        measured.layers(review),
        measured.classes(review),
        measured.flips(review),
        measured.ranges(review),
        measured.skipped(review),
        decided.cost(review),
        measured.parity(review),
        decided.lineage(review),
        decided.override(review),
    )
    return tuple(s for s in asked if s is not None)
