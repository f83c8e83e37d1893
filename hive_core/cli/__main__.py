import sys

from hive_core.cli import main

sys.exit(main())
