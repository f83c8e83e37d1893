import sys

from hive_core.helper.cli import main

sys.exit(main())
