"""`python -m retro_data`: the same as the command `retro-data`."""

from retro_data.cli import main

raise SystemExit(main())
