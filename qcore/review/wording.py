"""Numbers as people read them: two decimals of a per cent, sizes and times in a unit that fits."""

from collections.abc import Sequence

KIB, MIB = 1024, 1 << 20
CELL = 200
"""Characters of a name or reason that a table shows."""


def percent(share: float) -> str:
    """Return a fraction of 1 as per cent."""
    return f"{100 * share:.2f} %"


def small(share: float) -> str:
    """Return a fraction of 1 as per cent, so that a little is not shown as nothing."""
    return "none" if share == 0 else "< 0.01 %" if share < 1e-4 else percent(share)


def points(difference: float) -> str:
    """Return a difference of two shares in points, with its sign."""
    text = f"{100 * difference:+.2f}"
    return f"{'0.00' if text in ('+0.00', '-0.00') else text} points"


def size(n: float) -> str:
    """Return bytes in the unit that fits."""
    return f"{n / MIB:.2f} MiB" if abs(n) >= MIB else f"{n / KIB:.1f} KiB" if abs(n) >= KIB else f"{n:.0f} bytes"


def milliseconds(value: float) -> str:
    """Return a time given in milliseconds with three significant digits."""
    return f"{value / 1000:.2f} s" if value >= 10_000 else f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def times(ratio: float) -> str:
    """Return a ratio to the baseline."""
    return f"{ratio:.2f} x"


def number(value: float) -> str:
    """Return a number without a unit of its own; whole ones as such."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def decibels(value: float) -> str:
    """Return a ratio of powers; 300 dB is where equal tensors are cut."""
    return "exact" if value >= 300 else f"{value:.1f} dB"


def count(n: int, one: str, many: str | None = None) -> str:
    """Return `n` with the word that fits."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def cut(text: str, length: int = CELL) -> str:
    """Return `text` on one line, with its end left out where it is longer than `length`."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."


def listed(names: Sequence[str], shown: int = 5) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(cut(n, 80) for n in names[:shown]) + more


def by_name(name: str, value: float) -> str:
    """Return a value of a check, a metric or a cost, in the unit that its name ends in."""
    if name.endswith(("_drop", "_delta")):
        return points(value)
    if name.endswith("_ratio"):
        return times(value)
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_ms"):
        return milliseconds(value)
    if name.endswith("_db"):
        return decibels(value)
    if name.split("_")[0] in ("top1", "top5", "agreement", "ece", "auc"):
        return percent(value)
    return number(value)
