"""``python -m pyfmha`` and the ``pyfmha`` command."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from pyfmha.cli.main import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"pyfmha's commands need {error.name}: pip install typer rich\n")
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
