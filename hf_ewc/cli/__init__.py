"""The command line: `hf-ewc fisher`, `hf-ewc inspect`, `hf-ewc report`."""

from hf_ewc.cli.main import main

__all__ = ["main"]
