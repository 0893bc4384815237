"""`python -m pagewire`: serve a model, measure, or say what this installation can do."""

import sys
from collections.abc import Callable

USAGE = """usage: pagewire COMMAND [OPTIONS]

  serve    an OpenAI-compatible server: a prefill and a decode process behind one HTTP front
  bench    correctness, then speed, beside this machine's roof and the peers that are installed
  info     versions, backends, and why each one runs here or not

pagewire COMMAND --help shows a command's options."""


def serve(argv: list[str]) -> int:
    try:
        from pagewire.serve.cli import main

        return main(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pagewire"):
            raise
        print(f"pagewire serve: it needs {error.name}: pip install 'pagewire[serve]'", file=sys.stderr)
        return 1


def bench(argv: list[str]) -> int:
    from pagewire.bench.cli import main

    return main(argv)


def info(argv: list[str]) -> int:
    from pagewire.info import report

    print(report())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"serve": serve, "bench": bench, "info": info}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"pagewire: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
