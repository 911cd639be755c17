"""What options are read by."""

from __future__ import annotations

import argparse
import math


def finite(text: str) -> float:
    """A number; for `type=`.

    Raises:
        argparse.ArgumentTypeError: No number, or none that JSON could hold: inf, nan.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a finite number")
    return value
