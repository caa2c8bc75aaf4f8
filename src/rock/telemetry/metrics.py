"""Counters, gauges and histograms of this process, and their text for Prometheus (exposition format 0.0.4).

Counting is a handful of additions on objects that are looked up once; nothing is rendered before somebody asks. A
family has a most of series: what a caller may choose cannot make it grow for ever, and is counted as "other" beyond.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
_MOST_SERIES = 1000
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = tuple[str, ...]


class Number:
    """One series of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value


class Distribution:
    """One series of a histogram. counts: of each bound, not cumulated, and of what is above the last."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


Series = TypeVar("Series", Number, Distribution)


@dataclass
class Family(Generic[Series]):
    """A metric: its series by the values of its labels."""

    name: str
    kind: str  # counter, gauge or histogram
    text: str
    labels: Labels
    bounds: Sequence[float] = ()
    series: dict[Labels, Series] = field(default_factory=dict)

    def of(self, *values: str) -> Series:
        """The series of these values of the labels, made when it is first asked for."""
        found = self.series.get(values)
        if found is None:
            if len(values) != len(self.labels):
                raise ValueError(f"{self.name} has the labels {self.labels}")
            if len(self.series) >= _MOST_SERIES and values != (OTHER,) * len(values):
                return self.of(*(OTHER for _ in values))
            found = self.series[values] = self._make()
        return found

    def _make(self) -> Series:
        return Distribution(self.bounds) if self.kind == "histogram" else Number()  # type: ignore[return-value]

    def all(self) -> list[tuple[Labels, Series]]:
        """Each series, with the values of its labels."""
        return list(self.series.items())


class Registry:
    """The families of a process, by name. Each is declared once, where it is counted."""

    def __init__(self) -> None:
        self.families: dict[str, Family[Number] | Family[Distribution]] = {}

    def counter(self, name: str, text: str, *labels: str) -> Family[Number]:
        return self._add(Family[Number](name, "counter", text, labels))

    def gauge(self, name: str, text: str, *labels: str) -> Family[Number]:
        return self._add(Family[Number](name, "gauge", text, labels))

    def histogram(
        self, name: str, text: str, *labels: str, bounds: Sequence[float] = _SECONDS
    ) -> Family[Distribution]:
        found: Family[Distribution] = Family(name, "histogram", text, labels, bounds)
        return self._add(found)

    def _add(self, family: Family[Series]) -> Family[Series]:
        if family.name in self.families:
            raise ValueError(f"metric {family.name} is declared twice")
        self.families[family.name] = family
        if not family.labels:
            family.of()  # a metric without labels is there from the start, at 0
        return family


REGISTRY = Registry()


def gauge_of(name: str, text: str, labels: Labels, values: Mapping[Labels, float]) -> Family[Number]:
    """A gauge of values that are asked for when they are told, in no registry."""
    family: Family[Number] = Family(name, "gauge", text, labels)
    for key, value in values.items():
        family.of(*key).value += value  # what is "other" is the sum of several
    return family


def render(families: Iterable[Family[Number] | Family[Distribution]]) -> bytes:
    """Their text, in the order that they come in."""
    return "".join(line for family in families for line in _lines(family)).encode()


def merged(own: bytes, others: Mapping[str, bytes]) -> bytes:
    """The text of a server with those of its rocklet processes, by worker: the series of a process get the label
    `worker`, and each metric stays one group, as the format requires."""
    groups: dict[str, list[str]] = {}
    for worker, text in (("", own), *others.items()):
        label = f'worker="{worker.translate(_ESCAPES)}"'
        lines: list[str] = []
        known = False
        for line in text.decode().split("\n")[:-1]:  # values may have other line separators
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                known = name in groups
                lines = groups.setdefault(name, [])
            if line.startswith("#"):
                if not known:
                    lines.append(line)
            else:
                lines.append(_labelled(line, label) if worker else line)
    return "".join(f"{line}\n" for lines in groups.values() for line in lines).encode()


def _labelled(line: str, label: str) -> str:
    series, space, value = line.partition(" ")
    name, brace, _ = series.partition("{")
    if not brace:
        return f"{name}{{{label}}}{space}{value}"
    return f"{name}{{{label},{line[len(name) + 1:]}"


def _lines(family: Family[Number] | Family[Distribution]) -> Iterator[str]:
    text = family.text.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {family.name} {text}\n# TYPE {family.name} {family.kind}\n"
    for values, series in family.all():
        pairs = list(zip(family.labels, values, strict=True))
        if isinstance(series, Number):
            yield f"{family.name}{_labels(pairs)} {series.value:.17g}\n"
            continue
        seen = 0
        for bound, count in zip([*(f"{bound:g}" for bound in series.bounds), "+Inf"], series.counts, strict=True):
            seen += count
            yield f"{family.name}_bucket{_labels([*pairs, ('le', bound)])} {seen}\n"
        yield f"{family.name}_sum{_labels(pairs)} {series.total:.17g}\n"
        yield f"{family.name}_count{_labels(pairs)} {seen}\n"


def _labels(pairs: list[tuple[str, str]]) -> str:
    if not pairs:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs) + "}"
