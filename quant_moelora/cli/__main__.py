"""`python -m quant_moelora.cli`."""

from quant_moelora.cli.app import main

main()
