"""One task after another: training, testing, remembering, reporting."""

from hf_ewc.tasks.gate import ForgettingError
from hf_ewc.tasks.heads import Head
from hf_ewc.tasks.results import TaskResults
from hf_ewc.tasks.runner import run_tasks
from hf_ewc.tasks.task import Task

__all__ = ["ForgettingError", "Head", "Task", "TaskResults", "run_tasks"]
