"""What processes are given to do in tests; here, since each imports the module of what it is given."""

import time


def slowly_squared(number: int) -> int:
    time.sleep(0.03 * (number % 3))
    return number * number


def reciprocal(number: int) -> float:
    time.sleep(0.02 * number)
    return 1 / number
