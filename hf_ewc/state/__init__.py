"""What a sequence of tasks leaves behind: importances, anchors and the records of the tasks."""

from hf_ewc.state.ewc_state import EWCState, TaskRecord

__all__ = ["EWCState", "TaskRecord"]
