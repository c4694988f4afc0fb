"""Command line of the library; `main` is what the program `quant-moelora` runs."""

from quant_moelora.cli.app import app as app
from quant_moelora.cli.app import main as main
