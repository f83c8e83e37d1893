import sys

from hive_core.daemon_cli import main

sys.exit(main())
