"""Checks of constructor arguments, so that each model says in one line which value cannot work."""

from collections.abc import Sequence


def positive(name: str, value: int) -> int:
    """Return `value` if it is a whole number of at least 1.

    Raises:
        ValueError: It is not; the message names the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def positives(name: str, values: Sequence[int], *, length: int | None = None) -> tuple[int, ...]:
    """Return `values` as a tuple if each is a whole number of at least 1.

    Args:
        name: The argument's name, for the message.
        values: The values.
        length: How many there must be; None: at least one.

    Raises:
        ValueError: One of them is not, or there are too few or too many.
    """
    if isinstance(values, int | str) or not values or (length is not None and len(values) != length):
        wanted = f"{length} whole numbers" if length else "a list of whole numbers"
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    return tuple(positive(f"{name}[{i}]", value) for i, value in enumerate(values))


def probability(name: str, value: float) -> float:
    """Return `value` if it can be a dropout probability, in [0, 1).

    Raises:
        ValueError: It cannot.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is none of `choices`.

    Raises:
        ValueError: It is none of them; the message lists them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def divides(name: str, value: int, by_name: str, by: int) -> None:
    """Refuse a `value` that is not a multiple of `by`.

    Raises:
        ValueError: It is not; the message names both arguments.
    """
    if value % by:
        raise ValueError(f"{name} must be a multiple of {by_name}={by}, got {value}")
