"""``python -m resect`` is the ``resect`` command."""

from resect.cli import main

main()
