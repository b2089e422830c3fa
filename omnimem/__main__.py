"""`python -m omnimem` runs the command `omnimem`."""

from omnimem.cli import main

raise SystemExit(main())
