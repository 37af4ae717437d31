"""The report: its values, and pure functions from them to tables, text, plots and pages."""
