"""Entry point of `accelerate launch train.py recipe=NAME key=value ...`; the program is `train/command.py`.

(`import train` imports the package `train/`, not this file: packages take precedence.)
"""

import sys

from train.command import main

if __name__ == "__main__":
    sys.exit(main())
