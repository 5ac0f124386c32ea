"""What the engine programs share: names on the command line, logging, and errors as one message with exit code 2."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from pyfmha.errors import PyfmhaError
from pyfmha.trt.attention.llm import DTYPES  # on these command lines, too, types have TensorRT-LLM's names

__all__ = ["DTYPES", "LOG_LEVELS", "Parser", "add_dtype", "add_log_level", "positive", "run_program"]

LOG_LEVELS = {
    "internal_error": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": logging.DEBUG,
}
"""TensorRT's severities; its messages come through Python's logging, from the logger ``pyfmha.tensorrt``."""


class Parser(argparse.ArgumentParser):
    """Options have hyphens; with underscores, as in TensorRT-LLM's example, they are taken, too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See argparse."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_hyphened(word) for word in given], namespace)


def _hyphened(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _dtype(word: str) -> str:
    return next((name for name, short in DTYPES.items() if short == word), word)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option ``--dtype``; fp16 is float16, and so on."""
    parser.add_argument(
        "--dtype", choices=DTYPES, type=_dtype, default="float16", help="fp16, bf16, fp32 are these, too"
    )


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """The option ``--log-level``."""
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="of TensorRT and of pyfmha")


def run_program(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> None:
    """Parse, set up logging, run, and exit: 0 done, 1 a check failed, 2 an error, which is printed."""
    options = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("pyfmha").setLevel(LOG_LEVELS[options.log_level])
    try:
        code = main(options)
    except PyfmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
