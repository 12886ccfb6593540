"""``python -m fedvlm`` is the command line."""

from fedvlm.cli import main

main()
