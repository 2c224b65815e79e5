"""What a million inferences cost, from a price and a measured throughput."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Price:
    """What an hour of the machine costs.

    Attributes:
        per_hour: Price of one hour.
        currency: Such as "USD"; only repeated in the report.
        utilisation: Share of the hour in which the machine really serves, in (0, 1].
        source: Where the price is from, such as "list price, 2026-11".
    """

    per_hour: float
    currency: str = "USD"
    utilisation: float = 0.5
    source: str = "price given in the config"

    def __post_init__(self) -> None:
        if not self.per_hour >= 0:
            raise ValueError(f"price per_hour must be 0 or more; got {self.per_hour}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"price utilisation must be in (0, 1]; got {self.utilisation}")


def cost_per_million(throughput_per_s: float, *, price: Price) -> dict[str, float | str]:
    """Return the cost of a million samples as `{value, currency, source}`.

    Example:
        >>> cost_per_million(1000.0, price=Price(per_hour=3.6, utilisation=0.5))["value"]
        2.0

    Raises:
        ValueError: The throughput is not positive.
    """
    if not throughput_per_s > 0:
        raise ValueError(f"throughput must be positive; got {throughput_per_s} samples/s")
    hours = 1e6 / (throughput_per_s * price.utilisation) / 3600
    source = (
        f"{price.per_hour:g} {price.currency}/h at {price.utilisation:.0%} utilisation, "
        f"{throughput_per_s:.4g} samples/s measured ({price.source})"
    )
    return {"value": hours * price.per_hour, "currency": price.currency, "source": source}
