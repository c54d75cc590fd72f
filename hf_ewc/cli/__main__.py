"""`python -m hf_ewc.cli`, where the command itself is not on the path."""

from hf_ewc.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
