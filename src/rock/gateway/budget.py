"""Budget and cost of a run. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from rock.protocol.runs import Budget, CallUsage, Counts, Price

_MILLION = 1_000_000


def refusal(budget: Budget, counts: Counts, age: float) -> str | None:
    """Why the budget permits no further call; None when it does. age: seconds since the creation of the run."""
    used_tokens = counts.prompt_tokens + counts.completion_tokens
    begun = counts.done + counts.running + counts.waiting
    for name, limit, used in (
        ("calls", budget.calls, begun),
        ("tokens", budget.tokens, used_tokens),
        ("seconds", budget.seconds, age),
        ("cost", budget.cost, counts.cost),
    ):
        if limit is not None and used >= limit:
            return f"the budget of the run is used up: {_shown(used)} of {_shown(limit)} {name}"
    return None


def left(budget: Budget, counts: Counts, age: float) -> Budget:
    """What remains of each limit, at least 0."""
    begun = counts.done + counts.running + counts.waiting
    tokens = counts.prompt_tokens + counts.completion_tokens
    return Budget(
        calls=None if budget.calls is None else max(0, budget.calls - begun),
        tokens=None if budget.tokens is None else max(0, budget.tokens - tokens),
        seconds=None if budget.seconds is None else max(0.0, budget.seconds - age),
        cost=None if budget.cost is None else max(0.0, budget.cost - counts.cost),
    )


def price_of(prices: Mapping[str, Price], model: str) -> Price | None:
    """The price of a model; None for a model without one."""
    return prices.get(model) or prices.get("*")


def cost(price: Price | None, usage: CallUsage) -> float:
    """The cost of one call."""
    if price is None:
        return 0.0
    cached = min(usage.cached, usage.prompt)
    cached_price = price.prompt if price.cached is None else price.cached
    return ((usage.prompt - cached) * price.prompt + cached * cached_price + usage.completion * price.completion) / (
        _MILLION
    )


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
