"""`python -m omnimem`: the same as the command `omnimem`."""

from omnimem.cli import main

raise SystemExit(main())
