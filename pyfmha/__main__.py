"""``python -m pyfmha`` and the ``pyfmha`` command."""

import sys


def main() -> None:
    """Run the command line; needs the extra ``aot``."""
    try:
        from pyfmha.cli.main import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "jinja2"):
            raise
        sys.stderr.write(f"pyfmha's commands need {error.name}: pip install 'pyfmha[aot]'\n")
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
