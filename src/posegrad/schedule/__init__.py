"""Schedules: m poses without m graphs. One schedule a file; `_plan.py` chooses."""
