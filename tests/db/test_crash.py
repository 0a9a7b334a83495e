"""A reader beside a writer. (Writers that are killed: test_kill.py; writers that meet: test_concurrent.py.)"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from aivmm.db.database import Database

Child = Callable[..., subprocess.Popen[str]]

BATCHES = """
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
first = 0
while True:
    database.add_many([outcome(number) for number in range(first + 1, first + 301)])
    first += 300
    print(first, flush=True)
"""


def test_a_reader_sees_all_of_a_transaction_or_nothing_of_it(location: str, child: Child) -> None:
    process = child(BATCHES, location)
    assert process.stdout is not None
    assert process.stdout.readline()
    with Database.open(location) as database:
        sizes = {len(database.outcomes(subject=[str(number) for number in range(1, 1801)])) for _ in range(2)}
    process.kill()
    assert all(size % 300 == 0 for size in sizes)
