"""Spoken and written forms of numbers in English transcripts."""

from decimal import Decimal

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_SCALES = ("", "thousand", "million", "billion", "trillion")
_LONGEST = 15
"""Numbers with more digits before the point are not spelled out."""


def forms(number: int | float) -> tuple[str, ...]:
    """All forms of a finite number, the usual words first, in lower case without hyphens.

    `-37.5` is "minus thirty seven point five", "negative thirty seven point five" or "-37.5".
    Decimals are spelled digit by digit. A float stands for the shortest decimal that denotes it,
    rounded to two places if it has more than six (such as 1/3).
    """
    exact = Decimal(repr(number))
    if -int(exact.normalize().as_tuple().exponent) > 6:
        exact = round(exact, 2)
    written = f"{abs(exact):f}"
    whole, _, decimals = written.partition(".")
    decimals = decimals.rstrip("0")
    said = _whole(whole)
    if decimals:
        after = "point " + " ".join(_ONES[int(digit)] for digit in decimals)
        said = [f"{before} {after}" for before in said]
        if whole == "0":
            said.append(after)
    digits = [f"{whole}.{decimals}" if decimals else whole]
    if len(whole) > 3:
        digits.append(f"{int(whole):,}" + (f".{decimals}" if decimals else ""))
    if decimals and whole == "0":
        digits.append(f".{decimals}")
    if not decimals:
        digits += [f"{whole}.0", f"0{whole}"] if len(whole) == 1 else [f"{whole}.0"]
    if exact < 0:
        said = [f"{sign} {words}" for sign in ("minus", "negative") for words in said]
        digits = [f"-{each}" for each in digits]
    return tuple(dict.fromkeys([*said, *digits]))


def _whole(digits: str) -> list[str]:
    """A whole number in words, with and without "and", and in hundreds ("nineteen hundred")."""
    if len(digits) > _LONGEST:
        return []
    number = int(digits)
    said = [_cardinal(number, ""), _cardinal(number, "and ")]
    if 1000 < number < 10_000 and number % 100 == 0 and number % 1000:
        said.append(f"{_cardinal(number // 100, '')} hundred")
    return list(dict.fromkeys(said))


def _cardinal(number: int, joint: str) -> str:
    """A number in words, with `joint` between a hundred or thousand and the last two digits."""
    if number == 0:
        return _ONES[0]
    parts: list[str] = []
    for power in range(len(_SCALES) - 1, -1, -1):
        group = number // 1000**power % 1000
        if not group:
            continue
        hundreds, rest = divmod(group, 100)
        words = [f"{_ONES[hundreds]} hundred"] if hundreds else []
        if rest:
            before = joint if hundreds or (parts and not power) else ""
            words.append(before + _below_hundred(rest))
        parts.append(" ".join([*words, _SCALES[power]]).strip())
    return " ".join(parts)


def _below_hundred(number: int) -> str:
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")
