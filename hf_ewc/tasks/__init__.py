"""One task after another: training, testing, remembering, reporting."""

from hf_ewc.tasks.runner import TaskResults, run_tasks
from hf_ewc.tasks.task import Task

__all__ = ["Task", "TaskResults", "run_tasks"]
