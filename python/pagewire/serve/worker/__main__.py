import sys

from pagewire.serve.worker.process import main

sys.exit(main())
