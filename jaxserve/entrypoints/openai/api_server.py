"""`python -m jaxserve.entrypoints.openai.api_server --model …` is `jaxserve serve --model …`."""

import sys

from jaxserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
