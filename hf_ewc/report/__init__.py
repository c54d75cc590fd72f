"""What is shown and kept of runs over tasks: tables, pictures, report.md and results.json."""

from hf_ewc.report.cost import Cost, measured
from hf_ewc.report.outcome import LayerImportance, Outcome
from hf_ewc.report.results import read_outcomes, read_results, write_results
from hf_ewc.report.statistics import mean_scores, summarize
from hf_ewc.report.tables import difference_table, score_table, summary_table
from hf_ewc.report.writing import write_pages, write_report

__all__ = [
    "Cost",
    "LayerImportance",
    "Outcome",
    "difference_table",
    "mean_scores",
    "measured",
    "read_outcomes",
    "read_results",
    "score_table",
    "summarize",
    "summary_table",
    "write_pages",
    "write_report",
    "write_results",
]
