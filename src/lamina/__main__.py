"""`python -m lamina` is `lamina`."""

import sys

from lamina.cli.main import main

sys.exit(main())
