"""``python -m fedvlm`` is the command line."""

from fedvlm.cli.app import main

main()
