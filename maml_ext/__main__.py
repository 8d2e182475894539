"""``python -m maml_ext doctor``."""

import argparse
import sys

from .doctor import doctor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m maml_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what can run here, and whether it computes right")
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
